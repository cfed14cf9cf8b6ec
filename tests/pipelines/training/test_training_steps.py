"""That settings of the trainings reach the step that they are for."""

import numpy as np
import pytest
import torch

import pipelines.training.autoencoder_trainer as autoencoder_module
import pipelines.training.flow_trainer as flow_module
from latent_cache import FlowBatch
from pipelines.config import RiverConfig, parse_config
from pipelines.loading import find_autoencoder, load_trained_autoencoder
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.training.autoencoder_trainer import AutoencoderTrainer, autoencoder_plan, loop_settings
from pipelines.training.flow_trainer import FlowTrainer
from stage1_autoencoder.families import build_autoencoder

CPU = torch.device("cpu")
ADVERSARIAL = {"weight": 0.5, "start": 1, "layers": 1, "filters": 8}


def config(**sections) -> RiverConfig:
    tiny = {
        "dataset": {"name": "toy", "source": "shapes", "image_size": 16},
        "autoencoder": {
            "model": {
                "channels": 8, "channel_multipliers": [1, 1], "blocks": 1, "attention_resolutions": [],
                "norm_groups": 4, "codes": 8,
            },
        },
        "flow": {"model": {"width": 16, "depth": 1, "mid_depth": 0, "heads": 2, "dropout": 0.0}},
    }  # fmt: skip
    for path, value in sections.items():
        stage, key = path.split("__")
        tiny[stage].setdefault("training", {})[key] = value
    return parse_config(tiny, "test")


class Sampler:
    """Serves one fixed batch, where a flow's training expects a sampler."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FlowBatch:
        target, reference, condition = torch.randn(3, 64, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        return FlowBatch(target, reference, condition, torch.ones(64, dtype=torch.int64))


class Cache:
    """The part of a store's split that a trainer looks at."""

    latent_shape = (4, 2, 2)
    mean = np.array([1, 0, 0, 0], np.float32)
    std = np.array([2, 1, 1, 0], np.float32)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_time_sampling_reaches_the_loss(times, monkeypatch):
    seen = []
    loss = flow_module.flow_matching_loss
    monkeypatch.setattr(
        flow_module, "flow_matching_loss", lambda field, batch, draws: seen.append(draws.t) or loss(field, batch, draws)
    )
    trainer = FlowTrainer(config(flow__time_sampling=times, flow__batch_size=64), CPU, Cache(), Sampler())
    for step in range(20):
        trainer.train_step(step)
    outside = ((torch.cat(seen) - 0.5).abs() > 0.4).double().mean().item()
    # P(t < .1 or t > .9): 0.2 for the uniform, 0.028 for sigmoid(N(0, 1)).
    assert outside == pytest.approx(0.2 if times == "uniform" else 0.028, abs=0.03)


@pytest.mark.parametrize("standardize", [False, True])
def test_standardization_is_the_stores_where_it_is_asked_for(standardize):
    trainer = FlowTrainer(config(flow__standardize=standardize), CPU, Cache(), Sampler())
    expected = ([1, 0, 0, 0], [2, 1, 1, 1]) if standardize else ([0] * 4, [1] * 4)  # a constant channel is left alone
    assert trainer.standardization.mean.tolist() == expected[0]
    assert trainer.standardization.std.tolist() == expected[1]


class Pool:
    """Serves one fixed batch of frames, where an autoencoder's training expects a frame pool."""

    lengths = np.array([8])
    frames = np.random.default_rng(0).integers(60, 180, (8, 16, 16, 3), dtype=np.uint8)

    def batch(self, step: int, rows: slice) -> np.ndarray:
        return self.frames[rows]


@pytest.mark.parametrize("options", [{}, {"autoencoder__color_jitter": {"hue": 0.3}}, {"autoencoder__flip": True}])
def test_augmentation_reaches_the_images(options, monkeypatch):
    seen = []
    backward = autoencoder_module.backward

    def note(output, images, *arguments, **others):
        seen.append(images)
        return backward(output, images, *arguments, **others)

    monkeypatch.setattr(autoencoder_module, "backward", note)
    AutoencoderTrainer(config(autoencoder__batch_size=8, **options), CPU, Pool()).train_step(0)
    untouched = torch.from_numpy(Pool.frames).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(seen[0], untouched, atol=1e-6) == (not options)


@pytest.mark.parametrize(
    ("training", "best", "lowest"),
    [
        ({}, "validation_psnr", False),
        ({"perceptual": "lpips"}, "validation_lpips", True),
        ({"perceptual": "lpips", "best_by": "psnr"}, "validation_psnr", False),
        ({"best_by": "last"}, None, False),
        ({"adversarial": ADVERSARIAL}, None, False),
        ({"adversarial": ADVERSARIAL, "best_by": "psnr"}, "validation_psnr", False),
        ({"adversarial": ADVERSARIAL, "perceptual": "lpips"}, "validation_lpips", True),
    ],
)
def test_what_tells_the_best_autoencoder(training, best, lowest):
    wanted = config(**{f"autoencoder__{key}": value for key, value in training.items()})
    perceptual = wanted.autoencoder.training.perceptual == "lpips"
    settings = loop_settings(wanted, perceptual, validated=True)
    assert (settings.best, settings.lowest) == (best, lowest)
    assert loop_settings(wanted, perceptual, validated=False).best is None


def test_an_autoencoder_depends_on_its_seed_and_not_on_where_its_videos_lie():
    plain = config()
    moved = plain.model_copy(update={"dataset": plain.dataset.model_copy(update={"root": "elsewhere", "name": "b"})})
    assert autoencoder_plan(moved).identity == autoencoder_plan(plain).identity
    assert autoencoder_plan(plain.model_copy(update={"seed": 1})).identity != autoencoder_plan(plain).identity
    larger = plain.model_copy(update={"dataset": plain.dataset.model_copy(update={"image_size": 32})})
    assert autoencoder_plan(larger).identity != autoencoder_plan(plain).identity


def test_the_averaged_weights_of_the_best_checkpoint_are_used(tmp_path):
    model = build_autoencoder(config().autoencoder.model)
    folder = CheckpointFolder(tmp_path / "autoencoder" / "checkpoints")
    assert find_autoencoder(tmp_path) is None
    state = {"model": config().autoencoder.model.model_dump(mode="json")}
    for step, best in ((1, None), (2, {"validation_psnr": 9.0}), (3, None)):
        averaged = {name: torch.full_like(tensor, step) for name, tensor in model.state_dict().items()}
        folder.save(step, {"model": model.state_dict(), "ema": averaged}, state, best=best)
        found = find_autoencoder(tmp_path)
        assert found.step == min(step, 2)
        loaded = load_trained_autoencoder(found, CPU)
        assert all((tensor == found.step).all() for tensor in loaded.state_dict().values())
        assert not loaded.training
