"""The refiner's training: its clips, its step, its validation, and inputs that are refused."""

from collections import Counter
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import latent_cache
from pipelines.config import RiverConfig, parse_config
from pipelines.errors import UserError
from pipelines.evaluation.measures.metrics import psnr
from pipelines.loading import load_trained_refiner
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.distributed import Processes
from pipelines.training.refiner_trainer import (
    ATTEMPTS,
    RefinerClips,
    RefinerTrainer,
    make_example,
    refiner_plan,
)
from pipelines.training.training_loop import LoopSettings, run_training
from stage1_autoencoder.videos.source import BrokenVideoError

CPU = torch.device("cpu")
CLIP = 5
# Of the kit's videos of 7, 13, 1, 22 and 5 frames.
EVERY_CLIP = {
    f"{video}@{start}" for video, count in {"a": 3, "b": 9, "d": 18, "e": 1}.items() for start in range(count)
}
MODEL = {"groups": 1, "blocks": 1, "features": 4, "reduction": 2}


def open_clips(kit, split: str = "train", *, broken: list | None = None, **options: Any) -> RefinerClips:
    defaults = {"clip_frames": CLIP, "batch_size": 4, "steps": 100, "seed": 3, "memory": 10**9}
    return RefinerClips(
        kit.splits[split],
        latent_cache.open(kit.store, split),
        on_broken=(lambda error: None) if broken is None else broken.append,
        **(defaults | options),
    )


@pytest.fixture
def encoded(kit):
    kit.encode()
    return kit


@pytest.mark.parametrize("memory", [0, 10**9])
def test_clips_are_frames_beside_their_own_latents(encoded, memory):
    cache, source = latent_cache.open(encoded.store), encoded.splits["train"]
    seen = Counter()
    with closing(open_clips(encoded, memory=memory, batch_size=8)) as clips:
        assert clips.count == len(EVERY_CLIP)
        for step in range(100):
            batch = clips.batch(step)
            assert batch.pixels.dtype == torch.uint8
            assert batch.latents.dtype == torch.float32
            seen.update(batch.names)
            if step % 10 == 0:
                for name, pixels, latents in zip(batch.names, batch.pixels, batch.latents, strict=True):
                    video, start = name.split("@")[0], int(name.split("@")[1])
                    wanted = [source.frame(video, start + i) for i in range(CLIP)]
                    assert np.array_equal(pixels, wanted)
                    assert np.array_equal(latents, cache.video(video)[start : start + CLIP].astype(np.float32))
    assert seen.keys() == EVERY_CLIP
    # 800 draws of 31 clips: 25.8 each, deviation 5.
    assert min(seen.values()) > 5
    assert max(seen.values()) < 52


def test_a_batch_is_a_function_of_seed_and_step(encoded):
    with closing(open_clips(encoded)) as clips, closing(open_clips(encoded)) as others:
        in_order = [clips.batch(step) for step in range(6)]
        for step in (5, 0, 3):
            batch = others.batch(step)
            assert batch.names == in_order[step].names
            assert torch.equal(batch.pixels, in_order[step].pixels)
            assert torch.equal(batch.latents, in_order[step].latents)
    assert len({tuple(batch.names) for batch in in_order}) == 6
    with closing(open_clips(encoded, seed=4)) as clips:
        assert clips.batch(0).names != in_order[0].names
    parts = []
    for rank in range(2):
        with closing(open_clips(encoded)) as clips:
            parts += clips.batch(2, Processes(rank, 2).rows(4)).names
    assert parts == in_order[2].names


def test_decoding_runs_ahead_and_not_beyond_the_last_step(encoded):
    source = encoded.splits["train"]
    with closing(open_clips(encoded, steps=5)) as clips:
        source.passes.clear()
        clips.batch(0)
        for step in (1, 2, 3, 4):
            clips.batch(step)
    assert len(source.passes) == 5 * 4  # each clip once, and nothing of a sixth step
    assert all(stop - start == CLIP for _, start, stop in source.passes)


def test_other_clips_replace_broken_videos(encoded):
    encoded.splits["train"].ends["d"] = 0
    broken, again = [], []
    with closing(open_clips(encoded, broken=broken)) as clips:
        batches = [clips.batch(step) for step in range(10)]
        assert clips.describe(9) == f"clips {', '.join(batches[9].names)}"
    names = [name for batch in batches for name in batch.names]
    assert {error.video_id for error in broken} == {"d"}
    assert not [name for name in names if name.startswith("d")]
    assert all(batch.pixels.shape[:2] == (4, CLIP) for batch in batches)
    with closing(open_clips(encoded, broken=again)) as clips:
        assert [name for step in range(10) for name in clips.batch(step).names] == names
    encoded.splits["train"].ends.update(dict.fromkeys("abe", 0))
    with closing(open_clips(encoded)) as clips, pytest.raises(BrokenVideoError, match="is noise"):
        clips.batch(0)
    assert ATTEMPTS > 1


