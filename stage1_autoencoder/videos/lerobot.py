"""Robot episodes in the layout of LeRobot, versions 2.0, 2.1 and 3.0 (`source: lerobot`): MP4 files and parquet files.

Version 2 has a video and a table of data for each episode; in version 3 a file holds several, one after another:

    v2.1  meta/info.json, meta/episodes.jsonl, videos/chunk-000/<camera>/episode_000000.mp4,
          data/chunk-000/episode_000000.parquet
    v3.0  meta/info.json, meta/episodes/chunk-000/file-000.parquet, videos/<camera>/chunk-000/file-000.mp4,
          data/chunk-000/file-000.parquet

https://github.com/huggingface/lerobot (src/lerobot/datasets/utils.py, convert_dataset_v21_to_v30.py)
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, PositiveInt, ValidationError

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.division import choose_fractions, split_training
from stage1_autoencoder.videos.folders import Clip, Cut, FolderSource, index_listings
from stage1_autoencoder.videos.listing import Listing
from stage1_autoencoder.videos.names import escaped, join_names
from stage1_autoencoder.videos.source import (
    FASTEST_FPS,
    SLOWEST_FPS,
    BrokenVideoError,
    Recording,
    SkippedVideo,
    UnreadableVideoError,
    VideoError,
    is_of_the_system,
)

VERSIONS = ("v2.0", "v2.1", "v3.0")
INFO, EPISODES, EPISODE_TABLES, ACTION = "meta/info.json", "meta/episodes.jsonl", "meta/episodes", "action"
WAY_OUT = "dataset.root is the folder of a LeRobot data set, which has meta, data and videos"
# Bytes of a file with metadata, and values that are read of a table.
MOST_BYTES, MOST_VALUES = 2**28, 2**29
MOST_NUMBER = 10**9


class Feature(BaseModel):
    """What a data set says of one of its columns or cameras."""

    dtype: str
    shape: list[int] = []


class Info(BaseModel):
    """`meta/info.json`, as far as it is needed."""

    codebase_version: str
    fps: float = Field(ge=SLOWEST_FPS, le=FASTEST_FPS)
    features: dict[str, Feature]
    chunks_size: PositiveInt = 1000
    robot_type: str | None = None

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras, which are names of folders, too."""
        return [name for name, feature in self.features.items() if feature.dtype == "video"]

    @property
    def action_size(self) -> int:
        """Values of an action; 0: there are none."""
        action = self.features.get(ACTION)
        return 0 if action is None else action.shape[0]


class _Length(BaseModel):
    """A line of `meta/episodes.jsonl`, as far as it is needed."""

    episode_index: int = Field(ge=0, lt=MOST_NUMBER)
    length: int = Field(ge=1, lt=MOST_NUMBER)


@dataclass(frozen=True, slots=True)
class Episode:
    """Where an episode is.

    Attributes:
        frames: its number of frames, as the metadata say.
        video, data: its files, relative to the data set's folder.
        first, stop: its first and one-past-last frame in the video file; stop is None where it is the whole file.
    """

    number: int
    frames: int
    video: str
    data: str
    first: int = 0
    stop: int | None = None

    @property
    def id(self) -> str:
        return f"episode_{self.number:06d}"


