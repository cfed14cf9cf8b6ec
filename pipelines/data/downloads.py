"""The published archives of KTH, BAIR and CLEVRER: which are needed, where they are, and how they get unpacked."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, RootModel

from pipelines.data.archives import (
    MARKER_NAME,
    MAX_UNPACKED_BYTES,
    ArchiveError,
    NoRoomError,
    check_beginning,
    clear_leftovers,
    read_marker,
    unpack,
)
from pipelines.data.fetch import announced_size, arrived_bytes, fetch
from pipelines.errors import UserError
from pipelines.runtime.files import file_digest, free_bytes, locked, read_json, size_text, write_bytes, write_json
from pipelines.runtime.progress import say
from pipelines.runtime.status import Status
from stage1_autoencoder.videos import VideoError
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.kth import MOST_SEQUENCES_BYTES, SEQUENCES_FILE, read_sequences

# Both beside the unpacked folders, so that they outlive them.
RECORD_NAME = ".archives.json"
LOCK_NAME = ".download.lock"


@dataclass(frozen=True)
class Archive:
    """One published archive.

    Attributes:
        path: below the data set's URL. In a mirror all archives are in one folder, under their file names.
        folder: that it is unpacked to, below the data set's folder.
        extension: of its videos.
        sha1: as published or recorded by other projects; None: the sha256 of the first download is recorded.
        top: a folder in the archive that `folder` stands for.
        elsewhere: another folder, below the data set's, where users may have put its files themselves.
    """

    path: str
    folder: str
    extension: str
    sha1: str | None = None
    top: str = ""
    elsewhere: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class ArchiveSet:
    """The archives of a data set, below one URL."""

    url: str
    archives: tuple[Archive, ...]


KTH_SHA1 = {  # as other projects recorded them
    "boxing": "adb36ed9c29c846d44d2ba15f348bd115c951bbd",
    "handclapping": "d3b81261aa822ef63d0d1523f945bfaff27814d2",
    "handwaving": "0792f7cd69f7f895a205c08ac212ddaa7177e370",
    "jogging": "21943bdbcef9dad106db0d74661e49eaeaa15a25",
    "running": "da83bb313edfd4455fffdda6263696fa10d43c6f",
    "walking": "a3e81537271a0ab4576591774baa38c2d97b7e3a",
}
_BAIR_TAR = Archive(
    "bair_robot_pushing_dataset_v0.tar",
    "softmotion30_44k",
    ".tfrecords",
    top="softmotion30_44k",
    elsewhere="train",
)
# By `dataset.source`.
PUBLISHED = {
    "kth": ArchiveSet(
        "http://www.csc.kth.se/cvap/actions",
        tuple(Archive(f"{action}.zip", action, ".avi", sha1) for action, sha1 in KTH_SHA1.items()),
    ),
    "bair": ArchiveSet("http://rail.eecs.berkeley.edu/datasets", (_BAIR_TAR,)),
    "clevrer": ArchiveSet(
        "http://data.csail.mit.edu/clevrer/videos",
        (
            Archive("train/video_train.zip", "train", ".mp4"),
            Archive("validation/video_validation.zip", "validation", ".mp4", elsewhere="val"),
            Archive("test/video_test.zip", "test", ".mp4"),
        ),
    ),
}


class FirstArchive(BaseModel):
    """The archive of a name that was unpacked first: later ones are compared with it."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    sha256: str
    bytes: int
    place: str = Field(alias="from", description="URL or path, for people to read")


class FirstArchives(RootModel[dict[str, FirstArchive]]):
    """`.archives.json` of a data set's folder: first archives by file name."""


