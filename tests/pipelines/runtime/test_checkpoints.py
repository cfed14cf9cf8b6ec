"""Checkpoints: complete or absent, whatever interrupts saving or damages files."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from pipelines.runtime.checkpoints import CheckpointFolder


def files(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"weight": torch.full((4, 3), value), "count": torch.tensor(7)},
        "optimizer": {"0.1.step": torch.tensor(2.0), "0.1.exp_avg": torch.randn(5).bfloat16()},
    }


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


def test_what_is_saved_is_what_is_loaded(folder):
    saved = files()
    path = folder.save(50, saved, {"identity": {"seed": 0}, "fps": 12.5})
    assert path.name == "step_00000050"
    found = folder.latest()
    assert (found.path, found.step) == (path, 50)
    assert found.state["identity"] == {"seed": 0}
    assert found.state["fps"] == 12.5
    for name, tensors in saved.items():
        loaded = found.tensors(name)
        assert loaded.keys() == tensors.keys()
        assert all(
            loaded[key].dtype == tensors[key].dtype and torch.equal(loaded[key], tensors[key]) for key in tensors
        )
    assert found.has("model")
    assert not found.has("ema")


def test_shared_and_strided_tensors_are_saved(folder):
    weight = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    shared = torch.arange(6.0)
    folder.save(1, {"model": {"a": weight, "b": shared, "c": shared, "d": shared[::2]}, "empty": {}}, {})
    loaded = folder.latest().tensors("model")
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["d"], shared[::2])
    assert folder.latest().tensors("empty") == {}


def test_old_checkpoints_are_removed_and_the_pointer_names_the_newest(folder):
    assert folder.latest() is None
    for step in (5, 10, 15):
        folder.save(step, files(step), {})
        assert (folder.folder / "latest").read_text() == f"step_{step:08d}"
    assert names(folder) == ["latest", "step_00000010", "step_00000015"]
    assert folder.latest().step == 15


def test_saving_a_step_again_replaces_it(folder):
    folder.save(5, files(1), {})
    folder.save(5, files(2), {})
    assert folder.latest().tensors("model")["weight"][0, 0] == 2
    assert names(folder) == ["latest", "step_00000005"]


@pytest.mark.parametrize("where", ["safetensors.torch.serialize_file", "os.fsync", "pathlib.Path.rename"])
def test_a_crash_while_saving_leaves_the_one_before(folder, monkeypatch, where):
    folder.save(5, files(1), {})

    def crash(*_, **__):
        raise KeyboardInterrupt("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(where, crash)
        with pytest.raises(KeyboardInterrupt):
            folder.save(10, files(2), {})
    assert folder.latest().step == 5
    assert folder.latest().tensors("model")["weight"][0, 0] == 1
    folder.save(15, files(3), {})  # and the next save clears up
    assert names(folder) == ["latest", "step_00000005", "step_00000015"]


def test_everything_is_flushed_before_it_is_renamed(folder, monkeypatch):
    events = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append("rename"), rename(path, target))[1])
    monkeypatch.setattr("os.fsync", lambda file: events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    folder.save(5, files(), {})
    before = events[: events.index("rename")]
    assert {"model.safetensors", "optimizer.safetensors", "state.json", ".step_00000005.tmp"} == set(before)
    assert "checkpoints" in events[events.index("rename") :]


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: truncate(path / "model.safetensors", 100),
        lambda path: truncate(path / "model.safetensors", -1),
        lambda path: truncate(path / "model.safetensors", 20),
        lambda path: truncate(path / "model.safetensors", 3),
        lambda path: truncate(path / "model.safetensors", 0),
        lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 400),
        lambda path: (path / "model.safetensors").write_bytes((1000).to_bytes(8, "little") + b"\x00" * 2000),
        lambda path: (path / "optimizer.safetensors").unlink(),
        lambda path: (path / "state.json").unlink(),
        lambda path: truncate(path / "state.json", 12),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / "state.json").write_text("{}"),
        lambda path: (path / "state.json").write_bytes(b"\xff\xfe"),
        lambda path: replace_in(path / "state.json", "0.125", "0.135"),
        lambda path: replace_in(path / "state.json", '"std"', '"stf"'),
        lambda path: replace_in(path / "state.json", '"sha256": "', '"sha256": "0'),
        lambda path: path.rename(path.with_name("step_00000015")),
    ],
    ids=range(17),
)
def test_a_damaged_newest_one_is_named_and_passed_over(folder, damage, capsys):
    folder.save(5, files(1), {})
    damage(folder.save(10, files(2), {"standardization": {"mean": [0.5], "std": [0.125]}}))
    found = folder.latest()
    assert found.step == 5
    assert re.search(r"step_000000(10|15): not a whole checkpoint", capsys.readouterr().err)


def test_only_damaged_ones_are_none(folder):
    (folder.save(5, files(), {}) / "state.json").unlink()
    assert folder.latest() is None


@pytest.mark.parametrize("keep", [1, 2])
def test_training_that_goes_on_before_a_damaged_one_keeps_what_it_saves(tmp_path, keep):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (10, 20):
        folder.save(step, files(step), {})
    (tmp_path / "step_00000020" / "model.safetensors").unlink()
    CheckpointFolder(tmp_path, keep).save(15, files(15), {})
    assert folder.latest().step == 15
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000010", "step_00000015"][-keep:]


def swap(path: Path, one: str, other: str) -> None:
    (path / f"{one}.safetensors").rename(path / "aside")
    (path / f"{other}.safetensors").rename(path / f"{one}.safetensors")
    (path / "aside").rename(path / f"{other}.safetensors")


def change_byte(file: Path, place: int, mask: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= mask
    file.write_bytes(content)


def with_zeros(file: Path) -> None:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + bytes(len(content) - start))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model", lambda path: change_byte(path / "model.safetensors", -1, 1)),
        ("model", lambda path: change_byte(path / "model.safetensors", 8 + 5, 1)),
        ("optimizer", lambda path: change_byte(path / "optimizer.safetensors", -3, 0x80)),
        ("ema", lambda path: with_zeros(path / "ema.safetensors")),
        ("ema", lambda path: swap(path, "model", "ema")),
        ("model", lambda path: shutil.copy(path.with_name("step_00000040") / "model.safetensors", path)),
        ("codebook", lambda path: shutil.copy(path / "model.safetensors", path / "codebook.safetensors")),
    ],
    ids=["bit", "name", "optimizer", "zeros", "swapped", "of another step", "not saved"],
)
def test_tensors_that_are_not_those_that_were_saved(folder, name, damage):
    for step in (40, 60):
        folder.save(step, files(float(step)) | {"ema": files(step / 2)["model"]}, {})
    path = folder.folder / "step_00000060"
    damage(path)
    found = folder.latest()
    with pytest.raises(UserError, match=rf"step_00000060/{name}.safetensors: .*remove .*step_00000060"):
        found.tensors(name)
    assert not found.has("codebook")
    assert folder.named("40").tensors("model")["weight"][0, 0] == 40


def test_a_checkpoint_without_digests_is_read_and_said_once(folder, capsys):
    path = folder.save(5, files(), {"fps": 25})
    (path / "state.json").write_text('{"step": 5, "files": ["model", "optimizer"], "fps": 25}')
    for name in ("model", "optimizer"):
        assert folder.latest().tensors(name).keys() == files()[name].keys()
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    truncate(path / "model.safetensors", 40)
    with pytest.raises(UserError, match=r"model.safetensors: missing or damaged.*remove .*step_00000005"):
        folder.latest().tensors("model")


def test_the_best_one_is_known_without_the_pointer(folder):
    """A crash between the pointers leaves the one before."""
    for step, value in ((10, 1.0), (20, 2.0), (30, None), (40, None)):
        folder.save(step, files(step), {}, best=value and {"score": value})
    (folder.folder / "best").write_text("step_00000010")
    assert folder.best().step == 20
    assert not folder.is_best("score", 1.5, lowest=False)
    assert folder.is_best("score", 2.5, lowest=False)
    folder.save(50, files(50), {})
    assert names(folder) == ["best", "latest", "step_00000020", "step_00000040", "step_00000050"]
    assert (folder.folder / "best").read_text() == "step_00000020"


def test_the_state_is_json(folder):
    path = folder.save(3, files(), {"identity": {"a": [1, None]}})
    state = json.loads((path / "state.json").read_text())
    assert state.keys() == {"step", "files", "identity", "content_sha256"}
    assert (state["step"], state["identity"]) == (3, {"a": [1, None]})
    assert list(state["files"]) == ["model", "optimizer"]
    for name, recorded in state["files"].items():
        content = (path / f"{name}.safetensors").read_bytes()
        assert recorded == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_key_that_state_lacks_is_named(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(3, {"model": {"weight": torch.ones(2)}}, {"identity": {}})
    with pytest.raises(UserError, match=r"step_00000003/state.json .*'store'.*--restart"):
        folder.latest().state["store"]