class LerobotSource(FolderSource):
    """Episodes of one camera, with their actions.

    Args:
        root: folder of the data set.
        clips: of its episodes. One whose actions do not fit its frames is skipped.
        episodes: all of them by id.
        action_size: values of an action; 0: there are none.
    """

    def __init__(
        self,
        dataset: DatasetConfig,
        root: Path,
        clips: Iterable[Clip],
        skipped: list[SkippedVideo],
        passed_over: Mapping[str, int] | None = None,
        *,
        episodes: Mapping[str, Episode],
        action_size: int,
    ) -> None:
        self.root, self.episodes, self.action_size = root, episodes, action_size
        super().__init__(dataset, root, self._with_actions(clips, skipped), skipped, passed_over)

    def actions(self, index: int) -> np.ndarray:
        told = self._told(self.videos[index].id)
        return told[self.positions(index, 0, self.videos[index].frames) - int(self._ends[index, 0])]

    def recording(self, index: int) -> Recording:
        """The episode, also where a file holds several."""
        return Recording(self.videos[index].id)

    def _with_actions(self, clips: Iterable[Clip], skipped: list[SkippedVideo]) -> Iterator[Clip]:
        """The clips whose actions fit, with a fingerprint that changes with the actions, too."""
        for clip in clips:
            try:
                told = self._told(clip.info.id)
            except BrokenVideoError as error:
                skipped.append(SkippedVideo(clip.info.id, error.reason))
                continue
            if self.action_size:
                fingerprint = f"{clip.info.fingerprint} {hashlib.sha256(told.tobytes()).hexdigest()}"
                clip = clip._replace(info=replace(clip.info, fingerprint=fingerprint))
            yield clip

    def _told(self, video_id: str) -> np.ndarray:
        """Actions [n, action] float32 of all frames of an episode. Raises BrokenVideoError if there are not as many."""
        episode = self.episodes[video_id]
        if not self.action_size:
            return np.empty((episode.frames, 0), np.float32)
        path = self.root / episode.data
        try:
            numbers, actions = _read_actions(path, self.action_size, path.stat().st_mtime_ns)
        except FileNotFoundError as error:
            raise BrokenVideoError(video_id, f"{episode.data} is missing") from error
        except OSError as error:
            raise UnreadableVideoError.of(video_id, error, episode.data) from error
        except VideoError as error:
            raise BrokenVideoError(video_id, str(error)) from error
        told = actions[numbers == episode.number]
        if len(told) != episode.frames:
            raise BrokenVideoError(
                video_id, f"{episode.data} has {len(told)} actions of it, but it has {episode.frames} frames"
            )
        if not np.isfinite(told).all():
            raise BrokenVideoError(video_id, f"{episode.data} has actions that are not finite")
        return told


