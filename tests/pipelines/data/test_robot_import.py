"""`import-lerobot`: what it says of a robot data set, and the configuration that it writes."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

import latent_cache
from tests.small_data_sets import write_lerobot

pytest.importorskip("pyarrow")

CAMERAS = ("observation.images.top", "observation.images.wrist")


@pytest.fixture
def imports(story: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command in an empty folder, for a data set of four episodes beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for seed in range(4):
        story.write_video(tmp_path / f"{seed}.mp4", story.moving_square(12, seed, width=64, height=48))
    videos = [(tmp_path / f"{seed}.mp4").read_bytes() for seed in range(4)]
    actions = [np.full((12, 3), episode, np.float32) for episode in range(4)]
    write_lerobot(tmp_path / "ALOHA 2", "v2.1", videos, actions, fps=50, cameras=CAMERAS)
    return lambda *words: story.run_main(["import-lerobot", str(tmp_path / "ALOHA 2"), *words])


def test_the_contents_are_told_and_a_configuration_is_written(imports) -> None:
    assert "would write configs/ALOHA_2.yaml" in imports("--dry-run").ok().out
    assert not Path("configs").exists()
    outcome = imports("--camera", CAMERAS[1]).ok()
    for text in (
        "v2.1",
        "4 episodes, 48 frames at 50",
        "3 values",
        CAMERAS[0],
        f"{CAMERAS[1]}, 48x64x3, used",
        "train: ",
    ):
        assert text in outcome.out
    written = yaml.safe_load(Path("configs/ALOHA_2.yaml").read_text())
    assert written["dataset"]["camera"] == CAMERAS[1]
    imports("--camera", CAMERAS[1]).ok()  # again
    imports().refused(2, "ALOHA_2", "--name")  # with another camera
    imports("--name", "kth").refused(2, "kth", "--name")


@pytest.mark.long
def test_it_is_encoded_with_its_actions(imports, story: ModuleType, tmp_path: Path) -> None:
    imports().ok()
    tiny = (
        "autoencoder.model.channels=8",
        "autoencoder.training.steps=1",
        "dataset.image_size=32",
        "dataset.frame_step=2",
    )
    encode = ["encode", "--config", "ALOHA_2", *(word for setting in tiny for word in ("--set", setting))]
    episodes = tmp_path / "ALOHA 2/meta/episodes.jsonl"
    lines = episodes.read_text().splitlines(keepends=True)
    for count in (3, 4):  # the last one comes later
        episodes.write_text("".join(lines[:count]))
        story.run_main([*encode, "--device", "cpu"]).ok()
        caches = [latent_cache.open("latents/ALOHA_2.zarr", split) for split in ("train", "val", "test")]
        found = {video: cache.video_actions(video) for cache in caches for video in cache.video_ids}
        assert len(found) == count
        for video, actions in found.items():
            np.testing.assert_array_equal(actions, np.full((6, 3), int(video[-1]), np.float32))
    assert "actions of 3 values" in story.run_main(["inspect", "latents/ALOHA_2.zarr"]).ok().out


def test_what_is_no_data_set(imports, story: ModuleType, tmp_path: Path) -> None:
    story.run_main(["import-lerobot", str(tmp_path)]).refused(2, f"{tmp_path}/meta/info.json", "no such file")
    imports("--camera", "left").refused(2, "'left'", *CAMERAS)
