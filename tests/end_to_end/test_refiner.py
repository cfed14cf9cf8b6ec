"""The refiner as users meet it: trained on the way, used when asked for, resumed, refused."""

import json
import re
import shutil
import signal
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import latent_cache
from pipelines.errors import UserError
from pipelines.predictor import VideoPredictor
from pipelines.training.refiner_trainer import RefinerTrainer

SMALL = (
    "refiner.model={groups: 1, blocks: 1, features: 4, reduction: 2}",
    "refiner.training.steps=8", "refiner.training.batch_size=4", "refiner.training.clip_frames=5",
    "refiner.training.learning_rate=1e-2", "refiner.training.checkpoint_every=4", "refiner.training.validate_every=4",
    "refiner.training.validation_clips=3",
)  # fmt: skip
EVERYTHING = (
    "refiner.training.ema_decay=0.9", "refiner.training.precision=bf16", "refiner.training.optimizer=muon",
    "refiner.training.grad_clip=1.0", "refiner.training.loss=l1", "refiner.training.start=random",
    "refiner.training.accumulate=2", "refiner.model.tanh=true", "cache.memory_budget=20 KiB",
)  # fmt: skip


@pytest.fixture
def story_place(copied):
    """A trained place without a refiner, and settings of a small one."""
    return copied.with_sets(*SMALL)


@pytest.fixture(scope="module")
def refined(trained, tmp_path_factory: pytest.TempPathFactory):
    """A place with a refiner. Tests must not change it."""
    place = trained.copy(tmp_path_factory.mktemp("refiner") / "refined", "latents", "runs").with_sets(*SMALL)
    outcome = place.run("train-refiner").ok()
    (place.folder / "train.txt").write_text(outcome.out)
    return place


def evaluation(place) -> dict:
    return json.loads((place.runs / "evaluation.json").read_text())


def test_training_says_what_it_does_and_is_done_once(refined, story: ModuleType) -> None:
    said = (refined.folder / "train.txt").read_text()
    assert re.search("batch 4 of 192 clips of 5 frames.* steps 0 to 8", said)
    assert "step 8: validation PSNR" in said
    records = story.read_log(refined, "refiner")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert {"loss", "mse", "learning_rate", "steps_per_second"} <= records[0].keys()
    assert "validation_psnr" not in records[0]
    assert records[-1].keys() >= {"validation_psnr", "validation_psnr_unrefined"}
    assert records[1]["validation_psnr_unrefined"] == records[3]["validation_psnr_unrefined"]
    assert story.pictures(refined, "refiner") == [4, 8]
    before = story.stamps(refined.runs, refined.store)
    assert "refiner: done, 8 steps" in refined.run("train-refiner").ok().out
    assert story.stamps(refined.runs, refined.store) == before


def test_sample_trains_the_refiner_first_and_leaves_latents_alone(story_place) -> None:
    samples = story_place.runs / "samples"
    plain = story_place.run("sample", "--videos", "2").ok()
    latents, sheet = load_file(samples / "predictions.safetensors"), (samples / "contact_sheet.png").read_bytes()
    assert "refined" not in plain.out
    assert "refiner:" not in plain.out
    assert not (story_place.runs / "refiner").exists()
    outcome = story_place.run("sample", "--videos", "2", "--refine").ok()
    assert outcome.out.index("refiner: step 8") < outcome.out.index("sample: 2 clips")
    assert "warm start 0, refined" in outcome.out
    assert torch.equal(load_file(samples / "predictions.safetensors")["latents"], latents["latents"])
    assert (samples / "contact_sheet.png").read_bytes() != sheet
    assert json.loads((samples / "samples.json").read_text())["refine"] is True
    story_place.run("sample", "--videos", "2").ok()  # there is a refiner now, and it is used only when asked for
    assert (samples / "contact_sheet.png").read_bytes() == sheet
    assert json.loads((samples / "samples.json").read_text())["refine"] is False


