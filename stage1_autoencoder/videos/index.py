"""The index of a folder's videos, a small SQLite file in it: frame counts, keyframes, digests, and splits.

All of it streams: of a million videos only names and some numbers are in memory at once.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sqlite3
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json
from tqdm import tqdm

from stage1_autoencoder.videos.config import Split
from stage1_autoencoder.videos.display import MOST_ASPECT, Display
from stage1_autoencoder.videos.image_folders import is_webp, list_frames, probe_folder, probe_webp
from stage1_autoencoder.videos.source import (
    FASTEST_FPS,
    MOST_PIXELS,
    RETRY_SECONDS,
    SLOWEST_FPS,
    BrokenVideoError,
    UnreadableVideoError,
)
from stage1_autoencoder.videos.splits import SPLITS
from stage1_autoencoder.videos.video_files import Keyframe, Probe, digest_cuts, probe_video

CACHE_NAME = ".river_index.sqlite"
CACHE_VERSION = 4

_WORKERS = 8  # opening files is mostly waiting, and FFmpeg releases Python's lock
_AHEAD = 16 * _WORKERS  # videos examined ahead of the one whose result is taken
_COMMIT_SECONDS = 5.0  # longest time for which results may be lost by a crash
_MOST_BYTES = 2**24  # of one value: the keyframes of weeks
_BESIDE = ("-journal", "-wal", "-shm")  # SQLite's own files, named like the database
# Errors that say that the file is damaged or has other tables than ours, by their first 8 bits: others come from the
# disk, or from another process. https://sqlite.org/rescode.html
_DAMAGED = {
    sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH,
}  # fmt: skip
_TABLE = """CREATE TABLE video (
    name BLOB PRIMARY KEY, stamp TEXT NOT NULL, frames INTEGER NOT NULL, fps REAL NOT NULL, width INTEGER NOT NULL,
    height INTEGER NOT NULL, keyframes TEXT NOT NULL, orientation INTEGER NOT NULL, aspect TEXT NOT NULL,
    digest TEXT NOT NULL
) WITHOUT ROWID"""
# Splits by name, for each rule by which videos are divided. Other versions of the index keep this table.
_SPLIT_TABLE = """CREATE TABLE division (
    rule TEXT NOT NULL, name BLOB NOT NULL, split TEXT NOT NULL, PRIMARY KEY (rule, name)
) WITHOUT ROWID"""
_COLUMNS = "stamp, frames, fps, width, height, keyframes, orientation, aspect, digest"
_TABLES = {("video", _TABLE), ("division", _SPLIT_TABLE)}


def _plausible_aspect(text: str) -> str:
    if not 1 / MOST_ASPECT <= Fraction(text) <= MOST_ASPECT:
        raise ValueError("no shape of a pixel")
    return text


_Count = Annotated[int, Field(ge=1, lt=2**31)]
_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Row(BaseModel):
    """A row of the table `video`: what a probe may be, since anything may have written it."""

    model_config = ConfigDict(strict=True, frozen=True)

    stamp: str
    frames: _Count
    fps: float = Field(ge=SLOWEST_FPS, le=FASTEST_FPS)
    width: _Count = Field(le=MOST_PIXELS)
    height: _Count = Field(le=MOST_PIXELS)
    keyframes: Json[list[tuple[_Int64, _Int64]]]
    orientation: int = Field(ge=1, le=8)
    aspect: Annotated[str, Field(pattern=r"^\d{1,9}(/[1-9]\d{0,8})?$"), AfterValidator(_plausible_aspect)]
    digest: str = Field(pattern=r"^[0-9a-f]{64}( \d{1,10}:[0-9a-f]{64})*$")  # of the file, and of cuts by their stop

    def entry(self) -> "Entry":
        chosen = tuple(Keyframe(*pair) for pair in self.keyframes)
        display = Display(self.orientation, Fraction(self.aspect))
        probe = Probe(self.frames, self.fps, self.width, self.height, chosen, display)
        digest, *cuts = self.digest.split()
        parts = (cut.split(":") for cut in cuts)
        return Entry(self.stamp, probe, digest, {int(stop): of_cut for stop, of_cut in parts})


@dataclass(frozen=True)
class Indexed:
    """A video in the index: its probe and the digest of its content, or the reason why it cannot be used.

    Attributes:
        cuts: digests of its content up to the stops that were asked for.
    """

    probe: Probe | None = None
    digest: str | None = None
    reason: str | None = None
    cuts: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A usable video: its stamp when it was probed, the probe, and the digests of its content."""

    stamp: str
    probe: Probe
    digest: str
    cuts: Mapping[int, str] = field(default_factory=dict)


