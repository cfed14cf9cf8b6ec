"""The command line itself: words that do not exist, the version, the default preset, consoles and environments."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import __version__
from pipelines.__main__ import main
from pipelines.commands import COMMANDS

ROOT = Path(__file__).parents[2]
SHAPES = str(ROOT / "configs" / "shapes.yaml")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian-flow"], "train-flow"),
        (["sampel", "--config", "shapes"], "sample"),
        (["sample", "--conifg", "shapes"], "--config"),
        (["sample", "--conifg=shapes"], "--config"),
        (["sample", "-config", "shapes"], "--config"),
        (["encode", "--overwite"], "--overwrite"),
        (["convert", "--ot", "frames"], "--out"),
        (["predict", "--frame", "3"], "--frames"),
        (["--verison"], "--version"),
    ],
)
def test_an_unknown_word_is_told_with_the_nearest_known_one(words, meant, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    wrong = next(word for word in words if word not in ("sample", "encode", "convert", "predict"))
    assert wrong in message
    assert f"did you mean {meant}?" in message


def test_a_file_may_begin_with_a_dash(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "--config", SHAPES, "--device", "cpu", "--", "-clip.mp4"]) == 2
    assert "-clip.mp4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["inspect", "~/none"], ["predict", "~/none"], ["import-official", "--model", "~/none"]]
)
def test_home_in_options(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*words, "--config", SHAPES, "--device", "cpu"]) == 2
    assert f"{tmp_path}/none" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"river {__version__}\n"


# What bash does when Tab is pressed behind a line.
PRESS_TAB = """
eval "$1"; COMP_WORDS=($2); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_river; echo ${COMPREPLY[@]}
"""


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("river train-au", "train-autoencoder"),
        ("river encode --ov", "--overwrite"),
        ("river convert --ou", "--out"),
        ("river completion f", "fish"),
        ("river sample --config pyproj", "pyproject.toml"),
    ],
)
def test_bash_completes_commands_options_and_files(line, completed, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    pressed = subprocess.run(
        ["bash", "-c", PRESS_TAB, "bash", script, line], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert pressed.stdout.split() == [completed]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_all_commands(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)


@pytest.fixture
def ran(monkeypatch):
    """Contexts in which `sample` ran, which does nothing."""
    contexts = []
    monkeypatch.setattr("pipelines.commands.sample.run", lambda config, context, options: contexts.append(context))
    return contexts


def test_without_config_the_command_says_which_one_it_takes(tmp_path, monkeypatch, capsys, ran):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--device", "cpu"]) == 0
    assert SHAPES in capsys.readouterr().out
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "shapes.yaml").write_text("dataset: {name: mine, source: shapes}")
    assert main(["sample", "--device", "cpu"]) == 0
    assert str(Path("configs", "shapes.yaml")) in capsys.readouterr().out
    assert main(["sample", "--device", "cpu", "--config", "shapes"]) == 0
    assert capsys.readouterr().out == ""
    assert len(ran) == 3


@pytest.mark.parametrize(
    ("word", "wanted"),
    [("no", False), ("False", False), ("0", False), ("off", False), ("", False), ("1", True), ("yes", True)],
)
def test_download_is_a_yes_or_a_no(word, wanted, monkeypatch, ran):
    monkeypatch.setenv("DOWNLOAD", word)
    assert main(["sample", "--config", SHAPES, "--device", "cpu"]) == 0
    assert main(["sample", "--config", SHAPES, "--device", "cpu", "--download"]) == 0
    assert [context.download for context in ran] == [wanted, True]


def test_another_download_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("DOWNLOAD", "perhaps")
    with pytest.raises(SystemExit) as left:
        main(["sample", "--config", SHAPES, "--device", "cpu"])
    assert left.value.code == 2
    assert "perhaps" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_of_any_encoding(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    words = ["sample", "--config", SHAPES, "--device", "cpu", "--set", "dataset.root=/vidéos/映画"]
    assert main([*words, "--dry-run"]) == 0
    assert main([*words, "--set", "dataset.source=映"]) == 2
    for stream in (out, err):
        stream.flush()
        assert "\\u6620" in stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("words", [["sample", "--config", SHAPES, "--device", "cpu", "--dry-run"], ["--help"]])
def test_a_reader_that_leaves_is_not_missed(words, monkeypatch, capfd):
    """As with `river ... | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        try:
            code = main(words)
        except SystemExit as left:  # of the parser
            code = left.code
        assert code == 0
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_command_ends_in_order_by_a_signal(number, monkeypatch, capsys):
    cleaned = []

    def run(*_):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleaned.append(number)

    before = signal.getsignal(number)
    monkeypatch.setattr("pipelines.commands.sample.run", run)
    assert main(["sample", "--config", SHAPES, "--device", "cpu"]) == 128 + number
    assert cleaned == [number]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sample: interrupted")
    assert signal.getsignal(number) is before


def test_a_connection_that_breaks_is_told(monkeypatch, capsys, ran):
    def run(*_):
        raise BrokenPipeError(32, "Broken pipe: the scheduler")

    monkeypatch.setattr("pipelines.commands.sample.run", run)
    assert main(["sample", "--config", SHAPES, "--device", "cpu"]) == 1
    assert "the scheduler" in capsys.readouterr().err


def test_the_backend_of_a_notebook_is_not_needed(tmp_path):
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "OMP_NUM_THREADS": "1"}
    words = ["report", "--config", SHAPES, "--device", "cpu", "--set", f"paths.runs={tmp_path}"]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipelines.__main__ import main; sys.exit(main({words}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path}/shapes" in done.stderr
