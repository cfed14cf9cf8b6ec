"""Clips of latents as a PyTorch dataset, for trainings other than ours."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latent_cache.errors import CorruptStoreError, DamagedFramesError, ReplacedStoreError, StoreError
from latent_cache.reading.reader import LatentCache, open_cache

logger = logging.getLogger(__name__)


class ClipDataset(Dataset[Tensor]):
    """All clips of consecutive latents of a split, as `latent_cache.torch_dataset`.

    Item i is one clip: [clip_frames, c, h, w] float32 on the CPU. Clips are in the order of the videos, then by their
    first frame; all views of a video are in it. Videos that are shorter than a clip are left out. For random clips, use
    `shuffle=True` of a DataLoader or a DistributedSampler.

    It can be pickled, and works in forked, spawned and threaded workers: each process opens the store itself. The
    latents of a local store stay in the operating system's cache of files, which all processes share.

    Args:
        store: path or URL of the store.
        split: name of the split.
        clip_frames: >= 1.
        stride: frames between the beginnings of two clips of a video, >= 1.
        standardize: `(latents - mean) / std` of each channel, with the statistics of the store's training split.
        memory: load the whole split now, and in each process that is not forked from this one when it is first used.
            Use it for a URL, of which every clip would be downloaded with its whole chunk.
    Raises:
        ValueError: clip_frames or stride out of range.
        StoreError: no such store or split; no video is long enough; with `memory`, as `LatentCache.load`.
    """

    def __init__(
        self,
        store: str | Path,
        split: str,
        clip_frames: int,
        *,
        stride: int = 1,
        standardize: bool = False,
        memory: bool = False,
    ) -> None:
        if clip_frames < 1 or stride < 1:
            raise ValueError(f"clip_frames = {clip_frames}, stride = {stride}: both must be at least 1")
        cache = open_cache(store, split)
        self.url, self.split = cache.url, split
        self.clip_frames, self.stride = clip_frames, stride
        lengths = cache.lengths
        clips = np.maximum((lengths - clip_frames) // stride + 1, 0)
        if not clips.any():
            raise StoreError(
                f"{cache.url}, split {split!r}: a clip needs {clip_frames} frames, but the {len(lengths)} videos have "
                f"{lengths.min()} to {lengths.max()}: use a smaller clip_frames, or encode longer videos"
            )
        if short := np.count_nonzero(clips == 0):
            logger.warning(
                "%s, split %r: %d of %d videos have fewer than %d frames and are left out",
                cache.url, split, short, len(lengths), clip_frames,
            )  # fmt: skip
        self._ends = np.cumsum(clips)  # [videos] clips of each video and of those before it
        self._offsets = cache.offsets
        self._scale: tuple[Tensor, Tensor] | None = None
        if standardize:  # a constant channel has std 0 and becomes 0
            std = np.where(cache.std > 0, cache.std, np.float32(1))
            self._scale = torch.from_numpy(cache.mean)[:, None, None], torch.from_numpy(std)[:, None, None]
        self._fingerprint = cache.fingerprint
        self._opened = (os.getpid(), cache)
        self._memory = memory
        self._latents = cache.load() if memory else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Tensor:
        """A clip: [clip_frames, c, h, w] float32.

        Raises:
            IndexError: no such clip.
            CorruptStoreError: a chunk is missing or damaged; names its file and its videos.
            ReplacedStoreError: the store was written again, with other latents.
        """
        video, frame = self.window(index)
        start = int(self._offsets[video]) + frame
        try:
            latents = self._read(start, start + self.clip_frames)
        except DamagedFramesError as error:
            raise CorruptStoreError(str(error)) from error  # a DataLoader can't take the other to its own process
        clip = latents.to(torch.float32, copy=True)
        return clip if self._scale is None else clip.sub_(self._scale[0]).div_(self._scale[1])

    def window(self, index: int) -> tuple[int, int]:
        """The video of a clip, as its row in the split, and the clip's first frame in the video."""
        clip = range(len(self))[index]
        video = int(self._ends.searchsorted(clip, side="right"))
        return video, (clip - int(self._ends[video - 1] if video else 0)) * self.stride

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None, "_latents": None}

    def _read(self, start: int, stop: int) -> Tensor:
        if not self._memory:
            return torch.from_numpy(self._cache().latent_reader.read_window(start, stop))
        if self._latents is None:
            self._latents = self._cache().load()
        return self._latents[start:stop]

    def _cache(self) -> LatentCache:
        """The split as this process has opened it: connections and event loops do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            cache = open_cache(self.url, self.split)
            if cache.fingerprint != self._fingerprint:
                raise ReplacedStoreError(f"{self.url} was encoded again while it was in use: start again")
            self._opened = (os.getpid(), cache)
        return self._opened[1]
