"""What changes while a vector field is trained; one call a step."""

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_cache import FlowBatch, LatentCache, Sampler, step_generator
from pipelines.config import RiverConfig
from pipelines.runtime.checkpoints import Checkpoint, Tensors
from pipelines.runtime.context import resolve_precision
from pipelines.runtime.cuda_graph_step import CudaGraphStep
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.progress import say
from pipelines.runtime.runs import training_identity
from pipelines.runtime.throughput import matmul_rate, peak_memory, step_flops
from pipelines.runtime.train_state import TrainState
from pipelines.training.flow_validation import FlowValidation
from pipelines.training.training_loop import StepResult, Trainer
from stage2_flow.config import FlowTrainingConfig
from stage2_flow.loss import FlowDraws, draw_flow, flow_matching_loss
from stage2_flow.schedule import learning_rate
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField


def flow_identity(config: RiverConfig) -> dict[str, Any]:
    """What the trained vector field depends on besides the store and its first weights, as plain data."""
    flow = config.flow.model_dump(mode="json", exclude={"training": {"accumulate"}})
    return training_identity({"seed": config.seed, "flow": flow})


def flow_settings(config: RiverConfig) -> dict[str, Any]:
    """All settings of the training, also those that its result does not depend on."""
    return {"seed": config.seed, "flow": config.flow.model_dump(mode="json")}


def flow_state(config: RiverConfig, cache: LatentCache, standardization: Standardization) -> dict[str, Any]:
    """The JSON of a training of this configuration on this store."""
    return {
        "identity": flow_identity(config),
        "settings": flow_settings(config),
        "model": config.flow.model.model_dump(mode="json"),
        "latent_shape": list(cache.latent_shape),
        "standardization": {"mean": standardization.mean.tolist(), "std": standardization.std.tolist()},
        "fps": cache.metadata.fps,
        "store": {
            "path": str(cache.url),
            "fingerprint": cache.fingerprint,
            "autoencoder": cache.metadata.autoencoder["sha256"],
        },
    }


def standardization_in(checkpoint: Checkpoint) -> Standardization:
    """That which a flow was trained with."""
    statistics = checkpoint.state["standardization"]
    return Standardization(torch.tensor(statistics["mean"]), torch.tensor(statistics["std"]))


