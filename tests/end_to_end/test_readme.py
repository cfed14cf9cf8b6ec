"""README and docs stay true: code blocks run on a tiny data set, and links, targets, options, keys and paths exist.

A block that cannot run here (network, GPU, cluster, hours) has the comment `<!-- not run: reason -->` before it. Its
commands are parsed all the same, which checks targets, options, keys and values.
"""

import argparse
import copy
import dataclasses
import functools
import gzip
import importlib
import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr

import latent_cache
from pipelines.commands import COMMANDS
from pipelines.config import RiverConfig, load_config
from pipelines.errors import UserError
from pipelines.runtime.arguments import add_common_options

REPOSITORY = Path(__file__).parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures"
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "yaml", "text"}
# Targets that are no call of the command line: they exist, and that is all that is checked.
OTHER_TARGETS = {"setup", "test", "test-all", "test-faults", "lint", "docs"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced code block of a page."""

    language: str
    code: str
    is_run: bool
    line: int

    @property
    def commands(self) -> list[str]:
        """Lines of a bash block without comments; those that go on are joined."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in (line.split(" #")[0].strip() for line in lines) if line]


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start(2)].count("\n") + 1
        found.append(Block(match[2], match[3], match[1] is None, line))
    return found


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code_spans(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def targets() -> dict[str, str]:
    """The targets that the Makefile documents."""
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z-]+):.*## (.+)$", text, re.MULTILINE))


