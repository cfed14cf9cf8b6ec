"""The flow's training step: settings that reach it, parts of a batch, processes, and overfitting one store."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import latent_cache
from latent_cache import FlowBatch, SplitPlan, StoreMetadata, StoreWriter, open_sampler, step_generator
from pipelines.config import RiverConfig, parse_config
from pipelines.errors import UserError
from pipelines.loading import load_trained_field
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.context import RunContext, resolve_precision
from pipelines.runtime.distributed import Processes
from pipelines.runtime.throughput import step_flops
from pipelines.training import flow_trainer
from pipelines.training.flow_trainer import (
    FlowTrainer,
    check_data,
    compile_mode,
    flow_plan,
    standardization_of,
)
from pipelines.training.student_trainer import StudentTrainer
from stage2_flow.config import DistillationConfig, FlowTrainingConfig
from stage2_flow.distillation import Segments
from stage2_flow.loss import draw_flow, flow_matching_loss
from stage2_flow.path import path_sample
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.solvers import SOLVERS
from stage2_flow.vector_field import POSITIONS, VectorField
from tests.no_host_sync import NoHostSync

CPU = torch.device("cpu")
MODEL = {"width": 32, "depth": 1, "mid_depth": 0, "heads": 2, "dropout": 0.0}


def config(model: dict | None = None, **training) -> RiverConfig:
    values = {"batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 5, "clip_frames": 8, "steps": 1000} | training
    return parse_config(
        {"dataset": {"name": "toy", "source": "shapes"}, "flow": {"model": MODEL | (model or {}), "training": values}},
        "test",
    )


def write_store(path: Path, lengths: list[int], shape: tuple[int, int, int] = (4, 2, 2)) -> Path:
    """Independent latents with mean 3 and deviation 2 in every channel."""
    plan = SplitPlan([f"clip_{i}" for i in range(len(lengths))], ["identity"] * len(lengths), lengths, shape, 64)
    metadata = StoreMetadata("toy", 10.0, {}, {"sha256": "0" * 64, "codes": 8}, {})
    generator = np.random.default_rng(0)
    with StoreWriter.open(path, metadata, {"train": plan}, codes=False) as writer:
        for chunk in plan.chunks:
            latents = (3 + 2 * generator.standard_normal((chunk.frames, *shape))).astype(np.float32)
            writer.write_chunk("train", chunk, latents, None)
        writer.finish()
    return path


@pytest.fixture
def store(tmp_path: Path) -> latent_cache.LatentCache:
    return latent_cache.open(write_store(tmp_path / "toy.zarr", [12, 9, 3]), "train")


def trainer(store, settings: RiverConfig, processes: Processes | None = None, build=FlowTrainer) -> FlowTrainer:
    training = settings.flow.training
    sampler = open_sampler(
        store, CPU, settings.seed, training.batch_size, training.clip_frames, residency="auto", memory_budget=2**20,
        past_horizon=training.past_horizon, recent_frames=settings.flow.model.recent_frames,
    )  # fmt: skip
    return build(settings, CPU, store, sampler, processes=processes or Processes())


def student(store, settings: RiverConfig, processes: Processes | None = None) -> StudentTrainer:
    """Of a field with random weights and four Euler steps; half of the samples have own frames."""
    torch.manual_seed(0)
    teacher = VectorField(settings.flow.model, store.latent_shape[0]).eval().requires_grad_(False)
    segments = Segments(SamplingPlan(SOLVERS["euler"], 0.0, 5), 2)
    state = {"longest_distance": 6}
    settings = settings.model_copy(update={"distillation": DistillationConfig(evaluations=2, own_past=0.5)})
    return trainer(store, settings, processes, partial(StudentTrainer, teacher=teacher, segments=segments, state=state))


def inputs_of(made: FlowTrainer) -> list[tuple[torch.Tensor, ...]]:
    """The inputs of every call of the network from here on: x_t, reference, condition, distance, t."""
    seen, network = [], made.network
    made.network = lambda *inputs: seen.append(inputs) or network(*inputs)
    return seen


@torch.no_grad()
def loss_of(field: torch.nn.Module, made: FlowTrainer) -> float:
    """Mean loss of a field on the batches of 20 other steps."""
    losses = []
    for step in range(1000, 1020):
        batch = made.sampler.batch(step)
        final = (made.standardization.to_final(x) for x in (batch.target, batch.reference, batch.condition))
        draws = draw_flow(tuple(batch.target.shape), torch.Generator().manual_seed(step), CPU)
        losses.append(flow_matching_loss(field, FlowBatch(*final, batch.distance), draws).item())
    return float(np.mean(losses))


def weights(made: FlowTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


def test_all_frames_are_standardized(store):
    """Target (seen in x_t), reference and condition; the store's latents have mean 3 and deviation 2."""
    made = trainer(store, config(standardize=True))
    batch, seen = made.sampler.batch(0), inputs_of(made)
    made.train_step(0)
    draws = draw_flow(tuple(batch.target.shape), step_generator(0, 0, CPU, "flow"), CPU)
    ((x_t, reference, condition, distance, t),) = seen
    mean, std = (torch.from_numpy(values)[:, None, None] for values in (store.mean, store.std))
    target = (batch.target - mean) / std
    torch.testing.assert_close(x_t, path_sample(target, draws.noise, draws.t).x_t)
    torch.testing.assert_close(reference, (batch.reference - mean) / std)
    torch.testing.assert_close(condition, (batch.condition - mean) / std)
    assert torch.equal(distance, batch.distance)
    assert torch.equal(t, draws.t)