def index_videos(
    root: Path,
    names: Sequence[str],
    remember: bool = True,
    stops: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> Iterator[Indexed]:
    """Probe videos below `root`, except those that an earlier call has probed.

    Results are kept in the folder (see `IndexCache`) and hold as long as a video's `stamp` does; so an interrupted
    call is resumed. If the folder is read-only, videos are probed each time; so are unusable videos.

    Args:
        names: paths relative to `root`.
        remember: False writes nothing.
        stops: by name, one-past-last frames of the cuts whose digests are wanted.
    Yields:
        one result per name, in order.
    """

    def examine(name: str, known: Entry | None) -> tuple[str, Indexed, bool]:
        """The stamp, the result, and whether it is new."""
        path, seen, cuts = root / name, "", stops.get(name, ())
        for pause in (*RETRY_SECONDS, None):
            try:
                try:
                    seen = stamp(path)
                except OSError as error:
                    raise UnreadableVideoError.of(name, error) from error
                if known is not None and known.stamp == seen and known.cuts.keys() >= set(cuts):
                    return seen, Indexed(known.probe, known.digest, cuts=known.cuts), False
                return seen, examine_video(path, name, cuts), True
            except BrokenVideoError as error:
                reason = error.reason
                if pause is None or not (isinstance(error, UnreadableVideoError) and error.may_pass):
                    break
            time.sleep(pause)
        return seen, Indexed(reason=reason), True

    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(IndexCache(root, remember))
        cache.forget_others(names)
        executor = ThreadPoolExecutor(_WORKERS)
        stack.callback(executor.shutdown, cancel_futures=True)
        # disable=None: no bar unless on a terminal
        bar = stack.enter_context(
            tqdm(total=len(names), desc=f"index {root.name}", leave=False, unit="video", disable=None)
        )
        running: deque[tuple[str, Future]] = deque()
        waiting = iter(names)
        while True:
            if len(running) <= _AHEAD // 2:
                ahead = list(itertools.islice(waiting, _AHEAD - len(running)))
                for name, known in zip(ahead, cache.get(ahead), strict=True):
                    running.append((name, executor.submit(examine, name, known)))
            if not running:
                break
            name, future = running.popleft()
            seen, indexed, new = future.result()
            if new and indexed.probe is not None and indexed.digest is not None:
                cache.put(name, Entry(seen, indexed.probe, indexed.digest, indexed.cuts))
            bar.update()
            yield indexed


def examine_video(path: Path, video_id: str, stops: Collection[int] = ()) -> Indexed:
    """Probe and digest a video file or frame folder.

    Args:
        stops: see `index_videos`; a stop whose digest is unknown gets that of the whole file.
    Raises:
        BrokenVideoError: it cannot be used.
    """
    try:
        probe_kind = probe_folder if path.is_dir() else probe_webp if is_webp(path) else probe_video
        probe = probe_kind(path, video_id)
        whole = digest(path)
        cuts = digest_cuts(path, video_id, stops, probe) if stops else {}
        return Indexed(probe, whole, cuts=dict.fromkeys(stops, whole) | cuts)
    except OSError as error:
        raise UnreadableVideoError.of(video_id, error) from error


def digest(path: Path) -> str:
    """sha256 (hexadecimal) of a video's content, independent of its path and time stamps.

    Of a file: all its bytes. Of a frame folder: the names and sizes of its frames, and the bytes of the first, middle
    and last one, because opening every picture of a large data set takes hours.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    frames = list_frames(path)
    listed = json.dumps([(frame.name, frame.stat().st_size) for frame in frames])
    opened = [frames[i].read_bytes() for i in (0, len(frames) // 2, -1)]
    # Digests of digests, so that no byte can move from one part to the next.
    parts = [hashlib.sha256(part).digest() for part in (listed.encode(), *opened)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def stamp(path: Path) -> str:
    """What reveals a change: size and time of a file; a digest of names, sizes and times of the frames of a folder."""
    if not path.is_dir():
        stat = path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    frames = hashlib.sha256()
    for frame in list_frames(path):
        stat = frame.stat()
        frames.update(b"%b/%d %d\n" % (os.fsencode(frame.name), stat.st_size, stat.st_mtime_ns))
    return frames.hexdigest()


class IndexCache:
    """Entries by name, in `<root>/.river_index.sqlite`, and the splits into which videos were divided.

    A cache that is damaged, or has other tables, is replaced, and so are the entries of another version; an entry that
    no video can have is unknown. If the folder is read-only, or another process locks the file for long, nothing is
    stored, but nothing fails.
    """

    def __init__(self, root: Path, remember: bool = True) -> None:
        """Open the cache; read-only if not `remember`."""
        self._path = root / CACHE_NAME
        self._writes = remember
        self._database = self._open()
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

    def get(self, names: Sequence[str]) -> list[Entry | None]:
        """Entries of some videos, at most a thousand, by their paths relative to the folder; None for an unknown video.

        One query for many: while threads are busy, each query waits for Python's lock.
        """
        found: dict[bytes, Entry] = {}
        keys = [os.fsencode(name) for name in names]
        try:
            if self._database is not None:
                query = f"SELECT name, {_COLUMNS} FROM video WHERE name IN ({', '.join('?' * len(keys))})"
                for row in self._database.execute(query, keys):
                    with contextlib.suppress(ValueError):  # as unknown, it is probed and stored again
                        named = zip(_COLUMNS.split(", "), row[1:], strict=True)
                        found[row[0]] = _Row.model_validate(dict(named)).entry()
        except sqlite3.Error as error:
            self._recover(error)
        return [found.get(key) for key in keys]

    def put(self, name: str, entry: Entry) -> None:
        """Store the entry of a video."""
        if self._database is None or not self._writes:
            return
        probe, digests = entry.probe, " ".join([entry.digest, *(f"{stop}:{cut}" for stop, cut in entry.cuts.items())])
        row = (os.fsencode(name), entry.stamp, probe.frames, probe.fps, probe.width, probe.height)
        row += (json.dumps(probe.keyframes), probe.display.orientation, str(probe.display.aspect), digests)
        try:
            self._database.execute(f"INSERT OR REPLACE INTO video VALUES ({', '.join('?' * len(row))})", row)
        except sqlite3.Error as error:
            self._recover(error)
            return
        if time.monotonic() - self._saved > _COMMIT_SECONDS:
            self._commit()

    def get_split(self, rule: str, name: str) -> Split | None:
        """The split that a video was put into by a rule."""
        if self._database is None:
            return None
        try:
            query = "SELECT split FROM division WHERE rule = ? AND name = ?"
            row = self._database.execute(query, (rule, os.fsencode(name))).fetchone()
        except sqlite3.Error as error:
            self._recover(error)
            return None
        return row[0] if row and row[0] in SPLITS else None

    def put_splits(self, rule: str, split: Split, names: Iterable[str]) -> None:
        """Store the split of videos, of which those that have one keep it."""
        if self._database is None or not self._writes:
            return
        try:
            rows = ((rule, os.fsencode(name), split) for name in names if self.get_split(rule, name) is None)
            self._database.executemany("INSERT OR IGNORE INTO division VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._recover(error)

    def forget_others(self, names: Sequence[str]) -> None:
        """Delete entries of videos that are not among `names` if they are more than half of all."""
        if self._database is None or not self._writes:
            return
        try:
            (count,) = self._database.execute("SELECT count(*) FROM video").fetchone()
            if count <= 2 * len(names):
                return
            kept = {os.fsencode(name) for name in names}
            gone = [row for row in self._database.execute("SELECT name FROM video") if row[0] not in kept]
            self._database.executemany("DELETE FROM video WHERE name = ?", gone)
        except sqlite3.Error as error:
            self._recover(error)

    def _open(self) -> sqlite3.Connection | None:
        if any(file.exists() and not file.is_file() for file in self._files()):  # a pipe would be waited for
            return None
        if self._writes:
            with contextlib.suppress(sqlite3.Error, OSError):
                return self._create()
        if self._path.is_file():  # read-only
            with contextlib.suppress(sqlite3.Error):
                database = self._connect("ro")
                if database.execute("PRAGMA user_version").fetchone() == (CACHE_VERSION,) and _is_ours(database):
                    return database
                database.close()
        return None

    def _files(self) -> list[Path]:
        return [self._path, *(self._path.with_name(self._path.name + suffix) for suffix in _BESIDE)]

    def _create(self) -> sqlite3.Connection:
        """Open the cache for writing; create it, or empty it of entries of another version.

        Raises:
            sqlite3.Error, OSError: the folder or the file is read-only.
        """
        for _ in range(2):
            with contextlib.suppress(FileExistsError):
                self._path.touch(exist_ok=False)  # SQLite itself would not let a group write
            database = self._connect("rwc")
            try:
                database.execute("BEGIN IMMEDIATE")  # one of several processes creates the tables
                if database.execute("PRAGMA user_version").fetchone() != (CACHE_VERSION,):
                    database.execute("DROP TABLE IF EXISTS video")
                    database.execute(_TABLE)
                    database.execute(_SPLIT_TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))
                    database.execute(f"PRAGMA user_version = {CACHE_VERSION}")
                database.commit()
                if _is_ours(database):
                    return database
            except sqlite3.Error as error:
                if not _is_damage(error):  # locked by another process, or read-only
                    database.close()
                    raise
            database.close()
            self._remove()
        raise sqlite3.DatabaseError(f"{self._path} cannot be replaced")

    def _remove(self) -> None:
        for file in self._files():
            file.unlink(missing_ok=True)

    def _connect(self, mode: str) -> sqlite3.Connection:
        database = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode={mode}", uri=True, timeout=10.0)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES)
        return database

    def _commit(self) -> None:
        self._saved = time.monotonic()
        try:
            self._database.commit()
        except sqlite3.Error as error:  # a full disk, for example
            self._recover(error)

    def _recover(self, error: sqlite3.Error) -> None:
        """Continue with an empty cache in place of a damaged one, or without any; videos are probed again."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
        self._database = None
        if self._writes and _is_damage(error):
            with contextlib.suppress(sqlite3.Error, OSError):
                self._remove()
                self._database = self._create()


def _is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _is_ours(database: sqlite3.Connection) -> bool:
    """Whether a database has our tables and nothing else: a view or a trigger could compute for ever."""
    return set(database.execute("SELECT name, sql FROM sqlite_schema")) == _TABLES
