"""What `convert` has written into a folder: a file in it, a line a video, held by one process at a time."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.errors import UserError

RECORD = ".river_convert.jsonl"
UNFINISHED = ".river_convert.unfinished"
_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A video that was written: its id, the fingerprint of what it was made of, and the number of its frames."""

    id: str
    fingerprint: str
    frames: int


class Record:
    """The videos of an output folder by their folders' names (`train/clip`); see `open_record`.

    A video is made in `unfinished`, recorded, and then renamed to its place. So a folder at its place that is recorded
    is whole, whenever the process was killed; and one that is not recorded is none of ours.

    Attributes:
        entries: also those whose folder somebody removed.
        unfinished: a hidden folder on the same disk.
    """

    def __init__(self, out: Path, file: BinaryIO) -> None:
        self.out = out
        self.unfinished = out / UNFINISHED
        self.entries: dict[str, Entry] = {}
        self._file = file

    def is_whole(self, name: str, extension: str) -> bool:
        """Tell whether a recorded video is there, with as many frames as it had."""
        if name not in self.entries:
            return False
        try:
            files = os.listdir(self.out / name)
        except OSError:
            return False
        return sum(file.endswith(extension) for file in files) == self.entries[name].frames

    def put(self, made: Path, name: str, entry: Entry) -> None:
        """Record a video and rename its finished folder to its place, which a damaged older one has to leave."""
        self._discard(name)
        self._append({"folder": name} | asdict(entry))
        self.entries[name] = entry
        place = self.out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        made.rename(place)

    def remove(self, names: list[str]) -> None:
        """Delete recorded videos and forget them."""
        for name in names:
            self._discard(name)
            self._append({"removed": name})
            del self.entries[name]
            with suppress(OSError):  # other videos lie in them
                for parent in Path(name).parents[:-1]:
                    (self.out / parent).rmdir()

    def _discard(self, name: str) -> None:
        if (place := self.out / name).exists():
            aside = self.unfinished / "removed"
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)  # so that no half of it is ever at its place
            shutil.rmtree(aside)

    def start(self, settings: Mapping[str, Any]) -> None:
        """Note what the pictures that follow are made by."""
        self._append({"convert": _FORMAT, "settings": dict(settings)})

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(f"{json.dumps(line)}\n".encode())
        self._file.flush()

    def load(self) -> dict[str, Any] | None:
        """Read the file; the settings that its pictures were made by, None where there are no pictures.

        Raises:
            UserError: it is damaged.
        """
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1  # a process may have been killed within the last line
        self._file.truncate(whole)
        settings = None
        try:
            for line in map(json.loads, content[:whole].splitlines()):
                if "convert" in line:
                    if line["convert"] != _FORMAT:
                        raise ValueError(f"format {line['convert']}")
                    settings = line["settings"]
                elif "removed" in line:
                    del self.entries[line["removed"]]
                else:
                    name = line.pop("folder")
                    self.entries[name] = Entry(**line)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.out / RECORD} cannot be read ({error}): remove {self.out}, or choose another folder"
            ) from error
        return settings if self.entries else None


def check_place(out: Path) -> None:
    """Find out, writing nothing, whether a folder is one to write into.

    Raises:
        UserError: it is a file, cannot be looked into, or has something in it that `convert` did not write.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: this is a file; name a folder")
    try:
        names = sorted(name for name in os.listdir(out) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be looked into ({error.strerror})") from error
    if names and not (out / RECORD).exists():
        raise UserError(
            f"--out {out}: has {names[0]} in it, which was not written by convert; name a new folder, or an empty one"
        )


@contextmanager
def open_record(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Iterator[Record]:
    """Hold an output folder, made where it lacks, for one process; the kernel lets go of it when the process dies.

    Args:
        settings: all that pictures depend on besides the videos.
        overwrite: where they contradict those of an earlier command, remove what it wrote.
    Raises:
        UserError: contradicting settings, a damaged record, another process, a folder that cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / RECORD).open("a+b")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another process converts into it; wait for it, or stop it") from None
        record = Record(out, file)
        found = record.load()
        shutil.rmtree(record.unfinished, ignore_errors=True)
        record.unfinished.mkdir()
        try:
            if found is not None and found != settings:
                if not overwrite:
                    raise UserError(_contradiction(out, found, settings))
                record.remove(list(record.entries))
                found = None
            if found is None:
                record.start(settings)
            yield record
        finally:
            shutil.rmtree(record.unfinished, ignore_errors=True)


def _contradiction(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    differing = [key for key in found if found[key] != wanted.get(key)]
    listed = ", ".join(f"{key} {found.get(key)!r} (now {wanted.get(key)!r})" for key in differing)
    return f"--out {out}: its pictures were made with {listed}; name another folder, or replace them with --overwrite"
