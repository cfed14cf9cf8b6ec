"""The Python API, with tiny random networks."""

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.config import dump_config, parse_config
from pipelines.errors import UserError
from pipelines.loading import weights_digest
from pipelines.prediction.detail import restore_detail
from pipelines.predictor import VideoPredictor, to_video
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.context import sampling_precision
from pipelines.runtime.files import write_json
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField
from tests.pipelines.evaluation.study.test_sampler_study import point, study

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


def test_a_prediction_has_the_threads_that_were_fastest_and_others_keep_theirs(monkeypatch):
    predicting, threads, used = predictor(), [5], set()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    expected = predicting.generate_frames(images(1, 1), 1)
    monkeypatch.setattr("pipelines.predictor.fastest_threads", lambda work, clips: work(clips) or 7)
    for part in (predicting.vector_field.project_out["4"], predicting.autoencoder.encoder.conv_in):
        part.register_forward_hook(lambda *_: used.add(torch.get_num_threads()))
    predicting.choose_threads(1)
    used.clear()
    torch.testing.assert_close(predicting.generate_frames(images(1, 1), 1), expected)
    assert (used, threads[-1]) == ({7}, 5)
    assert "7" in predicting.describe_threads()


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_context_is_reconstructed_and_frames_follow(tiny, context):
    given = images(2, context)
    frames = tiny.generate_frames(given, num_frames=3)
    assert frames.shape == (2, context + 3, 3, 16, 16)
    assert frames.dtype == torch.float32
    assert frames.abs().max() <= 1
    with torch.no_grad():
        expected = tiny.autoencoder.decode(tiny.autoencoder.encode(given.flatten(0, 1))).clamp(-1, 1)
    torch.testing.assert_close(frames[:, :context].flatten(0, 1), expected, atol=1e-5, rtol=0)


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
    assert not torch.equal(default, tiny.generate_latents(context, 1, sampling={"seed": 1}))


def test_samples_of_a_video_follow_one_another(tiny):
    clips = images(2, 2)
    several = tiny.generate_frames(clips, 2, samples=3, keys=[(5, 0), (8, 4)])
    assert several.shape == (6, 4, 3, 16, 16)
    keys = [(5, 0), (5, 1), (5, 2), (8, 4), (8, 5), (8, 6)]
    one_by_one = tiny.generate_frames(clips.repeat_interleave(3, dim=0), 2, keys=keys)
    torch.testing.assert_close(several, one_by_one)
    assert not torch.equal(several[0], several[1])


