"""The Python API, with tiny random networks."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.config import dump_config, parse_config
from pipelines.errors import UserError
from pipelines.loading import weights_digest
from pipelines.prediction.rollouts import with_matrices_in
from pipelines.predictor import VideoPredictor, to_video
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.context import sampling_precision
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.rollout import Rollout
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField

AUTOENCODER = VQGANConfig(
    channels=8,
    channel_multipliers=(1, 2, 2),
    blocks=1,
    decoder_blocks=1,
    attention_resolutions=(),
    codes=64,
    norm_groups=4,
)
FIELD = VectorFieldConfig(width=16, depth=1, mid_depth=0, heads=2)
MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 3.0]


def networks() -> tuple[VQGAN, VectorField]:
    torch.manual_seed(0)
    autoencoder, field = VQGAN(AUTOENCODER), VectorField(FIELD, 4)
    for parameter in (*autoencoder.parameters(), *field.parameters()):
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return autoencoder.eval(), field.eval()


def predictor(**sampling) -> VideoPredictor:
    autoencoder, field = networks()
    return VideoPredictor(
        autoencoder=autoencoder,
        vector_field=field,
        standardization=Standardization(torch.tensor(MEAN), torch.tensor(STD)),
        sampling=SamplingConfig(**{"solver": "euler", "steps": 2, **sampling}),
        fps=10.0,
        device=torch.device("cpu"),
    )


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def tiny() -> VideoPredictor:
    return predictor()


@pytest.mark.parametrize("context", [1, 2, 3])
def test_frames_come_out_in_shape_and_range(tiny, context):
    frames = tiny.generate_frames(images(2, context), num_frames=3)
    assert frames.shape == (2, context + 3, 3, 16, 16)
    assert frames.dtype == torch.float32
    assert frames.min() >= -1
    assert frames.max() <= 1
    assert frames.isfinite().all()


def test_the_context_comes_back_reconstructed(tiny):
    context = images(2, 2)
    frames = tiny.generate_frames(context, num_frames=1)
    with torch.no_grad():
        expected = tiny.autoencoder.decode(tiny.autoencoder.encode(context.flatten(0, 1))).clamp(-1, 1)
    torch.testing.assert_close(frames[:, :2].flatten(0, 1), expected, atol=1e-5, rtol=0)
    assert (frames[:, :2] - context).abs().max() > 0.1


def test_latents_of_the_context_come_back_exactly(tiny):
    context = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    latents = tiny.generate_latents(context, 2)
    assert latents.shape == (2, 5, 4, 4, 4)
    assert torch.equal(latents[:, :3], context)
    assert not torch.allclose(latents[:, 3], latents[:, 4])


def test_the_field_sees_standardised_latents():
    seen = []

    class Still(nn.Module):
        def forward(self, x_t, reference, condition, distance, t):
            seen.append((x_t, reference))
            return torch.zeros_like(x_t)

    still = dataclasses.replace(predictor(steps=1), vector_field=Still())
    context, noise = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 1, 4, 4, 4)
    latents = still.generate_latents(context, 1, noise=noise)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(seen[0][1], (context[:, -1] - mean) / std)
    # Nothing moves where the velocity is zero: noise comes out, as a raw latent.
    torch.testing.assert_close(latents[:, 2], noise[0] * std + mean)


def test_a_prediction_does_not_depend_on_its_batch(tiny):
    batch = images(3, 2)
    together = tiny.generate_frames(batch, 2, keys=[(7, 0), (8, 0), (9, 1)])
    alone = tiny.generate_frames(batch[2:], 2, keys=[(9, 1)])
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=0)
    other = tiny.generate_frames(batch[2:], 2, keys=[(9, 2)])
    assert (other[:, 2:] - alone[:, 2:]).abs().max() > 1e-3
    torch.testing.assert_close(other[:, :2], alone[:, :2])


def test_rows_are_keyed_by_their_number_unless_told(tiny):
    context = torch.randn(2, 2, 4, 4, 4)
    default = tiny.generate_latents(context, 1)
    assert torch.equal(default, tiny.generate_latents(context, 1, keys=[(0, 0), (1, 0)]))
    assert torch.equal(default, tiny.generate_latents(context, 1))
    assert not torch.equal(default, tiny.generate_latents(context, 1, sampling={"seed": 1}))


def test_samples_of_a_video_follow_one_another(tiny):
    clips = images(2, 2)
    several = tiny.generate_frames(clips, 2, samples=3, keys=[(5, 0), (8, 4)])
    assert several.shape == (6, 4, 3, 16, 16)
    keys = [(5, 0), (5, 1), (5, 2), (8, 4), (8, 5), (8, 6)]
    one_by_one = tiny.generate_frames(clips.repeat_interleave(3, dim=0), 2, keys=keys)
    torch.testing.assert_close(several, one_by_one)
    assert not torch.equal(several[0], several[1])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_batch_size_changes_no_prediction(tiny, size):
    context = torch.randn(5, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = tiny.generate_latents(context, 3)
    latents = tiny.generate_latents(context, 3, sampling={"batch_size": size})
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_that_does_not_fit_is_made_smaller(monkeypatch, capsys):
    def run(rollout, context, draws, **others):
        if len(context) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(rollout, context, draws, **others)

    original, context, fresh = Rollout.run, torch.randn(5, 2, 4, 4, 4), predictor()
    expected = fresh.generate_latents(context, 2)
    monkeypatch.setattr(Rollout, "run", run)
    torch.testing.assert_close(fresh.generate_latents(context, 2), expected, atol=1e-5, rtol=1e-5)
    said = capsys.readouterr().err
    assert "32 clips at once don't fit into memory; going on with 16" in said
    assert said.count("don't fit") == 4  # 32, 16, 8, 4
    with pytest.raises(UserError, match=r"out of memory with sampling\.batch_size 4: lower it"):
        fresh.generate_latents(context, 2, sampling={"batch_size": 4})


def test_precision_of_a_rollout_is_its_own(tiny):
    context = torch.randn(2, 2, 4, 4, 4)
    exact = tiny.generate_latents(context, 2)
    before = torch.get_float32_matmul_precision()
    rounded = tiny.generate_latents(context, 2, sampling={"precision": "bf16"})
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(tiny.generate_latents(context, 2), exact)
    assert {parameter.dtype for parameter in tiny.vector_field.parameters()} == {torch.float32}


def test_bf16_matrices_are_those_of_autocast(tiny):
    field = tiny.vector_field
    copied = with_matrices_in(field, torch.bfloat16)
    inputs = (*torch.randn(3, 2, 4, 4, 4), torch.tensor([1, 5]), torch.rand(2))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, time = torch.randn(2, 16, 16), torch.randn(2, 16)
        assert torch.equal(copied.trunk(tokens, time, 4, 4), field.trunk(tokens, time, 4, 4))
        assert field(*inputs).isfinite().all()
    assert copied.in_blocks[0].linear1.weight.dtype == torch.bfloat16
    assert copied.in_blocks[0].norm1.weight.dtype == torch.float32
    assert copied.project_in["1"].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [({}, "cpu", "fp32"), ({}, "cuda", "bf16"), ({"preset": "official"}, "cuda", "fp32"),
     ({"precision": "tf32"}, "cuda", "tf32"),
     ({"preset": "official", "precision": "bf16"}, "cpu", "bf16")],
)  # fmt: skip
def test_sampling_precision(monkeypatch, options, device, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert sampling_precision(SamplingConfig(**options), torch.device(device)) == expected


def test_frames_are_counted_over_all_batches(tiny, monkeypatch):
    counted = []
    monkeypatch.setattr(
        "pipelines.predictor.progress", lambda **how: SimpleNamespace(update=counted.append, close=lambda: None)
    )
    tiny.generate_latents(torch.randn(5, 2, 4, 4, 4), 3, sampling={"batch_size": 2}, verbose=True)
    assert counted == [2, 2, 2, 2, 2, 2, 1, 1, 1]


def test_samples_are_refined_with_their_own_context(tiny):
    """The refiner sees the real frame before the prediction: that of each sample's video."""

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.previous = nn.Conv2d(6, 3, 1), []

        def forward(self, previous, frame):
            self.previous.append(previous)
            return frame

    refiner, clips = Seen(), images(2, 2)
    dataclasses.replace(tiny, refiner=refiner).generate_frames(clips, 1, samples=2, refine=True)
    torch.testing.assert_close(refiner.previous[0], clips[[0, 0, 1, 1], -1])


