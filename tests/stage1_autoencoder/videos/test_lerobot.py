"""Robot episodes in LeRobot's layouts: frames and actions of each, and what does not fit together."""

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from stage1_autoencoder.videos import VideoError, open_splits
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.source import VideoSource
from tests.small_data_sets import write_lerobot
from tests.stage1_autoencoder.videos.conftest import brightening, encode, numbers

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LENGTHS = [5, 4, 6]
FIRST = [0, 5, 9]
TOP = "observation.images.top"
DATA = {"v2.1": "data/chunk-000/episode_000001.parquet", "v3.0": "data/chunk-000/file-000.parquet"}


def told(episode: int, size: int = 2) -> np.ndarray:
    """Actions that say of which episode and frame they are."""
    frames = np.arange(LENGTHS[episode])
    return np.stack([np.full_like(frames, episode), frames, *[frames] * size], axis=1)[:, :size].astype(np.float32)


@pytest.fixture(scope="session")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("robots")


@pytest.fixture
def robot(_folders: Path, tmp_path: Path) -> Callable[..., Path]:
    """A data set of three episodes, whose frames together have 15 brightnesses."""

    def make(version: str, size: int = 2, **options: object) -> Path:
        pictures = brightening(15)
        parts = [(0, 15)] if version == "v3.0" else [(f, f + n) for f, n in zip(FIRST, LENGTHS, strict=True)]
        videos = []
        for first, stop in parts:
            file = _folders / f"{first}-{stop}.mp4"
            videos.append((file if file.exists() else encode(file, pictures[first:stop])).read_bytes())
        actions = [told(episode, size) for episode in range(3)]
        return write_lerobot(tmp_path / version, version, videos, actions, **options)

    return make


def open_robot(root: Path, remember: bool = False, **settings: object) -> VideoSource:
    options = {"splits": {"val": 0, "test": 0}, "image_size": 16} | settings
    dataset = DatasetConfig(name="robot", source="lerobot", root=str(root), **options)
    return open_splits(dataset, root.parent, remember=remember)["train"]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_each_episode_has_its_frames_and_actions(robot, version: str) -> None:
    source = pickle.loads(pickle.dumps(open_robot(robot(version))))  # as workers get it
    assert [video.id for video in source.videos] == ["episode_000000", "episode_000001", "episode_000002"]
    assert [video.frames for video in source.videos] == LENGTHS
    assert source.action_size == 2
    assert len({source.recording(row).name for row in range(3)}) == 3
    for row, (first, length) in enumerate(zip(FIRST, LENGTHS, strict=True)):
        assert numbers(source.read(row)) == list(range(first, first + length))
        np.testing.assert_array_equal(source.actions(row), told(row))
        assert source.actions(row).dtype == np.float32


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize(
    ("settings", "used"), [({"frame_step": 2}, [0, 2, 4]), ({"fps": 20}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])]
)
def test_actions_are_those_of_the_frames_that_are_used(robot, version: str, settings: dict, used: list[int]) -> None:
    source = open_robot(robot(version), **settings)
    assert numbers(source.read(2)) == [9 + number for number in used]
    np.testing.assert_array_equal(source.actions(2), told(2)[used])


def test_a_single_value_and_no_action(robot, tmp_path: Path) -> None:
    np.testing.assert_array_equal(open_robot(robot("v2.1", size=1)).actions(1), told(1, 1))
    source = open_robot(robot("v3.0", size=0))
    assert (source.action_size, source.actions(1).shape) == (0, (4, 0))


def test_other_actions_are_another_video(robot) -> None:
    root = robot("v2.1")
    before = [video.fingerprint for video in open_robot(root).videos]
    table = pyarrow.table({"episode_index": [1] * 4, "action": (told(1) + 1).tolist()})
    parquet.write_table(table, root / DATA["v2.1"])
    changed = [one != other.fingerprint for one, other in zip(before, open_robot(root).videos, strict=True)]
    assert changed == [False, True, False]