@pytest.mark.parametrize("size", [1, 2])
def test_the_batch_size_changes_no_prediction(tiny, size):
    context = torch.randn(5, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = tiny.generate_latents(context, 3)
    latents = tiny.generate_latents(context, 3, sampling={"batch_size": size})
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


class TwoAtMost(nn.Module):
    """A field for which larger batches do not fit into memory."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, x_t: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.field(x_t, *others)


def test_a_batch_that_does_not_fit_is_made_smaller(tiny, capsys):
    context = torch.randn(5, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    limited = dataclasses.replace(tiny, vector_field=TwoAtMost(tiny.vector_field))
    torch.testing.assert_close(limited.generate_latents(context, 2), tiny.generate_latents(context, 2))
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "5 clips" in said
    with pytest.raises(UserError, match=r"sampling\.batch_size 4"):
        limited.generate_latents(context, 2, sampling={"batch_size": 4})
    with pytest.raises(UserError, match="3 rows"):
        next(limited.stream(images(3, 2)))


def test_precision_of_a_rollout_is_its_own(tiny):
    context = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = tiny.generate_latents(context, 2)
    before = torch.get_float32_matmul_precision()
    rounded = tiny.generate_latents(context, 2, sampling={"precision": "bf16"})
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    # A bf16 matrix product is off by up to 2^-8 of its size, and errors of a dozen of them add up.
    assert (rounded - exact).norm() < 12 * 2**-8 * exact.norm()
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(tiny.generate_latents(context, 2), exact)
    assert {parameter.dtype for parameter in tiny.vector_field.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [({}, "cpu", "fp32"), ({}, "cuda", "bf16"), ({}, "old cuda", "fp32"), ({"preset": "official"}, "cuda", "fp32"),
     ({"precision": "tf32"}, "cuda", "tf32"),
     ({"preset": "official", "precision": "bf16"}, "cpu", "bf16"), ({"precision": "bf16"}, "old cuda", "bf16")],
)  # fmt: skip
def test_sampling_precision(monkeypatch, options, device, expected):
    """PyTorch emulates bf16 on GPUs that do not compute in it, and counts that as support."""
    *old, device = device.split()
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: not old or including_emulation
    )
    assert sampling_precision(SamplingConfig(**options), torch.device(device)) == expected


def test_options_of_conditions_reach_the_draws(tiny):
    context = torch.randn(1, 12, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    usual = tiny.generate_latents(context, 1, sampling={"steps": 8})
    for options in ({"condition": "per-frame"}, {"past_horizon": 2}):
        changed = tiny.generate_latents(context, 1, sampling={"steps": 8} | options)
        assert not torch.equal(changed[:, -1], usual[:, -1]), options


def test_conditions_are_not_farther_away_than_in_training(tiny, capsys):
    """A rollout of 2 + 6 frames, whose last one could have a condition 6 frames before its reference."""
    context = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(3))

    class Distances(nn.Module):
        def forward(self, x_t, reference, condition, distance, t):
            seen.append(int(distance.max()))
            return torch.zeros_like(x_t)

    seen: list[int] = []
    far = dataclasses.replace(tiny, vector_field=Distances(), longest_distance=6)
    trained = dataclasses.replace(tiny, vector_field=Distances(), longest_distance=3)
    several = {"steps": 16}
    far.generate_latents(context, 6, sampling=several)
    assert max(seen) == 6
    assert capsys.readouterr().out == ""

    for _ in range(2):  # it is said once
        seen.clear()
        trained.generate_latents(context, 6, sampling=several)
        assert (min(seen), max(seen)) == (1, 3)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert re.search(r"last 4 frames", said)
    trained.generate_latents(context, 3, sampling=several)
    trained.generate_latents(context, 6, sampling=several | {"past_horizon": 2})
    assert capsys.readouterr().out == ""

    # As the official code does; and draws that are given are used as they are.
    for options in ({"sampling": {"preset": "official"}},
                    {"sampling": several, "condition_indices": torch.zeros(6, 16, 1, dtype=torch.int64)}):  # fmt: skip
        seen.clear()
        trained.generate_latents(context, 6, **options)
        assert max(seen) == 6


def test_a_short_rollout_begins_a_longer_one_of_limited_distances(tiny):
    context = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    limited = dataclasses.replace(tiny, longest_distance=3)
    torch.testing.assert_close(limited.generate_latents(context, 8)[:, :5], limited.generate_latents(context, 3))


def test_frames_of_another_size_than_in_training(tiny, capsys):
    """Sides up to the trained ones have trained position codes; beyond them that is said, once for each size."""
    trained = dataclasses.replace(tiny, trained_grid=(3, 4))
    frames = trained.generate_frames(torch.zeros(1, 2, 3, 8, 16), 1)
    assert frames.shape == (1, 3, 3, 8, 16)
    assert capsys.readouterr().out == ""
    for _ in range(2):
        assert trained.generate_frames(torch.zeros(1, 2, 3, 12, 20), 1).shape == (1, 3, 3, 12, 20)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert re.search("3x5.*3x4", said)
    tiny.generate_frames(torch.zeros(1, 2, 3, 12, 20), 1)  # of official files nothing is known
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"1x513.*512"):
        tiny.generate_latents(torch.zeros(1, 2, 4, 1, 513), 1)


class Brighter(nn.Module):
    """A refiner that adds a step to the decoded frame, beyond [-1, 1], and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 1, 1)  # its dtype is that of the network
        self.given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, previous: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        self.given.append((previous, decoded))
        return decoded + 0.5


