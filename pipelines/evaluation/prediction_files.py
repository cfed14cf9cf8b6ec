"""Predictions of any other predictor, as files named after the clips: which clips these are, and what was predicted."""

import hashlib
import io
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.prediction.clips import ClipReader
from pipelines.prediction.pictures import file_names, to_video
from pipelines.runtime.files import file_sha256, write_bytes, write_json
from pipelines.runtime.progress import progress, say
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.videos import VideoSource, open_video
from stage1_autoencoder.videos.image_folders import list_frames
from stage1_autoencoder.videos.video_files import VIDEO_EXTENSIONS

ARRAYS = (".npy", ".npz", ".safetensors")
# How far float values may leave their range: what rounding does, and no more.
TOLERANCE = 1e-3
NAMES_SHOWN = 5


class ExportedClip(BaseModel):
    """A clip.

    Attributes:
        name: of its files in `given/` and `truth/`, without `.npy`, and of the predictions.
        video: id in its split.
        recording, person: what it was cut from, and who is in it where the data set says.
        start: number of its first frame in the video, after `fps` and `frame_step` of the data set.
        fps: frames per second.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    video: str
    recording: str
    person: str | None
    start: int
    fps: float


class ExportedClips(BaseModel):
    """`clips.json`: the clips of a protocol, beside their frames as uint8 arrays [frames, height, width, 3].

    Attributes:
        context, horizon: frames of each array in `given/` and in `truth/`.
        image_size: height and width.
        frame_step: the clips have every frame of the video (1), every second one (2), and so on.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    dataset: str
    split: str
    context: int
    horizon: int
    image_size: tuple[int, int]
    frame_step: int
    clips: list[ExportedClip]


def export_clips(config: RiverConfig, clips: ClipReader, folder: Path) -> Path:
    """Write the frames of all clips, so that any predictor can be run on them.

    Args:
        clips: of the protocol.
        folder: new, or of an earlier export, whose files are replaced.
    Returns:
        `clips.json`, which is written last.
    Raises:
        UserError: the folder has other files; no video can be decoded.
        OSError: a file cannot be written.
    """
    index, folders = folder / "clips.json", [folder / "given", folder / "truth"]
    others = sorted({path.name for path in folder.glob("*")} - {"clips.json", "given", "truth"})
    if others:
        raise UserError(f"{folder}: it has other files ({others[0]}): name a new folder")
    index.unlink(missing_ok=True)
    for stale in (path for part in folders for path in part.glob("*.npy")):
        stale.unlink()
    context, exported = config.evaluation.context, []
    for number, _, name in progress(named_clips(clips), description="clips", unit="clip"):
        for clip in clips.read([number]):
            frames, recording = to_video(clip.frames), clip.recording
            for part, content in zip(folders, (frames[:context], frames[context:]), strict=True):
                buffer = io.BytesIO()
                np.save(buffer, content, allow_pickle=False)
                write_bytes(part / f"{name}.npy", buffer.getvalue())
            exported.append(
                ExportedClip(
                    name=name,
                    video=clips.source.videos[clip.video].id,
                    recording=recording.name,
                    person=recording.person,
                    start=clip.start,
                    fps=clip.fps,
                )
            )
    if not exported:
        raise clips.nothing_found()
    listed = ExportedClips(
        dataset=config.dataset.name,
        split=config.evaluation.split,
        context=context,
        horizon=config.evaluation.horizon,
        image_size=config.dataset.frame_size,
        frame_step=config.dataset.frame_step,
        clips=exported,
    )
    write_json(index, listed)
    return index


def named_clips(clips: ClipReader) -> list[tuple[int, str, str]]:
    """Number and name of each clip, and the name of its files; without clips of videos that are found to be broken."""
    keys = {number: key for number in range(len(clips)) if (key := clips.key(number)) is not None}
    names = [*map(clips.name, keys.values())]
    return [*zip(keys, names, file_names(names), strict=True)]


@dataclass(frozen=True)
class _Entry:
    """Where a prediction is: a file, a folder of frames, or one array of a file of several.

    Attributes:
        key: name of the array in a file of several.
    """

    path: Path
    key: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.key is None else f"{self.path}: {self.key}"

    @property
    def is_array(self) -> bool:
        return self.path.suffix.lower() in ARRAYS and not self.path.is_dir()


