"""The autoencoder's trainer: what one step changes, what a validation measures, and exact resuming."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latent_cache import step_generator
from pipelines.config import parse_config
from pipelines.evaluation.measures.metrics import psnr, ssim
from pipelines.loading import find_autoencoder, load_trained_autoencoder
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.distributed import Processes
from pipelines.training.autoencoder_trainer import AutoencoderTrainer, Validation, autoencoder_plan, best_by
from stage1_autoencoder.config import AutoencoderTrainingConfig
from tests.no_host_sync import NoHostSync

CPU = torch.device("cpu")
SIDE = 16


class Pool:
    """Frames of noise, a function of the step, where a trainer expects a frame pool."""

    def __init__(self, batch_size: int = 8, frames: int = 40) -> None:
        self.batch_size, self.lengths = batch_size, np.array([frames])

    def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        blocks = np.random.default_rng(step).integers(0, 256, (self.batch_size, 4, 4, 3), dtype=np.uint8)
        return blocks.repeat(4, axis=1).repeat(4, axis=2)[rows]

    def describe(self, step: int) -> str:
        return f"the batch of step {step}"


def make(
    validation: Validation | None = None, perceptual=None, processes=None, codes: int = 16, **training: Any
) -> AutoencoderTrainer:
    training = ({} if perceptual is None else {"perceptual": "lpips"}) | training
    config = parse_config(
        {
            "dataset": {"name": "toy", "source": "shapes", "image_size": SIDE},
            "autoencoder": {
                "model": {
                    "channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "attention_resolutions": [],
                    "norm_groups": 4, "codes": codes,
                },
                "training": {"batch_size": 8, "steps": 100, "warmup_steps": 0, "learning_rate": 1e-3} | training,
            },
        },
        "test",
    )  # fmt: skip
    options = {} if processes is None else {"processes": processes}
    return AutoencoderTrainer(config, CPU, Pool(), validation=validation, perceptual=perceptual, **options)


ADVERSARIAL = {"weight": 0.5, "start": 1, "layers": 1, "filters": 8}


def everything(trainer: AutoencoderTrainer) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = trainer.files()
    return {f"{file}.{name}": tensor.detach().clone() for file, part in files.items() for name, tensor in part.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_step_trains_and_gives_its_terms():
    trainer = make()
    before = copy.deepcopy(trainer.model.state_dict())
    results = [trainer.train_step(step) for step in range(8)]
    assert all(result.finite for result in results)
    assert results[0].terms.keys() == {"loss", "l1", "l2", "codebook", "gradient_norm"}
    changed = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(before)
    assert results[-1].terms["l1"] < results[0].terms["l1"]


def test_steps_are_functions_of_the_seed_and_the_step():
    first, second = (make(adversarial=ADVERSARIAL, flip=True, color_jitter={"hue": 0.2}) for _ in range(2))
    for step in range(3):
        first.train_step(step)
        torch.rand(7)  # whatever else draws random numbers
        second.train_step(step)
    assert same(everything(first), everything(second))


def test_parts_of_a_batch_train_like_the_batch():
    whole, parts = make(), make(accumulate=4)
    for step in range(3):
        one, other = whole.train_step(step), parts.train_step(step)
        assert other.terms["loss"].item() == pytest.approx(one.terms["loss"].item(), rel=1e-3)
    for ours, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    assert torch.equal(whole.care.since_restart, parts.care.since_restart)


def test_the_discriminator_starts_when_it_should():
    trainer = make(adversarial=ADVERSARIAL | {"start": 2, "warm_in": 2})
    before = copy.deepcopy(trainer.adversary.discriminator.state_dict())
    terms = [trainer.train_step(step).terms for step in range(2)]
    untouched = trainer.adversary.discriminator.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in untouched.items())
    assert all("discriminator" not in each for each in terms)
    begun = trainer.train_step(2).terms
    assert {"discriminator", "logits_real", "logits_fake"} <= begun.keys()
    assert "adversarial" not in begun  # its weight rises from 0
    assert not torch.equal(before["main.0.weight"], trainer.adversary.discriminator.state_dict()["main.0.weight"])
    felt = trainer.train_step(3).terms
    assert {"adversarial", "adaptive_weight"} <= felt.keys()


def test_the_autoencoder_learns_beside_the_discriminator():
    trainer = make(adversarial=ADVERSARIAL | {"start": 0})
    trainer.train_step(0)
    before = copy.deepcopy(trainer.model.state_dict())
    assert trainer.train_step(1).finite
    assert not any(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("failing", ["autoencoder", "discriminator"])
def test_a_step_in_which_one_of_both_is_not_finite_changes_neither(failing):
    """Nor the averages, the statistics of BatchNorm, or the codebook: codes are moved after each step here."""
    trainer = make(adversarial=ADVERSARIAL | {"start": 0}, ema_decay=0.9, restart_every=1, codes=256)
    for step in range(2):
        assert trainer.train_step(step).finite
    before = everything(trainer)
    network = trainer.model if failing == "autoencoder" else trainer.adversary.discriminator
    hooks = [p.register_hook(torch.full_like(p, torch.inf).mul) for p in list(network.parameters())[:1]]
    assert not trainer.train_step(2).finite
    counts = {"codebook.since_restart"}  # begins again with each restart
    after = everything(trainer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in counts)
    for hook in hooks:
        hook.remove()
    assert trainer.train_step(3).finite
    assert not torch.equal(everything(trainer)["model.quantizer.embedding.weight"],
                           before["model.quantizer.embedding.weight"])  # fmt: skip


def test_no_code_is_moved_in_the_last_tenth():
    """A code that was moved at the end would be saved untrained."""
    trainer = make(restart_every=1, codes=256, steps=20, warmup_steps=0, optimizer="adamw", learning_rate=1e-6)
    moved = []
    for step in range(20):
        before = trainer.model.quantizer.embedding.weight.detach().clone()
        trainer.train_step(step)
        change = (trainer.model.quantizer.embedding.weight - before).abs().amax()
        moved.append(bool(change > 1e-4))  # an update moves a code by the learning rate
    assert moved == [True] * 18 + [False] * 2


def test_the_host_does_not_wait_for_the_device_in_a_step():
    trainer = make(adversarial=ADVERSARIAL | {"start": 0}, ema_decay=0.9, flip=True, optimizer="adamw",
                   color_jitter={"hue": 0.2, "brightness": 0.2}, restart_every=1, accumulate=2)  # fmt: skip
    trainer.train_step(0)
    with NoHostSync():
        trainer.train_step(1)


def test_the_discriminators_parts_are_its_batch():
    """Parts of one pair of images, over and over: BatchNorm sees the same in each, so the gradients are the same."""
    torch.manual_seed(1)
    images, reconstructed = torch.rand(2, 1, 3, SIDE, SIDE).expand(2, 8, 3, SIDE, SIDE) * 2 - 1
    seen = []
    for accumulate in (1, 4):
        trainer = make(adversarial=ADVERSARIAL, accumulate=accumulate)
        network = trainer.adversary.discriminator.eval()
        trainer.adversary.backward(images, reconstructed, trainer._autocast)
        assert network.training
        seen.append([parameter.grad for parameter in network.parameters()])
    for whole, parts in zip(*seen, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_the_discriminator_has_its_own_learning_rate_and_the_same_schedule():
    adversarial = ADVERSARIAL | {"start": 0, "learning_rate": 1e-4, "betas": [0.5, 0.9]}
    trainer = make(adversarial=adversarial, warmup_steps=4, weight_decay=0.1, ema_decay=0.9)
    trainer.train_step(0)
    ((group,),) = (optimizer.param_groups for optimizer in trainer.adversary.train_state.optimizers)
    assert group["lr"] == pytest.approx(1e-4 / 4)
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.9), 0)
    assert trainer.learning_rate == pytest.approx(1e-3 / 4)
    assert trainer.adversary.train_state.average is None


@dataclasses.dataclass(frozen=True)
class Second(Processes):
    """The second of two processes that exchange nothing and both have all rows."""

    rank: int = 1

    def rows(self, batch: int) -> slice:
        return slice(None)

    def all_true(self, flag: torch.Tensor) -> torch.Tensor:
        return flag


@pytest.mark.parametrize("processes", [Processes(), Second()])
def test_dropout_is_keyed_by_step_and_process(processes):
    trainer = make(processes=processes)
    for step in range(2):
        trainer.train_step(step)
        assert torch.initial_seed() == step_generator(0, step, stream="dropout").initial_seed() + processes.rank


def test_codes_start_on_the_latents_of_the_first_batches(monkeypatch):
    monkeypatch.setattr("pipelines.training.autoencoder_trainer.VECTORS_A_CODE", 100)  # 1600 vectors, 512 a batch
    trainer, served, modes = make(), [], []
    batch, encode = trainer.pool.batch, trainer.model.encode
    monkeypatch.setattr(trainer.pool, "batch", lambda step, rows: (served.append(step), batch(step, rows))[1])
    monkeypatch.setattr(
        trainer.model, "encode", lambda images: (modes.append(trainer.model.training), encode(images))[1]
    )
    trainer.train_step(0)
    assert served == [0, 1, 2, 3, 0]
    assert modes == [False] * 4


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_networks_run_in_the_precision_asked_for(precision, dtype, monkeypatch):
    seen = []

    def perceptual(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        seen.append((images @ images.mT).dtype)
        return (images - truth).square().mean((1, 2, 3))

    trainer = make(precision=precision, perceptual=perceptual, adversarial=ADVERSARIAL | {"start": 0})
    for network in (trainer.model.last_layer, trainer.adversary.discriminator.main[0]):
        network.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    trainer.train_step(0)
    assert len(seen) >= 4
    assert set(seen) == {dtype}


@pytest.mark.parametrize("adversarial", [{}, ADVERSARIAL])
def test_a_batch_that_is_not_finite_changes_no_weight(adversarial, monkeypatch):
    trainer = make(adversarial=adversarial, ema_decay=0.9, restart_every=0)
    for step in range(3):
        trainer.train_step(step)
    before = everything(trainer)
    forward = type(trainer.model).forward

    def broken(self, images):
        return forward(self, torch.where(images > 0.9, float("nan"), images))

    monkeypatch.setattr(type(trainer.model), "forward", broken)
    result = trainer.train_step(3)
    assert not result.finite
    assert not result.terms["loss"].isfinite()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    after = everything(trainer)
    # The codes were counted, and BatchNorm has seen the batch; nothing else changed.
    unlearnt = {name for name in before if not name.startswith("codebook.") and "running" not in name}
    unlearnt = {name for name in unlearnt if "num_batches_tracked" not in name}
    assert [name for name in unlearnt if not torch.equal(before[name], after[name])] == []


def test_a_restarted_code_forgets_its_moments():
    trainer = make(restart_every=3, codebook_start="uniform")
    for step in range(2):
        trainer.train_step(step)
    weight = trainer.model.quantizer.embedding.weight
    (optimizer,) = trainer.train_state.optimizers
    optimizer.state[weight]["exp_avg"].fill_(1.0)
    unused = trainer.care.since_restart == 0
    seen = trainer.train_step(2)
    assert seen.finite
    moments = optimizer.state[weight]["exp_avg"]
    forgotten = (moments == 0).all(1)
    assert 0 < int(forgotten.sum()) < 16
    assert (unused | ~forgotten).all()


def test_restarted_codes_move_in_the_average_too():
    trainer = make(restart_every=2, ema_decay=0.999, codebook_start="uniform")
    for step in range(2):
        trainer.train_step(step)
    ours = trainer.model.quantizer.embedding.weight
    theirs = trainer.train_state.average.module.quantizer.embedding.weight
    moved = ours.abs().amax(1) > 2 / 16  # codes start below 1/16
    assert moved.any()
    torch.testing.assert_close(ours[moved], theirs[moved])


def test_codes_start_among_the_latents():
    started, uniform = make(), make(codebook_start="uniform")
    used = [int(trainer.train_step(0) and trainer.care.usage().used) for trainer in (started, uniform)]
    assert used[0] > used[1]


class FirstOfTwo(Processes):
    """The first of two processes that exchange nothing."""

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def all_true(self, flag: torch.Tensor) -> torch.Tensor:
        return flag

    def sum_(self, tensor: torch.Tensor) -> None:
        pass

    def distribute(self, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        return model


@pytest.mark.parametrize("processes", [Processes(), FirstOfTwo(0, 2)])
def test_more_codes_than_latent_vectors_is_a_warning(processes, capsys):
    config = parse_config(
        {
            "dataset": {"name": "toy", "source": "shapes", "image_size": SIDE},
            "autoencoder": {
                "model": {
                    "channels": 8, "channel_multipliers": [1, 1, 1], "blocks": 1, "attention_resolutions": [],
                    "norm_groups": 4, "codes": 4096,
                },
                "training": {"batch_size": 8, "steps": 1},
            },
        },
        "test",
    )  # fmt: skip
    assert AutoencoderTrainer(config, CPU, Pool(), processes=processes).train_step(0).finite
    assert "128 latent vectors to initialize 4096 codes" in capsys.readouterr().err


def test_rows_of_two_processes_are_the_batch():
    whole = make(flip=True, color_jitter={"brightness": 0.3})
    halves = [make(flip=True, color_jitter={"brightness": 0.3}, processes=Processes(0, 1)) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.processes = Processes(rank, 2)
    assert torch.equal(torch.cat([half._images(5) for half in halves]), whole._images(5))


def test_resuming_is_exact(tmp_path):
    options = dict(
        adversarial=ADVERSARIAL | {"start": 2, "warm_in": 3}, ema_decay=0.9, accumulate=2, restart_every=3, flip=True,
        optimizer="muon",
    )  # fmt: skip
    whole, before, after = (make(**options) for _ in range(3))
    for step in range(8):
        whole.train_step(step)
    for step in range(4):
        before.train_step(step)
        before.metrics(step + 1, {"l1": 0.5}, 1.0)
    folder = CheckpointFolder(tmp_path)
    folder.save(4, before.files(), before.state())
    after.load(folder.latest())
    assert after.watch.state() == before.watch.state()
    for step in range(4, 8):
        after.train_step(step)
    assert same(everything(after), everything(whole))


@pytest.fixture
def validation(tmp_path) -> Validation:
    images = torch.rand(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Validation(images, tmp_path / "sheets")


def test_validation_measures_the_averaged_model(validation):
    trainer = make(validation, ema_decay=0.5, perceptual=lambda images, truth: (images - truth).abs().mean((1, 2, 3)))
    for step in range(3):
        trainer.train_step(step)
    measured = trainer.validate(3)
    model = trainer.train_state.average.module
    with torch.no_grad():
        decoded = model.decode(model.encode(validation.images)).clamp(-1, 1)
        codes = model.quantize(model.encode(validation.images))[1]
    assert measured["validation_psnr"] == pytest.approx(psnr(decoded, validation.images).mean().item(), rel=1e-5)
    assert measured["validation_lpips"] == pytest.approx((decoded - validation.images).abs().mean().item(), rel=1e-4)
    assert measured["validation_codes"] == len(codes.unique())
    frequencies = torch.bincount(codes.flatten()).double()
    frequencies = frequencies[frequencies > 0] / frequencies.sum()
    entropy = -(frequencies * frequencies.log()).sum()
    assert measured["validation_perplexity"] == pytest.approx(entropy.exp().item())
    assert measured["validation_ssim"] == pytest.approx(ssim(decoded, validation.images).mean().item(), rel=1e-5)
    assert not model.training
    with Image.open(validation.folder / "step_00000003.png") as sheet:
        assert sheet.width > 8 * 96
    # Training continues after validation.
    assert trainer.train_step(3).finite
    assert trainer.model.training


def test_validation_measures_clamped_images(validation):
    trainer = make(validation, perceptual=lambda images, truth: (images - truth).abs().mean((1, 2, 3)))
    with torch.no_grad():
        trainer.model.last_layer.bias.fill_(50.0)  # far beyond white
    white = (1 - validation.images).abs().mean().item()
    assert trainer.validate(1)["validation_lpips"] == pytest.approx(white, rel=1e-5)
    assert make().validate(1) == {}


def test_frames_smaller_than_the_window_of_ssim_are_measured_without_it(validation):
    small = Validation(validation.images[..., :8, :8], validation.folder)
    measured = make(small).validate(1)
    assert "validation_psnr" in measured
    assert "validation_ssim" not in measured


def test_metrics_of_the_codes_in_use():
    trainer = make()
    for step in range(6):  # an epoch is 5 steps of 8 of 40 frames
        trainer.train_step(step)
    assert int(trainer.care.last_window.sum()) == 5 * 8 * 64
    reading = trainer.metrics(6, {"l1": 0.1}, 1.0)
    assert 1 <= reading["code_perplexity"] <= reading["codes_used"] <= 16


def test_a_harmful_discriminator_is_reported(capsys):
    trainer = make(adversarial=ADVERSARIAL | {"start": 5})
    for step in range(1, 5):
        trainer.metrics(step, {"l1": 0.1}, 1.0)
    trainer.metrics(5, {"l1": 0.2}, 1.0)  # the last one without it
    assert trainer.watch.level == pytest.approx(0.8 * 0.1 + 0.2 * 0.2)
    trainer.watch.level = 0.1
    for step in range(6, 30):
        trainer.metrics(step, {"l1": 0.3, "logits_real": 0.0, "logits_fake": 0.0}, 1.0)
    message = capsys.readouterr().err
    assert message.count("autoencoder: step") == 1
    assert "the reconstruction term" in message
    # With LPIPS its level decides.
    trainer = make(adversarial=ADVERSARIAL | {"start": 5})
    for step in range(1, 30):
        trainer.metrics(step, {"l1": 0.1 * step, "perceptual": 0.2, "logits_real": 0.0, "logits_fake": 0.0}, 1.0)
    assert "the reconstruction term" not in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"color_jitter": {"hue": 0.3}}, {"flip": True}])
def test_augmentation_reaches_the_images(options):
    trainer, seen = make(codebook_start="uniform", **options), []
    trainer.model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    trainer.train_step(0)
    untouched = torch.from_numpy(trainer.pool.batch(0)).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(seen[0], untouched, atol=1e-6) == (not options)


@pytest.mark.parametrize(
    ("training", "best"),
    [
        ({}, "validation_psnr"),
        ({"perceptual": "lpips"}, "validation_lpips"),
        ({"perceptual": "st_lpips"}, "validation_st_lpips"),
        ({"perceptual": "lpips", "best_by": "psnr"}, "validation_psnr"),
        ({"best_by": "last"}, None),
        ({"adversarial": ADVERSARIAL}, None),
        ({"adversarial": ADVERSARIAL, "best_by": "psnr"}, "validation_psnr"),
        ({"adversarial": ADVERSARIAL, "perceptual": "lpips"}, "validation_lpips"),
    ],
)
def test_the_value_that_selects_the_best_autoencoder(training, best):
    settings = AutoencoderTrainingConfig(**training)
    assert best_by(settings, perceptual=settings.perceptual != "none") == best


def test_an_autoencoder_depends_on_its_seed_and_not_on_the_place_of_its_videos():
    plain = make().config
    moved = plain.model_copy(update={"dataset": plain.dataset.model_copy(update={"root": "elsewhere", "name": "b"})})
    larger = plain.model_copy(update={"dataset": plain.dataset.model_copy(update={"image_size": 32})})
    assert autoencoder_plan(moved).identity == autoencoder_plan(plain).identity
    for other in (larger, plain.model_copy(update={"seed": 1})):
        assert autoencoder_plan(other).identity != autoencoder_plan(plain).identity


def test_the_averaged_weights_of_the_best_checkpoint_are_used(tmp_path):
    trainer = make()
    folder = CheckpointFolder(tmp_path / "autoencoder" / "checkpoints")
    assert find_autoencoder(tmp_path) is None
    for step, best in ((1, None), (2, {"validation_psnr": 9.0}), (3, None)):
        averaged = {name: torch.full_like(tensor, step) for name, tensor in trainer.model.state_dict().items()}
        folder.save(step, trainer.files() | {"ema": averaged}, trainer.state(), best=best)
        found = find_autoencoder(tmp_path)
        assert found.step == min(step, 2)
        loaded = load_trained_autoencoder(found, CPU)
        assert all((tensor == found.step).all() for tensor in loaded.state_dict().values())
        assert not loaded.training