@pytest.mark.parametrize("context", [1, 3])
def test_predicted_frames_are_refined_only_when_asked(context):
    predicting = dataclasses.replace(predictor(), refiner=Brighter())
    # Decoded frames leave [-1, 1].
    nn.init.normal_(predicting.autoencoder.decoder.conv_out.bias, std=1.0, generator=torch.Generator().manual_seed(0))
    clips = images(2, context)
    plain = predicting.generate_frames(clips, 2)
    assert not predicting.refiner.given
    refined = predicting.generate_frames(clips, 2, refine=True)
    assert torch.equal(refined[:, :context], plain[:, :context])  # the reconstructed context
    assert (refined[:, context:] - plain[:, context:]).abs().amax() > 0.1
    (first, decoded), (second, _) = predicting.refiner.given
    assert torch.equal(first, clips[:, -1])  # the real frame, not its reconstruction
    assert torch.equal(second, decoded + 0.5)
    assert decoded.abs().amax() > 1.001  # not clamped
    torch.testing.assert_close(decoded.clamp(-1, 1), plain[:, context])


def test_samples_are_refined_with_the_context_of_their_video(tiny):
    refiner, clips = Brighter(), images(2, 2)
    dataclasses.replace(tiny, refiner=refiner).generate_frames(clips, 1, samples=2, refine=True)
    torch.testing.assert_close(refiner.given[0][0], clips[[0, 0, 1, 1], -1])


class Darker(torch.nn.Module):
    """A fast decoder that returns half of what the autoencoder's does."""

    def __init__(self, autoencoder: torch.nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode_quantized(quantized).clamp(-1, 1) / 2


@pytest.mark.parametrize("decoder", ["full", "fast"])
@pytest.mark.parametrize("detail", [False, True])
def test_predictions_are_decoded_with_the_given_frames(detail, decoder, tiny):
    predicting = dataclasses.replace(tiny, refiner=Brighter(), fast_decoder=Darker(tiny.autoencoder))
    given = images(2, 3)
    sampling = {"restore_detail": detail, "decoder": decoder}
    latents = predicting.generate_latents(predicting.encode_videos(given), 2, sampling=sampling)
    decoded = predicting.decode_videos(latents)
    shown = decoded if decoder == "full" else decoded / 2
    # What is lost of the given frames is what this decoder loses.
    expected = restore_detail(shown[:, 3:], given, shown[:, :3]) if detail else shown[:, 3:]
    torch.testing.assert_close(predicting.decode_predictions(latents, given, sampling=sampling), expected)
    whole = predicting.generate_frames(given, 2, sampling=sampling)
    torch.testing.assert_close(whole, torch.cat([decoded[:, :3], expected], 1))
    predicting.decode_predictions(latents, given, sampling=sampling, refine=True)
    torch.testing.assert_close(predicting.refiner.given[0][1].clamp(-1, 1), decoded[:, 3])  # as it was trained


def test_refining_without_a_refiner_is_refused_before_anything_is_predicted(tiny):
    uncallable = dataclasses.replace(tiny, refiner=None, autoencoder=None)
    with pytest.raises(UserError, match="refiner"):
        uncallable.generate_frames(images(1, 2), 1, refine=True)
    with pytest.raises(UserError, match="fast decoder"):
        uncallable.generate_frames(images(1, 2), 1, sampling={"decoder": "fast"})


def test_recorded_draws_can_be_replayed(tiny):
    context = torch.randn(2, 3, 4, 4, 4)
    noise, conditions = torch.randn(2, 2, 4, 4, 4), torch.zeros(2, 2, 2, dtype=torch.int64)
    replayed = tiny.generate_latents(context, 2, noise=noise, condition_indices=conditions)
    assert torch.equal(
        replayed, tiny.generate_latents(context, 2, noise=noise, condition_indices=conditions, sampling={"seed": 5})
    )
    assert not torch.equal(replayed, tiny.generate_latents(context, 2, noise=noise, condition_indices=conditions + 1))


@pytest.mark.parametrize(
    ("context", "threads", "options"),
    [
        (1, 2, {"restore_detail": True, "warm_start": 0.2}),
        (3, 1, {"past_horizon": 4}),
        (20, 1, {"preset": "official", "steps": 3}),
    ],
)
def test_a_stream_is_a_prediction_without_an_end(tiny, context, threads, options):
    """Longer than the frames that it keeps, of which some lie before the first frame of the video."""
    torch.set_num_threads(threads)  # one of two decodes beside the field
    limited, given = dataclasses.replace(tiny, longest_distance=5), images(2, context)
    arguments = {"sampling": options, "keys": [(5, 0), (8, 4)], "samples": 2}
    with contextlib.closing(limited.stream(given, **arguments)) as stream:
        frames = list(itertools.islice(stream, 14))
    torch.set_num_threads(1)
    expected = limited.generate_frames(given, 14, **arguments)[:, context:]
    torch.testing.assert_close(torch.stack(frames, 1), expected, atol=1e-5, rtol=0)


def test_a_stream_leaves_room_for_other_predictions(tiny):
    """Of the same shape, while it goes on; and in the caller's own modes."""
    given = images(1, 2)
    expected = tiny.generate_frames(given, 4, sampling={"past_horizon": 4, "precision": "bf16"})[:, 2:]
    streams = [tiny.stream(given, sampling={"past_horizon": 4, "precision": "bf16"}) for _ in range(2)]
    before = torch.get_float32_matmul_precision()
    for number in range(4):
        frames = [next(stream) for stream in streams]
        assert torch.get_float32_matmul_precision() == before
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        tiny.generate_frames(given, 2, sampling={"past_horizon": 4, "precision": "bf16"}, keys=[(1, 1)])
        for frame in frames:
            torch.testing.assert_close(frame, expected[:, number], atol=1e-5, rtol=0)


def test_a_stream_keeps_as_many_frames_as_conditions_can_be_far_away(tiny):
    def numbers() -> int:
        gc.collect()
        return sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor)

    limited = dataclasses.replace(tiny, longest_distance=7)
    next(limited.stream(images(1, 2)))  # packs weights, which are kept
    held = [numbers()]
    stream = limited.stream(images(1, 2), sampling={"steps": 1})
    for frames in (2, 40):
        for _ in range(frames):
            next(stream)
        held.append(numbers())
    stream.close()
    assert held[2] == held[1] > held[0]
    assert numbers() == held[0]