def test_short_videos_are_ignored_with_a_message(encoded, capsys):
    with closing(open_clips(encoded, clip_frames=8)) as clips:
        assert clips.count == 6 + 15
    assert "3 of 5 videos of the train split are shorter than the 8 frames of a clip and ignored: a, c, e" in (
        capsys.readouterr().out
    )
    with closing(open_clips(encoded, clip_frames=22)) as clips:
        assert set(clips.batch(0).names) == {"d@0"}
    message = (
        "no video of the train split .* has the 23 frames of refiner.training.clip_frames; they have 1 to 22: lower"
    )
    with pytest.raises(UserError, match=message):
        open_clips(encoded, clip_frames=23)


def test_augmented_videos_are_not_used(kit):
    kit.encode(views=["hflip", "identity", "jitter-1"])
    cache = latent_cache.open(kit.store)
    with closing(open_clips(kit)) as clips:
        assert clips.count == len(EVERY_CLIP)
        batch = clips.batch(0)
    for name, latents in zip(batch.names, batch.latents, strict=True):
        video, start = name.split("@")[0], int(name.split("@")[1])
        assert np.array_equal(latents, cache.video(video, "identity")[start : start + CLIP].astype(np.float32))


def test_refuses_a_store_of_augmented_videos_only(kit):
    kit.encode(views=["hflip"])
    with pytest.raises(UserError, match=r"noise.zarr .*add identity to cache\.views, and encode with --overwrite"):
        open_clips(kit)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"a": 7, "b": 13, "c": 1, "e": 5}, "video 'd' of the train split .*noise.zarr has 22 frames"),
        (
            {"a": 7, "b": 12, "c": 1, "d": 22, "e": 5},
            "video 'b' of the train split has 12 frames, and .*noise.zarr has 13 frames",
        ),
    ],
)
def test_refuses_other_videos_than_the_stores(encoded, lengths, message):
    encoded.splits["train"] = encoded.Source(lengths)
    with pytest.raises(UserError, match=f"{message} .*--overwrite"):
        open_clips(encoded)


def config_of(kit, **training: Any) -> RiverConfig:
    defaults = {"steps": 10, "batch_size": 4, "clip_frames": CLIP, "learning_rate": 1e-3, "warmup_steps": 2}
    values = kit.config().model_dump(mode="json")
    values["refiner"] = {"model": MODEL, "training": defaults | training}
    return parse_config(values, "a test")


@pytest.fixture
def make_trainer(encoded):
    """Trainers of the kit's store; their threads end with the test."""
    opened = []

    def make(perceptual: Any = None, validation: Any = None, **training: Any) -> RefinerTrainer:
        clips = open_clips(encoded)
        opened.append(clips)
        config = config_of(encoded, **training)
        return RefinerTrainer(config, CPU, encoded.model, clips, perceptual=perceptual, validation=validation)

    yield make
    for clips in opened:
        clips.close()


def example_of(trainer: RefinerTrainer, step: int = 0):
    with closing(open_again(trainer)) as clips:
        batch = clips.batch(step)
    return make_example(trainer.autoencoder, batch.pixels, batch.latents)


def open_again(trainer: RefinerTrainer) -> RefinerClips:
    clips = trainer.clips
    return RefinerClips(
        clips.source, clips.cache, clip_frames=clips.clip_frames, batch_size=clips.batch_size, steps=1, seed=clips.seed,
        memory=0, on_broken=clips.on_broken,
    )  # fmt: skip


def test_an_example_is_the_real_frame_before_and_the_decoded_stored_latent(encoded):
    cache = latent_cache.open(encoded.store)
    frames = np.stack([encoded.splits["train"].frame("d", 4 + i) for i in range(CLIP)])
    latents = torch.from_numpy(cache.video("d")[4 : 4 + CLIP]).float()
    example = make_example(encoded.model, torch.from_numpy(frames)[None], latents[None])
    truth = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(example.previous[0], truth[:-1])
    torch.testing.assert_close(example.truth[0], truth[1:])
    with torch.no_grad():
        quantized = encoded.model.quantize(latents[1:])[0]
        torch.testing.assert_close(example.decoded[0], encoded.model.decode_quantized(quantized))
        assert (example.decoded[0] - encoded.model.decode_quantized(latents[1:])).abs().max() > 1e-3