def read_info(root: Path) -> Info:
    """What the data set in a folder says of itself.

    Raises:
        VideoError: no such data set, another version, or damaged metadata.
    """
    path = root / INFO
    try:
        info = Info.model_validate_json(_read_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = escaped(".".join(map(str, first["loc"]))) or "its text"
        raise VideoError(f"{path}: {where}: {first['msg']}: copy the data set again") from error
    if info.codebase_version not in VERSIONS:
        raise VideoError(
            f"{path}: codebase_version {info.codebase_version!r}, but {', '.join(VERSIONS)} can be read: convert the "
            "data set with LeRobot's own scripts"
        )
    for camera in info.cameras:
        if "/" in camera or "\\" in camera or camera in ("", ".", "..") or escaped(camera) != camera:
            raise VideoError(f"{path}: camera {camera!r} is no name of a folder")
    action = info.features.get(ACTION)
    if action is not None and (len(action.shape) != 1 or not 1 <= action.shape[0] <= 10_000):
        raise VideoError(f"{path}: actions of shape {action.shape}: expected one number, of the values of an action")
    return info


def choose_camera(info: Info, wanted: str | None, root: Path) -> str:
    """The camera to use: the wanted one, or the only one. Raises VideoError, with the names of all."""
    cameras = info.cameras
    if not cameras:
        raise VideoError(f"{root}: has no camera with videos (features of dtype video in {INFO})")
    if wanted is None and len(cameras) == 1:
        return cameras[0]
    if wanted not in cameras:
        asked = "has several cameras" if wanted is None else f"has no camera {wanted!r}"
        raise VideoError(f"{root}: {asked}: set dataset.camera to one of {join_names(cameras, 20)}")
    return wanted


def read_episodes(root: Path, info: Info, camera: str) -> list[Episode]:
    """All episodes, ordered by their numbers.

    Raises:
        VideoError: missing or damaged metadata, an episode that is there twice.
    """
    read = _episodes_of_tables if info.codebase_version == "v3.0" else _episodes_of_lines
    episodes = sorted(read(root, info, camera), key=lambda episode: episode.number)
    for one, other in itertools.pairwise(episodes):
        if one.number == other.number:
            raise VideoError(f"{root / 'meta'}: episode {one.number} is there twice: copy the data set again")
    if not episodes:
        raise VideoError(f"{root}: has no episodes")
    return episodes


def open_lerobot(
    dataset: DatasetConfig, root: Path, remember: bool, stored: Mapping[str, Split]
) -> dict[Split, FolderSource]:
    """Index the episodes of a LeRobot data set, and divide them among the splits by fractions, as in `open_folder`.

    Raises:
        VideoError: no data set in `root`, no such camera, no episode that can be used, or pyarrow is not installed.
    """
    fractions = choose_fractions(dataset, has_folders=False)
    info = read_info(root)
    camera = choose_camera(info, dataset.camera, root)
    episodes = {episode.id: episode for episode in read_episodes(root, info, camera)}
    of_file: dict[str, list[Episode]] = {}
    for episode in episodes.values():
        of_file.setdefault(episode.video, []).append(episode)

    def cut(file: str, frames: int) -> Iterator[Cut | SkippedVideo]:
        for episode in of_file[file]:
            first, stop = episode.first, frames if episode.stop is None else episode.stop
            if stop - first == episode.frames and stop <= frames:
                yield Cut(episode.id, first, stop)
                continue
            there = f"{file} has {frames} frames"
            if episode.stop is not None:
                there = f"they are frames {first} to {stop - 1} of {file}, which has {frames}"
            yield SkippedVideo(episode.id, f"has {episode.frames} frames by the metadata, but {there}")

    listing = Listing(root, list(of_file), list(of_file))
    # Recording goes on at the end of the last file.
    stops = {file: [episode.stop for episode in those if episode.stop] for file, those in of_file.items()}
    kind = partial(LerobotSource, episodes=episodes, action_size=info.action_size)
    sources = index_listings(dataset, root, {"train": listing}, remember, cut, kind, stops)
    if not sources["train"].videos:
        reasons = join_names(f"{video.id} {video.reason}" for video in sources["train"].skipped)
        raise VideoError(f"{root}: none of its {len(episodes)} episodes can be used: {reasons}")
    return split_training(dataset, root, sources, fractions, stored, remember)


def _episodes_of_lines(root: Path, info: Info, camera: str) -> Iterator[Episode]:
    for number, line in enumerate(_read_text(root / EPISODES).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            episode = _Length.model_validate_json(line)
        except ValidationError as error:
            raise VideoError(
                f"{root / EPISODES}: line {number}: {error.errors()[0]['msg']}: copy the data set again"
            ) from error
        chunk, name = f"chunk-{episode.episode_index // info.chunks_size:03d}", f"episode_{episode.episode_index:06d}"
        video, data = f"videos/{chunk}/{camera}/{name}.mp4", f"data/{chunk}/{name}.parquet"
        yield Episode(episode.episode_index, episode.length, video, data)


def _episodes_of_tables(root: Path, info: Info, camera: str) -> Iterator[Episode]:
    places = [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index")]
    places += ["data/chunk_index", "data/file_index"]
    times = [f"videos/{camera}/{name}_timestamp" for name in ("from", "to")]
    tables = sorted((root / EPISODE_TABLES).glob("chunk-*/file-*.parquet"))
    if not tables:
        raise VideoError(f"{root / EPISODE_TABLES}: has no chunk-*/file-*.parquet: {WAY_OUT}")
    for path in tables:
        try:
            table = _read_table(path, ["episode_index", "length", *places, *times])
            whole = [_numbers(table, name, path).astype(np.int64) for name in ("episode_index", "length", *places)]
            seconds = [_numbers(table, name, path).astype(np.float64) for name in times]
        except OSError as error:
            raise VideoError(f"{path}: cannot be read ({error.strerror})") from error
        for *numbers, begin, end in zip(*(column.tolist() for column in (*whole, *seconds)), strict=True):
            if not all(0 <= number < MOST_NUMBER for number in (*numbers, begin * info.fps, end * info.fps)):
                raise VideoError(f"{path}: episode {numbers[0]} has numbers out of range: copy the data set again")
            number, length, video_chunk, video_file, data_chunk, data_file = numbers
            video = f"videos/{camera}/chunk-{video_chunk:03d}/file-{video_file:03d}.mp4"
            data = f"data/chunk-{data_chunk:03d}/file-{data_file:03d}.parquet"
            yield Episode(number, length, video, data, round(begin * info.fps), round(end * info.fps))


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise VideoError(f"{path}: not a regular file: {WAY_OUT}")
        if path.stat().st_size > MOST_BYTES:
            raise VideoError(f"{path}: has more than {MOST_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise VideoError(f"{path}: no such file: {WAY_OUT}") from error
    except UnicodeDecodeError as error:
        raise VideoError(f"{path}: is no text: copy the data set again") from error
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from error


def _parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise VideoError(
            "dataset.source: lerobot needs pyarrow: pip install pyarrow (or 'river-two-stage[lerobot]')"
        ) from error
    return pyarrow.parquet


def _read_table(path: Path, columns: list[str]) -> Any:
    """Some columns of a parquet file, as a pyarrow table.

    Raises:
        VideoError: another kind of file, a column is missing, or too many values.
        OSError: the file system does not give it.
    """
    parquet = _parquet()
    from pyarrow import ArrowException

    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise VideoError(f"{path}: not a regular file")
    try:
        with parquet.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise VideoError(f"{path}: has no column {join_names(missing)}: copy the data set again")
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            parts = (group.column(number) for group in groups for number in range(group.num_columns))
            if sum(part.num_values for part in parts if part.path_in_schema.startswith(tuple(columns))) > MOST_VALUES:
                raise VideoError(f"{path}: has more than {MOST_VALUES} values in {join_names(columns)}")
            return file.read(columns, use_threads=False)
    except (ArrowException, OSError, ValueError) as error:
        if is_of_the_system(error):
            raise
        reason = str(error).splitlines()[0]
        raise VideoError(f"{path}: cannot be read as parquet ({reason}): copy the data set again") from error


def _numbers(table: Any, name: str, path: Path) -> np.ndarray:
    """A column of numbers without gaps. Raises VideoError."""
    values = table[name].to_numpy()
    if table[name].null_count or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise VideoError(f"{path}: {name} has gaps or other values than numbers: copy the data set again")
    return values


@lru_cache(maxsize=4)  # a file of version 3 has many episodes
def _read_actions(path: Path, size: int, changed: int) -> tuple[np.ndarray, np.ndarray]:
    """The episode [n] and the action [n, size] float32 of each row of a file. Raises as `_read_table`.

    Args:
        changed: when the file was changed, in ns.
    """
    table = _read_table(path, ["episode_index", ACTION])
    from pyarrow import ArrowException, compute, types

    numbers, actions = _numbers(table, "episode_index", path), table[ACTION].combine_chunks()
    try:
        if size > 1 or types.is_nested(actions.type):  # single values need no lists
            if compute.list_value_length(actions).unique().to_pylist() != [size]:
                raise VideoError(f"{path}: has actions of another size than {size}, which {INFO} says")
            actions = actions.flatten()
        if actions.null_count or not (types.is_floating(actions.type) or types.is_integer(actions.type)):
            raise VideoError(f"{path}: has actions that are not numbers")
    except ArrowException as error:
        raise VideoError(f"{path}: has actions that are no lists of numbers") from error
    with np.errstate(over="ignore"):  # to infinity, which is refused
        values = actions.to_numpy(zero_copy_only=False).astype(np.float32)
    return numbers, values.reshape(len(numbers), size)
