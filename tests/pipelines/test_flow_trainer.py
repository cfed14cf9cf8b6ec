"""The flow's training step: its parts, its sums over processes, and that it can learn one store by heart."""

from pathlib import Path

import numpy as np
import pytest
import torch

import latent_cache
from latent_cache import FlowBatch, SplitPlan, StoreMetadata, StoreWriter, open_sampler
from pipelines.config import RiverConfig, parse_config
from pipelines.flow_trainer import FlowTrainer, compiles, records_steps
from pipelines.runtime.distributed import Processes
from pipelines.runtime.session import resolve_precision
from stage2_flow.config import FlowTrainingConfig

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


def trainer(store, settings: RiverConfig, processes: Processes | None = None) -> FlowTrainer:
    training = settings.flow.training
    sampler = open_sampler(
        store, CPU, settings.seed, training.batch_size, training.clip_frames, residency="auto", memory_budget=2**20,
        past_horizon=training.past_horizon,
    )  # fmt: skip
    return FlowTrainer(settings, CPU, store, sampler, processes=processes or Processes())


def weights(made: FlowTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


def test_a_batch_in_parts_is_the_batch(store):
    whole, parts = trainer(store, config()), trainer(store, config(accumulate=4))
    for made in (whole, parts):
        made.learner.step = lambda: torch.tensor(True)  # leaves the gradients to look at
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


@pytest.mark.parametrize("coupling", ["independent", "conditional"])
def test_processes_share_out_the_rows_of_one_batch(store, coupling, monkeypatch):
    settings = config(coupling=coupling, time_sampling="logit_normal")
    seen = {}
    for name, processes in {"all": Processes(), "0": TwoProcesses(0, 2), "1": TwoProcesses(1, 2)}.items():
        made = trainer(store, settings, processes)
        rows = []
        forward = made.model.forward
        made.network = lambda *inputs, rows=rows, forward=forward: rows.append(inputs) or forward(*inputs)
        made.train_step(3)
        (seen[name],) = rows
    for whole, first, second in zip(seen["all"], seen["0"], seen["1"], strict=True):
        assert torch.equal(whole, torch.cat([first, second]))
    assert len(seen["0"][0]) == 8


def test_dropout_is_another_in_each_process(store):
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


def test_a_tiny_store_is_learned_by_heart(tmp_path):
    """The noise can't be told from x_t and t alone, but with the target known by heart it can: the loss goes to 0."""
    store = latent_cache.open(write_store(tmp_path / "one.zarr", [4]), "train")
    settings = config({"width": 64, "depth": 1, "mid_depth": 1}, batch_size=64, learning_rate=2e-3, standardize=True,
                      grad_clip=1.0, ema_decay=0.98, optimizer="muon", steps=300)  # fmt: skip
    made = trainer(store, settings)
    losses = [made.train_step(step).terms["loss"].item() for step in range(300)]
    assert np.mean(losses[:5]) > 1.5
    assert np.mean(losses[-50:]) < 0.15


def test_raw_latents_unless_standardised_ones_are_wanted(store):
    seen = {}
    for standardize in (False, True):
        made = trainer(store, config(standardize=standardize, batch_size=22))
        made.network = lambda x_t, reference, *rest, key=standardize, made=made: (
            seen.__setitem__(key, reference) or made.model(x_t, reference, *rest)
        )
        made.train_step(0)
    assert seen[False].mean() == pytest.approx(3, abs=0.4)
    assert seen[True].mean() == pytest.approx(0, abs=0.2)
    assert seen[True].std() == pytest.approx(1, abs=0.2)


def test_past_horizon_reaches_the_conditions(store):
    made = trainer(store, config(past_horizon=2, batch_size=22))
    distances = []
    made.network = lambda *inputs: distances.append(inputs[3]) or made.model(*inputs)
    made.train_step(0)
    assert (distances[0] == 1).all()


def test_readings_tell_how_well_the_machine_is_used(store):
    made = trainer(store, config())
    for step in range(4):
        made.train_step(step)
    readings = made.readings(4, {"loss": 1.0}, 10.0)
    assert readings["samples_per_second"] == 160
    assert 0 < readings["data_wait"] < 1
    assert readings["tflops_per_second"] == pytest.approx(10 * made._step_flops / 1e12)
    assert 0 < readings["mfu"] < 1
    assert readings["peak_memory_mb"] > 50
    made._waited, made._steps = 0.5, 4  # seconds in 4 steps, of which there are 10 in a second
    assert made.readings(4, {}, 2.0)["data_wait"] == pytest.approx(0.25)
    assert made.readings(4, {}, 2.0)["data_wait"] == 0


GPU = torch.device("cuda")


def test_switches_take_what_suits_the_device():
    def settings(**values) -> FlowTrainingConfig:
        return FlowTrainingConfig(**values)

    assert not compiles(settings(), CPU)
    assert compiles(settings(), GPU)
    assert compiles(settings(compile=True), CPU)
    assert not compiles(settings(compile=False), GPU)
    one, two = Processes(), Processes(0, 2)
    assert records_steps(settings(), GPU, one)
    assert not records_steps(settings(), CPU, one)
    assert not records_steps(settings(), GPU, two)
    assert not records_steps(settings(optimizer="muon"), GPU, one)
    assert not records_steps(settings(cuda_graphs=False), GPU, one)
    for values, device, processes in (({}, CPU, one), ({}, GPU, two), ({"optimizer": "muon"}, GPU, one)):
        with pytest.raises(ValueError, match=r"cuda_graphs: true needs a single GPU and optimizer adamw"):
            records_steps(settings(cuda_graphs=True, **values), device, processes)
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
