"""Refining predicted videos: what each frame is given, beside what the official code recorded."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.official import load_refiner
from pipelines.prediction.rollouts import refine_frames
from pipelines.predictor import VideoPredictor
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.rcan import RCAN
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField

FIXTURES = Path(__file__).parents[2] / "fixtures"


class Recorder(nn.Module):
    """A refiner that adds a step to the decoded frame, beyond [-1, 1], and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 1, 1)  # its type is the network's
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, previous: Tensor, decoded: Tensor) -> Tensor:
        self.given.append((previous, decoded))
        return decoded + 0.5


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """Official clips as [b, t, 3, h, w]: `recon` and `refined_video` are of the frames 1, 2, 3 of `video`."""
    arrays = np.load(FIXTURES / "rcan_s3_b3_c16_r4.npz")
    return {name: torch.from_numpy(arrays[name]).transpose(1, 2) for name in ("video", "recon", "refined_video")}


@pytest.fixture(scope="module")
def official() -> RCAN:
    return load_refiner(FIXTURES / "rcan_s3_b3_c16_r4.pth")


def test_each_frame_is_given_the_unclamped_refined_one_before():
    refiner = Recorder()
    last, decoded = torch.full((2, 3, 4, 4), -0.25), torch.rand(2, 3, 3, 4, 4) * 2.4 - 1.2
    refined = refine_frames(refiner, last, decoded)
    assert refined.shape == decoded.shape
    assert torch.equal(refined, (decoded + 0.5).clamp(-1, 1))
    assert len(refiner.given) == 3  # one call a frame, for all clips
    assert torch.equal(refiner.given[0][0], last)
    for number in (1, 2):
        previous, frame = refiner.given[number]
        assert torch.equal(previous, decoded[:, number - 1] + 0.5)
        assert torch.equal(frame, decoded[:, number])
    assert (refiner.given[1][0] > 1).any()


def test_the_first_refined_frame_is_the_official_one(official, recorded):
    refined = refine_frames(official, recorded["video"][:, 0], recorded["recon"])
    assert (refined[:, 0] - recorded["refined_video"][:, 0]).abs().max() < 5e-6
    # The recorded clip is one of training, where each later frame is given the real one before. In use that one is
    # not there, and the refined one takes its place.
    assert (refined[:, 1:] - recorded["refined_video"][:, 1:]).abs().amax((0, 2, 3, 4)).min() > 0.01


def test_given_the_real_frames_before_all_refined_frames_are_the_official_ones(official, recorded):
    for number in range(3):
        one = recorded["recon"][:, number : number + 1]
        refined = refine_frames(official, recorded["video"][:, number], one)
        assert (refined[:, 0] - recorded["refined_video"][:, number]).abs().max() < 5e-6


def test_a_clip_is_refined_alike_in_any_batch(official, recorded):
    together = refine_frames(official, recorded["video"][:, 0], recorded["recon"])
    alone = refine_frames(official, recorded["video"][1:, 0], recorded["recon"][1:])
    assert (together[1:] - alone).abs().max() < 1e-5


def test_a_half_precision_refiner_gives_floats_in_range(official, recorded):
    import copy

    half = copy.deepcopy(official).to(torch.bfloat16)
    exact = refine_frames(official, recorded["video"][:, 0], recorded["recon"])
    refined = refine_frames(half, recorded["video"][:, 0], recorded["recon"])
    assert refined.dtype == torch.float32
    assert (refined - exact).abs().max() < 0.05


def test_nothing_to_refine_comes_back_empty(official, recorded):
    assert refine_frames(official, recorded["video"][:, 0], recorded["recon"][:, :0]).shape == (2, 0, 3, 32, 32)


@pytest.fixture(scope="module")
def predictor() -> VideoPredictor:
    torch.manual_seed(0)
    sizes = VQGANConfig(
        channels=8, channel_multipliers=(1, 2, 2), blocks=1, decoder_blocks=1, attention_resolutions=(), codes=64,
        norm_groups=4,
    )  # fmt: skip
    autoencoder = VQGAN(sizes)
    nn.init.normal_(autoencoder.decoder.conv_out.bias, std=1.0)  # decoded frames leave [-1, 1]
    return VideoPredictor(
        autoencoder=autoencoder.eval(),
        vector_field=VectorField(VectorFieldConfig(width=16, depth=1, mid_depth=0, heads=2), 4).eval(),
        standardization=Standardization.identity(4),
        sampling=SamplingConfig(steps=2),
        fps=10.0,
        device=torch.device("cpu"),
        refiner=Recorder(),
    )


def test_a_predictor_refines_what_it_predicted_and_only_when_asked(predictor):
    images = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    predictor.refiner.given.clear()
    plain = predictor.generate_frames(images, 2)
    assert not predictor.refiner.given
    refined = predictor.generate_frames(images, 2, refine=True)
    assert torch.equal(refined[:, :3], plain[:, :3])  # the context stays as the autoencoder gives it back
    assert (refined[:, 3:] - plain[:, 3:]).abs().amin() >= 0
    assert (refined[:, 3:] - plain[:, 3:]).abs().amax() > 0.1
    (first, decoded), (second, _) = predictor.refiner.given
    assert torch.equal(first, images[:, -1])  # the real frame, not its reconstruction
    assert torch.equal(second, decoded + 0.5)
    assert decoded.abs().amax() > 1.001  # as the decoder gave it
    torch.testing.assert_close(decoded.clamp(-1, 1), plain[:, 3])
    latents = predictor.generate_latents(predictor.encode_videos(images), 2)
    assert torch.equal(predictor.decode_refined(latents, images), refined)


def test_one_context_frame_is_enough(predictor):
    images = torch.rand(1, 1, 3, 16, 16) * 2 - 1
    predictor.refiner.given.clear()
    assert predictor.generate_frames(images, 2, refine=True).shape == (1, 3, 3, 16, 16)
    assert torch.equal(predictor.refiner.given[0][0], images[:, 0])


def test_without_a_refiner_asking_for_it_is_refused_before_anything_is_predicted(predictor, monkeypatch):
    bare = dataclasses.replace(predictor, refiner=None)
    monkeypatch.setattr(VideoPredictor, "encode_videos", None)
    with pytest.raises(UserError, match="made without a refiner: pass refiner="):
        bare.generate_frames(torch.zeros(1, 2, 3, 16, 16), 1, refine=True)