def test_options_of_conditions_reach_the_draws(tiny):
    context = torch.randn(1, 12, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    usual = tiny.generate_latents(context, 1, sampling={"steps": 8})
    for options in ({"condition": "per-frame"}, {"past_horizon": 2}):
        changed = tiny.generate_latents(context, 1, sampling={"steps": 8} | options)
        assert not torch.equal(changed[:, -1], usual[:, -1]), options


def test_more_frames_than_it_was_trained_on(tiny):
    assert tiny.generate_latents(torch.randn(1, 2, 4, 4, 4), 60).shape == (1, 62, 4, 4, 4)


def test_cuda_graphs_need_a_gpu(tiny):
    with pytest.raises(UserError, match="cuda_graphs: true: the device is cpu; leave it at auto"):
        tiny.generate_latents(torch.randn(1, 2, 4, 4, 4), 1, sampling={"cuda_graphs": True})


def test_recorded_draws_can_be_replayed(tiny):
    context = torch.randn(2, 3, 4, 4, 4)
    noise, conditions = torch.randn(2, 2, 4, 4, 4), torch.zeros(2, 2, 2, dtype=torch.int64)
    replayed = tiny.generate_latents(context, 2, noise=noise, condition_indices=conditions)
    assert torch.equal(
        replayed, tiny.generate_latents(context, 2, noise=noise, condition_indices=conditions, sampling={"seed": 5})
    )
    assert not torch.equal(replayed, tiny.generate_latents(context, 2, noise=noise, condition_indices=conditions + 1))


def test_sampling_options_change_the_prediction_for_one_call(tiny):
    context = torch.randn(1, 2, 4, 4, 4)
    default = tiny.generate_latents(context, 1)
    for changes in ({"steps": 3}, {"solver": "midpoint"}, {"warm_start": 0.5}, SamplingConfig(steps=4)):
        assert not torch.equal(default, tiny.generate_latents(context, 1, sampling=changes))
    assert torch.equal(default, tiny.generate_latents(context, 1, sampling={"steps": 2}))
    assert torch.equal(default, tiny.generate_latents(context, 1))


def test_a_preset_replaces_solver_and_steps_of_the_run_and_nothing_else():
    run = predictor(solver="heun", steps=7, warm_start=0.25, past_horizon=5, seed=3)
    changed = run.sampling_with({"preset": "official"})
    assert changed == SamplingConfig(preset="official", warm_start=0.25, past_horizon=5, seed=3)
    assert run.sampling_with({"preset": "official", "steps": 10}).steps == 10
    assert run.sampling_with({"steps": 9}) == run.sampling.model_copy(update={"steps": 9})
    assert run.sampling_with(None) == run.sampling
    assert run.sampling_with({"nfe": 20}).nfe == 20
    counted = predictor(nfe=8)
    assert counted.sampling_with({"steps": 3}).nfe is None
    assert counted.sampling_with({"preset": "official"}).nfe is None


def test_the_official_preset_predicts(tiny):
    latents = tiny.generate_latents(torch.randn(1, 2, 4, 4, 4), 1, sampling={"preset": "official", "steps": 4})
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 3}, "step: Extra inputs are not permitted"),
        ({"steps": 0}, "steps: Input should be greater than 0"),
        ({"solver": "eular"}, "solver: Input should be 'euler'"),
        ({"preset": "official", "steps": 1}, "needs at least 2"),
    ],
)
def test_bad_sampling_options_are_refused(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        tiny.generate_latents(torch.randn(1, 2, 4, 4, 4), 1, sampling=changes)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: images(1, 2) * 127.5, r"\[-1, 1\].*x / 127.5 - 1"),
        (lambda: images(1, 2) * float("nan"), r"\[-1, 1\]"),
        (lambda: torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8), "floats, not .* of torch.uint8"),
        (lambda: images(1, 2)[:, :, :1], r"must be \[b, n, 3, h, w\], not \[1, 2, 1, 16, 16\]"),
        (lambda: images(1, 2)[0], r"not \[2, 3, 16, 16\]"),
        (lambda: images(1, 0), "at least one frame"),
        (lambda: images(1, 2)[..., :15], "16x15 can't be encoded.*factor 4"),
    ],
)
def test_bad_images_are_refused(tiny, made, message):
    with pytest.raises(UserError, match=message):
        tiny.generate_frames(made(), 2)