class Shell:
    """What a reader's shell remembers: `make` keeps the last DATASET that was named."""

    def __init__(self) -> None:
        self.dataset = "shapes"

    def arguments(self, line: str) -> tuple[list[str], dict[str, str]] | None:
        """Arguments and environment of the `river` that a line calls; None: it calls something else."""
        words = list(itertools.takewhile(lambda word: word not in ("&", "|"), shlex.split(line)))
        for place, word in enumerate(words):  # after srun, torchrun or apptainer
            if word.rpartition("/")[2] == "river" or words[max(0, place - 1) : place + 1] == ["--", "pipelines"]:
                return words[place + 1 :], {}
        if "make" not in words:
            return None
        variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        (target,) = (word for word in words if word != "make" and "=" not in word)
        assert target in targets(), f"{line}: the Makefile has no target {target}"
        if target in OTHER_TARGETS:
            return None
        self.dataset = variables.setdefault("DATASET", self.dataset)
        called = subprocess.run(
            ["make", "--dry-run", target, *(f"{name}={value}" for name, value in variables.items())],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.replace("\\\n", " ")
        (call,) = re.findall(r" -m (?:-- )?pipelines (.+)", called)
        exported = {
            name: variables[name] for name in ("DEVICE", "MIRROR", "SCHEDULER", "DOWNLOAD") if name in variables
        }
        return shlex.split(call), exported


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, story: Any) -> Path:
    """What a reader has after `make demo`, with tiny presets for `shapes` and own videos, videos, and weights."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    refiner = {
        "model": {"groups": 1, "blocks": 1, "features": 4, "reduction": 2},
        "training": {"steps": 2, "batch_size": 2, "clip_frames": 3, "validation_clips": 2},
    }
    tiny = copy.deepcopy(story.TINY) | {"refiner": refiner, "evaluation": {"context": 2, "horizon": 2, "videos": 2}}
    tiny["autoencoder"]["training"] |= {"steps": 3, "checkpoint_every": 3}
    tiny["decoder"] = {"training": {"steps": 2}}
    tiny["flow"]["training"] |= {"steps": 2, "checkpoint_every": 2, "validate_every": 2, "validation_samples": 1}
    shapes = tiny | {"dataset": story.TINY["dataset"] | {"name": "shapes", "image_size": 64}, "cache": {"preview": 16}}
    videos = tiny | {
        "dataset": {"name": "videos", "source": "videos", "image_size": 32, "splits": {"val": 0.2, "test": 0.2}}
    }
    small = videos | {"dataset": videos["dataset"] | {"name": "videos_small"}}
    for name, values in (("shapes", shapes), ("videos", videos), ("videos_small", small)):
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    for name, recorded in (("model.pth", "main_ln_ddp.pth.gz"), ("vqvae.ckpt", "vqgan_f8s_ch32.ckpt.gz")):
        (folder / name).write_bytes(gzip.decompress((FIXTURES / recorded).read_bytes()))
    shutil.copy(FIXTURES / "rcan_s3_b3_c16_r4.pth", folder / "refiner.pth")
    story.write_videos(folder / "own", story.OWN_NAMES)
    story.write_video(folder / "clip.mp4", story.moving_square(12, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        story.run_main(["demo", "--config", "configs/shapes.yaml", "--device", "cpu"]).ok()
    return folder


@pytest.fixture
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DEVICE", "cpu")
    return workspace


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with the real presets, and those that the pages ask to write."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml" and block.is_run:
                name = yaml.safe_load(block.code)["dataset"]["name"]
                (tmp_path / "configs" / f"{name}.yaml").write_text(block.code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE", "cpu")
    return tmp_path


@functools.cache
def run_python(page: Path) -> list[dict[str, Any]]:
    """Run the Python blocks of a page one after another; gives the names that each leaves."""
    names: dict[str, Any] = {}
    left = []
    for block in blocks(page):
        if block.language == "python" and block.is_run:
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
            left.append(dict(names))
    return left


@each_page
def test_commands_run(page: Path, inside: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell()
    for block in blocks(page):
        for line in block.commands if block.language == "bash" else ():
            called = shell.arguments(line.replace("/path/to/my/videos", "own"))
            if not block.is_run or called is None:
                continue
            arguments, environment = called
            with monkeypatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                outcome = command(arguments)
            assert outcome.code == 0, f"{page.name}:{block.line}: {line}\n{outcome.err}"


@each_page
def test_commands_that_are_not_run_are_valid(page: Path, elsewhere: Path) -> None:
    """Commands of marked blocks and of the text: their targets, options, keys and values."""
    shell = Shell()
    lines = [line for block in blocks(page) if block.language == "bash" and not block.is_run for line in block.commands]
    spans = [span for span in code_spans(page) if re.match(r"(\w+=\S+ )*make \S|river \S", span)]
    for line in [*lines, *(span for span in spans if "TARGET" not in span and "COMMAND" not in span)]:
        called = shell.arguments(re.sub(r" N$", " 8", line))
        if called is None:
            continue
        name, *arguments = called[0]
        assert name in COMMANDS, f"{page.name}: {line}"
        try:
            options = parser_of(name).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: {line}: see the usage error")
        load_config(options.config or "configs/shapes.yaml", options.set)


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command, allow_abbrev=False)
    add_common_options(parser)
    importlib.import_module(f"pipelines.commands.{command.replace('-', '_')}").add_arguments(parser)
    return parser


def test_bash_is_valid() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)


def test_a_kubernetes_job_calls_the_command_line(elsewhere: Path) -> None:
    (code,) = (block.code for block in blocks(REPOSITORY / "docs" / "cluster.md") if block.language == "yaml")
    job = yaml.safe_load(code)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    ((program, name, *arguments),) = (container["command"] for container in pod["containers"])
    assert program == "river"
    load_config(parser_of(name).parse_args(arguments).config)
    mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


@each_page
def test_python_runs(page: Path, inside: Path) -> None:
    run_python(page)


@each_page
def test_blocks_have_a_language(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}"
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page))


@each_page
def test_yaml_is_a_configuration(page: Path, elsewhere: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml" and block.is_run:
            load_config(f"configs/{yaml.safe_load(block.code)['dataset']['name']}.yaml")


@each_page
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(target), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, link


@each_page
def test_options_in_the_text_exist(page: Path) -> None:
    known = set(re.findall(r"--[a-z-]+", "".join(parser_of(name).format_help() for name in COMMANDS)))
    for span in code_spans(page):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span):
            assert option in known, f"{page.name}: `{span}`"


def schema_keys(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> set[str]:
    """All dotted keys of a JSON schema."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    keys = set()
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        keys |= schema_keys(schema, choice, prefix)
    for name, child in node.get("properties", {}).items():
        keys |= {prefix + name} | schema_keys(schema, child, f"{prefix}{name}.")
    return keys


@each_page
def test_keys_in_the_text_exist(page: Path) -> None:
    schema = RiverConfig.model_json_schema()
    known = schema_keys(schema, schema)
    sections = "|".join(sorted(schema["properties"]))
    presets = sorted((REPOSITORY / "configs").glob("*.yaml"))
    parts = [part for span in code_spans(page) for part in re.split(r"(?:^| )--set ", span) if part]
    for part in parts:
        if not (match := re.fullmatch(rf"\"?((?:{sections})\.(?!json)[\w.]+)(?:(?:=|: )(.+?))?\"?", part)):
            continue
        key, value = match.groups()
        if key.startswith("dataset.splits."):
            key = "dataset.splits"
        assert key in known, f"{page.name}: `{part}`"
        if value and not value.startswith(("K", "<")):
            assert any(is_accepted(preset, f"{match[1]}={value}") for preset in presets), f"{page.name}: `{part}`"