def joined(path: Path, parts: list[Path]) -> Path:
    """One file of several, packet by packet, as LeRobot adds an episode to its last file."""
    listed = path.with_suffix(".ffconcat")
    listed.write_text("ffconcat version 1.0\n" + "".join(f"file '{part}'\n" for part in parts))
    with (
        av.open(str(listed), format="concat", options={"safe": "0"}) as source,
        av.open(str(path), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return path


@pytest.mark.parametrize(("codec", "options"), [("libsvtav1", {"g": "2"}), ("libx264", {"g": "2", "bf": "2"})])
def test_episodes_added_to_the_last_file_are_new_and_the_others_the_same(tmp_path, monkeypatch, codec, options) -> None:
    """AV1 is LeRobot's own choice. Of H.264, the first file has two episodes: adding to a single one changes it."""
    if codec not in av.codecs_available:
        pytest.skip(f"{codec} is missing here")
    pictures = brightening(16)
    kinds = {"0": pictures[:5], "1": pictures[5:9], "2": pictures[9:15], "other": pictures[10:16]}
    parts = {name: encode(tmp_path / f"{name}.mp4", frames, codec, **options) for name, frames in kinds.items()}
    videos = {"01": joined(tmp_path / "01.mp4", [parts["0"], parts["1"]])}
    videos["012"] = joined(tmp_path / "012.mp4", [videos["01"], parts["2"]])
    videos["01other"] = joined(tmp_path / "01other.mp4", [videos["01"], parts["other"]])
    videos["other12"] = joined(tmp_path / "other12.mp4", [parts[name] for name in ("other", "1", "2")])

    def fingerprints(name: str, episodes: int = 3, swapped: bool = False) -> list[str]:
        root = tmp_path / "robot"
        shutil.rmtree(root, ignore_errors=True)
        actions = [told(episode) for episode in range(episodes)]
        if swapped:
            actions[0] = np.concatenate([actions[0], actions[0][-1:]])
        write_lerobot(root, "v3.0", [videos[name].read_bytes()], actions)
        source = open_robot(root, remember=True)
        assert not source.skipped
        with monkeypatch.context() as patch:  # as the index has them
            patch.setattr("stage1_autoencoder.videos.index.examine_video", None)
            assert open_robot(root, remember=True).videos.fingerprints == source.videos.fingerprints
        return source.videos.fingerprints

    before = fingerprints("01", 2)
    after = fingerprints("012")
    assert after[:2] == before
    assert len(set(after)) == 3
    replaced = fingerprints("01other")
    assert replaced[:2] == before
    assert replaced[2] != after[2]
    assert not set(fingerprints("other12", swapped=True)) & set(after)


def rewrite(root: Path, version: str, change: Callable[[dict], object]) -> None:
    """Change the columns of the table with the actions of episode 1."""
    path = root / DATA[version]
    columns = parquet.read_table(path).to_pydict()
    change(columns)
    parquet.write_table(pyarrow.table(columns), path)


def lose_a_row(columns: dict) -> None:
    row = columns["episode_index"].index(1)
    for values in columns.values():
        del values[row]


def spoil(columns: dict) -> None:
    columns["action"][columns["episode_index"].index(1)] = [float("nan"), 1e300]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize(("change", "reason"), [(lose_a_row, "has 3 actions .* 4 frames"), (spoil, "not finite")])
def test_an_episode_that_does_not_fit_is_skipped(robot, version: str, change, reason: str) -> None:
    root = robot(version)
    rewrite(root, version, change)
    source = open_robot(root)
    assert [video.id for video in source.videos] == ["episode_000000", "episode_000002"]
    np.testing.assert_array_equal(source.actions(1), told(2))
    (skipped,) = source.skipped
    assert skipped.id == "episode_000001"
    assert re.search(reason, skipped.reason)


def test_videos_that_are_shorter_than_their_data(robot) -> None:
    root = robot("v2.1")
    videos = root / "videos/chunk-000" / TOP
    shutil.copy(videos / "episode_000001.mp4", videos / "episode_000000.mp4")
    (root / "videos/chunk-001" / TOP / "episode_000002.mp4").unlink()
    source = open_robot(root)
    assert [video.id for video in source.videos] == ["episode_000001"]
    assert [(video.id.split("/")[-1], "4 frames" in video.reason) for video in source.skipped] == [
        ("episode_000000", True), ("episode_000002.mp4", False)
    ]  # fmt: skip
    other = robot("v3.0")
    shutil.copy(videos / "episode_000001.mp4", other / "videos" / TOP / "chunk-000/file-000.mp4")
    with pytest.raises(VideoError, match=r"none of its 3 episodes.*episode_000000 .*file-000.mp4, which has 4"):
        open_robot(other)


def edit(root: Path, **changes: object) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_used_says_so_in_a_line(robot, tmp_path: Path) -> None:
    root = robot("v2.1", cameras=(TOP, "observation.images.wrist"))
    info = json.loads((root / "meta/info.json").read_text())
    for settings, parts in (({}, ["several cameras"]), ({"camera": "left"}, ["'left'"])):
        with pytest.raises(VideoError) as raised:
            open_robot(root, **settings)
        for part in (str(root), "dataset.camera", TOP, "observation.images.wrist", *parts):
            assert part in str(raised.value)
    assert len(open_robot(root, camera=TOP).videos) == 3
    for changes, parts in (
        ({"codebase_version": "v9.1"}, ["'v9.1'", "v3.0"]),
        ({"fps": 0}, ["fps"]),
        ({"features": {"../../x": {"dtype": "video"}}}, ["'../../x'"]),
        ({"features": {"action": {"dtype": "float32", "shape": [2]}}}, ["no camera"]),
        ({"features": info["features"] | {"action": {"dtype": "float32", "shape": [2, 2]}}}, ["[2, 2]"]),
        ({"features": info["features"] | {"action": {"dtype": "float32", "shape": [3]}}}, ["size than 3"]),
    ):
        edit(root, **info | changes)
        with pytest.raises(VideoError) as raised:
            open_robot(root, camera=TOP)
        for part in (str(root), *parts):
            assert part in str(raised.value)
    edit(root, **info)
    (root / "meta/episodes.jsonl").write_text('{"episode_index": 0}\n')
    with pytest.raises(VideoError, match=r"episodes.jsonl: line 1"):
        open_robot(root, camera=TOP)
    (root / "meta/info.json").write_text("{")
    with pytest.raises(VideoError, match=r"meta/info.json"):
        open_robot(root)
    with pytest.raises(VideoError, match=r"meta/info.json: no such file.*dataset.root"):
        open_robot(tmp_path)


def test_damaged_tables(robot) -> None:
    root = robot("v3.0")
    (root / DATA["v3.0"]).write_bytes(b"PAR1 and no more")
    with pytest.raises(VideoError, match=rf"none of its 3 episodes.*{DATA['v3.0']}.*parquet"):
        open_robot(root)
    table = root / "meta/episodes/chunk-000/file-000.parquet"
    columns = parquet.read_table(table).to_pydict()
    for changes, part in (({"length": None}, "no column length"), ({"length": [5, None, 6]}, "length has gaps")):
        kept = {name: values for name, values in (columns | changes).items() if values is not None}
        parquet.write_table(pyarrow.table(kept), table)
        with pytest.raises(VideoError, match=part):
            open_robot(root)
    table.unlink()
    with pytest.raises(VideoError, match=r"meta/episodes: has no"):
        open_robot(root)


def test_without_pyarrow(robot, monkeypatch: pytest.MonkeyPatch) -> None:
    root = robot("v3.0")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(VideoError, match=r"pip install pyarrow"):
        open_robot(root)