def test_no_frames_to_predict_and_wrong_keys_are_refused(tiny):
    with pytest.raises(UserError, match="at least 1 frame"):
        tiny.generate_frames(images(1, 2), 0)
    with pytest.raises(UserError):
        tiny.generate_frames(images(2, 2), 1, keys=[(0, 0)])
    with pytest.raises(UserError, match=r"context must be \[b, n, c, h, w\]"):
        tiny.generate_latents(torch.zeros(2, 4, 4, 4), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_float_types_are_taken(tiny, dtype):
    frames = tiny.generate_frames(images(1, 2).to(dtype), 1)
    torch.testing.assert_close(frames, tiny.generate_frames(images(1, 2), 1), atol=0.1, rtol=0)


def test_more_frames_than_go_through_at_once(tiny):
    clips = images(2, 40)
    encoded = tiny.encode_videos(clips)
    assert encoded.shape == (2, 40, 4, 4, 4)
    torch.testing.assert_close(encoded[1, 30], tiny.encode_videos(clips[1:, 30:31])[0, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        tiny.decode_videos(encoded)[1, 30], tiny.decode_videos(encoded[1:, 30:31])[0, 0], atol=1e-4, rtol=0
    )


def test_to_video_is_the_inverse_of_reading_pixels():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    video = to_video(image_to_unit(pixels))
    assert video.dtype == np.uint8
    assert video.shape == (1, 1, 16, 16, 3)
    assert (video == pixels.numpy()).all()


def test_to_video_rounds_to_the_nearest_and_clamps():
    values = torch.tensor([-9.0, -1.0, 0.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 1.0, 9.0])
    frames = values.reshape(1, 1, 1, 1, 7).expand(1, 1, 3, 1, 7)
    # 0.0 lies half way, at 127.5, and goes to the even 128.
    assert to_video(frames)[0, 0, 0, :, 0].tolist() == [0, 0, 128, 100, 101, 255, 255]
    assert to_video(frames.bfloat16().requires_grad_()).dtype == np.uint8


def save_run(folder, *, ema: bool = False, digest: str | None = None, fields: dict | None = None):
    """A run folder as the trainings write it; gives the networks that prediction should use."""
    autoencoder, field = networks()
    config = parse_config(
        {"dataset": {"name": "toy", "source": "shapes", "image_size": 16}, "sampling": {"steps": 3, "solver": "heun"},
         "autoencoder": {"model": AUTOENCODER.model_dump()}, "flow": {"model": FIELD.model_dump()}},
        "test",
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    CheckpointFolder(folder / "autoencoder" / "checkpoints").save(
        5, {"model": autoencoder.state_dict()}, {"model": AUTOENCODER.model_dump(mode="json")}
    )
    files = {"model": field.state_dict()}
    if ema:
        files["ema"] = {name: tensor + 0.01 for name, tensor in field.state_dict().items()}
    state = {
        "model": FIELD.model_dump(mode="json"),
        "latent_shape": [4, 4, 4],
        "standardization": {"mean": MEAN, "std": STD},
        "fps": 12.5,
        "store": {"autoencoder": digest or weights_digest(autoencoder)},
    }
    CheckpointFolder(folder / "flow" / "checkpoints").save(7, files, state | (fields or {}))
    return autoencoder, field


def test_a_run_is_loaded_as_it_was_trained(tmp_path):
    autoencoder, field = save_run(tmp_path / "run")
    loaded = VideoPredictor.from_run(tmp_path / "run", device="cpu")
    assert (loaded.fps, loaded.sampling.steps, loaded.sampling.solver) == (12.5, 3, "heun")
    assert loaded.standardization.mean.tolist() == MEAN
    assert loaded.standardization.std.tolist() == STD
    assert not loaded.autoencoder.training
    assert not loaded.vector_field.training
    for ours, theirs in ((loaded.autoencoder, autoencoder), (loaded.vector_field, field)):
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert loaded.generate_frames(images(1, 1), 2).shape == (1, 3, 3, 16, 16)


def test_averaged_weights_are_taken_where_there_are_any(tmp_path):
    _, field = save_run(tmp_path / "run", ema=True)
    loaded = VideoPredictor.from_run(tmp_path / "run", device="cpu").vector_field.state_dict()
    assert all(torch.equal(loaded[name], tensor + 0.01) for name, tensor in field.state_dict().items())


def test_raw_weights_are_taken_where_they_are_asked_for(tmp_path):
    _, field = save_run(tmp_path / "run", ema=True)
    raw = VideoPredictor.from_run(tmp_path / "run", device="cpu", weights="raw")
    loaded = raw.vector_field.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in field.state_dict().items())
    with pytest.raises(UserError, match=r"chosen when they are loaded: .*from_run\(\.\.\., weights='ema'\)"):
        raw.generate_latents(torch.randn(1, 2, 4, 4, 4), 1, sampling={"weights": "ema"})


def test_another_autoencoder_is_refused(tmp_path):
    save_run(tmp_path / "run", digest="0" * 64)
    with pytest.raises(
        UserError, match=r"trained on latents of autoencoder 000000000000\.\.\., but .*train the flow again"
    ):
        VideoPredictor.from_run(tmp_path / "run", device="cpu")


def test_incomplete_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing/flow/checkpoints holds no checkpoint; `make train-flow` makes one"):
        VideoPredictor.from_run(tmp_path / "nothing", device="cpu")
    save_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"config.yaml: missing or unreadable"):
        VideoPredictor.from_run(tmp_path / "run", device="cpu")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config.yaml: missing or unreadable"):
        VideoPredictor.from_run(tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="--device toaster"):
        VideoPredictor.from_run(tmp_path / "run", device="toaster")


def test_weights_of_other_sizes_are_refused(tmp_path):
    save_run(tmp_path / "run", fields={"model": FIELD.model_dump(mode="json") | {"width": 32}})
    with pytest.raises(UserError, match=r"step_00000007: weights don't fit the sizes in state.json"):
        VideoPredictor.from_run(tmp_path / "run", device="cpu")


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    save_run(tmp_path / "run")
    flow = tmp_path / "run" / "flow" / "checkpoints"
    state = json.loads((flow / "step_00000007" / "state.json").read_text())
    (flow / "step_00000009").mkdir()
    (flow / "step_00000009" / "state.json").write_text(json.dumps(state | {"step": 9}))
    assert VideoPredictor.from_run(tmp_path / "run", device="cpu").fps == 12.5
