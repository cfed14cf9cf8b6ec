"""The whole story at its smallest: a configuration that runs in seconds, one trained run to copy, and videos."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipelines.__main__ import main
from pipelines.evaluation.measures import networks
from stage1_autoencoder.lpips import STAGES
from stage2_flow.vector_field import VectorField

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

TINY: dict[str, Any] = {
    "dataset": {
        "name": "tiny",
        "source": "shapes",
        "image_size": 32,
        "splits": {"train": 24, "val": 4, "test": 4},
        "shapes": {"frames": 12},
    },
    "autoencoder": {
        "model": {
            "channels": 8,
            "channel_multipliers": [1, 2, 4, 8],
            "blocks": 1,
            "decoder_blocks": 1,
            "attention_resolutions": [],
            "codes": 32,
            "norm_groups": 4,
        },
        "training": {
            "steps": 6,
            "batch_size": 4,
            "warmup_steps": 2,
            "restart_every": 2,
            "checkpoint_every": 3,
            "validate_every": 3,
            "validation_frames": 8,
        },
    },
    "flow": {
        "model": {"width": 32, "depth": 1, "mid_depth": 0, "heads": 4, "dropout": 0.0},
        "training": {
            "steps": 8,
            "batch_size": 8,
            "learning_rate": 1.0e-3,
            "warmup_steps": 2,
            "clip_frames": 8,
            "standardize": True,
            "checkpoint_every": 4,
            "validate_every": 4,
            "validation_pairs": 16,
            "validation_samples": 1,
        },
    },
    "sampling": {"solver": "euler", "steps": 2},
    "evaluation": {"context": 2, "horizon": 6, "videos": 4, "samples": 1},
    "logging": {"every": 2},
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    def ok(self) -> "Outcome":
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int, *needed: str) -> "Outcome":
        """One clear message and no traceback."""
        assert self.code == code, f"exit code {self.code} instead of {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        for text in needed:
            assert text in self.err, f"{text!r} is not in\n{self.err}"
        return self


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with data, latents and runs of its own, and commands that work in it."""

    folder: Path
    sets: tuple[str, ...] = ()

    def with_sets(self, *sets: str) -> "Place":
        return dataclasses.replace(self, sets=(*self.sets, *sets))

    def arguments(self, command: str, *arguments: str, sets: Sequence[str] = ()) -> list[str]:
        config = self.folder / "tiny.yaml"
        if not config.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            paths = {name: str(self.folder / name) for name in ("data", "latents", "runs")}
            config.write_text(yaml.safe_dump({"paths": paths} | TINY))
        changes = [word for change in (*self.sets, *sets) for word in ("--set", change)]
        return [command, *arguments, "--config", str(config), "--device", "cpu", *changes]

    def run(self, command: str, *arguments: str, sets: Sequence[str] = ()) -> Outcome:
        """Run a command in this process."""
        return run_main(self.arguments(command, *arguments, sets=sets))

    def start(self, command: str, *arguments: str, sets: Sequence[str] = (), prelude: str = "") -> subprocess.Popen:
        """Start a command as a process of its own; `prelude` is Python that is run before it."""
        words = self.arguments(command, *arguments, sets=sets)
        code = f"import sys\n{prelude}\nfrom pipelines.__main__ import main\nsys.exit(main({words!r}))"
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def store(self) -> Path:
        return self.folder / "latents" / "tiny.zarr"

    @property
    def data(self) -> Path:
        return self.folder / "data" / "tiny"

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / "tiny"

    def checkpoint(self, what: str) -> Path:
        """The newest checkpoint's folder."""
        return sorted((self.runs / what / "checkpoints").glob("step_*"))[-1]

    def copy(self, folder: Path, *parts: str) -> "Place":
        """Some or all of `data`, `latents`, `runs` in another folder."""
        for part in parts:
            shutil.copytree(self.folder / part, folder / part)
        return Place(folder, self.sets)


def run_main(words: Sequence[str]) -> Outcome:
    """Call the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = torch.random.get_rng_state()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as left:
            code = int(left.code or 0)
    torch.random.set_rng_state(before)
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def _no_downloads_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's folder of downloads is empty, whatever this machine has."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def hide_st_lpips(patch: pytest.MonkeyPatch) -> None:
    """Let its package not be found: it would be half of each evaluation's time."""
    patch.setattr(networks, "ST_LPIPS_PACKAGE", "no-such-package")


