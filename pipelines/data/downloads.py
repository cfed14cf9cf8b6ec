"""Bringing the archives of a data set to where they belong: what lacks is found out, fetched or found, and unpacked."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.archives import (
    MARKER_NAME,
    NoRoomError,
    check_beginning,
    clear_leftovers,
    digest_of,
    read_marker,
    unpack,
)
from pipelines.data.fetch import announced_size, arrived_bytes, fetch, is_url
from pipelines.runtime.files import size_text
from stage1_autoencoder.videos import VideoError

# Beside the unpacked folders, so that it outlives them.
RECORD_NAME = ".archives.json"


def recorded_sha256(root: Path, name: str) -> str | None:
    """The checksum of the archive of this name that was unpacked first below `root`; None if none was.

    Raises:
        VideoError: the record is damaged.
    """
    entry = _read(root).get(name)
    return entry["sha256"] if entry is not None else None


def record_sha256(root: Path, name: str, sha256: str, *, size: int, place: str) -> None:
    """Remember the checksum of an archive, unless one of its name is remembered already.

    Args:
        size: of the archive, in bytes.
        place: URL or path that it came from, for people to read.
    Raises:
        VideoError: the record is damaged.
    """
    entries = _read(root)
    if name in entries:
        return
    entries[name] = {"sha256": sha256, "bytes": size, "from": place}
    aside = root / f"{RECORD_NAME}.new"
    aside.write_text(json.dumps(entries, indent=1))
    os.replace(aside, root / RECORD_NAME)


def _read(root: Path) -> dict[str, dict]:
    path = root / RECORD_NAME
    try:
        entries = json.loads(path.read_text())
        if not all(isinstance(entry["sha256"], str) for entry in entries.values()):
            raise ValueError("no checksum")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise VideoError(
            f"{path}: not the record of checksums that was written here; remove it, and checksums are recorded anew"
        ) from None
    return entries


KTH_URL = "http://www.csc.kth.se/cvap/actions"
BAIR_URL = "http://rail.eecs.berkeley.edu/datasets"
CLEVRER_URL = "http://data.csail.mit.edu/clevrer/videos"

# As other projects recorded them.
KTH_SHA1 = {
    "boxing": "adb36ed9c29c846d44d2ba15f348bd115c951bbd",
    "handclapping": "d3b81261aa822ef63d0d1523f945bfaff27814d2",
    "handwaving": "0792f7cd69f7f895a205c08ac212ddaa7177e370",
    "jogging": "21943bdbcef9dad106db0d74661e49eaeaa15a25",
    "running": "da83bb313edfd4455fffdda6263696fa10d43c6f",
    "walking": "a3e81537271a0ab4576591774baa38c2d97b7e3a",
}


@dataclass(frozen=True)
class Archive:
    """One archive of a data set.

    Attributes:
        path: below the data set's URL; a mirror has the last part of it, the file's name.
        folder: that it is unpacked to, below the data set's folder.
        extension: of the files in it that count.
        sha1: as published or recorded by others; None: the sha256 of the first one that is unpacked is remembered.
        top: a folder in the archive that `folder` stands for.
        elsewhere: other folders, below the data set's, where users may have put its files themselves.
        max_bytes: it is refused if it claims to unpack to more.
    """

    path: str
    folder: str
    extension: str
    sha1: str | None = None
    top: str = ""
    elsewhere: tuple[str, ...] = ()
    max_bytes: int = 32 << 30

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Recipe:
    """The archives of a data set, below one URL."""

    title: str
    url: str
    archives: tuple[Archive, ...]


# By `dataset.source`.
RECIPES = {
    "kth": Recipe(
        "KTH",
        KTH_URL,
        tuple(Archive(f"{action}.zip", action, ".avi", sha1) for action, sha1 in KTH_SHA1.items()),
    ),
    "bair": Recipe(
        "BAIR",
        BAIR_URL,
        (
            Archive(
                "bair_robot_pushing_dataset_v0.tar",
                "softmotion30_44k",
                ".tfrecords",
                top="softmotion30_44k",
                elsewhere=("train",),
                max_bytes=64 << 30,
            ),
        ),
    ),
    "clevrer": Recipe(
        "CLEVRER",
        CLEVRER_URL,
        (
            Archive("train/video_train.zip", "train", ".mp4"),
            Archive("validation/video_validation.zip", "validation", ".mp4", elsewhere=("val",)),
            Archive("test/video_test.zip", "test", ".mp4"),
        ),
    ),
}


Say = Callable[[str], None]


@dataclass(frozen=True)
class Delivery:
    """The archives of one data set, where they come from, and where they go.

    Attributes:
        root: the data set's folder.
        mirror: folder or http(s) URL that holds the archives; None for the makers' own site.
        way_out: ends messages about the network.
    """

    recipe: Recipe
    root: Path
    mirror: str | None
    way_out: str

    @property
    def is_local(self) -> bool:
        """The archives lie in a folder."""
        return self.mirror is not None and not is_url(self.mirror)

    @property
    def mirror_folder(self) -> Path:
        assert self.is_local
        return Path(self.mirror or "").expanduser()

    def url(self, path: str) -> str:
        """Where a file is fetched from. In a mirror, all lie beside each other."""
        if self.mirror is None:
            return f"{self.recipe.url}/{path}"
        return f"{self.mirror.rstrip('/')}/{path.rpartition('/')[2]}"

    def place(self, archive: Archive) -> str:
        """Where an archive comes from, as people call it."""
        return str(self.mirror_folder / archive.name) if self.is_local else self.url(archive.path)

    def local(self, archive: Archive) -> Path:
        """The file of an archive: in the mirror, or where a fetched one lies until it is unpacked."""
        return self.mirror_folder / archive.name if self.is_local else self.root / f".{archive.name}"

    def check_mirror(self) -> None:
        """Raises VideoError if there is no such mirror."""
        if self.is_local and not self.mirror_folder.is_dir():
            names = ", ".join(archive.name for archive in self.recipe.archives)
            raise VideoError(f"MIRROR={self.mirror}: no such folder, and no http(s) URL; it must hold {names}")

    def why_not_needed(self, archive: Archive) -> str | None:
        """Tell why an archive is not needed any more; None if it is."""
        folder = self.root / archive.folder
        if marker := read_marker(folder):
            note = ""
            local = self.mirror_folder / archive.name if self.is_local else None
            if local is not None and local.is_file() and local.stat().st_size != marker["bytes"]:
                note = f", from another archive than {local}; to use that one, remove {folder}"
            return f"{archive.folder}: already unpacked, {len(marker['files'])} files{note}"
        if self.mirror is not None:
            return None
        # Without our mark, a folder is the user's own, or files are missing. An archive tells; if none was named, trust
        # the folder.
        for place in (folder, *(self.root / name for name in archive.elsewhere)):
            if videos := sum(1 for _ in place.glob(f"**/*{archive.extension}")):
                what = "videos" if archive.kind == "zip" else f"{archive.extension} files"
                how = "were not unpacked by us"
                if (place / MARKER_NAME).exists():
                    how = "are not all that was unpacked, or not the same"
                return f"{archive.folder}: {videos} {what} that {how}, taken as they are ({place})"
        return None

    def missing_in_mirror(self, archives: list[Archive]) -> list[str]:
        """Names of the archives that a mirror folder lacks; a URL tells only when it is asked."""
        if not self.is_local:
            return []
        return [archive.name for archive in archives if not (self.mirror_folder / archive.name).is_file()]

    def deliver(self, archives: list[Archive], say: Say) -> None:
        """Fetch what has to be fetched, check and unpack it.

        Raises:
            VideoError: it cannot be fetched, is not what it should be, or does not fit on the disk.
        """
        for archive in archives:
            clear_leftovers(self.root / archive.folder)
        self._check_room(archives)
        for archive in archives:
            self._deliver_one(archive, say)

    def _deliver_one(self, archive: Archive, say: Say) -> None:
        local = self.local(archive)
        if not self.is_local and not local.is_file():  # it is when the last run was stopped while unpacking
            self._fetch(archive, local, say)
        size = local.stat().st_size
        say(f"{archive.folder}: checking and unpacking {self.place(archive)} ({size_text(size)})")
        try:
            checksum = self._verify(archive, local, say)
            unpacked = unpack(
                local,
                self.root / archive.folder,
                checksum=checksum,
                kind=archive.kind,
                top=archive.top,
                expected=archive.extension,
                max_bytes=archive.max_bytes,
            )
        except (NoRoomError, _Changed):
            raise  # the archive is good for another try
        except VideoError:
            if not self.is_local:
                local.unlink()  # damaged: to be fetched again
            raise
        if "sha256" in checksum:
            record_sha256(self.root, archive.name, checksum["sha256"], size=size, place=self.place(archive))
        if not self.is_local:
            local.unlink()  # of no more use
        litter = unpacked.passed_over
        note = f", passed over {len(litter)} that file managers left, such as {litter[0]!r}" if litter else ""
        say(f"{archive.folder}: unpacked {unpacked.files} files{note}")

    def _fetch(self, archive: Archive, target: Path, say: Say) -> None:
        url = self.url(archive.path)
        said = False

        def check_size(size: int, have: int) -> None:
            nonlocal said
            if not said:
                already = f", {size_text(have)} of them are here already" if have else ""
                say(f"{archive.folder}: fetching {url} ({size_text(size)}{already})")
                said = True
            check_room(self.root, f"{archive.name}: ", size - have, size)

        fetch(
            url,
            target,
            way_out=self.way_out,
            check_size=check_size,
            check_head=lambda head: check_beginning(archive.kind, head),
        )

    def _verify(self, archive: Archive, local: Path, say: Say) -> dict[str, str]:
        """Hold an archive to the checksum that is known or was recorded; a mirror may differ.

        Returns:
            its checksum, by the algorithm's name.
        Raises:
            VideoError: another archive than the known one.
            _Changed: another one than the first.
        """
        place = self.place(archive)
        if archive.sha1 is not None:
            sha1 = digest_of(local, "sha1")
            if sha1 != archive.sha1 and self.mirror is None:
                raise VideoError(
                    f"{place}: sha1 {sha1} is not the known {archive.sha1}: the file has changed or was damaged on "
                    f"its way; run again, or {self.way_out}"
                )
            if sha1 != archive.sha1:
                say(f"warning: {place}: sha1 {sha1} is not that of the {self.recipe.title} archive, {archive.sha1}")
            return {"sha1": sha1}
        sha256, record = digest_of(local, "sha256"), self.root / RECORD_NAME
        first = recorded_sha256(self.root, archive.name)
        if first is not None and sha256 != first:
            differs = f"{place}: sha256 {sha256} is not {first}, that of the archive that was unpacked here before"
            if self.mirror is None:
                raise _Changed(
                    f"{differs} ({record}): the file has changed or was damaged on its way; remove {local} to fetch it "
                    f"again, or {record} to take it as it is"
                )
            say(f"warning: {differs} ({record})")
        return {"sha256": sha256}

    def _check_room(self, archives: list[Archive]) -> None:
        """Refuse what cannot end well before anything is fetched, as far as the server tells the sizes."""
        taken = most = fetched = unpacked = 0
        for archive in archives:
            if self.is_local or self.local(archive).is_file():
                size = here = self.local(archive).stat().st_size
            else:
                announced = announced_size(self.url(archive.path))
                if announced is None:
                    break  # a server that tells of one file later tells of the others later, too
                size, here = announced, min(arrived_bytes(self.local(archive)), announced)
            fetched, unpacked = fetched + size - here, unpacked + size
            most = max(most, taken + size - here + size)
            taken += size - (0 if self.is_local else here)  # an archive that was fetched is removed once it is unpacked
        check_room(self.root, "", fetched, unpacked, most)


class _Changed(VideoError):
    """Another archive than the one that was unpacked first."""


def check_room(folder: Path, what: str, fetched: int, unpacked: int, most: int | None = None) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: on the disk; it need not be there.
        what: begins the message.
        fetched: bytes to be fetched.
        unpacked: bytes that archives unpack to. Of those not opened yet this is about their own size: tar stores files
            as they are, and videos hardly shrink.
        most: bytes that are taken at the same time; both together unless given.
    Raises:
        NoRoomError: there are fewer free.
    """
    free, needed = free_bytes(folder), fetched + unpacked if most is None else most
    if needed > free:
        raise NoRoomError(
            f"{what}{size_text(fetched)} to fetch and about {size_text(unpacked)} to unpack need {size_text(needed)}, "
            f"but only {size_text(free)} are free in {folder}; make room there, or set dataset.root to a folder on "
            "another disk"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be on."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def only_one_here(root: Path) -> Iterator[None]:
    """Hold a data set's folder for one process that fetches: two would write into the same files.

    The kernel lets go of the lock when the process dies, however it dies.

    Raises:
        VideoError: another process has it.
    """
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VideoError(f"{root}: another process fetches or unpacks here; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
