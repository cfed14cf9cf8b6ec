"""`train-flow`: stage 2, from the store alone to a checkpoint of the vector field."""

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import latent_cache
from latent_cache import FlowBatch, LatentCache, Sampler, open_sampler, step_generator
from pipelines.config import RiverConfig, differences
from pipelines.encode import ensure_store, store_is_complete
from pipelines.errors import StoppedBySignal, UserError
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.learner import Learner
from pipelines.runtime.logs import StepTimer, TrainingLog
from pipelines.runtime.progress import duration, progress, say, warn
from pipelines.runtime.runs import (
    describe_progress,
    is_imported,
    only_training_of,
    resumable_checkpoint,
    training_identity,
    write_run_files,
)
from pipelines.runtime.session import Session
from pipelines.runtime.signals import StopRequest
from stage2_flow.config import VectorFieldConfig
from stage2_flow.loss import draw_flow, flow_matching_loss
from stage2_flow.schedule import learning_rate
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField


def flow_identity(config: RiverConfig) -> dict[str, Any]:
    """What the trained vector field depends on besides the store, as plain data."""
    return training_identity({"seed": config.seed, "flow": config.flow.model_dump(mode="json")})


def train_flow(config: RiverConfig, session: Session) -> Checkpoint:
    """Train the vector field to its last step, or recognise that this was done; makes the store first when it lacks.

    Returns:
        The final checkpoint.
    Raises:
        UserError: a checkpoint that contradicts the configuration or the store; a loss that is not finite.
        StoppedBySignal: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    training = config.flow.training
    folder = config.run_path / "flow"
    identity = flow_identity(config)
    checkpoints, found = resumable_checkpoint(
        folder, identity, keep=training.keep_checkpoints, restart=session.restart, what="flow"
    )
    if found is not None and is_imported(found):  # it was trained elsewhere, on no store of ours
        _warn_of_another_store(found, config.store_path)
        say(f"flow: done, {describe_progress(found)}, {found.path}")
        return found
    finished = found is not None and found.step >= training.steps
    if finished and not config.store_path.exists():
        say(f"flow: done, {found.step} steps, {found.path} (its store is not here)")
        return found

    cache = latent_cache.open(ensure_store(config, session), "train")
    if found is not None:
        _check_same_store(found, cache)
    if finished:
        say(f"flow: done, {found.step} steps, {found.path}")
        return found

    write_run_files(config, session.device)
    trainer = FlowTrainer(config, session.device, cache)
    first_step = 0
    if found is not None:
        trainer.load(found)
        first_step = found.step
    state = {
        "identity": identity,
        "model": config.flow.model.model_dump(mode="json"),
        "latent_shape": list(cache.latent_shape),
        "standardization": {"mean": trainer.standardization.mean.tolist(), "std": trainer.standardization.std.tolist()},
        "fps": cache.metadata.fps,
        "store": {
            "path": str(cache.url),
            "fingerprint": cache.fingerprint,
            "autoencoder": cache.metadata.autoencoder["sha256"],
        },
    }
    validation = _validation_batch(config, cache, session.device)
    sampler = open_sampler(
        cache,
        session.device,
        config.seed,
        training.batch_size,
        training.clip_frames,
        residency=config.cache.residency,
        memory_budget=config.cache.memory_budget_bytes,
    )
    with closing(sampler):
        state["order"] = sampler.order
        if found is not None and found.state.get("order", sampler.order) != sampler.order:
            warn(
                f"flow: from here on batches come in another order: {sampler.order}, and before "
                f"{found.state['order']}. That is as good, but not what an uninterrupted training would have seen; "
                "cache.residency and cache.memory_budget decide it"
            )
        say(
            f"flow: {trainer.model.parameter_count / 1e6:.1f} M parameters, steps {first_step} to {training.steps}, "
            f"batch {training.batch_size} of {sampler.legal_targets} targets, {sampler.describe()}, "
            f"{training.precision} -> {folder}"
        )
        with only_training_of(folder), closing(TrainingLog(folder, config, "flow", first_step)) as log:
            _loop(config, trainer, sampler, validation, log, checkpoints, state, first_step)
    return checkpoints.latest()


def _loop(
    config: RiverConfig,
    trainer: "FlowTrainer",
    sampler: Sampler,
    validation: FlowBatch | None,
    log: TrainingLog,
    checkpoints: CheckpointFolder,
    state: dict[str, Any],
    first_step: int,
) -> None:
    training = config.flow.training
    timer = StepTimer()
    bar = progress(total=training.steps, initial=first_step, description="flow", unit="step")
    with StopRequest() as stop, bar:
        for step in range(first_step, training.steps):
            loss = trainer.train_step(step, sampler)
            timer.step()
            bar.update()
            done = step + 1
            last = done == training.steps
            saves = done % training.checkpoint_every == 0 or last or bool(stop)
            validates = validation is not None and (done % training.validate_every == 0 or last)
            logs = done % config.logging.every == 0 or validates or last
            # The only places where the host waits for the device. What is saved was looked at first.
            if (logs or saves) and not torch.isfinite(loss):
                raise UserError(
                    f"flow: the loss is {loss.item()} at step {done}; the last checkpoint is kept. Lower "
                    "flow.training.learning_rate, set flow.training.grad_clip=1, or take precision fp32"
                )
            if logs:
                record = {"step": done, "loss": loss.item(), "learning_rate": trainer.learner.learning_rate}
                rate = timer.rate()
                record |= {"steps_per_second": rate, "samples_per_second": rate * training.batch_size}
                if done - first_step <= config.logging.every:
                    say(f"flow: {rate:.2f} steps/s, about {duration((training.steps - done) / rate)} to go")
                if validates:
                    record["validation_loss"] = trainer.validate(validation)
                    say(f"flow: step {done}: validation loss {record['validation_loss']:.4f}")
                log.write(record)
                bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            if saves:
                path = checkpoints.save(done, trainer.files(), state)
                if stop:
                    raise StoppedBySignal(
                        stop.signal_number, f"stopped at step {done}, saved {path}; the same command goes on from there"
                    )


class FlowTrainer:
    """Vector field and standardization; one call a step."""

    def __init__(self, config: RiverConfig, device: torch.device, cache: LatentCache) -> None:
        self.config, self.training, self.device = config, config.flow.training, device
        channels = cache.latent_shape[0]
        self.standardization = Standardization.identity(channels)
        if self.training.standardize:
            self.standardization = _standardization(cache)
        self.standardization = self.standardization.to(device)
        torch.manual_seed(config.seed)
        self.model = VectorField(config.flow.model, channels).to(device)
        self.field = torch.compile(self.model) if self.training.compile else self.model
        self.learner = Learner(self.model, self.training, self.model.boundary_parameters())

    def train_step(self, step: int, sampler: Sampler) -> torch.Tensor:
        """One update; gives the loss as a tensor, without waiting for the device."""
        training, seed = self.training, self.config.seed
        batch = self._standardized(sampler.batch(step))
        generator = step_generator(seed, step, self.device, "flow")
        draws = draw_flow(batch.target.shape, generator, self.device, times=training.time_sampling)
        torch.manual_seed(step_generator(seed, step, stream="dropout").initial_seed())
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            loss = flow_matching_loss(self.field, batch, draws)
        rate = learning_rate(
            step,
            base=training.learning_rate,
            final=training.final_learning_rate,
            warmup=training.warmup_steps,
            total=training.steps,
        )
        self.learner.update(loss, rate / training.learning_rate)
        return loss.detach()

    @torch.no_grad()
    def validate(self, batch: FlowBatch) -> float:
        """Loss on fixed pairs, times and noise of the validation split: comparable over the whole training."""
        model = self.learner.best_model.eval()
        batch = self._standardized(batch)
        draws = draw_flow(
            batch.target.shape, step_generator(self.config.seed, 0, self.device, "validation"), self.device
        )
        return flow_matching_loss(model, batch, draws).item()

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        """Everything that resuming needs, and everything that sampling needs."""
        return self.learner.files()

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same configuration."""
        self.learner.load(checkpoint, self.device)

    def _standardized(self, batch: FlowBatch) -> FlowBatch:
        return FlowBatch(
            target=self.standardization.to_final(batch.target),
            reference=self.standardization.to_final(batch.reference),
            condition=self.standardization.to_final(batch.condition),
            distance=batch.distance,
        )


