"""KTH: persons, sequences, and folders that contain something else."""

import os
import zipfile
from pathlib import Path

import pytest

from stage1_autoencoder.videos import VideoError, open_source, open_splits
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.kth import ACTIONS, persons_of_splits, read_sequences
from tests.stage1_autoencoder.videos.conftest import ids

SEQUENCES = """KTH-style heading, which says: person01, frames 1-5

Training:    person11, 12, 13

person01_boxing_d1\t\tframes\t1-4, 5-8
person01_boxing_d2  frames   2-3,4-99,\t50-60
person02_walking_d1\tframes\t
person20_jogging_d1\t\tframes\t3-7
person13_handclapping_d3\tframes\t1-4
"""


def config(**settings) -> DatasetConfig:
    return DatasetConfig(**{"name": "kth", "source": "kth", "image_size": 16} | settings)


@pytest.fixture
def data(tmp_path, make_video):
    for name in ("01_boxing_d1", "01_boxing_d2", "02_walking_d1", "20_jogging_d1", "21_running_d3", "10_boxing_d1"):
        make_video(f"kth/{name.split('_')[1]}/person{name}_uncomp.avi", 8)
    (tmp_path / "kth/00sequences.txt").write_text(SEQUENCES)
    return tmp_path


def test_default_splits(data):
    assert ids(open_splits(config(), data)) == {
        "train": ["person01_boxing_d1", "person01_boxing_d2", "person10_boxing_d1", "person02_walking_d1"],
        "val": ["person20_jogging_d1"],
        "test": ["person21_running_d3"],
    }


def test_sequences_of_one_file_are_one_recording_of_its_person(data):
    train = open_splits(config(sequences=True, splits={"train": "1-2", "test": 20}), data)["train"]
    recordings = {video.id.removeprefix("person01_boxing_"): train.recording(i) for i, video in enumerate(train.videos)}
    assert recordings["d1_1-4"] == recordings["d1_5-8"]
    assert recordings["d2_2-3"] == recordings["d2_4-99"]
    assert len(set(recordings.values())) == 2
    assert {recording.person for recording in recordings.values()} == {"1"}
    whole = open_splits(config(), data)["test"]
    assert (whole.recording(0).name, whole.recording(0).person) == ("running/person21_running_d3_uncomp.avi", "21")


def test_given_splits_replace_the_default(data):
    def counts(**splits) -> dict[str, int]:
        return {split: len(names) for split, names in ids(open_splits(config(splits=splits), data)).items()}

    assert counts(train="1-2", val="none", test=10) == {"train": 3, "test": 1}
    assert counts(train="1-16", test="17-25") == {"train": 4, "test": 2}  # person 16, held out, has no video
    with pytest.raises(VideoError, match=r"val split of 'kth'"):
        open_source(config(splits={"train": 1, "test": 10}), data, "val")
    with pytest.raises(VideoError, match=r"splits\.train.*3-4.*river data"):
        open_splits(config(splits={"train": "3-4", "test": "21"}), data)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": "1-3", "test": "4"}, {"train": [1, 2], "test": [4], "val": [3]}),
        ({"train": "7,2-3", "test": "4"}, {"train": [2, 3], "test": [4], "val": [7]}),
        ({"train": "1-3", "val": "none", "test": "4"}, {"train": [1, 2, 3], "test": [4]}),
        ({"train": "1-3", "val": 9}, {"train": [1, 2, 3], "val": [9]}),
        ({"train": 5, "test": "4"}, {"train": [5], "test": [4]}),
    ],
)
def test_the_last_training_person_is_held_out_unless_val_is_given(splits, expected):
    found: dict[str, list[int]] = {}
    for person, split in persons_of_splits(splits).items():
        found.setdefault(split, []).append(person)
    assert found == expected


def test_a_person_in_two_splits_is_an_error_even_if_held_out():
    with pytest.raises(VideoError, match=r"person 17 .*train.*test"):
        persons_of_splits({"train": "1-17", "test": "17-25"})


