"""The futures of clips that an evaluation compares: those of what predicts, and the baselines."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from pipelines.config import EvaluationConfig, RiverConfig
from pipelines.evaluation.measures.measure import ClipBatch
from pipelines.evaluation.prediction_files import PredictionFiles
from pipelines.loading import (
    find_autoencoder,
    find_flow,
    find_refiner,
    load_trained_autoencoder,
    standardization_in,
    weights_digest,
)
from pipelines.prediction.clips import Clip
from pipelines.prediction.frame_coding import FrameCoding
from pipelines.predictor import VideoPredictor
from pipelines.runtime.context import sampling_precision
from pipelines.runtime.results import FilePredictor, RunPredictor
from stage2_flow.sampling_plan import SamplingPlan
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


def _describe_run(run: Path, predictor: VideoPredictor, evaluation: EvaluationConfig, refine: bool) -> RunPredictor:
    """A run as what predicts clips of a protocol.

    Args:
        run: its folder.
        predictor: its networks.
        refine: predicted frames are refined.
    Raises:
        UserError: `refine` without a refiner; decoder fast without one.
    """
    flow, refiner, sampling = find_flow(run), find_refiner(run) if refine else None, predictor.sampling
    assert flow is not None
    fast = sampling.decoder == "fast" and not refine
    resolved = predictor.resolved_sampling(sampling, evaluation.context, evaluation.horizon)
    return RunPredictor(
        flow_step=flow.step,
        flow_sha256=weights_digest(predictor.vector_field),
        flow_origin={key: flow.state[key] for key in ("imported", "fine_tuned_from", "teacher") if key in flow.state},
        store_fingerprint=flow.state["store"]["fingerprint"],
        autoencoder_sha256=flow.state["store"]["autoencoder"],
        refine=refine,
        refiner_step=None if refiner is None else refiner.step,
        refiner_sha256=weights_digest(predictor.check_refiner()) if refine else None,
        decoder_sha256=weights_digest(predictor.check_fast_decoder()) if fast else None,
        sampling=resolved.model_dump(mode="json"),
        seed=sampling.seed,
        nfe=SamplingPlan.from_config(sampling).evaluations,
        precision=sampling_precision(sampling, predictor.device),
        description=predictor.describe_sampling(refine),
    )


class Forecast(ABC):
    """Something that predicts clips, beside baselines: the last given frame, and the autoencoder's reconstruction.

    Attributes:
        description: of what predicts, for the protocol.
        context: given frames of each clip.
        samples: predictions per clip.
        device: of all frames.
        coding: the autoencoder of reconstructions and latents; None: there are none.
        is_encoded: latents of predictions are those of the predicted frames.
    """

    description: RunPredictor | FilePredictor
    samples: int
    coding: FrameCoding | None
    is_encoded: bool

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
        coding: FrameCoding | None,
        refine: bool = False,
    ) -> None:
        """Nothing predicted yet.

        Args:
            run: its folder.
            predictor: its networks.
            coding: the autoencoder of reconstructions and latents. If it is not the predictor, predicted frames are
                encoded.
            refine: refine predicted frames.
        Raises:
            UserError: `refine` without a refiner.
        """
        super().__init__(evaluation, coding, predictor.device)
        self.is_encoded = coding is not predictor
        self._predictor, self._refine = predictor, refine
        self.description = _describe_run(run, predictor, evaluation, refine)

    def predict(
        self, clips: Sequence[Clip], given: Tensor, given_latents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        own = not self.is_encoded
        context = given_latents if own and given_latents is not None else self._predictor.encode_videos(given)
        keys, horizon = [(clip.key, 0) for clip in clips], len(clips[0].frames) - self.context
        latents = self._predictor.generate_latents(context, horizon, keys=keys, samples=self.samples)
        frames = self._predictor.decode_predictions(
            latents, given.repeat_interleave(self.samples, dim=0), refine=self._refine
        )
        frames, latents = (rearrange(x, "(b k) t c h w -> b k t c h w", k=self.samples) for x in (frames, latents))
        return frames, latents if own else None


class FileForecast(Forecast):
    """Predictions of any other predictor, from files."""

    is_encoded = True

    def __init__(
        self, files: PredictionFiles, evaluation: EvaluationConfig, coding: FrameCoding | None, device: torch.device
    ) -> None:
        """Of files that were checked."""
        super().__init__(evaluation, coding, device)
        self._files = files
        self.description = FilePredictor(path=str(files.path), sha256=files.sha256, black=files.black)

    def predict(
        self, clips: Sequence[Clip], given: Tensor, given_latents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return torch.stack([self._files.read(clip.name) for clip in clips]).to(self.device), None