@each_page
def test_keys_in_tables_exist(page: Path) -> None:
    """In a table of "key of `section`", the first column holds keys of that section, some with a value."""
    presets = sorted((REPOSITORY / "configs").glob("*.yaml"))
    schema = RiverConfig.model_json_schema()
    known = schema_keys(schema, schema)
    for section, rows in re.findall(r"^\| key of `([\w.]+)` .*\n\|[-|]+\n((?:\|.*\n)+)", prose(page), re.MULTILINE):
        for span in re.findall(r"`([^`]+)`", "".join(row.split(" | ")[0] for row in rows.splitlines())):
            key, _, value = span.partition(": ")
            key = key if key.startswith(section.partition(".")[0]) else f"{section}.{key}"
            assert key in known, f"{page.name}: `{span}`"
            if value and not value.startswith("<"):
                assert any(is_accepted(preset, f"{key}={value}") for preset in presets), f"{page.name}: `{span}`"


def is_accepted(preset: Path, override: str) -> bool:
    try:
        load_config(preset, [override])
    except UserError:
        return False
    return True


@each_page
def test_paths_in_the_text_exist(page: Path) -> None:
    written_by_readers = {"configs/mine.yaml"}
    roots = r"configs|docs|tests|pipelines|latent_cache|stage1_autoencoder|stage2_flow|\.ci"
    for span in code_spans(page):
        if re.fullmatch(rf"({roots})/[\w./]+", span) and span not in written_by_readers:
            assert (REPOSITORY / span).exists(), f"{page.name}: `{span}`"


def test_readme_fits_on_a_few_screens() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 260


def test_readme_lists_every_page() -> None:
    listed = re.findall(r"^\| \[[^]]+\]\((docs/[\w.]+)\)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [f"docs/{page.name}" for page in PAGES[1:]]


def test_readme_lists_every_target() -> None:
    rows = re.findall(r"^\| (`make .*?) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`make ([a-z-]+)", row)}
    assert listed == targets().keys() - {"help"}


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_a_page_says_who_needs_it(page: Path) -> None:
    assert re.match(r"# .+\n\nRead this page if ", page.read_text(encoding="utf-8"))


def test_every_picture_is_shown() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for file in (REPOSITORY / "docs").iterdir():
        assert file.suffix in {".md", ".css", ".ipynb"} or file.name in text, file


def test_readers_of_the_store_agree(inside: Path) -> None:
    """zarr, xarray, dask and latent_cache read the same; a training reads clips."""
    plain, named, shown, chunked, looked_up, checked, trained = run_python(REPOSITORY / "docs" / "store_format.md")
    train, test = (latent_cache.open("latents/shapes.zarr", split) for split in ("train", "test"))
    np.testing.assert_array_equal(plain["first_video"], train.video(0))
    assert str(plain["names"][0]) == train.video_ids[0]
    np.testing.assert_array_equal(named["video"].values, train.video("train_00003"))
    assert named["video"].dims == ("frame", "channel", "y", "x")
    np.testing.assert_array_equal(shown["pictures"].values, train.video_preview("train_00003"))
    named["split"].close()
    np.testing.assert_allclose([chunked["mean"], chunked["std"]], [train.mean, train.std], rtol=1e-5)
    np.testing.assert_array_equal(looked_up["quantized"], train.codebook[train.video_codes(0)].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(checked["video"], test.video(3))
    assert len(checked["everything"]) == test.frames
    assert trained["clips"].clip_frames == 4
    assert trained["loss"].isfinite()


def test_drawn_layout(inside: Path) -> None:
    """The tree that the page draws is the store's, with its attributes."""
    (drawn,) = (b.code for b in blocks(REPOSITORY / "docs" / "store_format.md") if b.code.startswith("latents/"))
    store = zarr.open_group("latents/shapes.zarr", mode="r")
    arrays = dict(re.findall(r"│   [├└]── (\w+) +\[([^]]*)\]", drawn))
    assert arrays.keys() - {"actions"} == dict(store["train"].arrays()).keys()  # nobody acts in it
    for name in ("latents", "codes", "preview"):
        assert ", ".join(store[f"train/{name}"].metadata.dimension_names) == arrays[name]
    assert set(re.findall(r"^[├└]── (\w+)", drawn, re.MULTILINE)) == {*store.group_keys(), *store.array_keys()}
    for attribute in re.findall(r"\w+", re.sub(r"\(.*?\)", "", drawn.splitlines()[0].partition("attributes:")[2])):
        assert attribute in store.attrs


def test_shapes_in_the_python_api(inside: Path) -> None:
    frames, stream, latents, networks = run_python(REPOSITORY / "docs" / "sampling.md")
    assert frames["frames"].shape == (2, 19, 3, 64, 64)
    assert frames["several"].shape == (6, 19, 3, 64, 64)
    assert frames["video"].shape == (2, 19, 64, 64, 3)
    assert stream["frame"].shape == (4, 3, 64, 64)
    assert latents["latents"].shape == (2, 19, *latents["context"].shape[2:])
    assert latents["replayed"].shape == (2, 5, *latents["context"].shape[2:])
    assert networks["pixels"].shape == (2, 3, 64, 64)
    assert networks["velocity"].shape == networks["z"].shape
    assert networks["velocity"].dtype == torch.float32