def test_the_newest_frames_are_noisy_by_a_level_that_is_told(store):
    """In parts of the batch as well; one mean and deviation for each of the newest frames."""
    times = {"time_sampling": "logit_normal", "time_mean": -0.5}
    made = trainer(store, config({"recent_frames": 2, "past_noise": 0.25}, standardize=True, accumulate=2, **times))
    batch, seen = made.sampler.batch(0), inputs_of(made)
    made.train_step(0)
    draws = draw_flow(
        tuple(batch.target.shape), step_generator(0, 0, CPU, "flow"), CPU,
        times="logit_normal", time_mean=-0.5, past_noise=0.25, past_frames=3,
    )  # fmt: skip
    _, reference, condition, _, t, level = (torch.cat(parts) for parts in zip(*seen, strict=True))
    mean, std = (torch.from_numpy(values)[:, None, None] for values in (store.mean, store.std))
    newest = torch.cat([(frame - mean) / std for frame in batch.reference.chunk(2, dim=1)], dim=1)
    noise = draws.past_noise.split([8, 4], dim=1)
    torch.testing.assert_close(reference, newest + noise[0])
    torch.testing.assert_close(condition, (batch.condition - mean) / std + noise[1])
    assert torch.equal(t, draws.t)
    assert torch.equal(level, draws.noise_level)


def test_a_batch_in_parts_is_the_batch(store):
    whole, parts = trainer(store, config()), trainer(store, config(accumulate=4))
    for made in (whole, parts):
        made.train_state.update = lambda *_: None  # leaves the gradients to look at
    one, other = whole.train_step(0), parts.train_step(0)
    torch.testing.assert_close(other.terms["loss"], one.terms["loss"], rtol=1e-6, atol=0)
    for parameter, same in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(same.grad, parameter.grad, rtol=1e-4, atol=1e-6)


class TwoProcesses(Processes):
    """One of two processes that is on its own: nothing is exchanged."""

    def distribute(self, model, device):
        return model

    def without_exchange(self, model, active):
        return Processes().without_exchange(model, active)

    def all_true(self, flag):
        return flag


@pytest.mark.parametrize("build", [trainer, student])
def test_processes_share_out_the_rows_of_one_batch(store, build):
    settings = config(time_sampling="logit_normal")
    seen = {}
    for name, processes in {"all": Processes(), "0": TwoProcesses(0, 2), "1": TwoProcesses(1, 2)}.items():
        made = build(store, settings, processes)
        rows = inputs_of(made)
        made.train_step(3)
        (seen[name],) = rows
    for whole, first, second in zip(seen["all"], seen["0"], seen["1"], strict=True):
        # Of a student the inputs are computed, in batches of another size.
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=0 if build is trainer else 1e-5)
    assert len(seen["0"][0]) == 8


