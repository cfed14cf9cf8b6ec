"""A flow's validation: its loss on fixed draws, predicted clips, and no effect on the training."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor, nn

import latent_cache
from latent_cache import SplitPlan, StoreMetadata, StoreWriter
from latent_cache.sampling.residency import USABLE_FRACTION
from pipelines.config import RiverConfig, parse_config
from pipelines.loading import weights_digest
from pipelines.prediction.pictures import BORDER, GRAY, GREEN, RED, enlargement, to_video
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.files import SEAL
from pipelines.training.flow_trainer import FlowTrainer
from pipelines.training.flow_validation import (
    FlowValidation,
    ValidationClips,
    decode,
    open_flow_validation,
    rows_at_once,
    validation_draws,
)
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.conditioning import make_draws
from stage2_flow.config import VectorFieldConfig
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField

CPU = torch.device("cpu")
SHAPE = (4, 4, 4)
RAW = Standardization.identity(4)
SCALED = Standardization(torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.5, 2.0, 4.0, 1.5]))


class Formula(nn.Module):
    """A field that is a formula of all its inputs; remembers how many rows each call had, and their distances."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.farthest = 0

    def forward(self, x_t: Tensor, reference: Tensor, condition: Tensor, distance: Tensor, t: Tensor) -> Tensor:
        self.rows.append(len(t))
        self.farthest = max(self.farthest, int(distance.max()))
        per_row = (0.1 * distance + t)[:, None, None, None]
        return 0.5 * x_t + 0.25 * reference - 0.125 * condition + per_row


class Still(nn.Module):
    """A field without motion: what is predicted is the noise that it began with."""

    def forward(self, x_t: Tensor, *others: Tensor) -> Tensor:
        return torch.zeros_like(x_t)


def network(head: str = "ln", dropout: float = 0.5) -> VectorField:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        field = VectorField(VectorFieldConfig(width=32, depth=1, mid_depth=0, heads=2, head=head, dropout=dropout), 4)
        for parameter in field.parameters():
            nn.init.normal_(parameter, std=0.2)
    return field


@dataclasses.dataclass
class Place:
    """A store of random latents and, where it was saved, the autoencoder that is said to have made them."""

    folder: Path
    model: VQGAN

    def config(self, *, seed: int = 0, evaluation: Any = None, sampling: Any = None, **training: Any) -> RiverConfig:
        return parse_config(
            {
                "seed": seed,
                "paths": {name: str(self.folder / name) for name in ("data", "latents", "runs")},
                "dataset": {"name": "toy", "source": "shapes", "image_size": 16},
                "autoencoder": {"model": self.model.config.model_dump(mode="json")},
                "flow": {"training": {"validation_pairs": 22, "clip_frames": 6} | training},
                "evaluation": {"context": 2, "horizon": 3} | (evaluation or {}),
                "sampling": sampling or {},
            },
            "a test",
        )

    def save_autoencoder(self) -> Path:
        state = {"model": self.model.config.model_dump(mode="json")}
        checkpoints = CheckpointFolder(self.folder / "runs" / "toy" / "autoencoder" / "checkpoints")
        return checkpoints.save(1, {"model": self.model.state_dict()}, state)

    def write_store(self, lengths: Sequence[int], split: str = "val", views: Sequence[str] | None = None) -> None:
        """A split `train` of one video, and another with videos of these lengths."""
        names = [f"clip-{row}" for row in range(len(lengths))]
        plans = {
            "train": SplitPlan(["a"], ["identity"], [9], SHAPE, 8),
            split: SplitPlan(names, views or ["identity"] * len(names), list(lengths), SHAPE, 8),
        }
        metadata = StoreMetadata("toy", 12.5, {}, {"sha256": weights_digest(self.model), "codes": 8}, {})
        generator = np.random.default_rng(0)
        with StoreWriter.open(self.url, metadata, plans, codes=False) as writer:
            for name, plan in plans.items():
                for chunk in plan.chunks:
                    latents = generator.standard_normal((chunk.frames, *SHAPE)).astype(np.float32)
                    writer.write_chunk(name, chunk, latents, None)
            writer.finish()

    @property
    def url(self) -> Path:
        return self.folder / "latents" / "toy.zarr"

    def open(self, **changes: Any) -> FlowValidation | None:
        return open_flow_validation(self.config(**changes), self.url, CPU)

    def clips(self, **changes: Any) -> ValidationClips:
        validation = self.open(**changes)
        assert validation is not None
        assert validation.clips is not None
        return validation.clips


