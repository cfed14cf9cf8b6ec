"""What changes while a refiner is trained; one call a step. The autoencoder that it belongs to stays as it is."""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import RiverConfig
from pipelines.evaluation.metrics import psnr
from pipelines.evaluation.networks import VideoNetwork
from pipelines.prediction.rollouts import refine_frames
from pipelines.runtime.checkpoints import Checkpoint, Tensors
from pipelines.runtime.context import image_memory_format
from pipelines.runtime.distributed import ALONE, Processes
from pipelines.runtime.progress import say
from pipelines.runtime.train_state import TrainState
from pipelines.training.refiner_clips import ClipBatch, RefinerClips
from pipelines.training.training_loop import StepResult, Trainer
from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.rcan import RCAN
from stage1_autoencoder.training import learning_rate_factor

# Frames that go through the autoencoder, and clips that are validated, at once.
FRAMES_AT_ONCE = 64
CLIPS_AT_ONCE = 4


@dataclass(frozen=True)
class RefinerExample:
    """Clips as the refiner is given them in training, n = t - 1 frames each.

    Attributes:
        previous: [b, n, 3, h, w] in [-1, 1], the real frame before each.
        decoded: [b, n, 3, h, w], the decoded stored latent of each, not clamped.
        truth: [b, n, 3, h, w] in [-1, 1], what each should become.
    """

    previous: Tensor
    decoded: Tensor
    truth: Tensor


class RefinerTrainer(Trainer):
    """Refiner and averaged copy."""

    def __init__(
        self,
        config: RiverConfig,
        device: torch.device,
        autoencoder: Autoencoder,
        clips: RefinerClips,
        *,
        perceptual: VideoNetwork | None = None,
        validation: ClipBatch | None = None,
        state: dict[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Make everything anew, from the configuration's seed.

        Args:
            autoencoder: in eval mode, on the device; decodes the clips' latents.
            clips: where they come from.
            perceptual: the perceptual term of the loss, if any.
            validation: clips of the first process that are looked at again and again.
            state: what else goes to the checkpoints' JSON.
        """
        self.config, self.training, self.device = config, config.refiner.training, device
        self.autoencoder, self.clips, self.perceptual = autoencoder, clips, perceptual
        self.validation, self.checkpoint_state, self.processes = validation, state or {}, processes
        torch.manual_seed(config.seed)
        self.model = RCAN(config.refiner.model)
        if self.training.start == "copy":
            self.model.start_as_copy()
        self.model.to(device, memory_format=image_memory_format(device))
        settings = self.training.model_copy(update={"learning_rate": self.training.peak_learning_rate})
        self.train_state = TrainState(self.model, settings, self.model.boundary_parameters())
        self.network = processes.distribute(self.model, device)

    @property
    def learning_rate(self) -> float:
        return self.train_state.learning_rate

    def train_step(self, step: int) -> StepResult:
        """One update on this process's rows of the step's clips."""
        batch = self.clips.batch(step, self.processes.rows(self.training.batch_size))
        count = self.training.accumulate
        parts = zip(batch.pixels.chunk(count), batch.latents.chunk(count), strict=True)
        self.model.train()
        terms = []
        for number, (pixels, latents) in enumerate(parts):
            example = make_example(self.autoencoder, pixels.to(self.device), latents.to(self.device))
            with self.processes.without_exchange(self.network, number < count - 1):
                terms.append(self._backward(example, 1 / count))
        training = self.training
        finite = self.train_state.apply(learning_rate_factor(step, warmup=training.warmup, total=training.steps))
        return StepResult({name: torch.stack([part[name] for part in terms]).mean() for name in terms[0]}, finite)

    def _backward(self, example: RefinerExample, scale: float) -> dict[str, Tensor]:
        """Gradients of the loss times `scale`; gives its terms."""
        clips = len(example.truth)
        previous, decoded = (rearrange(x, "b n c h w -> (b n) c h w") for x in (example.previous, example.decoded))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16"):
            refined = self.network(previous, decoded)
        refined = rearrange(refined.float(), "(b n) c h w -> b n c h w", b=clips)
        distance = F.mse_loss if self.training.loss == "mse" else F.l1_loss
        terms = {self.training.loss: distance(refined, example.truth)}
        loss = terms[self.training.loss]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual.distance(refined, example.truth)
            loss = loss + self.training.perceptual_weight * terms["perceptual"]
        (scale * loss).backward()
        return {name: term.detach() for name, term in ({"loss": loss} | terms).items()}

    def describe_batch(self, step: int) -> str:
        return self.clips.describe(step)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """PSNR of fixed clips as they are refined in use, each frame given the refined one before, and unrefined."""
        if self.validation is None:
            return {}
        model = self.train_state.best_model.eval()
        refined, unrefined = [], []
        clips = zip(self.validation.pixels.split(CLIPS_AT_ONCE), self.validation.latents.split(CLIPS_AT_ONCE),
                    strict=True)  # fmt: skip
        for pixels, latents in clips:
            example = make_example(self.autoencoder, pixels.to(self.device), latents.to(self.device))
            truth = example.truth.flatten(0, 1)
            frames = refine_frames(model, example.previous[:, 0], example.decoded)
            refined.append(psnr(frames.flatten(0, 1), truth))
            unrefined.append(psnr(example.decoded.flatten(0, 1), truth))
        measured = {
            "validation_psnr": torch.cat(refined).mean().item(),
            "validation_psnr_unrefined": torch.cat(unrefined).mean().item(),
        }
        say(
            f"refiner: step {step}: validation PSNR {measured['validation_psnr']:.2f} dB refined, "
            f"{measured['validation_psnr_unrefined']:.2f} dB unrefined"
        )
        return measured

    def files(self) -> dict[str, Tensors]:
        """Everything that resuming needs, and everything that refining needs."""
        return self.train_state.files()

    def state(self) -> dict[str, Any]:
        return self.checkpoint_state | {"model": self.config.refiner.model.model_dump(mode="json")}

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same configuration."""
        self.train_state.load(checkpoint, self.device)


@torch.no_grad()
def make_example(autoencoder: Autoencoder, pixels: Tensor, latents: Tensor) -> RefinerExample:
    """Decode clips' latents as prediction does: quantized to their nearest codes first.

    Args:
        pixels: [b, t, h, w, 3] uint8; `latents`: [b, t, c, y, x] of the same frames; both on the autoencoder's device.
    """
    frames = image_to_unit(pixels)
    wanted = rearrange(latents[:, 1:], "b n c y x -> (b n) c y x")
    decoded = torch.cat([autoencoder.decode(part) for part in wanted.split(FRAMES_AT_ONCE)])
    return RefinerExample(
        previous=frames[:, :-1],
        decoded=rearrange(decoded, "(b n) c h w -> b n c h w", b=len(frames)),
        truth=frames[:, 1:],
    )