def test_dropout_differs_between_processes(store):
    settings = config({"dropout": 0.5})
    losses = [trainer(store, settings, p).train_step(3).terms["loss"] for p in (Processes(), Processes())]
    assert losses[0] == losses[1]
    states = []
    for processes in (TwoProcesses(0, 2), TwoProcesses(1, 2)):
        trainer(store, settings, processes).train_step(3)
        states.append(torch.random.get_rng_state())
    assert not torch.equal(*states)


class Broken:
    """A sampler that serves numbers that are not finite at some steps."""

    def __init__(self, sampler, steps: set[int], value: float) -> None:
        self.sampler, self.steps, self.value = sampler, steps, value

    def batch(self, step: int, rank: int, count: int) -> FlowBatch:
        batch = self.sampler.batch(step, rank, count)
        if step in self.steps:
            batch.target[0, 0, 0, 0] = self.value
        return batch


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_not_finite_updates_nothing(store, value, optimizer):
    made = trainer(store, config(optimizer=optimizer, ema_decay=0.9, grad_clip=1.0))
    made.train_step(0)
    before = {name: {k: t.clone() for k, t in tensors.items()} for name, tensors in made.files().items()}
    made.sampler = Broken(made.sampler, {1}, value)
    assert not made.train_step(1).finite
    for name, tensors in made.files().items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, before[name][key]), (name, key)
    assert made.train_step(2).finite
    assert not torch.equal(made.files()["model"]["project_out.0.weight"], before["model"]["project_out.0.weight"])


@pytest.mark.parametrize(
    ("build", "values"), [(trainer, {}), (trainer, {"accumulate": 2, "grad_clip": 1.0}), (student, {"accumulate": 2})]
)
def test_the_host_does_not_wait_for_the_device_in_a_step(store, build, values):
    made = build(store, config({"head": "bn"}, ema_decay=0.9, **values))
    made.train_step(0)
    with NoHostSync():
        made.train_step(1)


def test_the_average_of_a_short_training_is_no_worse_than_its_weights(store):
    """A fixed decay of 0.999 would keep nine tenths of the random start."""
    made = trainer(store, config(ema_decay=0.999, steps=80, learning_rate=2e-3, standardize=True))
    for step in range(80):
        made.train_step(step)
    raw, averaged = (loss_of(field.eval(), made) for field in (made.model, made.train_state.best_model))
    assert averaged < 1.02 * raw


def test_a_tiny_store_is_memorized(tmp_path):
    """x_t and t alone do not determine the noise, but with a memorized target they do: the loss goes to 0."""
    store = latent_cache.open(write_store(tmp_path / "one.zarr", [4]), "train")
    settings = config({"width": 64, "depth": 1, "mid_depth": 1}, batch_size=64, learning_rate=2e-3, standardize=True,
                      grad_clip=1.0, ema_decay=0.98, optimizer="muon", steps=200)  # fmt: skip
    made = trainer(store, settings)
    losses = [made.train_step(step).terms["loss"].item() for step in range(200)]
    assert np.mean(losses[:5]) > 1.5
    assert np.mean(losses[-50:]) < 0.15


def test_latents_are_standardized_on_request(store):
    seen = {}
    for standardize in (False, True):
        made = trainer(store, config(standardize=standardize, batch_size=22))
        inputs = inputs_of(made)
        made.train_step(0)
        seen[standardize] = inputs[0][1]
    assert seen[False].mean() == pytest.approx(3, abs=0.4)
    assert seen[True].mean() == pytest.approx(0, abs=0.2)
    assert seen[True].std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_times_are_drawn_from_the_distribution_of_the_settings(store, times):
    made = trainer(store, config(time_sampling=times, batch_size=18))
    seen = inputs_of(made)
    for step in range(60):
        made.train_step(step)
    outside = (torch.cat([inputs[4] for inputs in seen]) - 0.5).abs() > 0.4
    # P(t < .1 or t > .9): 0.2 for the uniform, 0.028 for sigmoid(N(0, 1)); 1080 draws, deviation 0.012 at most.
    assert outside.double().mean() == pytest.approx(0.2 if times == "uniform" else 0.028, abs=0.05)


