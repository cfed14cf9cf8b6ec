"""The futures of clips that an evaluation compares: a run's predictions, and the baselines."""

from collections.abc import Sequence

import torch
from einops import rearrange

from pipelines.evaluation.measures import ClipBatch
from pipelines.prediction.clips import Clip
from pipelines.predictor import VideoPredictor


class RunForecast:
    """Predictions of a run beside its baselines: copying the last given frame, and the autoencoder's reconstruction."""

    def __init__(self, predictor: VideoPredictor, context: int, samples: int, refine: bool = False) -> None:
        """Nothing predicted yet.

        Args:
            context: number of given frames of each clip.
            samples: predictions per clip.
            refine: refine predicted frames.
        """
        self.predictor, self.context, self.samples, self.refine = predictor, context, samples, refine

    def __call__(self, clips: Sequence[Clip]) -> ClipBatch:
        """Predict the frames after the given ones.

        Raises:
            UserError: latents or pixels that are not finite.
        """
        predictor, context = self.predictor, self.context
        frames = torch.stack([clip.frames for clip in clips]).to(predictor.device)
        horizon = frames.shape[1] - context
        latents, to_final = predictor.encode_videos(frames), predictor.standardization.to_final
        autoencoded = predictor.decode_videos(latents)
        given, given_latents = frames[:, :context], latents[:, :context]
        copied, copied_latents = (x[:, -1:].expand(-1, horizon, -1, -1, -1) for x in (given, given_latents))
        keys = [(clip.key, 0) for clip in clips]
        predicted_latents = predictor.generate_latents(given_latents, horizon, keys=keys, samples=self.samples)
        predicted = predictor.decode_predictions(
            predicted_latents, given.repeat_interleave(self.samples, dim=0), refine=self.refine
        )
        return ClipBatch(
            clips=clips,
            given=given,
            truth=frames[:, context:],
            autoencoded=autoencoded,
            futures={
                "prediction": rearrange(predicted, "(b k) t c h w -> b k t c h w", k=self.samples),
                "copy_last": copied[:, None],
                "reconstruction": autoencoded[:, None, context:],
            },
            latents={
                "truth": to_final(latents)[:, None],
                "prediction": rearrange(to_final(predicted_latents), "(b k) t c y x -> b k t c y x", k=self.samples),
                "copy_last": to_final(torch.cat([given_latents, copied_latents], dim=1))[:, None],
            },
        )