def test_evaluate_says_that_it_refined(refined, tmp_path) -> None:
    place = refined.copy(tmp_path / "evaluated", "latents", "runs")
    place.run("evaluate").ok()
    plain = evaluation(place)
    assert plain["protocol"]["predictor"]["refine"] is False
    assert plain["protocol"]["predictor"]["refiner_step"] is None
    assert "refined" in place.run("evaluate", "--refine").ok().out
    with_refiner = evaluation(place)
    assert with_refiner["protocol"]["predictor"]["refine"] is True
    assert with_refiner["protocol"]["predictor"]["refiner_step"] in (4, 8)  # the better one by validation
    for subject in ("copy_last", "reconstruction"):
        assert with_refiner["metrics"]["psnr"][subject] == plain["metrics"]["psnr"][subject]
    assert with_refiner["metrics"]["psnr"]["prediction"] != plain["metrics"]["psnr"]["prediction"]


def test_predict_trains_the_refiner_first(story_place, story: ModuleType) -> None:
    video = story_place.folder / "clip.mp4"
    story.write_video(video, story.moving_square(6, 0))
    outcome = story_place.run("predict", str(video), "--refine", "--frames", "3").ok()
    assert "refiner: step 8" in outcome.out
    assert "refined" in outcome.out
    assert (story_place.runs / "predictions" / "clip.gif").exists()
    again = story_place.run("predict", str(video), "--refine", "--frames", "3").ok()
    assert "refiner:" not in again.out


def test_from_a_bare_place_everything_before_it_is_made(place) -> None:
    outcome = place.with_sets(*SMALL).run("train-refiner").ok()
    steps = [outcome.out.index(text) for text in ("autoencoder: step", "store: complete", "refiner: step 8")]
    assert steps == sorted(steps)
    assert not (place.runs / "flow").exists()


@pytest.mark.parametrize(
    ("sets", "number"), [((), signal.SIGINT), (EVERYTHING, signal.SIGTERM)], ids=["plain", "everything"]
)
def test_stopped_by_a_signal_and_resumed(trained, tmp_path, story, monkeypatch, sets, number) -> None:
    def place_of(name: str):
        place = trained.copy(tmp_path / name, "latents").with_sets(*SMALL, *sets)
        shutil.copytree(trained.runs / "autoencoder", place.runs / "autoencoder")
        return place

    whole, halves = place_of("whole"), place_of("halves")
    whole.run("train-refiner").ok()
    story.send_at(monkeypatch, RefinerTrainer, "train_step", call=5, number=number)
    halves.run("train-refiner").refused(128 + number, "stopped at step 5", "step_00000005")
    assert "steps 5 to 8" in halves.run("train-refiner").ok().out
    ours, theirs = story.tree(halves.checkpoint("refiner")), story.tree(whole.checkpoint("refiner"))
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= theirs.keys()
    assert ("ema.safetensors" in theirs) == (sets is EVERYTHING)
    assert ours == theirs
    assert story.timeless(story.read_log(halves, "refiner")) == story.timeless(story.read_log(whole, "refiner"))


def test_another_configuration_is_refused_and_restart_sets_the_old_one_aside(refined, tmp_path) -> None:
    place = refined.copy(tmp_path / "other", "latents", "runs")
    changed = ["refiner.training.loss=l1"]
    place.run("train-refiner", sets=changed).refused(2, "refiner.training.loss: mse -> l1", "train-refiner --restart")
    place.run("sample", "--refine", sets=changed).refused(2, "train-refiner --restart")
    place.run("train-refiner", "--restart", sets=changed).ok()
    assert len(list(place.runs.glob("refiner.*"))) == 1
    state = json.loads((place.checkpoint("refiner") / "state.json").read_text())
    assert state["identity"]["refiner"]["training"]["loss"] == "l1"
    more = place.run("train-refiner", sets=[*changed, "refiner.training.steps=10"]).ok()
    assert "steps 8 to 10" in more.out