def test_a_constant_channel_is_centered_but_not_scaled():
    cache = SimpleNamespace(latent_shape=(2, 2, 2), mean=np.float32([1, 3]), std=np.float32([2, 0]))
    standardization = standardization_of(cache, wanted=True)
    assert (standardization.mean.tolist(), standardization.std.tolist()) == ([1, 3], [2, 1])


def test_past_horizon_reaches_the_conditions(store):
    made = trainer(store, config(past_horizon=2, batch_size=22))
    seen = inputs_of(made)
    made.train_step(0)
    assert (seen[0][3] == 1).all()


def test_metrics_of_the_use_of_the_machine(store):
    made = trainer(store, config())
    for step in range(4):
        made.train_step(step)
    readings = made.metrics(4, {"loss": 1.0}, 10.0)
    assert readings["samples_per_second"] == 160
    assert 0 < readings["data_wait"] < 1
    flops = step_flops(made.config.flow.model, store.latent_shape, 16)
    assert readings["tflops_per_second"] == pytest.approx(10 * flops / 1e12)
    assert 0 < readings["mfu"] < 1
    assert readings["peak_memory_mb"] > 50
    assert made.metrics(4, {}, 2.0)["data_wait"] == 0  # nothing was waited for since
    second = trainer(store, config(), TwoProcesses(0, 2)).metrics(4, {"loss": 1.0}, 10.0)
    assert second["mfu"] == pytest.approx(readings["mfu"] / 2)  # of the rate of both processes


GPU = torch.device("cuda")


def test_switches_depend_on_the_device():
    def settings(**values) -> FlowTrainingConfig:
        return FlowTrainingConfig(**values)

    one, two = Processes(), Processes(0, 2)
    assert compile_mode(settings(), CPU, one) is None
    assert compile_mode(settings(compile=False), GPU, one) is None
    assert compile_mode(settings(compile=True), CPU, one) == "default"
    assert compile_mode(settings(), GPU, one) == "reduce-overhead"
    assert compile_mode(settings(), GPU, two) == "default"
    assert compile_mode(settings(accumulate=2), GPU, one) == "default"
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def with_seed(seed: int) -> RiverConfig:
    return config().model_copy(update={"seed": seed})


