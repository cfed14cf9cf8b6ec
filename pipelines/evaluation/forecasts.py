"""The futures of clips that an evaluation compares: those of what predicts, and the baselines."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from pipelines.config import EvaluationConfig, RiverConfig
from pipelines.evaluation.measures import ClipBatch
from pipelines.evaluation.protocol import describe_run
from pipelines.loading import find_autoencoder, find_flow, load_trained_autoencoder, standardization_in, weights_digest
from pipelines.prediction.clips import Clip
from pipelines.predictor import FrameCoding, VideoPredictor
from pipelines.runtime.results import FilePredictor, RunPredictor
from stage2_flow.standardization import Standardization


class RunCoding(FrameCoding):
    """The autoencoder of a run, which need not have a flow."""

    def __init__(self, config: RiverConfig, device: torch.device) -> None:
        """Load it. Without a flow of this autoencoder, whose standardization is used, final latents are the raw ones.

        Raises:
            LookupError: there is none.
            UserError: weights that are damaged.
        """
        checkpoint, flow = find_autoencoder(config.shared.run_path), find_flow(config.run_path)
        if checkpoint is None:
            raise LookupError(f"{config.training_folder('autoencoder')}/checkpoints holds no autoencoder")
        self.device, self.autoencoder = device, load_trained_autoencoder(checkpoint, device)
        standardization = Standardization.identity(self.autoencoder.config.latent_channels)
        if flow is not None and flow.state["store"]["autoencoder"] == weights_digest(self.autoencoder):
            standardization = standardization_in(flow)
        self.standardization = standardization.to(device)


class Forecast(ABC):
    """Something that predicts clips, beside baselines: the last given frame, and the autoencoder's reconstruction.

    Attributes:
        description: of what predicts, for the protocol.
        samples: predictions per clip.
        coding: the autoencoder of reconstructions and latents; None: there are none.
    """

    description: RunPredictor | FilePredictor
    samples: int
    coding: FrameCoding | None

    def __init__(self, evaluation: EvaluationConfig, coding: FrameCoding | None, device: torch.device) -> None:
        self.context, self.samples, self.coding, self.device = evaluation.context, evaluation.samples, coding, device

    @abstractmethod
    def predict(
        self, clips: Sequence[Clip], given: Tensor, given_latents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The frames after the given ones.

        Args:
            given: [b, context, 3, h, w] in [-1, 1], on the device.
            given_latents: [b, context, c, y, x] raw latents of `coding`.
        Returns:
            [b, samples, horizon, 3, h, w] in [-1, 1], and their raw latents [b, samples, context + horizon, c, y, x],
            after the given ones; None: those of encoding them.
        """

    def __call__(self, clips: Sequence[Clip]) -> ClipBatch:
        """Clips with all their futures.

        Raises:
            UserError: latents or pixels that are not finite.
        """
        coding, context = self.coding, self.context
        frames = torch.stack([clip.frames for clip in clips]).to(self.device)
        given, horizon = frames[:, :context], frames.shape[1] - context
        latents = None if coding is None else coding.encode_videos(frames)
        predicted, predicted_latents = self.predict(clips, given, None if latents is None else latents[:, :context])
        futures = {"prediction": predicted, "copy_last": given[:, None, -1:].expand(-1, -1, horizon, -1, -1, -1)}
        final, autoencoded = {}, None
        if coding is not None and latents is not None:
            autoencoded = coding.decode_videos(latents)
            futures["reconstruction"] = autoencoded[:, None, context:]
            if predicted_latents is None:
                encoded = coding.encode_videos(rearrange(predicted, "b k t c h w -> (b k) t c h w"))
                encoded = rearrange(encoded, "(b k) t c y x -> b k t c y x", k=predicted.shape[1])
                start = latents[:, None, :context].expand(-1, predicted.shape[1], -1, -1, -1, -1)
                predicted_latents = torch.cat([start, encoded], dim=2)
            copied = latents[:, context - 1 : context].expand(-1, horizon, -1, -1, -1)
            copied = torch.cat([latents[:, :context], copied], dim=1)
            final = {"truth": latents[:, None], "prediction": predicted_latents, "copy_last": copied[:, None]}
            final = {subject: coding.standardization.to_final(raw) for subject, raw in final.items()}
        return ClipBatch(clips, given, frames[:, context:], autoencoded, futures, final)


class RunForecast(Forecast):
    """Predictions of a run."""

    def __init__(
        self,
        run: Path,
        predictor: VideoPredictor,
        evaluation: EvaluationConfig,
        refine: bool = False,
        coding: FrameCoding | None = None,
    ) -> None:
        """Nothing predicted yet.

        Args:
            run: its folder.
            predictor: its networks.
            refine: refine predicted frames.
            coding: another autoencoder of reconstructions and latents, for which predicted frames are encoded; None:
                the run's own, with the latents as they are predicted.
        Raises:
            UserError: `refine` without a refiner.
        """
        super().__init__(evaluation, predictor if coding is None else coding, predictor.device)
        self._predictor, self._refine = predictor, refine
        self.description = describe_run(run, predictor, evaluation, refine)

    def predict(
        self, clips: Sequence[Clip], given: Tensor, given_latents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        own = self.coding is self._predictor
        context = given_latents if own and given_latents is not None else self._predictor.encode_videos(given)
        keys, horizon = [(clip.key, 0) for clip in clips], len(clips[0].frames) - self.context
        latents = self._predictor.generate_latents(context, horizon, keys=keys, samples=self.samples)
        frames = self._predictor.decode_predictions(
            latents, given.repeat_interleave(self.samples, dim=0), refine=self._refine
        )
        frames, latents = (rearrange(x, "(b k) t c h w -> b k t c h w", k=self.samples) for x in (frames, latents))
        return frames, latents if own else None
