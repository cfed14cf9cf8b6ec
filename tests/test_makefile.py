"""Make passes on what users type, word for word: no shell and no make runs or replaces anything in it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

ROOT = Path(__file__).parents[1]
# Stands in for the Python of .venv.
PYTHON = """#!/bin/sh
exec {python} -IS -c 'import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))' "$@"
"""
ODD = [
    """it's the "best" dér, #1.mp4""",
    "$(touch ran)`touch ran` $HOME $$.mp4",
    "$(shell touch ran);touch ran;a&b|c>d*\\.mp4",
    "-clip.mp4",
    "new\nline'\ntouch ran\n\\\n'.mp4",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the Makefile, in which `setup` is done and Python prints its arguments and environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "shapes.yaml").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", ".venv/bin/.ready"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(PYTHON.format(python=shutil.which("python3")))
    python.chmod(0o755)
    return tmp_path


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without what `make test` gives its commands: a make in a make also prints folders.
    own = ("DATASET", "RUN", "ARGS", "MFLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in own and not name.startswith("MAKE")}
    return subprocess.run(["make", *words], cwd=folder, env=kept | environment, capture_output=True, text=True)


def called(folder: Path, *words: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    """Arguments after `-m pipelines`, and the environment, of the call that a target makes."""
    done = make(folder, *words, **environment)
    assert done.returncode == 0, done.stderr
    arguments, seen = json.loads(done.stdout)
    assert arguments[:2] == ["-m", "pipelines"]
    return arguments[2:], seen


@pytest.mark.parametrize("name", ODD)
def test_names_of_files_arrive_as_they_are(folder, name):
    config = ["--config", "configs/shapes.yaml"]
    assert called(folder, "predict", f"VIDEO={name}")[0] == ["predict", *config, "--", name]
    assert called(folder, "predict", VIDEO=name)[0] == ["predict", *config, "--", name]
    assert called(folder, "convert", f"OUT={name}")[0] == ["convert", f"--out={name}", *config]
    files = ("MODEL", "AUTOENCODER", "REFINER")
    arguments, _ = called(folder, "import-official", *(f"{file}={name}" for file in files))
    assert arguments == ["import-official", *config, *(f"--{file.lower()}={name}" for file in files)]
    arguments, environment = called(folder, "data", f"MIRROR={name}", f"DATASET={name}", f"RUN={name}")
    assert arguments == ["data", "--config", f"configs/{name}.yaml", f"--run={name}"]
    assert environment["MIRROR"] == name
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--set dataset.root='/my videos' --quiet", ["--set", "dataset.root=/my videos", "--quiet"]),
        ('--set "dataset.root=/it\'s here"', ["--set", "dataset.root=/it's here"]),
        ("--video '$(touch ran)' --gif `touch`.gif", ["--video", "$(touch ran)", "--gif", "`touch`.gif"]),
        ("--set a=$(shell touch ran); *,$HOME", ["--set", "a=$(shell", "touch", "ran);", "*,$HOME"]),
    ],
)
def test_words_of_args_are_split_at_spaces_outside_quotes(folder, text, words):
    for given in (called(folder, "inspect", f"ARGS={text}"), called(folder, "inspect", ARGS=text)):
        assert given[0] == ["inspect", "--config", "configs/shapes.yaml", *words]
    assert not (folder / "ran").exists()


def test_a_quote_that_is_not_closed_stops_before_the_command(folder):
    done = make(folder, "sample", "ARGS=--set it's")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "--set it's" in done.stderr


def test_a_data_set_is_remembered(folder):
    (folder / "configs" / "my videos.yaml").touch()
    for words in (["encode", "DATASET=my videos"], ["train-flow"], ["sample", "DATASET=unknown"], ["sample"]):
        config = called(folder, *words)[0][2]
        assert config == f"configs/{'unknown' if 'DATASET=unknown' in words else 'my videos'}.yaml"


def test_help_runs_no_name_of_a_preset(folder):
    (folder / "configs" / "$(touch ran) it's.yaml").touch()
    done = make(folder, "help")
    assert done.returncode == 0
    assert "$(touch ran) it's" in done.stdout
    assert "shapes" in done.stdout
    assert not (folder / "ran").exists()


def test_processes_and_counts(folder):
    done = make(folder, "train-flow", "NUM_GPUS=4", "RUN=wide")
    words = json.loads(done.stdout)[0]
    assert words[:2] == ["-m", "torch.distributed.run"]
    # torchrun reads its own options only: it has some that begin with --run.
    parsed = torchrun_parser().parse_args(words[2:])
    assert (parsed.standalone, parsed.nproc_per_node, parsed.module, parsed.training_script) == (
        True,
        "4",
        True,
        "pipelines",
    )
    assert parsed.training_script_args == ["train-flow", "--config", "configs/shapes.yaml", "--run=wide"]
    assert called(folder, "train-flow", "NUM_GPUS=1")[0][0] == "train-flow"
    assert called(folder, "verify", "N=8")[0][:3] == ["encode", "--verify", "8"]
    assert called(folder, "verify")[0] == ["encode", "--verify", "--config", "configs/shapes.yaml"]