def test_seed_and_step_decide_times_dropout_and_first_weights(store):
    def drawn(seed: int, step: int) -> tuple[tuple[float, ...], int]:
        made, seen = trainer(store, with_seed(seed)), []
        made.model.eval()  # as something else may leave it

        def forward(*inputs):
            assert made.model.training
            seen.append((tuple(inputs[4].tolist()), torch.initial_seed()))
            return made.model(*inputs)

        made.network = forward
        made.train_step(step)
        return seen[0]

    assert drawn(0, 3) == drawn(0, 3)
    for other in (drawn(1, 3), drawn(0, 4)):
        for ours, theirs in zip(drawn(0, 3), other, strict=True):
            assert ours != theirs
    first, same, other = (weights(trainer(store, with_seed(seed))) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_learning_rate_follows_its_schedule(store):
    made = trainer(store, config(learning_rate=4e-3, final_learning_rate=1e-3, warmup_steps=4, steps=104))
    for step, rate in ((0, 0), (3, 3e-3), (4, 4e-3), (79, 2.5e-3), (104, 1e-3)):
        made.train_step(step)
        assert made.learning_rate == pytest.approx(rate)
        assert made.train_state.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_muon_leaves_inputs_outputs_and_embeddings_to_adamw(store):
    made = trainer(store, config(optimizer="muon"))
    _, adamw = made.train_state.optimizers
    taken = {id(parameter) for parameter in adamw.param_groups[0]["params"]}
    assert {id(parameter) for parameter in made.model.boundary_parameters()} <= taken


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_reaches_the_field(store, precision, dtype):
    made, seen = trainer(store, config(precision=precision)), []
    made.model.project_in["1"].register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    made.train_step(0)
    assert seen == [dtype]


def test_validation_measures_the_delivered_model(store):
    class Validation:
        fields: tuple = ()

        def measure(self, field, standardization):
            self.fields += (field,)
            return {"validation_loss": 0.25}

    for decay in (None, 0.9):
        made = trainer(store, config(ema_decay=decay))
        made.validation = Validation()
        assert made.validate(5) == {"validation_loss": 0.25}
        assert made.validation.fields == (made.train_state.best_model,)


def test_what_a_trained_flow_depends_on():
    assert flow_plan(config()).identity == flow_plan(config(accumulate=2, max_bad_steps=3)).identity
    for other in (
        with_seed(1),
        config(time_sampling="logit_normal"),
        config(past_horizon=4),
        config({"qk_norm": True}),
    ):
        assert flow_plan(other).identity != flow_plan(config()).identity


def test_unusual_stores_are_reported(tmp_path, capsys):
    store = latent_cache.open(write_store(tmp_path / "toy.zarr", [12, 9, 3, 2]), "train")  # 10 + 7 + 1 targets

    def said(**training) -> str:
        settings = config(**training)
        check_data(settings, store, trainer(store, settings).sampler, None)
        return capsys.readouterr().out

    assert re.fullmatch(r"flow: 1 of 4 videos .*\n", said(batch_size=18, clip_frames=12))
    assert re.search(r"clip_frames is 13, .* 12 frames: .* at most 10 ", said(clip_frames=13))
    with pytest.raises(UserError, match=r"split 'train': 18 frames .* fewer than flow\.training\.batch_size 19"):
        said(batch_size=19)


@pytest.mark.parametrize("shape", [(4, POSITIONS, POSITIONS), (4, POSITIONS + 1, 2), (4, 2, POSITIONS + 1)])
def test_latents_larger_than_the_position_codes_are_refused(store, shape):
    cache = SimpleNamespace(url="toy.zarr", latent_shape=shape, lengths=store.lengths)
    sampler = trainer(store, config()).sampler
    if max(shape) == POSITIONS:
        check_data(config(), cache, sampler, None)
    else:
        with pytest.raises(UserError, match=rf"latents of {shape[1]}x{shape[2]}, .* {POSITIONS} "):
            check_data(config(), cache, sampler, None)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_averaged_weights_predict(store, tmp_path, decay):
    made = trainer(store, config(ema_decay=decay))
    for step in range(3):
        made.train_step(step)
    state = {"model": made.config.flow.model.model_dump(mode="json"), "latent_shape": list(store.latent_shape)}
    CheckpointFolder(tmp_path / "checkpoints").save(3, made.files(), state)
    field = load_trained_field(CheckpointFolder(tmp_path / "checkpoints").latest(), CPU)
    assert not field.training
    for name, tensor in field.state_dict().items():
        assert torch.equal(tensor, made.train_state.best_model.state_dict()[name]), name


class Opened(Exception):
    """A trainer would be made with this sampler."""


@pytest.mark.parametrize("residency", ["device", "host", "stream"])
def test_batches_are_drawn_with_the_seed_of_the_run(tmp_path, monkeypatch, residency):
    write_store(tmp_path / "toy.zarr", [12, 9, 3])

    def opened(*arguments, **options):
        raise Opened(arguments[3].targets(0).tolist())

    monkeypatch.setattr(flow_trainer, "FlowTrainer", opened)
    targets = []
    for seed in (1, 2, 1):
        values = config().model_dump(mode="json") | {
            "seed": seed, "paths": dict.fromkeys(("data", "latents", "runs"), str(tmp_path)),
            "cache": {"residency": residency},
        }  # fmt: skip
        with pytest.raises(Opened) as raised:
            flow_trainer.train_flow(parse_config(values, "test"), RunContext(CPU))
        targets.append(raised.value.args[0])
    assert targets[0] == targets[2] != targets[1]
