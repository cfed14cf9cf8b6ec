"""`demo` on tiny shapes: all that it leaves behind, and that a second run finds it done."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import latent_cache
from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.predictor import VideoPredictor


def test_demo_says_what_it_does_and_where_to_look(trained) -> None:
    text = (trained.folder / "demo.txt").read_text()
    for number in range(1, 9):
        assert f"[{number}/8]" in text
    assert (trained.runs / "report.html").stat().st_size > 100_000
    assert str(trained.runs / "samples") in text
    assert str(trained.store) in text
    assert "PSNR" in text
    assert "copying the last frame" in text


def test_run_files(trained) -> None:
    resolved = load_config(trained.runs / "config.yaml")
    assert resolved.flow.training.steps == 8
    assert resolved.paths.latents == str(trained.folder / "latents")
    environment = json.loads((trained.runs / "environment.json").read_text())
    assert environment["software"].keys() >= {"python", "torch", "zarr", "numpy", "av"}
    assert environment["device"]


@pytest.mark.parametrize(("what", "steps", "keys"), [
    ("autoencoder", [2, 3, 4, 6], {"l1", "l2", "codebook"}),  # step 3 is validated
    ("flow", [2, 4, 6, 8], {"samples_per_second"}),
])  # fmt: skip
def test_log(trained, story: ModuleType, what: str, steps: list[int], keys: set[str]) -> None:
    records = story.read_log(trained, what)
    assert [record["step"] for record in records] == steps
    for record in records:
        assert record.keys() >= {"step", "loss", "steps_per_second", "learning_rate"} | keys
        assert all(math.isfinite(value) for name, value in record.items() if name != "crc32")
        assert record["steps_per_second"] > 0


def test_checkpoints(trained) -> None:
    for what, steps, pointers in (("autoencoder", (3, 6), ("best", "latest")), ("flow", (4, 8), ("best", "latest"))):
        folder = trained.runs / what / "checkpoints"
        names = sorted(path.name for path in folder.iterdir())
        assert names == [*pointers, *(f"step_{step:08d}" for step in steps)]
        assert (folder / "latest").read_text() == f"step_{steps[-1]:08d}"
        for step in steps:
            state = json.loads((folder / f"step_{step:08d}" / "state.json").read_text())
            assert state["step"] == step
            assert load_file(folder / f"step_{step:08d}" / "model.safetensors")
    assert not list(trained.folder.rglob("*.pth"))
    assert not list(trained.folder.rglob("*.tmp"))


def test_files_have_the_permissions_of_the_umask(trained) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in trained.folder.rglob("*")}
    wrong = {path for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask}
    assert not wrong


def test_store_is_complete_and_holds_all_videos(trained) -> None:
    assert latent_cache.is_complete(trained.store)
    assert latent_cache.splits(trained.store) == ["train", "val", "test"]
    for split, videos in (("train", 24), ("val", 4), ("test", 4)):
        cache = latent_cache.open(trained.store, split)
        assert len(cache.video_ids) == videos
        assert cache.latents.shape == (12 * videos, 4, 4, 4)
        assert cache.codes.shape == (12 * videos, 4, 4)
        assert torch.isfinite(cache.load()).all()
    latents = latent_cache.open(trained.store, "train").load().double()
    cache = latent_cache.open(trained.store, "val")
    np.testing.assert_allclose(cache.mean, latents.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cache.std, latents.std((0, 2, 3), correction=0), rtol=1e-4)


def test_store_holds_what_the_autoencoder_makes_of_the_frames(trained) -> None:
    from pipelines.loading import find_autoencoder, load_trained_autoencoder
    from stage1_autoencoder.autoencoder import image_to_unit
    from stage1_autoencoder.videos import open_source

    config = load_config(trained.runs / "config.yaml")
    autoencoder = load_trained_autoencoder(find_autoencoder(trained.runs), torch.device("cpu"))
    source = open_source(config.dataset, config.data_root, "test")
    cache = latent_cache.open(trained.store, "test")
    latents = autoencoder.encode(image_to_unit(torch.from_numpy(source.read(2))))
    torch.testing.assert_close(torch.from_numpy(cache.video("test_00002")).float(), latents, rtol=1e-3, atol=1e-3)
    assert np.array_equal(cache.video_codes("test_00002"), autoencoder.quantizer.nearest(latents).numpy())


def test_samples(trained) -> None:
    folder = trained.runs / "samples"
    clips = [f"test_{number:05d}" for number in range(4)]
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 100
    for name in ["overview", *clips]:
        with Image.open(folder / f"{name}.gif") as animation:
            assert animation.n_frames == 8
    for name in clips:
        with av.open(str(folder / f"{name}.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == 8
    latents = load_file(folder / "predictions.safetensors")["latents"]
    assert latents.shape == (4, 8, 4, 4, 4)
    assert torch.isfinite(latents).all()
    # The context is the store's, rounded to fp16 there.
    stored = torch.from_numpy(latent_cache.open(trained.store, "test").video("test_00001")[:2]).float()
    torch.testing.assert_close(latents[1, :2], stored, rtol=1e-3, atol=1e-3)


def test_evaluation(trained) -> None:
    result = json.loads((trained.runs / "evaluation.json").read_text())
    assert result.keys() >= {"protocol", "metrics", "objects"}
    protocol = result["protocol"]
    assert (protocol["clips"], protocol["context"], protocol["horizon"], protocol["samples"]) == (4, 2, 6, 1)
    assert protocol["predictor"]["store_fingerprint"] == latent_cache.open(trained.store, "train").fingerprint
    for metric in ("psnr", "ssim"):
        values = result["metrics"][metric]
        for subject in ("prediction", "copy_last", "reconstruction"):
            assert len(values["per_frame"][subject]) == 6
            assert values[subject] == pytest.approx(sum(values["per_frame"][subject]) / 6)
    # Shapes move away from where they were.
    copy_last = result["metrics"]["psnr"]["per_frame"]["copy_last"]
    assert copy_last[0] > copy_last[-1] + 1
    # A copied frame shows all of them, and none moves.
    objects = result["objects"]
    assert {name: objects[name]["copy_last"] for name in ("whole", "kept", "kind", "speed", "ghosts")} == {
        "whole": 1, "kept": 1, "kind": 1, "speed": 0, "ghosts": 0,
    }  # fmt: skip
    assert 1 < objects["position"]["per_frame"]["copy_last"][0] < 4  # a step of 2 to 3 pixels, or less at a wall
    with Image.open(trained.runs / "objects.png") as picture:
        assert min(picture.size) > 100


def test_a_second_run_recognises_everything(trained, story: ModuleType) -> None:
    place = trained
    kept = (place.store, place.runs / "autoencoder", place.runs / "flow")
    before = story.stamps(*kept)
    predictions = (place.runs / "samples" / "predictions.safetensors").read_bytes()
    evaluation = (place.runs / "evaluation.json").read_bytes()
    outcome = place.run("demo").ok()
    assert story.stamps(*kept) == before
    for said in ("autoencoder: done, 6 steps", "store: done", "flow: done, 8 steps"):
        assert said in outcome.out
    assert (place.runs / "samples" / "predictions.safetensors").read_bytes() == predictions
    assert (place.runs / "evaluation.json").read_bytes() == evaluation


def test_each_command_alone_recognises_what_is_done(trained, story: ModuleType) -> None:
    before = story.stamps(trained.store, trained.runs / "autoencoder", trained.runs / "flow")
    for command in ("data", "train-autoencoder", "encode", "train-flow"):
        trained.run(command).ok()
    assert story.stamps(trained.store, trained.runs / "autoencoder", trained.runs / "flow") == before


@pytest.mark.slow
def test_restart_runs_each_stage_again_once(trained, copied, story: ModuleType) -> None:
    outcome = copied.run("demo", "--restart", "--overwrite").ok()
    names = sorted(path.name.partition(".")[0] for path in copied.runs.iterdir() if path.is_dir())
    assert names == ["autoencoder", "autoencoder", "flow", "flow", "samples"]
    assert outcome.out.count("store: complete") == 1
    assert story.tree(copied.checkpoint("flow")).keys() == story.tree(trained.checkpoint("flow")).keys()
    # The same seed gives the same weights.
    weights = copied.checkpoint("flow") / "model.safetensors"
    assert weights.read_bytes() == (trained.checkpoint("flow") / "model.safetensors").read_bytes()


def test_more_steps_resume_from_the_last_one(copied, story: ModuleType) -> None:
    outcome = copied.run("train-flow", sets=["flow.training.steps=12"]).ok()
    assert "steps 8 to 12" in outcome.out
    assert [record["step"] for record in story.read_log(copied, "flow")] == [2, 4, 6, 8, 10, 12]


def test_the_run_and_its_videos_are_enough_to_sample(trained, tmp_path: Path) -> None:
    place = trained.copy(tmp_path / "moved", "runs")
    place.run("sample", "--videos", "2").ok()
    ours, theirs = (load_file(p.runs / "samples" / "predictions.safetensors")["latents"] for p in (place, trained))
    # Two clips are the first and the last; a video's prediction doesn't depend on its batch.
    torch.testing.assert_close(ours, theirs[[0, -1]])
    assert not place.store.exists()


def test_stage_two_needs_neither_pixels_nor_autoencoder(trained, tmp_path: Path, monkeypatch) -> None:
    place = trained.copy(tmp_path / "store_alone", "latents")
    for target in ("stage1_autoencoder.videos.folders.open_folder", "av.open"):
        monkeypatch.setattr(target, lambda *_, **__: pytest.fail("stage 2 asked for pixels"))
    build = "stage1_autoencoder.vqgan.VQGAN.__init__"
    monkeypatch.setattr(build, lambda *_: pytest.fail("stage 2 built an autoencoder"))
    outcome = place.run("train-flow", sets=["dataset.source=videos", "dataset.splits={}"]).ok()
    assert "flow:" in outcome.out
    assert not (place.runs / "autoencoder").exists()
    ours, theirs = (p.checkpoint("flow") / "model.safetensors" for p in (place, trained))
    assert ours.read_bytes() == theirs.read_bytes()


def test_dry_run_changes_nothing(place, trained, story: ModuleType) -> None:
    outcome = place.run("demo", "--dry-run").ok()
    assert sorted(path.name for path in place.folder.iterdir()) == ["tiny.yaml"]
    assert yaml.safe_load(outcome.out.partition("videos  ")[0])["flow"]["training"]["steps"] == 8
    assert re.search(r"(?m)^store +missing ", outcome.out)
    assert re.search(r"(?m)^flow +missing .*; 0 of 8 steps$", outcome.out)

    before = story.stamps(trained.folder)
    outcome = trained.run("demo", "--dry-run").ok()
    assert story.stamps(trained.folder) == before
    for stage, detail in (
        ("autoencoder", "6 steps"),
        ("store", ""),
        ("flow", "8 steps"),
        ("sampler", "euler, 2 evaluations"),
    ):
        assert re.search(rf"(?m)^{stage} +done .*; {detail}", outcome.out)


def test_quiet_leaves_stdout_empty(copied) -> None:
    for command in (["train-flow"], ["sample", "--videos", "1"], ["evaluate"], ["inspect"]):
        outcome = copied.run(*command, "--quiet", sets=["flow.training.steps=10"]).ok()
        assert (outcome.out, outcome.err) == ("", "")


def test_inspect(copied, command) -> None:
    outcome = command(["inspect", str(copied.store)]).ok()
    for text in ("latents of tiny", "train  24 videos of 12 to 12 frames", "test   4 videos", "of 32 codes"):
        assert text in outcome.out
    gif = copied.folder / "new" / "video.gif"
    outcome = copied.run("inspect", "--video", "val_00003", "--gif", str(gif)).ok()
    assert f"val_00003 of val decoded to {gif}" in outcome.out
    with Image.open(gif) as animation:
        assert animation.n_frames == 12
        assert animation.size == (256, 256)
    copied.run("inspect", "--video", "val_99", "--gif", str(gif)).refused(2, "no video 'val_99'")
    copied.run("inspect", "--video", "val_00003").refused(2, "--video val_00003", "--gif val_00003.gif")
    copied.run("inspect", "--gif", "video").refused(2, "must end in .gif")
    shutil.rmtree(copied.runs / "autoencoder")
    copied.run("inspect", "--gif", str(gif)).refused(2, f"{copied.runs}/autoencoder")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.gif", "clip"])
def test_predict_continues_any_video(copied, story: ModuleType, name: str) -> None:
    story.write_video(copied.folder / name, story.moving_square(5, 1))
    copied.run("predict", str(copied.folder / name), "--frames", "3").ok()
    with Image.open(copied.runs / "predictions" / "clip.gif") as animation:
        assert animation.n_frames == 5 + 3
        assert animation.size == (256, 256)
    assert (copied.runs / "predictions" / "clip.mp4").stat().st_size > 0
    assert (copied.runs / "predictions" / "clip.png").stat().st_size > 0


def test_predict_marks_what_was_given_and_samples_differ(copied, story: ModuleType) -> None:
    story.write_video(copied.folder / "clip.mp4", story.moving_square(5, 1))
    copied.run("predict", str(copied.folder / "clip.mp4"), "--frames", "3", "--marked", "--samples", "2").ok()
    videos = []
    for name in ("clip.mp4", "clip-2.mp4"):
        with av.open(str(copied.runs / "predictions" / name)) as container:
            videos.append([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    for frames in videos:
        corners = np.stack([frame[0, 0].astype(int) for frame in frames])
        assert frames[0].shape == (38 * 8, 38 * 8, 3)
        assert (corners[:5, 1] > corners[:5, 0]).all()  # green
        assert (corners[5:, 0] > corners[5:, 1]).all()  # red
    # The frames that were there are shown as they are, the predicted ones differ.
    assert np.abs(videos[0][4].astype(int) - videos[1][4]).mean() < 1
    assert np.abs(videos[0][7].astype(int) - videos[1][7]).mean() > 1


def test_predict_live_writes_its_frames_whenever_it_is_stopped(
    copied, story: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, predictions = str(copied.folder / "clip.mp4"), copied.runs / "predictions"

    def frames(name: str = "clip.mp4") -> np.ndarray:
        with av.open(str(predictions / name)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    story.write_video(copied.folder / "clip.mp4", story.moving_square(5, 1))
    options = ("--frames", "3", "--marked", "--samples", "2")
    copied.run("predict", clip, *options).ok()
    at_once = [frames(), frames("clip-2.mp4")]
    copied.run("predict", clip, "--live", *options).ok()
    np.testing.assert_allclose([frames(), frames("clip-2.mp4")], at_once, atol=2)
    assert {path.name for path in predictions.iterdir()} == {"clip.mp4", "clip-2.mp4", "clip.json"}

    original = VideoPredictor.stream

    def stopped_at_the_fourth(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        for number, frame in enumerate(original(*arguments, **options)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield frame

    monkeypatch.setattr(VideoPredictor, "stream", stopped_at_the_fourth)
    copied.run("predict", clip, "--live").refused(130, "clip.mp4", "5 + 4 frames")
    assert len(frames()) == 5 + 4
    assert json.loads((predictions / "clip.json").read_text())["horizon"] == 4
    assert {path.name for path in predictions.iterdir()} == {"clip.mp4", "clip.json"}
    copied.run("predict", clip, "--live", "--refine").refused(2, "--live", "--refine")

    def diverges_at_the_third(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        yield from itertools.islice(original(*arguments, **options), 2)
        raise UserError("NaN")

    monkeypatch.setattr(VideoPredictor, "stream", diverges_at_the_third)
    copied.run("predict", clip, "--live").refused(2, "NaN", "clip.mp4", "5 + 2 frames")
    assert len(frames()) == 5 + 2


def test_sample_shows_several_samples(copied) -> None:
    copied.run("sample", "--videos", "2", "--samples", "3").ok()
    tensors = load_file(copied.runs / "samples" / "predictions.safetensors")
    assert tensors["samples"].shape == (2, 3, 8, 4, 4, 4)
    assert torch.equal(tensors["samples"][:, 0], tensors["latents"])
    assert not torch.equal(tensors["samples"][:, 0], tensors["samples"][:, 1])
    copied.run("sample", "--videos", "2").ok()
    again = load_file(copied.runs / "samples" / "predictions.safetensors")
    assert torch.equal(again["latents"], tensors["latents"])
    assert "samples" not in again


def test_a_store_of_the_first_writer_trains_and_samples(trained, first_store: Path, story: ModuleType) -> None:
    """It tells one rate for all videos, and has no codebook. Its autoencoder is lost: here it is the trained one."""
    place = trained.copy(first_store.parent / "place")
    shutil.copytree(trained.runs / "autoencoder", place.runs / "autoencoder")
    root = json.loads((first_store / "zarr.json").read_text())
    root["attributes"]["autoencoder"]["sha256"] = latent_cache.open_metadata(trained.store).autoencoder["sha256"]
    (first_store / "zarr.json").write_text(json.dumps(root))
    shutil.copytree(first_store, place.store)
    before = story.tree(place.store)
    place.run("sample").ok()
    assert "10 frames/s" in place.run("inspect", "--verify").ok().out
    with av.open(str(place.runs / "samples" / "test_00000.mp4")) as container:
        assert container.streams.video[0].average_rate == 10
    place.run("inspect", "--gif", str(place.folder / "a.gif")).ok()
    place.run("report").ok()
    assert story.tree(place.store) == before


def test_predict_trains_a_missing_flow(trained, tmp_path: Path, story: ModuleType) -> None:
    place = trained.copy(tmp_path / "store_and_autoencoder", "latents")
    shutil.copytree(trained.runs / "autoencoder", place.runs / "autoencoder")
    story.write_video(place.folder / "clip.mp4", story.moving_square(5, 1))
    outcome = place.run("predict", str(place.folder / "clip.mp4")).ok()
    assert "steps 0 to 8" in outcome.out
    assert (place.runs / "predictions" / "clip.gif").exists()


def test_a_broken_video_is_reported_before_anything_is_trained(place, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    place.run("predict", str(tmp_path / "text.mp4")).refused(2, "text.mp4")
    assert not place.runs.exists()