@pytest.fixture
def bare(kit, tmp_path: Path) -> Place:
    """Neither store nor autoencoder."""
    return Place(tmp_path, kit.model)


@pytest.fixture
def place(bare: Place) -> Place:
    """Six videos in the val split, four of which have a whole clip."""
    bare.save_autoencoder()
    bare.write_store([9, 3, 5, 7, 2, 6])
    return bare


def test_pairs_do_not_depend_on_the_free_memory(bare: Place, monkeypatch) -> None:
    bare.write_store([9] * 20)
    batches = []
    for usable in (1.0, 0.0):
        for where in ("device", "host"):
            monkeypatch.setitem(USABLE_FRACTION, where, usable)
        batches.append(bare.open().batch)
    for one, other in zip(*(vars(batch).values() for batch in batches), strict=True):
        assert torch.equal(one, other)


def test_loss_by_hand(place):
    validation = place.open()
    batch, t = validation.batch, validation.draws.t.double().numpy()
    mean, std = (x.double().numpy()[:, None, None] for x in (SCALED.mean, SCALED.std))
    target, reference, condition = (
        (x.double().numpy() - mean) / std for x in (batch.target, batch.reference, batch.condition)
    )
    noise = validation.draws.noise.double().numpy()
    time = t[:, None, None, None]
    x_t = (1 - (1 - 1e-7) * time) * noise + time * target
    per_row = (0.1 * batch.distance.numpy() + t)[:, None, None, None]
    wrong = 0.5 * x_t + 0.25 * reference - 0.125 * condition + per_row - (target - (1 - 1e-7) * noise)
    errors = (wrong**2).mean((1, 2, 3))
    wanted = {"validation_loss": errors.mean()} | {
        f"validation_loss_t{i}": errors[(t >= i / 4) & (t < (i + 1) / 4)].mean() for i in range(4)
    }
    assert len(errors) == 22
    assert batch.distance.max() > 1
    measured = validation.measure(Formula(), SCALED)
    assert measured == pytest.approx(wanted, rel=2e-6)
    pairs = np.histogram(t, 4, (0, 1))[0]  # 22 are not four equal parts
    assert len(set(pairs)) > 1
    weighted = sum(count * measured[f"validation_loss_t{i}"] for i, count in enumerate(pairs)) / 22
    assert measured["validation_loss"] == pytest.approx(weighted, rel=1e-12)


def test_pairs_are_of_the_val_split_and_of_its_raw_latents(place):
    split = latent_cache.open(place.url, "val")
    stored = split.load().float()
    batch = place.open().batch
    for frames in (batch.target, batch.reference, batch.condition):
        assert frames.dtype == torch.float32
        assert all((stored == frame).flatten(1).all(1).any() for frame in frames)
    assert (place.open(past_horizon=2).batch.distance == 1).all()


def test_parts_of_any_size_have_the_same_loss(place):
    validation, field = place.open(), network()
    whole = validation.measure(field, SCALED)
    for size in (1, 5, 22, 100):
        parts = dataclasses.replace(validation, pairs_at_once=size)
        assert parts.measure(field, SCALED) == pytest.approx(whole, rel=1e-6)
        counting = Formula()
        parts.errors(counting, SCALED)
        assert max(counting.rows) == min(size, 22)
        assert sum(counting.rows) == 22


def test_memory_sets_the_size_of_the_parts():
    assert rows_at_once(torch.empty(5, 4, 8, 8)) == 256
    assert rows_at_once(torch.empty(5, 4, 200, 200)) == 1


def test_another_call_measures_the_same_and_another_seed_something_else(place):
    field = network()
    first = place.open().measure(field, RAW)
    assert place.open().measure(field, RAW) == first
    validation = place.open()
    assert [validation.measure(field, RAW) for _ in range(2)] == [first, first]
    assert place.open(time_sampling="logit_normal").measure(field, RAW) == first
    other = place.open(seed=1)
    assert other.measure(field, RAW)["validation_loss"] != first["validation_loss"]
    assert not torch.equal(other.batch.target, validation.batch.target)
    assert not torch.equal(other.draws.noise, validation.draws.noise)
    assert not torch.equal(other.draws.t, validation.draws.t)