@pytest.mark.parametrize(("loss", "power"), [("mse", 2), ("l1", 1)])
def test_the_loss_is_the_distance_to_the_real_frames(make_trainer, loss, power):
    trainer = make_trainer(loss=loss)
    example = example_of(trainer)
    result = trainer.train_step(0)
    expected = (example.decoded - example.truth).abs().pow(power).mean()  # it starts as a copy of the decoded frame
    assert result.terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert result.terms.keys() == {"loss", loss, "gradient_norm"}
    assert bool(result.finite)
    random = make_trainer(loss=loss, start="random")
    assert abs(random.train_step(0).terms["loss"].item() - expected.item()) > 0.01


def test_training_lowers_the_loss_and_keeps_the_autoencoder(make_trainer, encoded):
    before = {name: tensor.clone() for name, tensor in encoded.model.state_dict().items()}
    trainer = make_trainer(steps=60, learning_rate=0.01)
    losses = [trainer.train_step(step).terms["loss"].item() for step in range(60)]
    assert np.mean(losses[-10:]) < 0.85 * losses[0]  # of frames of noise, the mean of them is the best guess
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoded.model.state_dict().items())
    assert all(parameter.grad is None for parameter in encoded.model.parameters())


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(make_trainer):
    trainer = make_trainer(steps=10, warmup_steps=None)
    rates = []
    for step in range(10):
        trainer.train_step(step)
        rates.append(trainer.learning_rate)
    assert rates[:2] == pytest.approx([0.5e-3, 1e-3])  # a fifth of the steps
    assert rates[2:] == pytest.approx([0.5e-3 * (1 + np.cos(np.pi * i / 8)) for i in range(8)])
    groups = trainer.train_state.optimizers[0].param_groups
    assert {group["weight_decay"] for group in groups} == {5e-4}
    scaled = make_trainer(learning_rate=None)
    scaled.train_step(1)
    assert scaled.learning_rate == pytest.approx(3e-4 * 4 / 256)