def _standardization(cache: LatentCache) -> Standardization:
    # A channel that never changes has deviation 0; any other number standardises it to 0 as well.
    std = torch.from_numpy(cache.std)
    return Standardization(torch.from_numpy(cache.mean), torch.where(std > 0, std, torch.ones_like(std)))


def load_trained_field(checkpoint: Checkpoint, device: torch.device) -> VectorField:
    """The vector field of a checkpoint, in eval mode: the averaged weights where there are any."""
    try:
        sizes = VectorFieldConfig.model_validate(checkpoint.state["model"])
        field = VectorField(sizes, checkpoint.state["latent_shape"][0])
        field.load_state_dict(checkpoint.tensors("ema" if checkpoint.has("ema") else "model"))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: weights don't fit the sizes in state.json: {error}") from None
    return field.to(device).eval().requires_grad_(False)


def find_flow(run_path: Path) -> Checkpoint | None:
    """The newest flow checkpoint of a run."""
    return CheckpointFolder(run_path / "flow" / "checkpoints").latest()


def _check_same_store(checkpoint: Checkpoint, cache: LatentCache) -> None:
    before = checkpoint.state["store"]
    if before["fingerprint"] == cache.fingerprint:
        return
    now = {"autoencoder": cache.metadata.autoencoder["sha256"], "fingerprint": cache.fingerprint}
    changed = "\n  ".join(differences(now, {key: before[key] for key in now}))
    raise UserError(
        f"{checkpoint.path} was trained on another store than {cache.url} is now:\n  {changed}\n"
        "train anew with `train-flow --restart` (the old run is set aside), or bring the old store back"
    )


def _warn_of_another_store(imported: Checkpoint, store: Path) -> None:
    """An imported flow predicts without a store; one that is there should have been encoded by its autoencoder."""
    if not store_is_complete(store):
        return
    theirs, ours = latent_cache.open_metadata(store).autoencoder["sha256"], imported.state["store"]["autoencoder"]
    if theirs != ours:
        warn(
            f"flow: {store} was encoded by autoencoder {theirs[:12]}..., and {imported.path} knows latents of "
            f"{ours[:12]}...: encode again with the imported one (`encode --overwrite`), or train a flow on this store "
            "(`train-flow --restart`; the imported one is set aside)"
        )


def _validation_batch(config: RiverConfig, cache: LatentCache, device: torch.device) -> FlowBatch | None:
    """The one batch that every validation looks at: when it was drawn, the split can leave the memory again."""
    if "val" not in latent_cache.splits(cache.url):
        return None
    training = config.flow.training
    validation = latent_cache.open(cache.url, "val")
    if validation.lengths.max() < 3:
        return None
    sampler = open_sampler(
        validation,
        "cpu",
        config.seed,
        training.validation_pairs,
        training.clip_frames,
        residency="auto",
        memory_budget=config.cache.memory_budget_bytes,
    )
    with closing(sampler):
        return sampler.batch(0).to(device)