def test_times_lie_one_in_each_part_in_an_order_of_their_own():
    t = validation_draws((512, 1, 1, 1), 3).t
    assert torch.equal((t.double() * 512).floor().long().sort().values, torch.arange(512))
    assert not torch.equal(t, t.sort().values)
    inside = (t.double() * 512) % 1
    assert 0.45 < inside.mean() < 0.55
    assert inside.std() > 0.25


def test_no_time_is_rounded_to_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, 1 - 2**-53, dtype=torch.float64))
    t = validation_draws((4, 1, 1, 1), 0).t
    assert t.max() < 1
    assert t.max() > 0.9999


def test_bins_without_a_pair_are_left_out(place):
    validation = place.open(validation_pairs=1)
    assert len(validation.measure(network(), RAW)) == 2


@pytest.mark.parametrize("head", ["bn", "ln"])
def test_validation_does_not_affect_the_training(place, tmp_path, head):
    field = network(head).train()
    field.project_in.eval()
    modes = [module.training for module in field.modules()]
    before = {name: tensor.clone() for name, tensor in field.state_dict().items()}
    torch.manual_seed(7)
    generator = torch.get_rng_state()
    validation = place.open()
    measured = [validation.measure(field, RAW) for _ in range(2)]
    shown = [validation.write_samples(field, RAW, step, tmp_path / "samples") for step in (1, 2)]
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in field.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in field.state_dict().items())
    assert not validation.errors(field, RAW).requires_grad
    # Dropout and the batch's own statistics would tell two calls, or parts of a batch, apart.
    assert measured[0] == measured[1] == pytest.approx(validation.measure(field.eval(), RAW))
    assert shown[0] == shown[1]