@dataclass(frozen=True)
class Download:
    """The archives of one data set, where they come from, and where they go.

    Attributes:
        root: the data set's folder.
        mirror: folder or http(s) URL that holds the archives; None: the publisher's own site.
    """

    dataset: DatasetConfig
    root: Path
    mirror: str | None

    @property
    def published(self) -> ArchiveSet:
        return PUBLISHED[self.dataset.source]

    @property
    def mirror_folder(self) -> Path | None:
        is_url = (self.mirror or "").lower().startswith(("http://", "https://"))
        return Path(self.mirror).expanduser() if self.mirror and not is_url else None

    @property
    def way_out(self) -> str:
        """Ends messages about the network."""
        names = " ".join(archive.name for archive in self.published.archives)
        return (
            "get the archives by other means and name their folder: "
            f"river data --config {self.dataset.name} --mirror <folder with {names}>"
        )

    def place(self, path: str) -> str:
        """The path or URL of a published file."""
        name = path.rpartition("/")[2]
        if self.mirror_folder is not None:
            return str(self.mirror_folder / name)
        return f"{self.mirror.rstrip('/')}/{name}" if self.mirror else f"{self.published.url}/{path}"

    def file(self, archive: Archive) -> Path:
        """The file of an archive: in the mirror's folder, or where a downloaded one is kept until it is unpacked."""
        return (self.mirror_folder or self.root) / (archive.name if self.mirror_folder else f".{archive.name}")

    def status(self, archive: Archive) -> Status:
        """Whether an archive still has to be unpacked, and from where."""
        folder, file = self.root / archive.folder, self.file(archive)
        if marker := read_marker(folder):
            return Status("done", f"already unpacked, {len(marker.files)} files", folder)
        if not self.mirror:
            # A folder without our marker is the user's own, or incomplete: trusted where no mirror can complete it.
            for place in (folder, self.root / (archive.elsewhere or archive.folder)):
                if videos := sum(1 for _ in place.glob(f"**/*{archive.extension}")):
                    how = "changed since they were unpacked" if (place / MARKER_NAME).exists() else "from elsewhere"
                    detail = f"{videos} {archive.extension} files {how}, used as they are ({place})"
                    return Status("done", detail, place)
        if file.is_file():
            size = size_text(file.stat().st_size)
            return Status("missing" if self.mirror_folder else "partial", f"to unpack from {file} ({size})", file)
        if self.mirror_folder:
            return Status("missing", f"to unpack from {file}, which is missing", file)
        have = arrived_bytes(file)
        note = f", {size_text(have)} of it are here" if have else ""
        return Status("partial" if have else "missing", f"to download from {self.place(archive.path)}{note}", file)

    def needs_sequences(self) -> bool:
        """Whether KTH's file of frame ranges is wanted and missing."""
        return self.dataset.sequences and not (self.root / SEQUENCES_FILE).is_file()

    def plan(self) -> list[str]:
        """What `run` would do, a line per file. Asks no network."""
        lines = [f"{SEQUENCES_FILE}: to copy from {self.place(SEQUENCES_FILE)}"] if self.needs_sequences() else []
        return lines + [f"{archive.folder}: {self.status(archive).detail}" for archive in self.published.archives]

    def check_mirror(self) -> None:
        """Raises VideoError if `mirror` is neither a URL without a password nor a folder."""
        if self.mirror and self.mirror_folder is None and "@" in urlsplit(self.mirror).netloc:
            raise VideoError(
                f"--mirror {self.mirror}: users and passwords in a URL are not supported; copy the archives into a "
                "folder, and name that"
            )
        if self.mirror_folder and not self.mirror_folder.is_dir():
            names = ", ".join(archive.name for archive in self.published.archives)
            raise VideoError(
                f"--mirror {self.mirror}: no such folder, and no http(s) URL; expected one that has {names}"
            )

    def run(self) -> None:
        """Download, verify and unpack what is missing; where nothing is, nothing is written.

        Raises:
            VideoError, UserError: an archive is missing, cannot be downloaded, is not the expected one, or does not fit
                on the disk; another process downloads into the same folder.
        """
        self.check_mirror()
        busy = f"{self.root}: process {{pid}} downloads or unpacks here; wait for it, or stop it"
        needed = []
        try:
            for archive in self.published.archives:
                status = self.status(archive)
                if status.is_done:
                    say(f"{archive.folder}: {status.detail}")
                    self._remove_unpacked(archive)
                else:
                    needed.append(archive)
            if self.mirror_folder and (missing := [a.name for a in needed if not self.file(a).is_file()]):
                raise VideoError(f"--mirror {self.mirror}: no {', '.join(missing)}; put them there")
            if needed or self.needs_sequences():
                with locked(self.root / LOCK_NAME, busy):
                    self._get_all(needed)
        except OSError as error:
            raise VideoError(
                f"{error.filename or self.root}: {error.strerror or error}; check permissions and free space, or set "
                "dataset.root to another folder. Finished archives are kept, the same command resumes"
            ) from error

    def _get_all(self, archives: list[Archive]) -> None:
        if self.needs_sequences():
            target, temporary = self.root / SEQUENCES_FILE, self.root / f".{SEQUENCES_FILE}"
            try:
                if self.mirror_folder:
                    shutil.copyfile(self.place(SEQUENCES_FILE), temporary)
                else:
                    fetch(self.place(SEQUENCES_FILE), temporary, most=MOST_SEQUENCES_BYTES, way_out=self.way_out)
                read_sequences(temporary)
                write_bytes(target, temporary.read_bytes())
            finally:
                temporary.unlink(missing_ok=True)
        for archive in archives:
            clear_leftovers(self.root / archive.folder)
        self._check_space(archives)
        for archive in archives:
            self._get(archive)

    def _check_space(self, archives: list[Archive]) -> None:
        """Refuse before any download what the disk cannot hold, as far as servers announce sizes.

        An archive unpacks to about its own size: tar does not compress, and videos hardly shrink in a zip. A downloaded
        archive is removed once it is unpacked, so only the last one is on the disk beside its files.
        """
        used = peak = download = unpacked = 0
        for archive in archives:
            file = self.file(archive)
            size = file.stat().st_size if file.is_file() else announced_size(self.place(archive.path))
            if size is None:
                break  # the server will not announce the others either
            missing = 0 if file.is_file() else size - min(arrived_bytes(file), size)
            peak = max(peak, used + missing + size)
            used += size if self.mirror_folder else missing
            download, unpacked = download + missing, unpacked + size
        if peak > (free := free_bytes(self.root)):
            raise NoRoomError(
                f"{self.root}: {size_text(download)} to download and about {size_text(unpacked)} to unpack need "
                f"{size_text(peak)}, but only {size_text(free)} are free; free some space, or set dataset.root to a "
                "folder on another disk"
            )

    def _get(self, archive: Archive) -> None:
        file, place = self.file(archive), self.place(archive.path)
        if not file.is_file():
            say(f"{archive.folder}: downloading {place}")
            fetch(
                place,
                file,
                most=MAX_UNPACKED_BYTES,
                way_out=self.way_out,
                check_head=lambda head: check_beginning(file.suffix[1:], head),
            )
        size = file.stat().st_size
        say(f"{archive.folder}: verifying and unpacking {place} ({size_text(size)})")
        try:
            digest = self._verify(archive, file)
            unpacked = unpack(file, self.root / archive.folder, top=archive.top, expected=archive.extension)
        except ArchiveError as error:
            # One that does not fit can be unpacked later. A damaged one has to be downloaded again.
            if not self.mirror_folder and not isinstance(error, NoRoomError):
                file.unlink()
            raise
        if archive.sha1 is None:
            first = {archive.name: FirstArchive(sha256=digest, bytes=size, place=place)}
            write_json(self.root / RECORD_NAME, FirstArchives(first | self._first_archives()))
        if not self.mirror_folder:
            file.unlink()
        say(f"{archive.folder}: unpacked {len(unpacked.files)} files")

    def _remove_unpacked(self, archive: Archive) -> None:
        """Remove a downloaded archive that a killed process had unpacked."""
        file = self.file(archive)
        if not self.mirror_folder and file.is_file() and read_marker(self.root / archive.folder):
            file.unlink()

    def _verify(self, archive: Archive, file: Path) -> str:
        """Compare an archive with the known or recorded checksum. One from a mirror may differ, with a warning.

        Returns:
            its sha1 if one was published, its sha256 otherwise.
        Raises:
            ArchiveError: its sha1 is not the published one.
            UserError: its sha256 is not that of the archive that was unpacked first; or a damaged record.
        """
        record = self.root / RECORD_NAME
        first = self._first_archives().get(archive.name)
        algorithm, expected = ("sha1", archive.sha1) if archive.sha1 else ("sha256", first and first.sha256)
        digest = file_digest(file, algorithm)
        if expected not in (None, digest):
            origin = "published" if archive.sha1 else f"recorded in {record}"
            differs = f"{self.place(archive.path)}: its {algorithm} is {digest}, expected {expected}, {origin}"
            if self.mirror:
                say(f"warning: {differs}")
            elif archive.sha1:
                raise ArchiveError(f"{differs}: the file has changed or was damaged; run again, or {self.way_out}")
            else:
                raise UserError(f"{differs}; remove {file} to download it again, or {record} to accept it")
        return digest

    def _first_archives(self) -> dict[str, FirstArchive]:
        path = self.root / RECORD_NAME
        way_out = "remove it, and checksums are recorded again"
        return read_json(path, FirstArchives, way_out).root if path.exists() else {}
