"""What the index remembers of a folder's videos from one command to the next: a small SQLite file in the folder."""

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from stage1_autoencoder.videos.video_files import Keyframe, Probe

CACHE_NAME = ".river_index.sqlite"
CACHE_VERSION = 3

_SECONDS = 5.0  # after so long, at the latest, what was found out is safe
_TABLE = """CREATE TABLE video (
    name BLOB PRIMARY KEY, bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, frames INTEGER NOT NULL,
    fps REAL NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, keyframes TEXT NOT NULL, digest TEXT NOT NULL
) WITHOUT ROWID"""


@dataclass(frozen=True)
class Stamp:
    """By what a change of a file is noticed; of a frame folder: all bytes of its frames, and the newest of them."""

    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Entry:
    """A usable video: its stamp when it was read, what is in it, and the digest of its content."""

    stamp: Stamp
    probe: Probe
    digest: str


class IndexCache:
    """Entries by name, in `<root>/.river_index.sqlite`.

    It is a cache: one that is damaged or of another version is begun anew, and where the folder cannot be written to,
    or another process holds the file for long, nothing is remembered and nothing fails.
    """

    def __init__(self, root: Path, remember: bool = True) -> None:
        """Open it. Without `remember` it is only read."""
        self._path = root / CACHE_NAME
        self._database = self._open(remember)
        self._writes = remember
        self._saved = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._database is not None:
            self._commit()
        if self._database is not None:
            self._database.close()

    def get(self, name: str) -> Entry | None:
        """What is remembered of a video, by its path relative to the folder."""
        if self._database is None:
            return None
        try:
            query = "SELECT bytes, mtime_ns, frames, fps, width, height, keyframes, digest FROM video WHERE name = ?"
            row = self._database.execute(query, (os.fsencode(name),)).fetchone()
            if row is None:
                return None
            size, mtime_ns, frames, fps, width, height, keyframes, digest = row
            chosen = tuple(Keyframe(*pair) for pair in json.loads(keyframes))
            return Entry(Stamp(size, mtime_ns), Probe(frames, fps, width, height, chosen), digest)
        except (sqlite3.Error, ValueError, TypeError):
            self._give_up()
            return None

    def put(self, name: str, entry: Entry) -> None:
        """Remember a video."""
        if self._database is None or not self._writes:
            return
        probe = entry.probe
        row = (os.fsencode(name), entry.stamp.bytes, entry.stamp.mtime_ns, probe.frames, probe.fps, probe.width)
        row += (probe.height, json.dumps(probe.keyframes), entry.digest)
        try:
            self._database.execute("INSERT OR REPLACE INTO video VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error:
            self._give_up()
            return
        if time.monotonic() - self._saved > _SECONDS:
            self._commit()

    def forget_others(self, names: Sequence[str]) -> None:
        """Forget videos that are not among `names`, where that would make the file much smaller."""
        if self._database is None or not self._writes:
            return
        try:
            (count,) = self._database.execute("SELECT count(*) FROM video").fetchone()
            if count <= 2 * len(names):
                return
            kept = {os.fsencode(name) for name in names}
            gone = [row for row in self._database.execute("SELECT name FROM video") if row[0] not in kept]
            self._database.executemany("DELETE FROM video WHERE name = ?", gone)
        except sqlite3.Error:
            self._give_up()

    def _open(self, remember: bool) -> sqlite3.Connection | None:
        if remember:
            with contextlib.suppress(sqlite3.Error, OSError):
                return self._create()
        if self._path.is_file():  # in a folder that may only be read
            with contextlib.suppress(sqlite3.Error):
                database = self._connect("ro")
                if database.execute("PRAGMA user_version").fetchone() == (CACHE_VERSION,):
                    return database
                database.close()
        return None

    def _create(self) -> sqlite3.Connection:
        """Open it for writing, as a new one where there is none of this version.

        Raises:
            sqlite3.Error, OSError: the folder or the file cannot be written to.
        """
        for _ in range(2):
            database = self._connect("rwc")
            try:
                database.execute("BEGIN IMMEDIATE")  # of several processes one makes the table
                if database.execute("PRAGMA user_version").fetchone() == (0,):
                    database.execute(_TABLE)
                    database.execute(f"PRAGMA user_version = {CACHE_VERSION}")
                if database.execute("PRAGMA user_version").fetchone() == (CACHE_VERSION,):
                    database.commit()
                    # What earlier versions of this project kept.
                    self._path.with_suffix(".json").unlink(missing_ok=True)
                    return database
            except sqlite3.OperationalError:  # held by another process, or read-only
                database.close()
                raise
            except sqlite3.DatabaseError:  # no such file at all
                pass
            database.close()
            self._path.unlink()
        raise sqlite3.DatabaseError(f"{self._path} cannot be replaced")

    def _connect(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(f"{self._path.absolute().as_uri()}?mode={mode}", uri=True, timeout=10.0)

    def _commit(self) -> None:
        self._saved = time.monotonic()
        try:
            self._database.commit()
        except sqlite3.Error:  # a full disk, for example
            self._give_up()

    def _give_up(self) -> None:
        """Go on without: what it would have told is found out anew."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
        self._database = None
