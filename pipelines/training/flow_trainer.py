"""Stage 2's training: from the store alone to a trained vector field."""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

import latent_cache
from latent_cache import FlowBatch, LatentCache, Sampler, StoreError, longest_distance, open_sampler, step_generator
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.loading import standardization_in
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder, Tensors
from pipelines.runtime.context import RunContext, resolve_precision, training_in
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.progress import say, warn
from pipelines.runtime.run_folder import describe_progress, has_only_weights, is_fine_tuned, is_student
from pipelines.runtime.status import Status
from pipelines.runtime.throughput import matmul_rate, peak_memory, step_flops
from pipelines.runtime.train_state import TrainState
from pipelines.training.fine_tuning import check_fine_tuning, fine_tune, finish_beginning
from pipelines.training.flow_validation import FlowValidation, open_flow_validation
from pipelines.training.training_loop import LoopSettings, StepResult, Trainer, TrainingAmount
from pipelines.training.training_run import TrainingPlan, plan_training, train, training_status
from stage2_flow.config import FlowTrainingConfig
from stage2_flow.loss import draw_flow, flow_matching_loss
from stage2_flow.schedule import learning_rate
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import POSITIONS, VectorField

LESS_MEMORY = ", or keep the latents elsewhere (cache.residency=host)"


def train_flow(config: RiverConfig, run_context: RunContext) -> Checkpoint:
    """Train the vector field to its last step, or recognise that this was done.

    With `run_context.fine_tune` the first weights are those of the existing flow, see `fine_tuning`.

    Returns:
        The checkpoint to use: the best by validation if one was measured, else the last.
    Raises:
        UserError: a checkpoint that conflicts with the configuration or the store; nothing to fine-tune; settings that
            fit neither store nor device; losses that are not finite; out of memory.
        StoreError: no complete store.
        StoppedBySignal: after a signal, with a checkpoint saved.
    """
    folder, processes = config.run_path / "flow", run_context.processes
    with processes.first_before_others():
        finish_beginning(folder)
    asked, device = run_context.fine_tune, run_context.device
    newest = CheckpointFolder(folder / "checkpoints").latest()
    if newest is not None and is_student(newest) and not run_context.restart:
        _refuse_to_train(newest, config, run_context)
    if asked:
        run_context = fine_tune(with_precision(config, device, anew=True), run_context, flow_state)
        newest = CheckpointFolder(folder / "checkpoints").latest()
    if newest is not None and has_only_weights(newest):
        _warn_of_another_store(newest, config.store_path)
    resolved = with_precision(config, device, anew=run_context.restart)
    plan = flow_plan(resolved, anew=run_context.restart)
    if asked and training_status(plan).is_done:
        say("flow: to fine-tune it again: `train-flow --fine-tune --restart`")
    return train_field(plan, resolved, run_context, config.flow.training.precision)


def train_field(
    plan: TrainingPlan,
    config: RiverConfig,
    run_context: RunContext,
    wanted_precision: str,
    *,
    standardization: Standardization | None = None,
    state: dict[str, Any] | None = None,
    build: Callable[..., "FlowTrainer"] | None = None,
    open_validation: Callable[..., FlowValidation | None] = open_flow_validation,
) -> Checkpoint:
    """Train a field from the store to its last step, by a plan; see `train_flow`.

    Args:
        config: `with_precision`.
        wanted_precision: as the configuration has it.
        standardization: of a training that begins; None: by the configuration, from the training split.
        state: what its checkpoints record besides.
        build: the trainer; None: `FlowTrainer`.
        open_validation: called as `open_flow_validation`.
    """
    processes, device = run_context.processes, run_context.device

    def open_trainer(
        config: RiverConfig, found: Checkpoint | None, held: ExitStack
    ) -> tuple[Trainer, LoopSettings, str]:
        check_flow(config, run_context)
        cache = latent_cache.open(config.store_path, "train")
        sampler = held.enter_context(closing(_open_sampler(config, run_context, cache)))
        check_data(config, cache, sampler, found)
        validation = open_validation(config, cache.url, device) if processes.is_first else None
        precision, best_here = config.flow.training.precision, resolve_precision(wanted_precision, device)
        if precision != best_here and processes.is_first:
            say(f"flow: precision {precision}, as this training began; auto would choose {best_here} on {device}")
        held.enter_context(training_in(precision))
        scale = standardization
        if found is not None:
            scale = standardization_in(found)
        elif scale is None:
            scale = standardization_of(cache, config.flow.training.standardize)
        records = plan.state | field_state(config, cache, scale) | {"order": sampler.order} | (state or {})
        if found is not None and is_fine_tuned(found):
            records["fine_tuned_from"] = found.state["fine_tuned_from"]
        trainer = (build or FlowTrainer)(
            config,
            device,
            cache,
            sampler,
            validation=validation,
            samples=plan.folder / "samples",
            state=records,
            standardization=scale,
            processes=processes,
        )
        best = "validation_loss" if validation and config.flow.training.best_by == "loss" else None
        return trainer, replace(plan.loop, best=best, lowest=True), _describe(config, trainer, sampler)

    return train(plan, config, run_context, open_trainer)