@pytest.fixture(autouse=True)
def _no_st_lpips(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Only a test that asks for ST-LPIPS has it."""
    if "st_lpips" not in request.fixturenames:
        hide_st_lpips(monkeypatch)


@pytest.fixture
def st_lpips() -> Path:
    """The weights of ST-LPIPS, which commands of this test find as well."""
    path = networks.find_st_lpips()
    assert path is not None
    return path


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty place."""
    return Place(tmp_path / "place")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place in which `demo` was run. Tests must not change it: they copy it."""
    place = Place(tmp_path_factory.mktemp("story") / "trained")
    with pytest.MonkeyPatch.context() as patch:
        hide_st_lpips(patch)
        outcome = place.run("demo").ok()
    (place.folder / "demo.txt").write_text(outcome.out)
    return place


@pytest.fixture
def copied(trained: Place, tmp_path: Path) -> Place:
    """A copy of the trained place that a test may change."""
    return trained.copy(tmp_path / "copied", "latents", "runs")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. While it is open no event loop can be run in this thread."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with (
        playwright.sync_playwright() as driver,
        contextlib.closing(driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])) as browser,
    ):
        yield browser


@pytest.fixture(scope="session")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The convolutions of VGG16 with random weights, as a file like torchvision's."""
    generator, channels, place = torch.Generator().manual_seed(0), 3, 0
    state = {"classifier.0.weight": torch.zeros(2, 2)}
    for widths in STAGES:
        for width in widths:
            deviation = (2 / (9 * channels)) ** 0.5
            state[f"features.{place}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * deviation
            state[f"features.{place}.bias"] = torch.zeros(width)
            channels, place = width, place + 2
        place += 1  # the pooling
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def story() -> ModuleType:
    """This module: tests can't import a conftest by name."""
    return sys.modules[__name__]


@pytest.fixture
def command() -> Callable[[Sequence[str]], Outcome]:
    """The bare command line."""
    return run_main


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def stamps(*folders: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of all files below folders."""
    files = (file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def read_log(place: Place, what: str) -> list[dict[str, Any]]:
    """The lines of a training's log."""
    return [json.loads(line) for line in (place.runs / what / "log.jsonl").read_text().splitlines()]


def pictures(place: Place, what: str) -> list[int]:
    """The steps of a training's validation pictures, each of which can be opened."""
    paths = sorted((place.runs / what).glob("*/step_*.png"))
    for path in paths:
        with Image.open(path) as image:
            image.load()
    return [int(path.stem.removeprefix("step_")) for path in paths]


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log lines without what the clock decides."""
    clocked = ("per_second", "data_wait", "mfu", "peak_memory", "crc32")
    return [
        {key: value for key, value in record.items() if not any(part in key for part in clocked)} for record in records
    ]


def send_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal during the given call (counted from 1) of a method."""
    method, calls = getattr(owner, name), [0]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.05)  # the handler runs in the main thread
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """Count the calls of a method, in the list's one number."""
    method, calls = getattr(owner, name), [0]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def wrap_field(monkeypatch: pytest.MonkeyPatch, wrapped: Callable[..., Any]) -> None:
    """Replace the vector field's forward pass by `wrapped(forward, *inputs)`, in training and not in validation."""
    forward = VectorField.forward

    def call(field: VectorField, *inputs: torch.Tensor) -> Any:
        original = functools.partial(forward, field)
        return wrapped(original, *inputs) if field.training else original(*inputs)

    monkeypatch.setattr(VectorField, "forward", call)


def moving_square(frames: int, seed: int, width: int = 48, height: int = 40) -> np.ndarray:
    """A bright square that moves over a dark ground: [n, h, w, 3] uint8."""
    generator = np.random.default_rng(seed)
    colour = generator.integers(100, 256, 3)
    x, y = generator.integers(0, 16, 2)
    video = np.full((frames, height, width, 3), 20, np.uint8)
    for i in range(frames):
        left, top = (x + i) % (width - 12), (y + i) % (height - 12)
        video[i, top : top + 12, left : left + 12] = colour
    return video


def write_video(path: Path, video: np.ndarray, fps: int = 10) -> None:
    """Write a video file in a codec that every FFmpeg has, or a folder of PNG frames where the name has no suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        path.mkdir()
        for number, frame in enumerate(video):
            Image.fromarray(frame).save(path / f"frame{number}.png")
        return
    if path.suffix == ".gif":
        frames = [Image.fromarray(frame).quantize(64) for frame in video]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_videos(folder: Path, names: Sequence[str], frames: int = 12, first_seed: int = 0) -> None:
    """Several videos, each with another content and a length of its own (`frames` and a few more)."""
    for number, name in enumerate(names):
        write_video(folder / name, moving_square(frames + number % 3, first_seed + number))


# Of the ten names, this seed puts two into each of val and test.
OWN_VIDEOS = ("dataset.source=videos", "dataset.splits={val: 0.2, test: 0.2}", "dataset.split_seed=1")
OWN_NAMES = ("a.mp4", "b.avi", "c.gif", "d", "e.mp4", "f.avi", "deep/g.mp4", "deep/h", "i.mp4", "j.avi")

KTH_ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")


def write_kth_mirror(folder: Path, persons: int = 6) -> None:
    """A folder as KTH publishes it: six zips and the file of frame ranges."""
    folder.mkdir(parents=True)
    lines = []
    for number, action in enumerate(KTH_ACTIONS):
        with zipfile.ZipFile(folder / f"{action}.zip", "w") as archive:
            for person in range(1, persons + 1):
                name = f"person{person:02d}_{action}_d1"
                file = folder / f"{name}_uncomp.avi"
                write_video(file, moving_square(14, 10 * number + person, width=160, height=120), fps=25)
                archive.write(file, file.name)
                file.unlink()
                lines.append(f"{name}\t\tframes\t1-6, 8-14")
    (folder / "00sequences.txt").write_text("Frame ranges\n\n" + "\n".join(lines) + "\n")
