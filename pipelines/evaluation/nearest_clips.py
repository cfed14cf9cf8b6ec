"""The training clips nearest to given ones, in the store of latents; and whether predictions are copies of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import latent_cache
from latent_cache import LatentCache, StoreError
from pipelines.config import RiverConfig
from pipelines.evaluation.measures.intervals import Tally, percentile_interval
from pipelines.evaluation.measures.measure import NO_AUTOENCODER, ClipBatch, Measure, Records
from pipelines.loading import weights_digest
from pipelines.prediction.frame_coding import FrameCoding
from pipelines.runtime.context import computing_in
from stage2_flow.standardization import Standardization

# Products of a wanted frame and a stored one that are in memory at once.
PRODUCTS_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class NearestClips:
    """The training clip nearest to each of n clips.

    Attributes:
        distance: [n] root mean square difference of their final latents.
        start: [n] int64, the number of its first frame in the split.
        following: [n, k, c, y, x] final latents of the frames after it.
    """

    distance: Tensor
    start: Tensor
    following: Tensor


class TrainingClips:
    """All windows of consecutive frames of the training videos, read chunk by chunk: a store may exceed the memory."""

    def __init__(self, cache: LatentCache, standardization: Standardization, device: torch.device) -> None:
        """The clips of a split.

        Args:
            standardization: from raw to final latents, on the device.
            device: of the search and its results.
        """
        self.cache, self._standardization, self._device = cache, standardization, device

    @classmethod
    def open(cls, config: RiverConfig, coding: FrameCoding | None) -> "TrainingClips":
        """Those of a configuration's store.

        Raises:
            ValueError: there is no autoencoder, or no usable store of its latents here; the message is the reason.
        """
        if coding is None:
            raise ValueError(NO_AUTOENCODER)
        try:
            cache = latent_cache.open(config.store_path, "train")
            cache.latent_reader.check_files()
        except StoreError as error:
            raise ValueError(f"it needs the store of the training videos (paths.latents): {error}") from None
        if cache.metadata.autoencoder["sha256"] != weights_digest(coding.autoencoder):
            raise ValueError(f"{config.store_path} was encoded by another autoencoder: `encode --overwrite` renews it")
        factor = coding.autoencoder.downsampling
        wanted = (len(coding.standardization.mean), *(side // factor for side in config.dataset.frame_size))
        if cache.latent_shape != wanted:
            raise ValueError(f"{config.store_path} has latents {cache.latent_shape}, and these frames have {wanted}")
        return cls(cache, coding.standardization, coding.device)

    def count(self, frames: int) -> int:
        """Number of clips of this length."""
        return int(np.maximum(self.cache.lengths - frames + 1, 0).sum())

    @torch.inference_mode()
    def nearest(self, clips: Tensor, following: int = 0) -> NearestClips:
        """Find the nearest training clip of each clip, by one pass over the store.

        Args:
            clips: [n, t, c, y, x] final latents on the device.
            following: frames that the training video must have after the clip, which are returned.
        Raises:
            CorruptStoreError: a chunk is damaged; names its file.
        """
        n, length = clips.shape[:2]
        total, wanted = length + following, clips.float().flatten(2)
        distance = wanted.new_full((n,), torch.inf)
        start = torch.zeros(n, dtype=torch.int64, device=self._device)
        after = wanted.new_zeros((n, following, wanted.shape[2]))
        with computing_in("fp32", self._device):
            for first, frames in self._blocks(total - 1, PRODUCTS_AT_ONCE // (n * length)):
                fits = torch.from_numpy(self._frames_left[first:][: max(0, len(frames) - total + 1)] >= total)
                if not fits.any():
                    continue
                # |w - f|^2 = |w|^2 + |f|^2 - 2 w f, without |w|^2, which is the same for all windows.
                products = torch.addmm(frames.square().sum(1), wanted.flatten(0, 1), frames.T, alpha=-2)
                products = products.view(n, length, -1)
                sums = products[:, 0, : len(fits)].clone()
                for place in range(1, length):
                    sums += products[:, place, place : place + len(fits)]
                place = sums.masked_fill_(~fits.to(self._device), torch.inf).argmin(1)
                # The difference again: the products of equal clips cancel but for their rounding.
                found = frames[place[:, None] + torch.arange(total, device=self._device)]
                here = (found[:, :length] - wanted).square().mean((1, 2)).sqrt()
                better = here < distance
                distance, start = torch.where(better, here, distance), torch.where(better, place + first, start)
                after[better] = found[better, length:]
        return NearestClips(distance, start, after.unflatten(2, clips.shape[2:]))

    @cached_property
    def _frames_left(self) -> np.ndarray:
        """[frames] int64: from each frame to the end of its video, itself included."""
        return np.repeat(self.cache.offsets[1:], self.cache.lengths) - np.arange(self.cache.frames)

    def _blocks(self, overlap: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """The number of the first frame, and final latents [frames, d]; each block repeats the last `overlap` frames.

        Blocks have `size` new frames, at least one.
        """
        reader, held = self.cache.latent_reader, torch.empty(0, device=self._device)
        for chunk in range(reader.chunk_count):
            first = chunk * reader.chunk_frames
            count = min(reader.chunk_frames, self.cache.frames - first)
            raw = np.empty((count, *self.cache.latent_shape), self.cache.latents.dtype)
            reader.read_chunk(chunk, raw)
            final = self._standardization.to_final(torch.from_numpy(raw).to(self._device)).flatten(1)
            for part in final.split(max(1, overlap, size)):
                block = torch.cat([held, part]) if len(held) else part
                yield first - len(held), block
                first += len(part)
                held = block[max(0, len(block) - overlap) :]


class MemorizationMeasure(Measure):
    """How near predictions are to the training clips, beside how near the true futures are.

    Records: `prediction` [clips, samples] and `truth` [clips, 1], distances to the nearest training clip of as many
    frames; `error` [clips, samples], those from the prediction to the truth. All float64.
    """

    name, part = "memorization", "memorization"

    def __init__(self, training: TrainingClips, horizon: int) -> None:
        self._training, self._horizon = training, horizon

    def measure(self, batch: ClipBatch) -> Records:
        context, samples = batch.given.shape[1], batch.latents["prediction"].shape[1]
        truth, predicted = (batch.latents[subject][:, :, context:] for subject in ("truth", "prediction"))
        clips = torch.cat([truth, predicted], dim=1)
        distance = self._training.nearest(clips.flatten(0, 1)).distance.view(-1, 1 + samples).double().cpu()
        error = (predicted - truth).square().mean((2, 3, 4, 5)).sqrt().double().cpu()
        return {"prediction": distance[:, 1:], "truth": distance[:, :1], "error": error}

    def results(self, records: Records, counts: Tensor | None) -> dict[str, Any]:
        predicted, truth = records["prediction"], records["truth"]
        nearer = (predicted < truth).double() + 0.5 * (predicted == truth)
        tallies = {name: Tally.of_values(values.mean(1)) for name, values in (*records.items(), ("nearer", nearer))}
        intervals = None
        if counts is not None:
            intervals = {
                name: tuple(percentile_interval(tally.resampled(counts)).tolist()) for name, tally in tallies.items()
            }
        return {
            **{name: tally.mean().item() for name, tally in tallies.items()},
            "smallest": {"prediction": predicted.min().item(), "truth": truth.min().item()},
            "interval": intervals,
            "training_clips": self._training.count(self._horizon),
            "store_fingerprint": self._training.cache.fingerprint,
        }