class PredictionFiles:
    """Predictions of all clips of a protocol, found and checked.

    Attributes:
        path: of the folder or file.
        sha256: over the names and contents of all that is used.
        black: the value of black in arrays of floats; None: there are none.
    """

    def __init__(self, config: RiverConfig, clips: ClipReader, path: Path, black: int | None) -> None:
        """Find the predictions of all clips; check arrays, and sizes and lengths of videos.

        Args:
            path: a folder with a file or a folder of frames per prediction, or one .npz or .safetensors file with an
                array per prediction.
            black: 0 where arrays of floats are in [0, 1], -1 where they are in [-1, 1]; None: not said.
        Raises:
            UserError: predictions that are missing, damaged, of another size or length, or of unclear values.
            VideoError: a video that cannot be opened.
        """
        evaluation = config.evaluation
        self.path, self._said, self.black, self._lowest = path, black, None, 0.0
        self._context, self._horizon, self._samples = evaluation.context, evaluation.horizon, evaluation.samples
        # Frames of videos are used as they are: they have the right size and rate.
        self._dataset = config.dataset.model_copy(update={"frame_step": 1, "fps": None})
        found = _find(path)
        # Opened once, since each opening reads the list of all arrays.
        self._archive = zipfile.ZipFile(path) if path.suffix.lower() == ".npz" and not path.is_dir() else None
        self._chosen = self._choose(clips, found)
        digest = hashlib.sha256((_content_sha256(path) if not path.is_dir() else "").encode())
        for entries in progress(self._chosen.values(), description=f"check {path.name}", unit="clip"):
            for entry in entries:
                self._check(entry)
                content = entry.key if entry.key is not None else _content_sha256(entry.path)
                digest.update(f"{entry.path.name} {content}\n".encode())
        self.sha256 = digest.hexdigest()
        if self.black == -1 and self._lowest == 0:
            raise UserError(f"{path}: no value is below 0, so these are hardly in [-1, 1]: for [0, 1] give --black 0")

    def read(self, clip: str) -> Tensor:
        """The prediction of a clip, by the clip's name: [samples, horizon, 3, h, w] in [-1, 1].

        Raises:
            UserError, VideoError: it cannot be read, or is no longer what was checked.
        """
        return torch.cat([self._frames(entry) for entry in self._chosen[clip]])[: self._samples]

    def _choose(self, clips: ClipReader, found: Mapping[str, _Entry]) -> dict[str, list[_Entry]]:
        """Name of each clip -> where its samples are. A name with `-2` that is a clip's own is that clip's."""
        known = named_clips(clips)
        names, chosen, missing = {name for _, _, name in known}, dict[str, list[_Entry]](), []
        for number, clip, name in known:
            inside = self._samples > 1 and name in found and self._has_samples(found[name])
            further = [] if inside else [f"{name}-{sample}" for sample in range(2, self._samples + 1)]
            absent = [part for part in (name, *further) if part not in found or (part != name and part in names)]
            if not absent:
                chosen[clip] = [found[part] for part in (name, *further)]
            # Nobody can predict a broken video, which is reported.
            elif not found.keys() & names or clips.read([number]):
                missing.append(absent[0])
        unused = [part for part in found if part not in names and re.sub(r"-\d+$", "", part) not in names]
        if missing:
            others = f"; it has {_some(unused)}, which no clip is called" if unused else ""
            raise UserError(
                f"{self.path}: predictions of {len(missing)} of {len(names)} clips are missing: {_some(missing)}"
                f"{others}: `evaluate --export-clips FOLDER` writes the clips with their names"
            )
        if not chosen:
            raise clips.nothing_found()
        if f"{known[0][2]}-{self._samples + 1}" in found:
            say(f"{self.path} has further predictions per clip: --set evaluation.samples=... measures them, too")
        return chosen

    def _has_samples(self, entry: _Entry) -> bool:
        """Whether an array has all samples of its clip."""
        if not entry.is_array:
            return False
        with self._open_array(entry) as array:
            return len(array.shape) == 5 and array.shape[0] >= self._samples

    def _check(self, entry: _Entry) -> None:
        if entry.is_array:
            self._array_frames(entry)
        else:
            self._open_video(entry)

    def _frames(self, entry: _Entry) -> Tensor:
        """[samples, horizon, 3, h, w] in [-1, 1]."""
        if entry.is_array:
            return self._array_frames(entry)
        source = self._open_video(entry)
        frames = source.videos[0].frames
        return image_to_unit(torch.from_numpy(source.read(0, range(frames - self._horizon, frames))))[None]

    def _open_video(self, entry: _Entry) -> VideoSource:
        source = open_video(self._dataset, entry.path)
        video = source.videos[0]
        assert video.size is not None
        self._check_shape(entry, video.frames, video.size[::-1])
        return source

    def _array_frames(self, entry: _Entry) -> Tensor:
        with self._open_array(entry) as array:
            if len(array.shape) not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape:
                raise ValueError(
                    f"an array {list(array.shape)}, expected [frames, height, width, 3] or several of these"
                )
            self._check_shape(entry, array.shape[-4], array.shape[-3:-1])
            values = array.read(self._samples if len(array.shape) == 5 else None)
        values = values.reshape(-1, *values.shape[-4:])[:, -self._horizon :]
        if values.dtype == torch.uint8:
            return image_to_unit(values)
        lowest, highest = (float(end) for end in values.aminmax())
        if self._said is None:
            raise UserError(f"{entry}: floats: say what black is: --black 0 for [0, 1], --black -1 for [-1, 1]")
        if not (lowest >= self._said - TOLERANCE and highest <= 1 + TOLERANCE):  # NaN is neither
            raise UserError(f"{entry}: values from {lowest:g} to {highest:g}, expected [{self._said}, 1] (--black)")
        self.black, self._lowest = self._said, min(self._lowest, lowest)
        values = rearrange(values.double(), "s n h w c -> s n c h w").clamp(self._said, 1)
        return (values if self._said else 2 * values - 1).float()

    def _check_shape(self, entry: _Entry, frames: int, size: Sequence[int]) -> None:
        height, width = self._dataset.frame_size
        if (*size,) != (height, width) or frames not in (self._horizon, self._context + self._horizon):
            raise UserError(
                f"{entry}: {frames} frames of {size[1]}x{size[0]}, expected {self._horizon} predicted frames, or "
                f"{self._context} given and {self._horizon} predicted ones, of {width}x{height}"
            )

    @contextmanager
    def _open_array(self, entry: _Entry) -> Iterator["_Array"]:
        """An array, of which nothing but the shape is read yet.

        Raises:
            UserError: damaged, or of other values than uint8 and floats; also for such errors inside.
        """
        try:
            with ExitStack() as stack:
                if entry.path.suffix.lower() == ".safetensors":
                    file = stack.enter_context(safe_open(entry.path, framework="pt"))
                    yield _Array.of_safetensors(file, entry.key or _only([*file.keys()]))
                elif entry.path.suffix.lower() == ".npy":
                    yield _Array.of_numpy(stack.enter_context(entry.path.open("rb")))
                else:
                    archive = self._archive or stack.enter_context(zipfile.ZipFile(entry.path))
                    member = f"{entry.key}.npy" if entry.key is not None else _only(archive.namelist())
                    yield _Array.of_numpy(stack.enter_context(archive.open(member)))
        except _DAMAGED as error:
            raise UserError(f"{entry}: cannot be read as an array: {error}") from None