def test_a_refiner_belongs_to_one_autoencoder(refined, tmp_path) -> None:
    place = refined.copy(tmp_path / "other", "latents", "runs")
    other = ["autoencoder.training.learning_rate=2e-3"]
    shutil.rmtree(place.runs / "flow")
    place.run("train-autoencoder", "--restart", sets=other).ok()
    place.run("encode", "--overwrite", sets=other).ok()
    place.run("train-refiner", sets=other).refused(2, "autoencoder: ", "->", "train-refiner --restart")
    place.run("train-flow", sets=other).ok()
    place.run("sample", sets=other).ok()  # who asks for no refiner is not troubled by one
    predictor = VideoPredictor.from_run(place.runs, "cpu")
    assert predictor.refiner is None
    with pytest.raises(
        UserError, match=r"refiner.* was trained for autoencoder .*\.\.\., but .*`train-refiner --restart`"
    ):
        predictor.generate_frames(torch.zeros(1, 2, 3, 32, 32), 1, refine=True)


def test_the_python_api_refines_when_asked(refined, trained) -> None:
    predictor = VideoPredictor.from_run(refined.runs, "cpu")
    images = torch.rand(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, better = (predictor.generate_frames(images, 2, refine=refine) for refine in (False, True))
    assert torch.equal(plain[:, :2], better[:, :2])
    assert not torch.equal(plain[:, 2:], better[:, 2:])
    with pytest.raises(UserError, match=r"refiner/checkpoints .*`river train-refiner`"):
        VideoPredictor.from_run(trained.runs, "cpu").generate_frames(images, 2, refine=True)


@pytest.mark.parametrize(
    ("sets", "needed"),
    [
        (["refiner.training.clip_frames=13"], ["the 13 frames of refiner.training.clip_frames; they have 12 to 12"]),
        (["refiner.training.perceptual_network=none.pt"], ["perceptual_network: none.pt: no such file", "null"]),
        (["dataset.image_size=64"], ["other preprocessing", "encode --overwrite"]),
        (["refiner.training.clip_frame=5"], ['did you mean "clip_frames"?']),
        (["refiner.model.reduction=5"], ["refiner.model.reduction: 5 "]),
        (["refiner.training.accumulate=3"], ["refiner.training.batch_size: a batch of 4", "multiple of 3"]),
    ],
)
def test_what_can_not_be_trained_is_refused_before_the_first_step(story_place, sets, needed) -> None:
    story_place.run("train-refiner", sets=sets).refused(2, *needed)
    assert not (story_place.runs / "refiner" / "checkpoints").exists()


def test_videos_that_changed_since_they_were_encoded_are_refused(story_place) -> None:
    story_place.run("train-refiner", sets=["dataset.splits={train: 20, val: 4, test: 4}"]).refused(
        2, "its videos have changed since", "4 removed", "encode --overwrite"
    )


def test_without_the_autoencoder_there_is_nothing_to_decode_with(story_place) -> None:
    shutil.rmtree(story_place.runs / "autoencoder")
    story_place.run("train-refiner").refused(2, "autoencoder/checkpoints", "train-autoencoder")


def test_a_finished_refiner_needs_no_store(refined, tmp_path) -> None:
    place = refined.copy(tmp_path / "alone", "runs")
    assert "refiner: done, 8 steps" in place.run("train-refiner").ok().out
    assert not place.store.exists()
    place.run("sample", "--refine").ok()


def test_another_store_is_not_gone_on_with(refined, tmp_path) -> None:
    place = refined.copy(tmp_path / "other", "latents", "runs")
    place.run("encode", "--overwrite", sets=["cache.views=[identity, hflip]"]).ok()
    place.run("train-refiner", sets=["cache.views=[identity, hflip]", "refiner.training.steps=10"]).refused(
        2, "step_00000008", "store.fingerprint: ", "train-refiner --restart"
    )
    assert len(latent_cache.open(place.store).video_ids) == 48


def test_with_validation_videos_that_are_too_short_it_trains_all_the_same(place, story: ModuleType) -> None:
    story.write_videos(place.data / "train", ["a.mp4", "b.mp4", "c.mp4"])
    story.write_videos(place.data / "val", ["d.mp4"], frames=4)
    story.write_videos(place.data / "test", ["e.mp4"])
    place = place.with_sets(*SMALL, "dataset.source=videos", "dataset.splits={}")
    outcome = place.run("train-refiner").ok()
    assert "refiner: no validation: " in outcome.out
    records = story.read_log(place, "refiner")
    assert records[-1]["step"] == 8
    assert not any("validation_psnr" in record for record in records)
    assert place.checkpoint("refiner").name == "step_00000008"