def test_sequences(data, read_numbers):
    sources = open_splits(config(sequences=True, splits={"train": "1-2", "val": 20}), data)
    train = sources["train"]
    assert {video.id: video.frames for video in train.videos} == {
        "person01_boxing_d1_1-4": 4,
        "person01_boxing_d1_5-8": 4,
        "person01_boxing_d2_2-3": 2,
        "person01_boxing_d2_4-99": 5,
    }
    reasons = {video.id: video.reason for video in train.skipped}
    assert reasons.keys() == {"person01_boxing_d2_50-60", "person02_walking_d1"}
    assert "8 frames" in reasons["person01_boxing_d2_50-60"]
    assert "00sequences.txt" in reasons["person02_walking_d1"]
    assert read_numbers(train.read(1)) == [4, 5, 6, 7]
    assert read_numbers(train.read(3)) == [3, 4, 5, 6, 7]
    assert read_numbers(sources["val"].read(0, [4, 0])) == [6, 2]
    assert len({video.fingerprint for video in train.videos}) == 4
    stepped = open_source(config(sequences=True, frame_step=2), data, "train")
    assert read_numbers(stepped.read(3)) == [3, 5, 7]


def test_broken_and_foreign_files(data):
    (data / "kth/boxing/person03_boxing_d1_uncomp.avi").write_text("text")
    (data / "kth/boxing/holiday.avi").write_text("text")
    (data / "kth/boxing/person22_boxing_d1_uncomp.avi").write_text("text")
    sources = open_splits(config(), data)
    reasons = {video.id: video.reason for video in sources["train"].skipped}
    assert reasons.keys() == {"person03_boxing_d1", "boxing/holiday"}
    assert "person01_boxing_d1_uncomp.avi" in reasons["boxing/holiday"]
    assert [video.id for video in sources["test"].skipped] == ["person22_boxing_d1"]


def test_folders_that_contain_something_else(tmp_path, make_video):
    root = tmp_path / "kth"
    with pytest.raises(VideoError, match=r"kth: .*river data --config kth"):
        open_splits(config(), tmp_path)
    root.mkdir()
    with pytest.raises(VideoError, match=r"kth: .*--mirror <folder with the zips>"):
        open_splits(config(), tmp_path)
    with zipfile.ZipFile(root / "boxing.zip", "w"):
        pass
    with pytest.raises(VideoError, match=rf"river data --config kth --mirror {root}"):
        open_splits(config(), tmp_path)
    make_video("kth/boxing/holiday.avi")
    with pytest.raises(VideoError, match=r"1 videos .*person01_boxing_d1_uncomp"):
        open_splits(config(), tmp_path)
    make_video("kth/boxing/person01_boxing_d1_uncomp.avi")
    with pytest.raises(VideoError, match=r"00sequences\.txt: .*No such file.*river data"):
        open_splits(config(sequences=True), tmp_path)
    (root / "00sequences.txt").write_text("<html>not found</html>")
    with pytest.raises(VideoError, match=r"00sequences\.txt: .*person01_boxing_d1  frames  1-95.*river data"):
        open_splits(config(sequences=True), tmp_path)


SHARED = Path(os.environ.get("RIVER_SHARED", Path(__file__).parents[4] / "shared")) / "data" / "kth_mocap"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the KTH stand-in is not here (RIVER_SHARED)")
def test_the_stand_in(tmp_path):
    sequences = read_sequences(SHARED / "00sequences.txt")
    assert len(sequences) == 300
    for action in ACTIONS[:2]:
        with zipfile.ZipFile(SHARED / f"{action}.zip") as archive:
            archive.extractall(tmp_path / "kth" / action)
    sources = open_splits(config(), tmp_path)
    assert {split: len(source.videos) for split, source in sources.items()} == {"train": 76, "val": 4, "test": 20}
    video = sources["test"].videos[3]
    frames = sources["test"].read(3)
    assert len(frames) == video.frames >= max(last for _, last in sequences[video.id])
    assert (frames == frames[..., :1]).all(), "grey videos give grey frames"
    assert frames.std() > 5