# What numpy, zipfile and safetensors raise for files that are not theirs.
_DAMAGED = (
    OSError, ValueError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error,
    SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class _Array:
    """An array in a file.

    Attributes:
        shape: as the file claims it.
        read: takes a number n, reads the first n entries of the first axis; None: all of them.
    """

    shape: tuple[int, ...]
    read: Callable[[int | None], Tensor]

    @classmethod
    def of_numpy(cls, file: IO[bytes]) -> "_Array":
        """Of a .npy file, behind whose header the file is.

        Raises:
            ValueError: no such file; other values than uint8 and floats, or not in the order of C.
        """
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read_header(file)
        if dtype != np.uint8 and dtype.kind != "f":
            raise ValueError(f"expected uint8 or floats, not {dtype}")
        if in_columns and len(shape) > 1:
            raise ValueError("its axes are in Fortran's order: write it by np.ascontiguousarray")

        def read(most: int | None) -> Tensor:
            wanted = shape if most is None else (min(most, shape[0]), *shape[1:])
            size = math.prod(wanted) * dtype.itemsize
            content = file.read(size)
            if len(content) < size:
                raise ValueError(f"it ends after {len(content)} of {size} bytes")
            values = np.frombuffer(content, dtype).reshape(wanted)
            return torch.from_numpy(values.astype(np.uint8 if dtype == np.uint8 else np.float64))

        return cls(shape, read)

    @classmethod
    def of_safetensors(cls, file: safe_open, key: str) -> "_Array":
        """Of a tensor in an open file.

        Raises:
            ValueError: other values than uint8 and floats.
        """
        part = file.get_slice(key)
        if part.get_dtype() not in ("U8", "F16", "BF16", "F32", "F64"):
            raise ValueError(f"expected uint8 or floats, not {part.get_dtype()}")
        return cls((*part.get_shape(),), lambda most: part[:most])


def _only(keys: Sequence[str]) -> str:
    if len(keys) != 1:
        raise ValueError(f"expected one array, and there are {len(keys)}")
    return keys[0]


def _find(path: Path) -> dict[str, _Entry]:
    """Name of each prediction -> where it is.

    Raises:
        UserError: neither a folder nor a file of named arrays; two predictions of one name.
    """
    if path.is_dir():
        found: dict[str, _Entry] = {}
        for file in sorted(path.iterdir()):
            is_one = file.is_file() and file.suffix.lower() in (*ARRAYS, *VIDEO_EXTENSIONS)
            if file.name.startswith(".") or not (is_one or file.is_dir()):
                continue
            name = file.stem if is_one else file.name
            if name in found:
                raise UserError(f"{path}: {found[name].path.name} and {file.name} are both predictions of {name}")
            found[name] = _Entry(file)
        return found
    try:
        if path.is_file() and path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                return {key: _Entry(path, key) for key in (name.removesuffix(".npy") for name in archive.namelist())}
        if path.is_file() and path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: _Entry(path, key) for key in file.keys()}
    except _DAMAGED as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    raise UserError(
        f"{path}: expected a folder with a file per prediction, or an .npz or .safetensors file with an array for each"
    )


def _content_sha256(path: Path) -> str:
    """Of a file, or of all frames of a folder."""
    if not path.is_dir():
        return file_sha256(path)
    frames = "".join(f"{frame.name} {file_sha256(frame)}\n" for frame in list_frames(path))
    return hashlib.sha256(frames.encode()).hexdigest()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