def flow_status(config: RiverConfig) -> Status:
    """How far the flow is: its newest checkpoint against the configuration and, if it is complete, the store."""
    return training_status(flow_plan(config))


def flow_plan(config: RiverConfig, *, anew: bool = False) -> TrainingPlan:
    """The training of this configuration on this store; of a student, if that is what the run has.

    Args:
        anew: whether a flow is trained whatever the run has.
    """
    config = with_precision(config)
    newest = None if anew else CheckpointFolder(config.run_path / "flow" / "checkpoints").latest(warns=False)
    if newest is not None and is_student(newest):
        return student_plan(config)
    return plan_training(
        "flow",
        config,
        inputs=_inputs(config),
        less_memory=LESS_MEMORY,
        way_out="fine-tune the existing weights (`train-flow --fine-tune --restart`), ",
    )


def student_plan(config: RiverConfig) -> TrainingPlan:
    """The training of a student with this configuration on this store."""
    plan = plan_training(
        "flow", config, also=("distillation",), inputs=_inputs(config), less_memory=LESS_MEMORY, command="distill"
    )
    return replace(plan, settings=plan.settings | {"distillation": config.distillation.model_dump(mode="json")})


def _inputs(config: RiverConfig) -> dict[str, Any]:
    try:
        if latent_cache.is_complete(config.store_path):
            return {"store": _origin(latent_cache.open(config.store_path, "train"))}
    except StoreError:  # the store's own status reports it
        pass
    return {}


def with_precision(config: RiverConfig, device: torch.device | None = None, *, anew: bool = False) -> RiverConfig:
    """The configuration with `flow.training.precision: auto` resolved, since the result depends on it.

    An existing training goes on in the precision in which it began, on any device.

    Args:
        device: chooses the precision of a new training; None: it stays `auto`.
        anew: whether a new training begins even if there is one.
    """
    training, precision = config.flow.training, None
    if training.precision != "auto":
        return config
    newest = CheckpointFolder(config.run_path / "flow" / "checkpoints").latest()
    if newest is not None and not anew:
        # An imported flow was not trained here, and has none.
        precision = newest.state.get("identity", {}).get("flow", {}).get("training", {}).get("precision")
    if precision is None:
        precision = training.precision if device is None else resolve_precision(training.precision, device)
    training = training.model_copy(update={"precision": precision})
    return config.model_copy(update={"flow": config.flow.model_copy(update={"training": training})})


def flow_state(config: RiverConfig, cache: LatentCache, standardization: Standardization) -> dict[str, Any]:
    """What each checkpoint records: what the training depends on, and what sampling needs."""
    return flow_plan(config).state | field_state(config, cache, standardization)


