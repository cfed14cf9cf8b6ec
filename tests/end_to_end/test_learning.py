"""The autoencoder learns: a step that does nothing, or the wrong thing, misses the bounds."""

from types import ModuleType

import numpy as np
import pytest

from pipelines.config import load_config
from stage1_autoencoder.videos import open_source

AUTOENCODER = (
    "autoencoder.training.steps=80", "autoencoder.training.learning_rate=2e-3", "autoencoder.training.batch_size=8",
    "autoencoder.training.optimizer=muon", "autoencoder.training.muon_learning_rate=1e-2",
    "autoencoder.training.l2_weight=4", "autoencoder.training.validate_every=1000", "logging.every=10",
)  # fmt: skip


@pytest.mark.slow
def test_autoencoder_loss_goes_down(place, story: ModuleType) -> None:
    place = place.with_sets(*AUTOENCODER)
    place.run("train-autoencoder").ok()
    records = story.read_log(place, "autoencoder")
    assert records[-1]["l1"] < 0.7 * records[0]["l1"]
    # Better than the best picture of one color, which a decoder that ignores its codes makes.
    source = open_source(load_config(place.runs / "config.yaml").dataset, "", "val")
    pixels = np.concatenate([source.read(video) for video in range(len(source.videos))]) / 127.5 - 1
    one_color = 10 * np.log10(4 / pixels.var(axis=(0, 1, 2)).mean())
    assert records[-1]["validation_psnr"] > one_color + 0.5
