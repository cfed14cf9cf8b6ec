"""The wheel, built from the source archive, works where there is no repository."""

import importlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from pipelines import __version__

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
PACKAGES = ("latent_cache", "pipelines", "stage1_autoencoder", "stage2_flow")
SOURCES = (*PACKAGES, "configs", "models", "pyproject.toml", "setup.py", "README.md", "LICENSE", "river_two_stage.py")
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
TINY = """
base: shapes
dataset: {name: tiny, image_size: 32, splits: {train: 6, val: 2, test: 2}, shapes: {frames: 8}}
autoencoder:
  model: {channels: 8, channel_multipliers: [1, 2, 4, 8], blocks: 1, decoder_blocks: 1, codes: 16, norm_groups: 4}
  training: {steps: 1, batch_size: 2, validation_frames: 2}
flow:
  model: {width: 16, depth: 1, mid_depth: 0, heads: 2}
  training: {steps: 1, batch_size: 4, clip_frames: 4, validation_pairs: 4, validation_samples: 0}
sampling: {solver: euler, steps: 1}
evaluation: {context: 2, horizon: 2, videos: 2, samples: 1}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `python -m build --no-isolation` does, outside the repository, which gets no `build` folder."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)

    def build(function: str, source: Path) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", BUILD, function, str(folder)], cwd=source, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return folder / done.stdout.splitlines()[-1]

    archive = build("build_sdist", folder / "source")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return build("build_wheel", folder / archive.name.removesuffix(".tar.gz"))


def test_the_wheel_has_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        metadata = Parser().parsestr(files.read(f"river_two_stage-{__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == __version__
    kept = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    assert {str(path) for path in kept if "__pycache__" not in path.parts} <= names
    assert {f"{name}/py.typed" for name in PACKAGES} <= names
    presets = {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name.removeprefix("pipelines/presets/") for name in names if "/presets/" in name} == presets
    models = {str(path.relative_to(ROOT)) for path in (ROOT / "models").rglob("*") if path.is_file()}
    assert {name.removeprefix("pipelines/") for name in names if name.startswith("pipelines/models/")} == models
    assert not [name for name in names if name.startswith(("tests", "configs", "models"))]


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def ours() -> dict[str, ModuleType]:
    names = (*PACKAGES, "river_two_stage")
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}


@pytest.fixture
def installed(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The wheel instead of the repository: what is imported now comes from it. The working folder is another one."""
    unpacked, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as files:
        files.extractall(unpacked)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr("sys.path", [str(unpacked), *(path for path in sys.path if Path(path).resolve() != ROOT)])
    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    yield unpacked
    for name in ours():
        del sys.modules[name]  # before those of the repository come back


def test_the_wheel_works_in_an_empty_folder(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = importlib.import_module("river_two_stage")
    river = importlib.import_module("pipelines.__main__").main
    assert river(["protocols"]) == 0
    assert river(["data", "--device", "cpu"]) == 0
    assert str(installed / "pipelines" / "presets" / "shapes.yaml") in capsys.readouterr().out
    assert river(["sample", "--run", "shapes-small", "--videos", "1", "--device", "cpu"]) == 0
    assert Path("runs", "shapes-small", "samples", "overview.gif").stat().st_size > 0
    Path("tiny.yaml").write_text(TINY)
    assert river(["demo", "--config", "tiny", "--device", "cpu"]) == 0
    assert "</html>" in Path("runs", "tiny", "report.html").read_text()
    predictor = public.VideoPredictor.from_run("runs/tiny", device="cpu")
    store = public.open_store("latents/tiny.zarr", split="test")
    assert len(public.torch_dataset("latents/tiny.zarr", "test", 2)[0]) == 2
    frames = predictor.decode_videos(torch.from_numpy(store.video(0)[None, :2]).float())
    assert public.to_video(predictor.generate_frames(frames, 2)).shape == (1, 4, 32, 32, 3)
    assert not [name for name, module in ours().items() if not Path(module.__file__).is_relative_to(installed)]