def cells(sheet: Image.Image, color: tuple[int, int, int]) -> list[np.ndarray]:
    """The frames [16, 16, 3] on a sheet that have a border of a color, row by row."""
    scale, pixels = enlargement(16), np.asarray(sheet.convert("RGB"))
    side = 16 * scale + 2 * BORDER
    # Squares of that color along all four edges; the border is several pixels wide, so each has one such place.
    edges = np.lib.stride_tricks.sliding_window_view((pixels == color).all(2), (side, side))
    found = np.argwhere(edges[..., 0, :].all(2) & edges[..., -1, :].all(2) & edges[..., :, 0].all(2))
    inside = slice(BORDER + scale // 2, side - BORDER, scale)
    return [pixels[top : top + side, left : left + side][inside, inside] for top, left in found]


def test_pictures_of_every_clip(place, tmp_path):
    validation, folder, field = place.open(), tmp_path / "flow" / "samples", network(dropout=0.0)
    clips = validation.clips
    result = validation.write_samples(field, RAW, 5000, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["step_00005000.gif", "step_00005000.png"]
    assert 0 < result["validation_sample_psnr"] < 60
    assert clips.names == ["clip-0", "clip-2", "clip-3", "clip-5"]
    # Per clip two rows: given and true frames; the same given and predicted frames.
    predicted = decode(place.model, clips.predict(field, RAW), CPU)
    with Image.open(folder / "step_00005000.png") as sheet:
        given = cells(sheet, GREEN)
        assert np.array_equal(cells(sheet, GRAY), to_video(clips.truth[:, 2:].flatten(0, 1)))
        assert np.array_equal(cells(sheet, RED), to_video(predicted.flatten(0, 1)))
    assert np.array_equal(given, to_video(clips.truth[:, [0, 1, 0, 1]].flatten(0, 1)))
    with Image.open(folder / "step_00005000.gif") as moving:
        assert [frame.info["duration"] for frame in ImageSequence.Iterator(moving)] == [80] * 4 + [1000]


def test_samples_are_compared_with_the_decoded_latents_of_the_store(place, tmp_path, monkeypatch):
    clips = place.clips()
    stored = latent_cache.open(place.url, "val")
    for number, name in enumerate(clips.names):
        latents = torch.from_numpy(stored.video(name)[:5]).float()
        assert torch.equal(clips.latents[number], latents)
        torch.testing.assert_close(clips.truth[number], place.model.decode(latents).clamp(-1, 1))
    monkeypatch.setattr(ValidationClips, "predict", lambda clips, *_: clips.latents[:, 2:])
    assert clips.write(Still(), RAW, 1, tmp_path) == {"validation_sample_psnr": 100}
    monkeypatch.setattr(ValidationClips, "predict", lambda clips, *_: clips.latents[:, :3])
    frames = clips.truth.double().numpy()
    errors = ((frames[:, :3] - frames[:, 2:]) ** 2).mean((2, 3, 4))
    by_hand = (10 * np.log10(4 / errors)).mean()
    assert clips.write(Still(), RAW, 1, tmp_path)["validation_sample_psnr"] == pytest.approx(by_hand, rel=1e-5)


def test_a_field_without_motion_predicts_its_noise_on_the_scale_of_the_store(place):
    clips = place.clips(sampling={"seed": 5})
    assert clips.keys == [0, 2, 3, 5]
    noise = make_draws(5, [(key, 0) for key in clips.keys], 3, 10, 2, SHAPE, None, CPU).noise.transpose(0, 1)
    torch.testing.assert_close(clips.predict(Still(), SCALED), SCALED.to_raw(noise))


def test_given_frames_reach_the_field_standardized(place):
    class Recorder(Still):
        def forward(self, x_t: Tensor, reference: Tensor, condition: Tensor, *others: Tensor) -> Tensor:
            self.reference = getattr(self, "reference", reference)
            return super().forward(x_t)

    field, clips = Recorder(), place.clips()
    clips.predict(field, SCALED)
    torch.testing.assert_close(field.reference, SCALED.to_final(clips.latents[:, 1]))


def test_the_run_decides_seed_and_past_horizon_of_predictions_and_nothing_else(place):
    field = network(dropout=0.0)
    usual = place.clips().predict(field, RAW)
    other = {"preset": "official", "solver": "rk4", "steps": 50, "warm_start": 0.5}
    assert torch.equal(place.clips(sampling=other).predict(field, RAW), usual)
    assert not torch.equal(place.clips(sampling={"seed": 1}).predict(field, RAW), usual)
    far, near = Formula(), Formula()
    place.clips().predict(far, RAW)
    place.clips(sampling={"past_horizon": 2}).predict(near, RAW)
    assert len(far.rows) == 3 * 10  # Euler: ten evaluations a frame
    assert (far.farthest, near.farthest) == (3, 1)
    trained = Formula()
    place.clips(clip_frames=4).predict(trained, RAW)
    assert trained.farthest == 2  # the field learns no distance beyond


def test_a_clip_is_predicted_alike_among_many_and_few_and_in_parts(place, monkeypatch):
    field = network(dropout=0.0)
    all_clips, two = place.clips(validation_samples=100), place.clips(validation_samples=2)
    assert all_clips.names == ["clip-0", "clip-2", "clip-3", "clip-5"]
    assert two.names == ["clip-0", "clip-5"]
    predicted = all_clips.predict(field, RAW)
    torch.testing.assert_close(two.predict(field, RAW), predicted[[0, 3]], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("pipelines.training.flow_validation.TOKENS_AT_ONCE", 3 * 16)
    monkeypatch.setattr("pipelines.training.flow_validation.PIXELS_AT_ONCE", 3 * 16 * 16)
    counting = Formula()
    all_clips.predict(counting, RAW)
    assert set(counting.rows) == {3, 1}
    torch.testing.assert_close(all_clips.predict(field, RAW), predicted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(place.clips(validation_samples=100).truth, all_clips.truth)


@pytest.mark.parametrize(
    ("lengths", "views", "evaluation", "names", "frames", "message"),
    [
        ([9, 3, 5, 7], None, {}, ["clip-0", "clip-2", "clip-3"], 5, ""),
        ([4, 2, 6, 3], None, {"horizon": 30}, ["clip-0", "clip-2", "clip-3"], 3, "1 instead of 30 frames"),
        ([3, 2], None, {}, ["clip-0"], 3, "1 instead of 3 frames"),
        ([9, 6], None, {"context": 1, "horizon": 4}, ["clip-0", "clip-1"], 5, ""),
        ([6, 9, 6, 9], ["identity", "hflip"] * 2, {}, ["clip-0", "clip-2"], 5, ""),
        ([4, 9], ["identity", "hflip"], {}, ["clip-0"], 4, "2 instead of 3 frames"),
    ],
    ids=["long enough", "all too short", "three frames", "one given", "augmented", "augmented are longer"],
)
def test_clips_of_the_videos_that_are_long_enough(
    bare, tmp_path, capsys, lengths, views, evaluation, names, frames, message
):
    bare.save_autoencoder()
    bare.write_store(lengths, views=views)
    validation = bare.open(evaluation=evaluation)
    assert (validation.clips.names, validation.clips.latents.shape[1]) == (names, frames)
    said = capsys.readouterr().out
    assert (message in said and "evaluation.horizon" in said) if message else said == ""
    assert "validation_sample_psnr" in validation.write_samples(network(), RAW, 1, tmp_path)


@pytest.mark.parametrize("shown", [True, False])
def test_training_reports_loss_and_clips(place, tmp_path, capsys, shown):
    split = latent_cache.open(place.url, "train")
    small = {"width": 32, "depth": 1, "mid_depth": 0, "heads": 2}
    config = place.config()
    flow = config.flow.model_copy(update={"model": VectorFieldConfig(**small)})
    folder = tmp_path / "samples" if shown else None
    trainer = FlowTrainer(
        config.model_copy(update={"flow": flow}), CPU, split, None, validation=place.open(), samples=folder
    )
    measured = trainer.validate(7)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"flow: step 7: validation loss {measured['validation_loss']:.4f}")
    assert ("validation_sample_psnr" in measured) == shown
    if shown:
        assert line.endswith(f", predicted clips {measured['validation_sample_psnr']:.2f} dB")
        assert (folder / "step_00000007.png").is_file()


def nothing_to_see(validation: FlowValidation | None, folder: Path) -> bool:
    """A loss is measured and no picture made."""
    assert validation is not None
    assert "validation_loss" in validation.measure(Formula(), RAW)
    return validation.write_samples(Formula(), RAW, 1, folder) == {} and not folder.exists()


def test_videos_shorter_than_the_context_are_not_predicted(place, tmp_path, capsys):
    assert nothing_to_see(place.open(evaluation={"context": 9}), tmp_path / "samples")
    (line,) = capsys.readouterr().out.splitlines()
    assert "evaluation.context is 9" in line
    assert "has 9 frames" in line


def test_no_clips_are_wanted(bare, tmp_path, capsys):
    bare.write_store([9, 6])
    assert nothing_to_see(bare.open(validation_samples=0), tmp_path / "samples")
    assert capsys.readouterr().out == ""  # the missing autoencoder is not needed


def test_without_the_autoencoder_there_are_no_pictures(bare, tmp_path, capsys):
    bare.write_store([9, 6])
    assert nothing_to_see(bare.open(), tmp_path / "samples")
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/runs/toy/autoencoder" in line


def test_another_autoencoder_is_named_and_not_used(place, tmp_path, capsys):
    encoder = weights_digest(place.model)
    place.model.quantizer.embedding.weight.add_(1)
    path = place.save_autoencoder()
    assert nothing_to_see(place.open(), tmp_path / "samples")
    (line,) = capsys.readouterr().out.splitlines()
    for part in (str(place.url), encoder[:12], str(path), weights_digest(place.model)[:12], "encode --overwrite"):
        assert part in line


def test_a_damaged_autoencoder_does_not_stop_the_training(place, tmp_path, capsys):
    state = place.save_autoencoder() / "state.json"
    content = json.loads(state.read_text())
    del content[SEAL]
    content["model"]["channels"] = 16
    state.write_text(json.dumps(content))
    assert nothing_to_see(place.open(), tmp_path / "samples")
    (line,) = capsys.readouterr().out.splitlines()
    assert "don't fit the sizes in state.json" in line


@pytest.mark.parametrize(
    ("lengths", "split", "said"),
    [([9], "test", "has no val split (dataset.splits"), ([2, 1], "val", "has 2")],
)
def test_without_videos_there_is_no_validation(bare, capsys, lengths, split, said):
    bare.write_store(lengths, split)
    assert bare.open() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"flow: no validation: {bare.url}")
    assert said in line


def test_a_field_that_predicts_nan(place, tmp_path):
    class Wild(Still):
        def forward(self, x_t: Tensor, *others: Tensor) -> Tensor:
            return torch.full_like(x_t, torch.nan)

    validation = place.open()
    assert np.isnan(validation.measure(Wild(), RAW)["validation_loss"])
    assert 0 < validation.write_samples(Wild(), RAW, 1, tmp_path)["validation_sample_psnr"] < 100