def test_a_stream_without_a_bound_says_from_where_it_draws(tiny, capsys):
    """Imported weights know no longest distance."""
    for _ in range(2):
        next(tiny.stream(images(1, 1)))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert re.search(r"last 1024 frames", said)


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


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"step": 3}, ["step", "not permitted"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"solver": "eular"}, ["solver", "'euler'"]),
        ({"preset": "official", "steps": 1}, ["official", "at least 2"]),
    ],
)
def test_bad_sampling_options_are_refused(tiny, changes, parts):
    with pytest.raises(UserError) as raised:
        tiny.generate_latents(torch.randn(1, 2, 4, 4, 4), 1, sampling=changes)
    assert all(part in str(raised.value) for part in parts)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: images(1, 2) * 127.5, r"\[-1, 1\].*x / 127.5 - 1"),
        (lambda: torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8), "torch.uint8"),
        (lambda: images(1, 2)[:, :, :1], r"\[b, n, 3, h, w\].* \[1, 2, 1, 16, 16\]"),
        (lambda: images(1, 2)[0], r" \[2, 3, 16, 16\]"),
        (lambda: images(1, 0), "at least one frame"),
        (lambda: images(1, 2)[..., :15], "16x15"),
    ],
)
def test_bad_images_are_refused(tiny, made, message):
    for predict in (tiny.stream, lambda images: tiny.generate_frames(images, 2)):
        with pytest.raises(UserError, match=message):
            predict(made())


def corrupt(tensor: torch.Tensor, *place: int, value: float = math.nan) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def broken(network: str, parameter: str) -> VideoPredictor:
    """As if activations had overflowed."""
    changed = predictor()
    nn.init.constant_(getattr(changed, network).get_parameter(parameter), math.inf)
    return changed