def test_a_batch_in_parts_is_the_batch(make_trainer):
    whole, parts = make_trainer(), make_trainer(accumulate=2)
    seen = []
    for trainer in (whole, parts):
        update = trainer.train_state.update
        # Adam would hide gradients that are all twice as large.
        trainer.train_state.update = lambda *given, trainer=trainer, update=update: (
            seen.append([parameter.grad.clone() for parameter in trainer.model.parameters()]) or update(*given)
        )
    losses = [trainer.train_step(0).terms["loss"].item() for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_bfloat16_reaches_the_network_and_not_the_loss(make_trainer):
    seen = []
    trainer = make_trainer(precision="bf16")
    trainer.model.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    assert trainer.train_step(0).terms["loss"].dtype == torch.float32
    assert seen == [torch.bfloat16]


class Perceptual:
    """Mean difference of the frames, times a number."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.shapes: list[tuple[int, ...]] = []

    def distance(self, videos: Tensor, truth: Tensor) -> Tensor:
        self.shapes += [tuple(videos.shape), tuple(truth.shape)]
        return self.factor * (videos - truth).mean().square()


def test_the_perceptual_term_is_weighted_and_added(make_trainer):
    perceptual = Perceptual(100.0)
    trainer = make_trainer(perceptual=perceptual, perceptual_weight=0.3)
    example = example_of(trainer)
    terms = trainer.train_step(0).terms
    expected = 100 * (example.decoded - example.truth).mean().square()
    assert terms["perceptual"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(terms["mse"].item() + 0.3 * expected.item(), rel=1e-4)
    assert perceptual.shapes == [(4, CLIP - 1, 3, 16, 16)] * 2


def test_a_loss_that_is_not_finite_updates_nothing_and_names_step_and_clips(make_trainer, tmp_path):
    trainer = make_trainer(perceptual=Perceptual(1.0))
    trainer.train_step(0)
    folder = CheckpointFolder(tmp_path / "before")
    folder.save(1, trainer.files(), {})
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.perceptual.factor = float("nan")
    settings = LoopSettings(name="refiner", steps=4, checkpoint_every=1, validate_every=1, log_every=1)
    with closing(open_again(trainer)) as clips:
        names = clips.batch(1).names
    with pytest.raises(UserError, match=r"not finite at step 2 \(loss nan, .*on clips") as told:
        run_training(trainer, settings, None, CheckpointFolder(tmp_path / "checkpoints"), folder.latest())
    assert ", ".join(names) in str(told.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert not (tmp_path / "checkpoints").exists()


def validation_of(encoded):
    with closing(open_clips(encoded, "val", batch_size=6)) as clips:
        return clips.batch(0)


def test_validation_measures_refined_beside_unrefined_frames(make_trainer, encoded):
    validation = validation_of(encoded)
    trainer = make_trainer(validation=validation)
    example = make_example(encoded.model, validation.pixels, validation.latents)
    expected = psnr(example.decoded.flatten(0, 1), example.truth.flatten(0, 1)).mean().item()
    measured = trainer.validate(0)
    assert measured["validation_psnr_unrefined"] == pytest.approx(expected, abs=1e-4)
    assert measured["validation_psnr"] == pytest.approx(expected, abs=1e-3)  # it starts as a copy
    assert make_trainer().validate(0) == {}


def test_validation_refines_as_in_use_each_frame_given_the_refined_one_before(make_trainer, encoded):
    validation = validation_of(encoded)
    trainer = make_trainer(validation=validation)
    with torch.no_grad():  # hands the previous frame on, so that in use every frame is the first real one
        weight = trainer.model.head.weight
        weight[:3] = weight[:3].roll(3, dims=1)
    example = make_example(encoded.model, validation.pixels, validation.latents)
    still = example.previous[:, :1].expand_as(example.truth)
    expected = psnr(still.flatten(0, 1), example.truth.flatten(0, 1)).mean().item()
    assert trainer.validate(0)["validation_psnr"] == pytest.approx(expected, abs=1e-3)


def test_validation_measures_the_averaged_weights(make_trainer, encoded):
    trainer = make_trainer(validation=validation_of(encoded), ema_decay=0.9, learning_rate=0.05, warmup_steps=0)
    for step in range(6):
        trainer.train_step(step)
    averaged = trainer.validate(6)["validation_psnr"]
    weights = trainer.files()["ema"]
    trainer.train_state.average = None
    assert abs(trainer.validate(6)["validation_psnr"] - averaged) > 0.01
    trainer.model.load_state_dict(weights)
    assert trainer.validate(6)["validation_psnr"] == pytest.approx(averaged, abs=1e-4)


def test_resuming_is_exact(make_trainer, tmp_path):
    options = {"ema_decay": 0.9, "optimizer": "muon", "grad_clip": 1.0}
    whole, first, second = (make_trainer(**options) for _ in range(3))
    for step in range(6):
        whole.train_step(step)
    for step in range(3):
        first.train_step(step)
    path = CheckpointFolder(tmp_path).save(3, first.files(), first.state())
    second.load(Checkpoint(path, {"step": 3}))
    for step in range(3, 6):
        second.train_step(step)
    files = whole.files()
    assert files.keys() == second.files().keys()
    for name, tensors in second.files().items():
        assert all(torch.equal(tensor, files[name][key]) for key, tensor in tensors.items()), name


def test_a_checkpoint_is_loaded_with_its_averaged_weights(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.5)
    for step in range(4):
        trainer.train_step(step)
    CheckpointFolder(tmp_path).save(4, trainer.files(), trainer.state())
    refiner = load_trained_refiner(CheckpointFolder(tmp_path).latest(), CPU)
    assert not refiner.training
    assert not any(parameter.requires_grad for parameter in refiner.parameters())
    average = trainer.train_state.best_model.state_dict()
    assert all(torch.equal(tensor, average[name]) for name, tensor in refiner.state_dict().items())
    assert not torch.equal(average["head.weight"], trainer.model.state_dict()["head.weight"])
    CheckpointFolder(tmp_path).save(5, trainer.files(), trainer.state() | {"model": MODEL | {"features": 5}})
    with pytest.raises(UserError, match=r"step_00000005: weights don't fit the sizes in state\.json"):
        load_trained_refiner(CheckpointFolder(tmp_path).latest(), CPU)


def test_the_identity_has_what_changes_the_result_and_nothing_else(kit):
    plain = refiner_plan(config_of(kit))
    for changes in ({"learning_rate": 2e-3}, {"clip_frames": 6}, {"loss": "l1"}):
        assert refiner_plan(config_of(kit, **changes)).identity != plain.identity
    for harmless in ({"steps": 20}, {"validation_clips": 3}, {"checkpoint_every": 5}, {"accumulate": 2}):
        assert refiner_plan(config_of(kit, **harmless)).identity == plain.identity


def test_a_perceptual_network_is_an_input_by_its_content(kit, tmp_path):
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"network")
    (tmp_path / "c.pt").write_bytes(b"another")
    a, b, c = (
        refiner_plan(config_of(kit, perceptual_network=str(tmp_path / name))) for name in ("a.pt", "b.pt", "c.pt")
    )
    assert a.identity == b.identity == c.identity == refiner_plan(config_of(kit)).identity
    assert a.inputs == b.inputs
    assert len({str(plan.inputs["perceptual"]) for plan in (a, c, refiner_plan(config_of(kit)))}) == 3