class FlowTrainer(Trainer):
    """Vector field, standardization and averaged copy.

    Attributes:
        model: the vector field.
        network: the same as training calls it: compiled, distributed, or as it is.
        standardization: between the store's latents and those that it learns on.
    """

    def __init__(
        self,
        config: RiverConfig,
        device: torch.device,
        latents: LatentCache,
        sampler: Sampler,
        *,
        validation: FlowValidation | None = None,
        samples: Path | None = None,
        state: dict[str, Any] | None = None,
        standardization: Standardization | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Make everything anew, from the configuration's seed.

        Args:
            latents: the split that it learns from.
            sampler: of that split.
            validation: of the first process.
            samples: folder for what each validation predicts.
            state: what else goes to the checkpoints' JSON.
            standardization: of the training that is gone on with; None: as the configuration says, from the split.
        """
        self.config, self.training, self.device = config, config.flow.training, device
        self.sampler, self.validation, self.samples = sampler, validation, samples
        self.checkpoint_state, self.processes = state or {}, processes
        self.precision = resolve_precision(self.training.precision, device)
        if standardization is None:
            standardization = standardization_of(latents, self.training.standardize)
        self.standardization = standardization.to(device)
        torch.manual_seed(config.seed)
        self.model = VectorField(config.flow.model, latents.latent_shape[0])
        if processes.count > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(device)
        recorded = records_steps(self.training, device, processes)
        self.train_state = TrainState(self.model, self.training, self.model.boundary_parameters(), recordable=recorded)
        self.compiled = compiles(self.training, device)
        network = self.model
        if self.compiled:
            # The distributed BatchNorm's exchange is no part of any graph.
            network = torch.compile(self.model, fullgraph=processes.count == 1, dynamic=False)
        self.network = processes.distribute(network, device)
        self.update = CudaGraphStep(self._update) if recorded else self._update
        self._step_flops = step_flops(config.flow.model, latents.latent_shape, self.training.batch_size)
        self._waited, self._steps = 0.0, 0

    @property
    def learning_rate(self) -> float:
        return self.train_state.learning_rate

    def train_step(self, step: int) -> StepResult:
        """One update on this process's rows of the step's batch, without waiting for the device."""
        training, seed, processes = self.training, self.config.seed, self.processes
        started = time.perf_counter()
        batch = self.sampler.batch(step, processes.rank, processes.count)
        self._waited += time.perf_counter() - started
        self._steps += 1
        # Drawn for the whole batch, so that they don't depend on how many processes share it.
        draws = draw_flow(
            (training.batch_size, *batch.target.shape[1:]),
            step_generator(seed, step, self.device, "flow"),
            self.device,
            times=training.time_sampling,
        ).rows(processes.rows(training.batch_size))
        torch.manual_seed(step_generator(seed, step, stream="dropout").initial_seed() + processes.rank)
        rate = learning_rate(
            step,
            base=training.learning_rate,
            final=training.final_learning_rate,
            warmup=training.warmup_steps,
            total=training.steps,
        )
        self.train_state.set_rate(rate / training.learning_rate)
        self.model.train()
        loss, finite = self.update(batch.target, batch.reference, batch.condition, batch.distance, draws.noise, draws.t)
        return StepResult({"loss": loss}, finite)

    def _update(
        self, target: Tensor, reference: Tensor, condition: Tensor, distance: Tensor, noise: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All that the device does in a step, given raw latents: the loss, and whether there was an update."""
        final = (self.standardization.to_final(frames) for frames in (target, reference, condition))
        batch = FlowBatch(*final, distance)
        count = self.training.accumulate
        columns = (batch.target, batch.reference, batch.condition, batch.distance, noise, t)
        losses = []
        for number, (*frames, noise, t) in enumerate(zip(*(x.chunk(count) for x in columns), strict=True)):
            with self.processes.without_exchange(self.network, number < count - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    loss = flow_matching_loss(self.network, FlowBatch(*frames), FlowDraws(noise, t))
                (loss / count).backward()
            losses.append(loss.detach())
        finite = self.train_state.step()
        return torch.stack(losses).mean(), finite

    def describe_batch(self, step: int) -> str:
        return self.sampler.describe_batch(step)

    def validate(self, step: int) -> dict[str, float]:
        """The loss on fixed pairs, times and noise of the validation split, and predictions to look at."""
        if self.validation is None:
            return {}
        field = self.train_state.best_model
        measured = self.validation.measure(field, self.standardization)
        words = f"validation loss {measured['validation_loss']:.4f}"
        if self.samples is not None:
            measured |= self.validation.write_samples(field, self.standardization, step, self.samples)
            if "validation_sample_psnr" in measured:
                words += f", predicted clips {measured['validation_sample_psnr']:.2f} dB"
        say(f"flow: step {step}: {words}")
        return measured

    def metrics(self, step: int, terms: dict[str, float], steps_per_second: float) -> dict[str, float]:
        """How well the device is used: samples a second, waiting for data, FLOP/s of the model, memory."""
        waited, self._waited, steps, self._steps = self._waited, 0.0, self._steps, 0
        flops = steps_per_second * self._step_flops
        best = _best_rate(self.device, self.precision) * self.processes.count
        return {
            "samples_per_second": steps_per_second * self.training.batch_size,
            "data_wait": waited / steps * steps_per_second if steps else 0.0,
            "tflops_per_second": flops / 1e12,
            "mfu": flops / best,
            "peak_memory_mb": peak_memory(self.device) / 1e6,
        }

    def files(self) -> dict[str, Tensors]:
        """Everything that resuming needs, and everything that sampling needs."""
        return self.train_state.files()

    def state(self) -> dict[str, Any]:
        return self.checkpoint_state

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same configuration."""
        self.train_state.load(checkpoint, self.device)


@cache
def _best_rate(device: torch.device, precision: str) -> float:
    """FLOP/s that the device reaches in large matrix products: measured once, when it is first asked for."""
    return matmul_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def standardization_of(latents: LatentCache, wanted: bool) -> Standardization:
    """That of a split's statistics, or the one that changes nothing."""
    if not wanted:
        return Standardization.identity(latents.latent_shape[0])
    # A channel that never changes has deviation 0; any other number standardises it to 0 as well.
    std = torch.from_numpy(latents.std)
    return Standardization(torch.from_numpy(latents.mean), torch.where(std > 0, std, torch.ones_like(std)))


def compiles(training: FlowTrainingConfig, device: torch.device) -> bool:
    """Whether the vector field is compiled."""
    return device.type == "cuda" if training.compile == "auto" else training.compile


def records_steps(training: FlowTrainingConfig, device: torch.device, processes: Processes) -> bool:
    """Whether steps are recorded as a CUDA graph.

    Raises:
        ValueError: it is asked for where it can't be.
    """
    possible = device.type == "cuda" and processes.count == 1 and training.optimizer == "adamw"
    if training.cuda_graphs is True and not possible:
        raise ValueError(
            f"flow.training.cuda_graphs: true needs a single GPU and optimizer adamw; this is {device}, "
            f"{processes.count} process(es), {training.optimizer}: set it to auto or false"
        )
    return possible and training.cuda_graphs is not False