def field_state(config: RiverConfig, cache: LatentCache, standardization: Standardization) -> dict[str, Any]:
    """What each checkpoint records for sampling."""
    training = config.flow.training
    return {
        "model": config.flow.model.model_dump(mode="json"),
        "latent_shape": list(cache.latent_shape),
        "standardization": {"mean": standardization.mean.tolist(), "std": standardization.std.tolist()},
        "fps": cache.metadata.fps,
        "longest_distance": longest_distance(cache.lengths, training.clip_frames, training.past_horizon),
        "store": {"path": str(cache.url), **_origin(cache)},
    }


def check_flow(config: RiverConfig, run_context: RunContext) -> None:
    """Refuse, before anything is built, settings that don't fit the device or the number of processes.

    Raises:
        UserError: names the key to change; `--fine-tune` without a flow to start from.
    """
    training, processes = config.flow.training, run_context.processes
    processes.check_batch(training.batch_size, training.accumulate, "flow.training.batch_size")
    on_cpus = processes.count > 1 and run_context.device.type == "cpu"
    if on_cpus and config.flow.model.head == "bn" and processes.is_first:
        warn("flow.model.head: bn: on CPUs each process normalizes with the statistics of its own rows")
    if run_context.fine_tune:
        check_fine_tuning(config, run_context)


def _refuse_to_train(student: Checkpoint, config: RiverConfig, run_context: RunContext) -> None:
    """Refuse to train a student as a flow; nothing where it is done and nothing is asked of it.

    Raises:
        UserError: says what the run is, and the ways out.
    """
    if flow_status(config).is_done and not run_context.asks_for_more and run_context.training_minutes is None:
        return
    raise UserError(
        f"{config.run_path} has a student ({describe_progress(student)}), which `distill --run {config.run}` "
        "trains; or train a flow there with `train-flow --restart` (the student is moved to a "
        "backup)"
    )


class Draws(Protocol):
    """The random draws of a step, a row per sample."""

    def rows(self, rows: slice) -> Self:
        """Those of some samples."""
        ...


