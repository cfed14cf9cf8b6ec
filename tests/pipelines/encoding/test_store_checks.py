"""How far a store is, and which stores are refused: by the run's autoencoder, preprocessing, layout, and videos."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import latent_cache
from latent_cache import StoreError, StoreMetadata
from pipelines.encoding.store_checks import (
    check_layout,
    check_sources,
    store_metadata,
    store_status,
    stored_precision,
)
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.status import Status
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.shapes import FRAMES_PER_SECOND, ShapesSource


def save_autoencoder(kit, scale: float = 1) -> None:
    """Make the kit's autoencoder, its weights scaled, the run's."""
    weights = {name: tensor * scale for name, tensor in kit.model.state_dict().items()}
    state = {"model": kit.config().autoencoder.model.model_dump(mode="json")}
    CheckpointFolder(kit.config().run_path / "autoencoder" / "checkpoints").save(1, {"model": weights}, state)


def edit_attributes(store: Path, **values: object) -> None:
    latent_cache.unseal(store)
    root = store / "zarr.json"
    content = json.loads(root.read_text())
    content["attributes"] |= values
    root.write_text(json.dumps(content))


@pytest.mark.parametrize("step", [1, 2, 5])
def test_the_rate_of_a_store_is_that_of_the_frames_in_it(kit, step: int) -> None:
    dataset = DatasetConfig(name="toy", source="shapes", image_size=16, frame_step=step, splits={"train": 1})
    splits = {"train": ShapesSource(dataset, "train")}
    config = kit.config().model_copy(update={"dataset": dataset})
    assert store_metadata(config, kit.model, splits).fps == pytest.approx(FRAMES_PER_SECOND / step)


# The status


def test_a_store_is_missing_then_partial_then_done(kit) -> None:
    save_autoencoder(kit)
    status = store_status(kit.config())
    assert (status.state, status.path) == ("missing", kit.store)
    for after in (0, 3):  # the second one resumes the first
        kit.interrupt(after)
        status = store_status(kit.config())
        assert status.state == "partial"
        assert f"{after} of 7 chunks" in status.detail
    kit.encode()
    assert store_status(kit.config()) == Status("done", "complete", kit.store)


def test_a_store_alone_is_done_without_an_autoencoder(kit) -> None:
    kit.encode()
    assert store_status(kit.config(views=["hflip"])).is_done


def other_autoencoder(kit) -> dict[str, object]:
    save_autoencoder(kit, scale=2)
    return {}


def other_preprocessing(kit) -> dict[str, object]:
    return {"views": ["identity", "hflip"]}


def resampled_before(kit) -> dict[str, object]:
    edit_attributes(kit.store, preprocessing=latent_cache.open_metadata(kit.store).preprocessing | {"fps": 10.0})
    return {}


def padded_before(kit) -> dict[str, object]:
    edit_attributes(kit.store, preprocessing=latent_cache.open_metadata(kit.store).preprocessing | {"fit": "pad"})
    return {}


def copied_too_early(kit) -> dict[str, object]:
    edit_attributes(kit.store, complete=False)
    return {}


def damaged(kit) -> dict[str, object]:
    (kit.store / "zarr.json").write_text("{")
    return {}


def of_another_program(kit) -> dict[str, object]:
    edit_attributes(kit.store, format="pictures")
    return {}


def a_folder_of_files(kit) -> dict[str, object]:
    shutil.rmtree(kit.store)
    kit.store.mkdir()
    (kit.store / "notes.txt").touch()
    return {}


def a_file(kit) -> dict[str, object]:
    shutil.rmtree(kit.store)
    kit.store.touch()
    return {}


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        (other_autoencoder, ["autoencoder", "encode --overwrite"]),
        (other_preprocessing, ["views", "['identity']", "['identity', 'hflip']", "encode --overwrite"]),
        (resampled_before, ["fps", "10.0 in the store, None in the configuration", "encode --overwrite"]),
        (padded_before, ["fit", "'pad' in the store, None in the configuration"]),
        (copied_too_early, ["not complete", "encode --overwrite"]),
        (damaged, ["zarr.json", "river encode"]),
        (of_another_program, ["pictures"]),
        (a_folder_of_files, ["paths.latents"]),
        (a_file, ["paths.latents"]),
    ],
)
def test_a_conflict_is_told_with_the_way_out(kit, change: Callable, needed: list[str]) -> None:
    save_autoencoder(kit)
    kit.encode()
    status = store_status(kit.config(**change(kit)))
    assert status.state == "conflicting"
    for text in [*needed, str(kit.store)]:
        assert text in status.detail


def test_a_partial_store_of_other_preprocessing_conflicts(kit) -> None:
    save_autoencoder(kit)
    kit.interrupt(after=2)
    status = store_status(kit.config(views=["hflip"]))
    assert status.state == "conflicting"
    assert "views" in status.detail


# Layout and metadata


def test_defaults_leave_no_mark_in_the_metadata(kit) -> None:
    plain = store_metadata(kit.config(), kit.model, kit.splits)
    assert plain.autoencoder.keys() == {"architecture", "sha256", "downsampling", "latent_channels", "codes"}
    assert stored_precision(plain) == "fp32"
    rough = store_metadata(kit.config(precision="tf32", compile=True), kit.model, kit.splits)
    assert stored_precision(rough) == "tf32"
    assert StoreMetadata.differences(plain, rough) == [
        "autoencoder.compiled: None here, True there",
        "autoencoder.precision: None here, 'tf32' there",
    ]


@pytest.mark.parametrize(
    ("there", "here", "key"),
    [
        ({"precision": "bf16"}, {"precision": "fp32"}, "precision"),
        ({"precision": "fp32"}, {"precision": "bf16"}, "precision"),
        ({"dtype": "float32"}, {"dtype": "float16"}, "dtype"),
        ({"codes": False}, {"codes": True}, "codes"),
        ({"preview": 4}, {"preview": 0}, "preview"),
        ({"chunk_frames": 7}, {"chunk_frames": 8}, "chunk_frames"),
    ],
)
def test_another_layout_is_refused(kit, there: dict, here: dict, key: str) -> None:
    kit.encode(**there)
    check_layout(kit.config(**there))
    check_layout(kit.config(**there | {"chunk_frames": None}))
    with pytest.raises(UserError) as raised:
        check_layout(kit.config(**here))
    for text in (str(kit.store), f"cache.{key}: {there[key]} in the store, {here[key]}", "--overwrite"):
        assert text in str(raised.value)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"precision": "bf16"}, "autoencoder.precision"), ({"views": ["identity", "hflip"]}, "preprocessing.views")],
)
def test_a_partial_store_of_other_settings_is_not_resumed(kit, change: dict, key: str) -> None:
    kit.interrupt(after=2)
    with pytest.raises(StoreError, match=key):
        kit.encode(**change)
    kit.encode()
    assert latent_cache.is_complete(kit.store)


def test_changed_videos_are_refused_by_name(kit) -> None:
    kit.splits["train"].ends |= {"c": 0, "e": 2}  # cannot be decoded, which is no change
    kit.encode()
    check_sources(kit.config(), kit.splits)
    now = {"a": 7, "b": 13, "c": 1} | {f"new{number}": 2 for number in range(7)}
    with pytest.raises(UserError) as raised:
        check_sources(kit.config(), {"train": kit.Source(now, b="other", c="mended")})
    for text in (
        str(kit.store), "train: 7 added: new0, new1, new2, new3, new4, ...", "train: 2 removed: d, e",
        "train: 2 replaced: b, c", "val: 2 removed: v, w", "--overwrite",
    ):  # fmt: skip
        assert text in str(raised.value)
