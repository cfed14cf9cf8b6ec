"""What the refiner is trained on: clips of real frames beside the stored latents of the same frames."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from latent_cache import LatentCache, step_generator
from latent_cache.schema import IDENTITY_VIEW
from pipelines.errors import UserError
from pipelines.runtime.progress import say
from stage1_autoencoder.videos.source import BrokenVideoError, VideoSource

# Steps whose clips are decoded ahead of the one that is trained on.
STEPS_AHEAD = 2
# Clips that are drawn for each row, in case that videos break.
ATTEMPTS = 8
NAMES_KEPT = 4


@dataclass(frozen=True)
class ClipBatch:
    """Clips and their latents.

    Attributes:
        names: such as `walking_3@17`, the clip's first frame after the video's id.
        pixels: [b, t, h, w, 3] uint8.
        latents: [b, t, c, y, x] float32, as they are in the store: before quantization.
    """

    names: list[str]
    pixels: torch.Tensor
    latents: torch.Tensor


class RefinerClips:
    """Serves a batch of clips a step, drawn uniformly over all clips of a split: a function of (seed, step).

    Only the clips of a few steps are in memory; latents are, where they fit into their budget.
    """

    def __init__(
        self,
        source: VideoSource,
        cache: LatentCache,
        *,
        clip_frames: int,
        batch_size: int,
        steps: int,
        seed: int,
        memory: int,
        on_broken: Callable[[BrokenVideoError], None],
    ) -> None:
        """Match videos and latents.

        Args:
            source: a split's videos; `cache`: the same split in the store.
            steps: of the whole training; none after these is decoded ahead.
            memory: bytes of latents that are kept; of a larger split each clip's are read from the store.
            on_broken: called with a video that can't be decoded, from another thread; other clips take its place.
        Raises:
            UserError: the store has other videos than the source, or all of them are shorter than a clip.
        """
        self.source, self.cache, self.clip_frames = source, cache, clip_frames
        self.batch_size, self.steps, self.seed, self.on_broken = batch_size, steps, seed, on_broken
        self.rows, self.videos = _match(source, cache)
        lengths = cache.lengths[self.rows]
        fits = lengths >= clip_frames
        if not fits.any():
            raise UserError(
                f"refiner: no video of the {cache.split} split of {cache.url} has the {clip_frames} frames of "
                f"refiner.training.clip_frames; they have {lengths.min()} to {lengths.max()}: lower it"
            )
        if not fits.all():
            short = [source.videos[video].id for video in self.videos[~fits]]
            names = ", ".join(short[:3]) + (", ..." if len(short) > 3 else "")
            say(
                f"refiner: {len(short)} of {len(lengths)} videos of the {cache.split} split are shorter than the "
                f"{clip_frames} frames of a clip and left out: {names}"
            )
        self.rows, self.videos = self.rows[fits], self.videos[fits]
        self.ends = np.cumsum(lengths[fits] - clip_frames + 1)  # clips of the videos up to each, this one included
        self._latents = cache.load() if cache.nbytes <= memory else None
        self._threads = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="clips")
        self._ahead: dict[int, list[Future[tuple]]] = {}
        self._names: dict[int, list[str]] = {}

    @property
    def count(self) -> int:
        """Clips that can be drawn."""
        return int(self.ends[-1])

    def batch(self, step: int, rows: slice = slice(None)) -> ClipBatch:
        """The clips of a step, or some rows of them (the same at every step); those of the next steps are begun.

        Raises:
            BrokenVideoError: clip after clip that was drawn for one row can't be decoded.
            CorruptStoreError: latents of a clip are damaged; names their chunk.
        """
        for old in [number for number in self._ahead if number < step]:
            del self._ahead[old]
        for wanted in range(step, max(step + 1, min(step + 1 + STEPS_AHEAD, self.steps))):
            if wanted not in self._ahead:
                draws = self._draw(wanted)[rows]
                self._ahead[wanted] = [self._threads.submit(self._read_first_whole, choices) for choices in draws]
        names, pixels, latents = zip(*(future.result() for future in self._ahead.pop(step)), strict=True)
        self._names[step] = list(names)
        for old in [number for number in self._names if number <= step - NAMES_KEPT]:
            del self._names[old]
        return ClipBatch(list(names), torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(latents)).float())

    def describe(self, step: int, most: int = 4) -> str:
        """Which clips one of the last steps was given, for messages."""
        names = self._names.get(step, [])
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return f"clips {', '.join(names[:most])}{more}"

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _draw(self, step: int) -> np.ndarray:
        """[batch_size, ATTEMPTS] numbers of clips."""
        generator = step_generator(self.seed, step, stream="refiner clips")
        return torch.randint(self.count, (self.batch_size, ATTEMPTS), generator=generator).numpy()

    def _read_first_whole(self, choices: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
        for choice in choices:
            try:
                return self._read(int(choice))
            except BrokenVideoError as error:
                self.on_broken(error)
                broken = error
        raise broken

    def _read(self, clip: int) -> tuple[str, np.ndarray, np.ndarray]:
        number = int(np.searchsorted(self.ends, clip, side="right"))
        start = clip - (int(self.ends[number - 1]) if number else 0)
        row, video = int(self.rows[number]), int(self.videos[number])
        first = int(self.cache.offsets[row]) + start
        last = first + self.clip_frames
        if self._latents is None:
            latents = self.cache.latent_reader.read(first, last)
        else:
            latents = self._latents[first:last].numpy()
        pixels = self.source.read(video, range(start, start + self.clip_frames))
        return f"{self.source.videos[video].id}@{start}", pixels, latents


def _match(source: VideoSource, cache: LatentCache) -> tuple[np.ndarray, np.ndarray]:
    """(rows in the store, numbers in the source) of the videos as they are, by their ids."""
    numbers = {video.id: number for number, video in enumerate(source.videos)}
    rows = [row for row, view in enumerate(cache.video_views) if view == IDENTITY_VIEW]
    if not rows:
        raise UserError(
            f"refiner: the {cache.split} split of {cache.url} has no video as it is: add {IDENTITY_VIEW} to "
            "cache.views, and encode with --overwrite"
        )
    for row in rows:
        name = cache.video_ids[row]
        there, here = int(cache.lengths[row]), source.videos[numbers[name]].frames if name in numbers else None
        if there != here:
            found = "is not among the videos" if here is None else f"has {here} frames among the videos"
            raise UserError(
                f"refiner: video {name!r} of the {cache.split} split {found}, and {there} in {cache.url}: bring the "
                "videos back that were encoded, or encode with --overwrite"
            )
    return np.array(rows), np.array([numbers[cache.video_ids[row]] for row in rows])