class FlowTrainer(Trainer):
    """The vector field, its standardization, optimizers and averaged copy.

    Attributes:
        model: the vector field.
        network: the field as training calls it: compiled, distributed, or neither.
        draw_device: device that noise and times are drawn on; a CPU and a GPU draw different numbers.
        standardization: between the store's raw latents and those that the field is trained on.
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
        weights: Tensors | None = None,
    ) -> None:
        """Initialize everything from the configuration's seed.

        Args:
            latents: the training split.
            sampler: of that split.
            validation: in rank 0.
            samples: folder for the clips that validation predicts.
            state: the JSON of the checkpoints.
            standardization: of the training that is resumed; None: by the configuration, from the split.
            weights: that a new training begins with; None: random ones.
        """
        self.config, self.training, self.device = config, config.flow.training, device
        self.draw_device = device
        self.sampler, self.validation, self.samples = sampler, validation, samples
        self.checkpoint_state, self.processes = state or {}, processes
        self.precision = resolve_precision(self.training.precision, device)
        if standardization is None:
            standardization = standardization_of(latents, self.training.standardize)
        self.standardization = standardization.to(device)
        torch.manual_seed(config.seed)
        self.model = VectorField(config.flow.model, latents.latent_shape[0])
        if weights is not None:
            self.model.load_state_dict(weights)
        if processes.count > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(device)
        self.train_state = TrainState(self.model, self.training, self.model.boundary_parameters())
        self.compile_mode = compile_mode(self.training, device, processes)
        network = self.model
        if self.compile_mode is not None:
            network = torch.compile(self.model, dynamic=False, mode=self.compile_mode)
        self.network = processes.distribute(network, device)
        self.step_flops = step_flops(config.flow.model, latents.latent_shape, self.training.batch_size)
        self._waited, self._steps = 0.0, 0

    def set_steps(self, steps: int) -> None:
        self.training = self.training.model_copy(update={"steps": steps})
        self._waited, self._steps = 0.0, 0

    @property
    def amount(self) -> TrainingAmount:
        return TrainingAmount(self.sampler.legal_targets, self.training.batch_size)

    def train_step(self, step: int) -> StepResult:
        """One update on this process's rows of the step's batch, without waiting for the device."""
        training, seed, processes = self.training, self.config.seed, self.processes
        started = time.perf_counter()
        batch = self.sampler.batch(step, processes.rank, processes.count)
        self._waited += time.perf_counter() - started
        self._steps += 1
        # Drawn for the global batch, so that draws don't depend on the number of processes.
        shape = (training.batch_size, *batch.target.shape[1:])
        draws = self.draw(shape, step_generator(seed, step, self.draw_device, "flow"))
        draws = draws.rows(processes.rows(training.batch_size))
        torch.manual_seed(step_generator(seed, step, stream="dropout").initial_seed() + processes.rank)
        rate = learning_rate(
            step,
            base=training.learning_rate,
            final=training.final_learning_rate,
            warmup=training.warmup,
            total=training.steps,
        )
        loss = self._backward(batch, draws)
        norm = self.train_state.gradient_norm()
        finite = processes.all_true(norm.isfinite() & loss.isfinite())
        self.train_state.update(step, rate / training.learning_rate, norm, finite)
        return StepResult({"loss": loss, "gradient_norm": norm}, finite)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """The draws of a global batch of targets of this shape, on the device."""
        return draw_flow(
            shape,
            generator,
            self.device,
            times=self.training.time_sampling,
            time_mean=self.training.time_mean,
            past_noise=self.model.config.past_noise,
            past_frames=self.model.recent_frames + 1,
        )

    def objective(self, batch: FlowBatch, draws: Draws) -> Callable[[nn.Module], Tensor]:
        """The loss of a field on final latents, a scalar."""
        return partial(flow_matching_loss, batch=batch, draws=draws)

    def _backward(self, batch: FlowBatch, draws: Draws) -> Tensor:
        """Accumulate the gradients of the loss; `batch` has raw latents. Returns the loss, a scalar."""
        final = (self.standardization.to_final(frames) for frames in (batch.target, batch.reference, batch.condition))
        count = self.training.accumulate
        columns = (*final, batch.distance)
        self.model.train()
        losses = []
        rows = len(batch.target) // count
        for number, frames in enumerate(zip(*(x.chunk(count) for x in columns), strict=True)):
            # Of its own: autocast would go on using casts of weights that an objective without gradients made.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss_of = self.objective(FlowBatch(*frames), draws.rows(slice(number * rows, (number + 1) * rows)))
            if self.compile_mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            with self.processes.without_exchange(self.network, number < count - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    loss = loss_of(self.network)
                (loss / count).backward()
            losses.append(loss.detach())
            self.train_state.observe(loss_of)
        return torch.stack(losses).mean()

    def describe_batch(self, step: int) -> str:
        return self.sampler.describe_batch(step)

    def validate(self, step: int) -> dict[str, float]:
        """The loss on fixed pairs, times and noise of the val split, and predicted clips."""
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
        """How well the device is used: samples per second, share of waiting for data, FLOP/s of the model, memory."""
        waited, self._waited, steps, self._steps = self._waited, 0.0, self._steps, 0
        flops = steps_per_second * self.step_flops
        best = _best_rate(self.device, self.precision) * self.processes.count
        return {
            "samples_per_second": steps_per_second * self.training.batch_size,
            "data_wait": waited / steps * steps_per_second if steps else 0.0,
            "tflops_per_second": flops / 1e12,
            "mfu": flops / best,
            "peak_memory_mb": peak_memory(self.device) / 1e6,
        }


@cache
def _best_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of large matrix products on the device, measured once."""
    return matmul_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def standardization_of(latents: LatentCache, wanted: bool) -> Standardization:
    """The standardization by a split's statistics, or the identity."""
    if not wanted:
        return Standardization.identity(latents.latent_shape[0])
    # A constant channel has standard deviation 0; any other value standardizes it to 0 as well.
    std = torch.from_numpy(latents.std)
    return Standardization(torch.from_numpy(latents.mean), torch.where(std > 0, std, torch.ones_like(std)))


