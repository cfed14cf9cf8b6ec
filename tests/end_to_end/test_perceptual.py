"""Training with a perceptual loss: missing weights are reported once, and nothing changes silently."""

import json
from pathlib import Path

import pytest

WANTED = ("autoencoder.training.perceptual=lpips", "autoencoder.training.perceptual_weight=0.1")


@pytest.mark.slow
def test_the_perceptual_loss_is_trained_on_and_measured(place, vgg: Path, story) -> None:
    sets = (*WANTED, f"autoencoder.training.vgg_weights={vgg}", "autoencoder.training.steps=3")
    outcome = place.run("train-autoencoder", sets=sets).ok()
    assert "L1 + LPIPS + codebook" in outcome.out
    assert "LPIPS 0." in outcome.out
    assert "warning" not in outcome.err
    line = story.read_log(place, "autoencoder")[-1]
    assert line["perceptual"] > 0
    assert line["loss"] == pytest.approx(line["l1"] + 0.1 * line["perceptual"] + line["codebook"], rel=1e-4)
    checkpoint = place.checkpoint("autoencoder")
    assert (checkpoint.parent / "best").read_text() == checkpoint.name
    assert '"validation_lpips"' in (checkpoint / "state.json").read_text()
    # A finished training needs the file no more.
    gone = (*WANTED, "autoencoder.training.vgg_weights=nowhere.pth", "autoencoder.training.steps=3")
    assert "steps/s" not in place.run("encode", sets=gone).ok().out


def test_without_weights_there_is_one_warning_and_a_way_out(place, vgg: Path) -> None:
    outcome = place.run("train-autoencoder", sets=WANTED).ok()
    assert outcome.err.count("warning") == 1
    for text in ("VGG16", "perceptual: none", "autoencoder.training.vgg_weights", "--download"):
        assert text in outcome.err
    assert ", L1 + codebook, " in outcome.out
    assert json.loads((place.checkpoint("autoencoder") / "state.json").read_text())["perceptual"] == "none"
    # The finished training is not repeated when the weights are there.
    again = place.run("train-autoencoder", sets=(*WANTED, f"autoencoder.training.vgg_weights={vgg}")).ok()
    assert "6 steps" in again.out


def test_st_lpips_stands_in_for_lpips(place, story, st_lpips) -> None:
    sets = ["autoencoder.training.perceptual=st_lpips", "autoencoder.training.steps=3"]
    outcome = place.run("train-autoencoder", sets=sets).ok()
    assert "L1 + ST-LPIPS + codebook" in outcome.out
    assert "ST-LPIPS 0." in outcome.out
    assert outcome.err == ""
    line = story.read_log(place, "autoencoder")[-1]
    assert line["loss"] == pytest.approx(line["l1"] + line["perceptual"] + line["codebook"], rel=1e-4)
    checkpoint = place.checkpoint("autoencoder")
    assert (checkpoint.parent / "best").read_text() == checkpoint.name
    assert '"validation_st_lpips"' in (checkpoint / "state.json").read_text()


def test_without_its_package_st_lpips_is_left_out(place) -> None:
    sets = ["autoencoder.training.perceptual=st_lpips", "autoencoder.training.steps=1"]
    outcome = place.run("train-autoencoder", sets=sets).ok()
    assert outcome.err.count("warning") == 1
    assert "pip install stlpips_pytorch" in outcome.err
    assert ", L1 + codebook, " in outcome.out


def test_half_a_training_does_not_change_its_loss(place, vgg: Path, story, monkeypatch) -> None:
    from pipelines.training.autoencoder_trainer import AutoencoderTrainer

    with monkeypatch.context() as patch:
        story.send_at(patch, AutoencoderTrainer, "train_step", call=3)
        place.run("train-autoencoder", sets=WANTED).refused(143, "stopped at step 3")
    with_weights = (*WANTED, f"autoencoder.training.vgg_weights={vgg}")
    outcome = place.run("train-autoencoder", sets=with_weights).ok()
    assert "without the perceptual loss" in outcome.out
    assert ", L1 + codebook, " in outcome.out


def test_weights_that_are_named_must_be_there(place) -> None:
    place.run("train-autoencoder", sets=[*WANTED, "autoencoder.training.vgg_weights=gone.pth"]).refused(
        2, "autoencoder.training.vgg_weights: gone.pth"
    )
    place.run("train-autoencoder", sets=["autoencoder.training.best_by=lpips"]).refused(
        2, "autoencoder.training.best_by", "lpips"
    )
    place.run(
        "train-autoencoder", sets=["autoencoder.training.best_by=lpips", "autoencoder.training.perceptual=st_lpips"]
    ).refused(2, "autoencoder.training.best_by", "lpips")


def test_frames_too_small_for_the_network_are_refused(place, vgg: Path) -> None:
    place.run(
        "train-autoencoder", sets=(*WANTED, f"autoencoder.training.vgg_weights={vgg}", "dataset.image_size=8")
    ).refused(2, "autoencoder.training.perceptual", "16 pixels", "dataset.image_size is 8")
    place.run("train-autoencoder", sets=("autoencoder.training.perceptual=st_lpips", "dataset.image_size=16")).refused(
        2, "autoencoder.training.perceptual", "21 pixels", "dataset.image_size is 16"
    )