@pytest.mark.parametrize(
    ("act", "needed"),
    [
        (lambda p: p.encode_videos(corrupt(images(2, 3), 1, 2)), ["images", "video 1", "frame 2"]),
        (lambda p: p.generate_frames(corrupt(images(2, 3), 1, 2), 1), ["images", "video 1", "frame 2"]),
        (lambda p: p.decode_videos(corrupt(torch.zeros(2, 3, 4, 4, 4), 0, 1)), ["latents", "video 0", "frame 1"]),
        (
            lambda p: p.generate_latents(corrupt(torch.zeros(2, 3, 4, 4, 4), 1, 0, value=-math.inf), 1),
            ["context", "video 1", "frame 0"],
        ),
        (
            lambda p: p.generate_latents(
                torch.zeros(2, 3, 4, 4, 4), 3, noise=corrupt(torch.zeros(3, 2, 4, 4, 4), 1, 0)
            ),
            ["noise", "video 0", "frame 1"],
        ),
        (
            lambda p: p.generate_latents(torch.zeros(1, 3, 4, 4, 4), 3, sampling={"warm_start": math.nan}),
            ["warm_start"],
        ),
        (
            lambda p: broken("autoencoder", "encoder.conv_out.bias").encode_videos(images(1, 1)),
            ["latents", "autoencoder", "video 0", "frame 0"],
        ),
        (
            lambda p: broken("vector_field", "project_out.4.bias").generate_frames(images(2, 3), 2),
            ["predicted latents", "video 0", "frame 3"],
        ),
        (
            lambda p: next(broken("vector_field", "project_out.4.bias").stream(images(2, 3))),
            ["predicted latents", "video 0", "frame 3"],
        ),
        (
            lambda p: broken("autoencoder", "decoder.conv_out.bias").decode_videos(torch.zeros(1, 2, 4, 4, 4)),
            ["pixels", "autoencoder", "video 0", "frame 0"],
        ),
    ],
    ids=["images", "frames", "latents", "context", "noise", "setting", "encoder", "field", "stream", "decoder"],
)  # fmt: skip
def test_what_is_not_finite_is_named_where_it_begins(tiny, act, needed):
    with pytest.raises(UserError) as error:
        act(tiny)
    for part in needed:
        assert part in str(error.value)


@pytest.mark.parametrize("what", ["flow", "autoencoder", "statistics"])
def test_weights_that_are_not_finite_are_refused(tmp_path, what):
    """Even if they were saved so."""
    save_run(
        tmp_path / "run",
        fields={"standardization": {"mean": MEAN, "std": [*STD[:3], math.nan]}} if what == "statistics" else None,
    )
    if what != "statistics":
        folder = CheckpointFolder(tmp_path / "run" / what / "checkpoints")
        found = folder.latest()
        tensors = found.tensors("model")
        name = max(tensors, key=lambda name: tensors[name].numel())
        state = {key: value for key, value in found.state.items() if key not in ("step", "files")}
        folder.save(found.step + 1, {"model": tensors | {name: corrupt(tensors[name], -1)}}, state)
    with pytest.raises(UserError) as error:
        VideoPredictor.from_run(tmp_path / "run", device="cpu")
    for part in ("standardization", "nan") if what == "statistics" else (f"step_0000000{found.step + 1}", name):
        assert part in str(error.value)


def test_no_frames_to_predict_and_wrong_keys_are_refused(tiny):
    with pytest.raises(UserError, match="at least 1"):
        tiny.generate_frames(images(1, 2), 0)
    with pytest.raises(UserError, match="1 keys for 2 videos"):
        tiny.generate_frames(images(2, 2), 1, keys=[(0, 0)])
    with pytest.raises(UserError, match=r"\[b, n, c, h, w\]"):
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


