"""Features of videos that every evaluation sees again, of the truth and of baselines: in a file beside the store.

The file is a convenience: it may be removed at any time, and a damaged one is begun anew.
"""

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.runtime.progress import warn


def feature_file(store: Path) -> Path:
    """The file of features beside a store."""
    return store.with_suffix(".features.sqlite")


class FeatureCache:
    """Features by network and content: a changed frame or network has features of its own."""

    def __init__(self, path: Path) -> None:
        """A file that is made when features are added, if its folder exists."""
        self.path = path

    def features(self, network: str, videos: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of videos, of which only those that are not in the file are computed.

        Args:
            network: sha256 of its weights.
            videos: [n, ...].
            compute: videos [m, ...] -> [m, d], m >= 1.
        Returns:
            [n, d] float32 on the CPU.
        """
        keys = [_digest(f"{network} {list(video.shape)} {video.dtype}".encode(), _bytes(video)) for video in videos]
        known = self._read(keys)
        new = [row for row, key in enumerate(keys) if key not in known]
        if new:
            computed = compute(videos[new]).float().cpu()
            known |= {keys[row]: values for row, values in zip(new, computed, strict=True)}
            self._write({keys[row]: known[keys[row]] for row in new})
        return torch.stack([known[key] for key in keys])

    def _read(self, keys: list[bytes]) -> dict[bytes, Tensor]:
        """Those that are there and sound."""
        if not self.path.exists():
            return {}
        found = {}
        try:
            with closing(self._open()) as connection:
                for key in keys:
                    row = connection.execute("SELECT features, sha256 FROM features WHERE key = ?", (key,)).fetchone()
                    if row is not None and _digest(row[0]) == row[1]:
                        found[key] = torch.from_numpy(np.frombuffer(row[0], np.float32).copy())
        except sqlite3.DatabaseError as error:
            self._begin_anew(error)
            return {}
        return found

    def _write(self, features: dict[bytes, Tensor]) -> None:
        if not self.path.parent.is_dir():
            return
        rows = [(key, content := _bytes(values), _digest(content)) for key, values in features.items()]
        try:
            with closing(self._open()) as connection, connection:
                connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", rows)
        except sqlite3.DatabaseError as error:
            self._begin_anew(error)

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path)
        connection.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, features BLOB, sha256 BLOB)")
        return connection

    def _begin_anew(self, error: sqlite3.DatabaseError) -> None:
        """A file that another process locks, or that cannot be written, stays."""
        if isinstance(error, sqlite3.OperationalError):
            return
        warn(f"{self.path}: damaged ({error}): features are computed again")
        with suppress(OSError):
            self.path.unlink()


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().numpy().tobytes()


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()
