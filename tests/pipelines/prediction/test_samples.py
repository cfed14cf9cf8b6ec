"""The files that `sample` and `predict` leave: each clip's under a name of its own, at its own rate."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file

from pipelines.prediction.clips import Clip, GivenVideo
from pipelines.prediction.samples import Samples, write_continuation, write_samples
from stage1_autoencoder.videos.source import Recording

CONTEXT, HORIZON = 2, 3


def clip(name: str, number: int, fps: float = 10.0) -> Clip:
    frames = torch.full((CONTEXT + HORIZON, 3, 8, 8), -0.8)
    frames[..., number] = 0.9
    return Clip(name, number, Recording(name), fps, frames)


def write(folder: Path, clips: list[Clip], number: int = 1) -> Samples:
    samples = Samples(
        clips=[one.name for one in clips], fps=[one.fps for one in clips], context=CONTEXT, horizon=HORIZON,
        sampling={}, samples=number, refine=False,
    )  # fmt: skip
    predicted = np.zeros((len(clips), number, CONTEXT + HORIZON, 8, 8, 3), np.uint8)
    latents = torch.arange(len(clips) * number).view(-1, number, 1, 1, 1, 1).expand(-1, -1, CONTEXT + HORIZON, 4, 1, 1)
    write_samples(folder, samples, clips, predicted, latents.float().contiguous(), "title")
    return samples


def rate_of(path: Path) -> tuple[float, float]:
    """Frames per second of a GIF, without the rest on its last frame, and of the MP4 beside it."""
    with Image.open(path.with_suffix(".gif")) as image:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    with av.open(str(path.with_suffix(".mp4"))) as container:
        return 1000 * (len(durations) - 1) / sum(durations[:-1]), float(container.streams.video[0].average_rate)


def moving(frames: int, seed: int, frame_size: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, *frame_size, 3), dtype=np.uint8)


def test_no_clip_takes_the_files_of_another(tmp_path: Path):
    names = ["a/b", "a_b", "overview", "clip", "clip-2", "Clip"]
    samples = write(tmp_path, [clip(name, number) for number, name in enumerate(names)])
    assert len(set(samples.files)) == len(names)
    for number, name in enumerate(samples.files):
        with Image.open(tmp_path / f"{name}.gif") as image:
            shown = np.asarray(image.convert("RGB")).astype(int)
        # The bright column of each clip's truth, enlarged; the first frame's border and label surround it.
        bright = (np.abs(shown - [242, 242, 242]).max(-1) <= 2).sum(0)
        scale = 12
        assert abs(int(bright.argmax()) - (6 + 3 + number * scale)) < scale, name
        assert (tmp_path / f"{name}.mp4").exists()
    assert json.loads((tmp_path / "samples.json").read_text())["files"] == samples.files
    with Image.open(tmp_path / "overview.gif") as image:
        assert image.size[0] > 4 * 100  # of all clips
    write(tmp_path, [clip("clip", 0)])
    assert {file.stem for file in tmp_path.glob("*.[gm][ip][f4]")} == {"overview", "clip"}


@pytest.mark.parametrize("clips", [1, 2])
def test_latents_of_several_samples(tmp_path: Path, clips: int):
    write(tmp_path, [clip(str(number), number) for number in range(clips)], number=3)
    stored = load_file(tmp_path / "predictions.safetensors")
    assert stored["samples"][:, :, 0, 0, 0, 0].flatten().tolist() == list(range(3 * clips))
    assert stored["latents"].equal(stored["samples"][:, 0])


def test_a_full_disk_leaves_the_clips_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def tree() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    write(tmp_path, [clip("a", 0), clip("b", 1)])
    before, flushes = tree(), []

    def full(descriptor: int) -> None:
        flushes.append(descriptor)
        if len(flushes) == 9:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, [clip("a", 3), clip("c", 2)])
    assert tree() == before


def test_each_clip_plays_at_its_rate(tmp_path: Path):
    rates = [10.0, 25.0, 0.5, 10.0]
    samples = write(tmp_path, [clip(f"clip {number}", number, fps) for number, fps in enumerate(rates)])
    for name, fps in zip(samples.files, rates, strict=True):
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(fps)
    with Image.open(tmp_path / "overview.gif") as image:
        assert image.info["duration"] % 100 == 0  # at 10 frames per second


def continued(
    folder: Path, video: Path, seed: int, samples: int = 1, fps: float = 10.0, marked: bool = False
) -> tuple[Path, np.ndarray]:
    given = GivenVideo(video, moving(4, seed), 4, fps, f"digest of {seed}")
    predicted = moving(samples * (CONTEXT + HORIZON), 100 + seed).reshape(samples, CONTEXT + HORIZON, 32, 32, 3)
    path = write_continuation(folder, given, predicted, CONTEXT, "title", marked)
    return path, np.concatenate([given.frames, predicted[0, CONTEXT:]])


def shown(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def test_predictions_of_videos_of_one_name_stay_beside_each_other(tmp_path: Path):
    first, frames = continued(tmp_path, Path("here/clip.mp4"), seed=0)
    second, other = continued(tmp_path, Path("there/clip.mp4"), seed=1)
    third, _ = continued(tmp_path, Path("clip.gif"), seed=0)  # the same content under another name
    assert (first.stem, second.stem, third.stem) == ("clip", "clip_2", "clip_3")
    for path, expected in ((first, frames), (second, other)):
        assert np.sqrt(np.square(shown(path)[:, ::8, ::8].astype(float) - expected).mean()) < 30
        assert path.with_suffix(".mp4").exists()
        assert path.with_suffix(".png").exists()
    # The same video again replaces its own files, wherever it lies now.
    assert continued(tmp_path, Path("moved/clip.mp4"), seed=1)[0] == second
    listed = json.loads(second.with_suffix(".json").read_text())
    assert listed["video"].endswith("moved/clip.mp4")
    assert (listed["fps"], listed["frames"], listed["horizon"]) == (10.0, 4, HORIZON)


def test_a_sample_is_no_other_video(tmp_path: Path):
    continued(tmp_path, Path("clip.mp4"), seed=0, samples=3)
    other, _ = continued(tmp_path, Path("clip-2.mp4"), seed=1)
    assert other.stem == "clip-2_2"
    assert continued(tmp_path, Path("a-2.mp4"), seed=2)[0].stem == "a-2"
    assert continued(tmp_path, Path("a.mp4"), seed=3)[0].stem == "a"
    assert continued(tmp_path, Path("a.mp4"), seed=3, samples=2)[0].stem == "a_2"  # `a-2` is taken
    # Fewer samples than before: those of then are gone.
    assert continued(tmp_path, Path("clip.mp4"), seed=0, samples=2)[0].stem == "clip"
    assert {file.name for file in tmp_path.glob("clip*.gif")} == {"clip.gif", "clip-2.gif", "clip-2_2.gif"}


def test_files_of_unknown_origin_are_left_alone(tmp_path: Path):
    (tmp_path / "clip.gif").write_text("mine")
    (tmp_path / "broken.json").write_text("{")
    assert continued(tmp_path, Path("clip.mp4"), seed=0)[0].stem == "clip_2"
    assert continued(tmp_path, Path("broken.mp4"), seed=0)[0].stem == "broken_2"
    assert (tmp_path / "clip.gif").read_text() == "mine"


@pytest.mark.parametrize(
    ("frame_size", "size"),
    [((32, 32), (256, 256)), ((100, 100), (300, 300)), ((72, 128), (144, 256)), ((128, 72), (256, 144)),
     ((16, 256), (16, 256)), ((256, 16), (256, 16))],
)  # fmt: skip
def test_small_frames_are_enlarged_to_a_legible_size(
    tmp_path: Path, frame_size: tuple[int, int], size: tuple[int, int]
):
    """Heights and widths. The longer side decides, so that clips in portrait and landscape format are equally large."""
    given = GivenVideo(Path("clip.mp4"), moving(3, 0, frame_size), 3, 10.0, "")
    path = write_continuation(tmp_path, given, moving(CONTEXT + 1, 1, frame_size)[None], CONTEXT, "title", False)
    with Image.open(path) as image:
        assert (image.height, image.width) == size
    with av.open(str(path.with_suffix(".mp4"))) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == size


@pytest.mark.parametrize("fps", [0.5, 10.0, 25.0])
def test_a_continuation_plays_at_the_rate_of_its_video(tmp_path: Path, fps: float):
    path, _ = continued(tmp_path, Path("clip.mp4"), seed=0, fps=fps)
    assert rate_of(path) == pytest.approx((fps, fps), rel=1e-2)