def save_run(
    folder, *, ema: bool = False, digest: str | None = None, fields: dict | None = None, sampling: dict | None = None
):
    """A run folder as the trainings write it; gives the networks that prediction should use."""
    autoencoder, field = networks()
    config = parse_config(
        {"dataset": {"name": "toy", "source": "shapes", "image_size": 16},
         "sampling": {"steps": 3, "solver": "heun"} if sampling is None else sampling,
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
    assert loaded.trained_grid == (4, 4)
    assert (loaded.fps, loaded.sampling.steps, loaded.sampling.solver) == (12.5, 3, "heun")
    assert loaded.standardization.mean.tolist() == MEAN
    assert loaded.standardization.std.tolist() == STD
    assert not loaded.autoencoder.training
    assert not loaded.vector_field.training
    for ours, theirs in ((loaded.autoencoder, autoencoder), (loaded.vector_field, field)):
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert loaded.generate_frames(images(1, 1), 2).shape == (1, 3, 3, 16, 16)


def test_averaged_weights_are_taken_unless_raw_ones_are_asked_for(tmp_path):
    _, field = save_run(tmp_path / "run", ema=True)
    averaged = VideoPredictor.from_run(tmp_path / "run", device="cpu").vector_field.state_dict()
    raw = VideoPredictor.from_run(tmp_path / "run", device="cpu", weights="raw")
    for name, tensor in field.state_dict().items():
        assert torch.equal(averaged[name], tensor + 0.01)
        assert torch.equal(raw.vector_field.state_dict()[name], tensor)
    with pytest.raises(UserError, match=r"from_run\(\.\.\., weights='ema'\)"):
        raw.generate_latents(torch.randn(1, 2, 4, 4, 4), 1, sampling={"weights": "ema"})


def test_the_chosen_sampler_of_a_run(tmp_path, capsys):
    def load(run, **options) -> VideoPredictor:
        return VideoPredictor.from_run(run, "cpu", **options)

    save_run(tmp_path, ema=True, sampling={"past_horizon": 6})
    default, path = load(tmp_path).sampling, tmp_path / "quality.json"
    of_run = study([point(8, solver="midpoint"), point(4, warm_start=0.25, condition="per-frame")])
    averaged = load(tmp_path).vector_field
    protocol = of_run.protocol.model_copy(update={"flow_sha256": weights_digest(averaged)})
    write_json(path, of_run.model_copy(update={"protocol": protocol}))
    found = load(tmp_path)
    chosen = {"solver": "euler", "nfe": 4, "warm_start": 0.25, "condition": "per-frame"}
    assert found.sampling == default.model_copy(update=chosen)
    assert found.sampling_with({"seed": 3}) == found.sampling.model_copy(update={"seed": 3})
    # One choice: whoever changes a part of it begins with the default.
    for changes in ({"solver": "heun"}, {"nfe": 6}, {"steps": 2}, {"warm_start": 0.5}, {"preset": "official"}):
        assert found.sampling_with(changes) == default.model_copy(update=changes)
    assert capsys.readouterr().out == ""

    assert load(tmp_path, weights="raw").sampling == default.model_copy(update={"weights": "raw"})
    assert capsys.readouterr() == ("", "")
    write_json(path, of_run)
    assert load(tmp_path).sampling == default
    assert str(path) in capsys.readouterr().out
    path.write_text('{"cheapest": 3}')
    assert load(tmp_path).sampling == default
    assert str(path) in capsys.readouterr().err
    save_run(tmp_path / "set", sampling={"solver": "rk4"})
    write_json(tmp_path / "set" / "quality.json", of_run)
    assert load(tmp_path / "set").sampling.solver == "rk4"


def test_another_autoencoder_is_refused(tmp_path):
    save_run(tmp_path / "run", digest="0" * 64)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "run"))) as raised:
        VideoPredictor.from_run(tmp_path / "run", device="cpu")
    for part in ("000000000000", "encode --overwrite", "train-flow --restart"):
        assert part in str(raised.value)


def test_incomplete_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing/flow/checkpoints.*train-flow"):
        VideoPredictor.from_run(tmp_path / "nothing", device="cpu")
    save_run(tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=re.escape(str(config))):
        VideoPredictor.from_run(tmp_path / "run", device="cpu")
    config.unlink()
    with pytest.raises(UserError, match=re.escape(str(config))):
        VideoPredictor.from_run(tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="--device toaster"):
        VideoPredictor.from_run(tmp_path / "run", device="toaster")


def test_weights_of_other_sizes_are_refused(tmp_path):
    save_run(tmp_path / "run", fields={"model": FIELD.model_dump(mode="json") | {"width": 32}})
    with pytest.raises(UserError, match=r"step_00000007.*state\.json"):
        VideoPredictor.from_run(tmp_path / "run", device="cpu")


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    save_run(tmp_path / "run")
    flow = tmp_path / "run" / "flow" / "checkpoints"
    state = json.loads((flow / "step_00000007" / "state.json").read_text())
    (flow / "step_00000009").mkdir()
    (flow / "step_00000009" / "state.json").write_text(json.dumps(state | {"step": 9}))
    assert VideoPredictor.from_run(tmp_path / "run", device="cpu").fps == 12.5