def compile_mode(training: FlowTrainingConfig, device: torch.device, processes: Processes) -> str | None:
    """The mode of `torch.compile` for the vector field; None: it is not compiled.

    On a single GPU the compiled passes are CUDA graphs (`reduce-overhead`). Not with `accumulate`, whose gradients
    would have to outlive a replay, nor with several processes, whose exchange runs between the kernels.
    """
    wanted = device.type == "cuda" if training.compile == "auto" else training.compile
    if not wanted:
        return None
    graphs = device.type == "cuda" and processes.count == 1 and training.accumulate == 1
    return "reduce-overhead" if graphs else "default"


def _open_sampler(config: RiverConfig, run_context: RunContext, cache: LatentCache) -> Sampler:
    training = config.flow.training
    return open_sampler(
        cache,
        run_context.device,
        config.seed,
        training.batch_size,
        training.clip_frames,
        residency=config.cache.residency,
        memory_budget=config.cache.memory_budget_bytes,
        past_horizon=training.past_horizon,
        recent_frames=config.flow.model.recent_frames,
        agree=run_context.processes.agree,
        sharing=run_context.processes.here,
    )


def _describe(config: RiverConfig, trainer: FlowTrainer, sampler: Sampler) -> str:
    """What is trained, on what, and how."""
    switches = [trainer.precision]
    switches += [] if trainer.compile_mode is None else [f"compiled ({trainer.compile_mode})"]
    return (
        f"{trainer.model.parameter_count / 1e6:.1f} M parameters, batch {config.flow.training.batch_size} of "
        f"{sampler.legal_targets} targets, {sampler.describe()}, {', '.join(switches)}"
    )


def _origin(cache: LatentCache) -> dict[str, Any]:
    """The identity of a store."""
    return {"autoencoder": cache.metadata.autoencoder["sha256"], "fingerprint": cache.fingerprint}


def check_data(config: RiverConfig, cache: LatentCache, sampler: Sampler, found: Checkpoint | None) -> None:
    """Refuse a store that does not fit the settings; report what is unusual.

    Raises:
        UserError: fewer targets than the batch size; latents larger than the field's position codes.
    """
    training = config.flow.training
    if sampler.legal_targets < training.batch_size:
        raise UserError(
            f"{cache.url}, split 'train': {sampler.legal_targets} frames can be a target (two frames of their video "
            f"precede them), fewer than flow.training.batch_size {training.batch_size}: lower it, or encode more videos"
        )
    if max(cache.latent_shape[1:]) > POSITIONS:
        raise UserError(
            f"{cache.url}: latents of {cache.latent_shape[1]}x{cache.latent_shape[2]}, but the vector field has "
            f"position codes for {POSITIONS} per side: encode smaller frames (dataset.image_size)"
        )
    short, longest = int((cache.lengths < 3).sum()), int(cache.lengths.max())
    if short:
        say(f"flow: {short} of {len(cache.lengths)} videos have fewer than 3 frames and are not used")
    if longest < training.clip_frames:
        say(
            f"flow: clip_frames is {training.clip_frames}, but the longest video has {longest} frames: conditions are "
            f"at most {longest - 2} frames before the reference"
        )
    order = sampler.order if found is None else found.state.get("order", sampler.order)
    if order != sampler.order:
        warn(
            f"flow: batches come in another order from here on ({sampler.order} instead of {order}): the result will "
            "differ from that of an uninterrupted training; cache.residency and cache.memory_budget determine the order"
        )


def _warn_of_another_store(flow: Checkpoint, store: Path) -> None:
    """Warn if the store was not encoded by the autoencoder of an imported or released flow."""
    if not latent_cache.is_complete(store):
        return
    theirs, ours = latent_cache.open_metadata(store).autoencoder["sha256"], flow.state["store"]["autoencoder"]
    if theirs != ours:
        warn(
            f"flow: {store} was encoded by autoencoder {theirs[:12]}..., and {flow.path} was trained on "
            f"latents of {ours[:12]}...: encode again with that autoencoder (`encode --overwrite`), or train a "
            "flow on this store (`train-flow --restart`; the existing one is moved to a backup)"
        )
