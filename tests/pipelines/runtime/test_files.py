"""Files of a run: replaced as a whole, locked, read through their class, and sizes as text."""

import contextlib
import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from pipelines.errors import UserError
from pipelines.runtime.files import (
    SEAL,
    backup_folder,
    file_sha256,
    locked,
    read_json,
    replacing,
    replacing_files,
    size_text,
    write_json,
)
from pipelines.runtime.files import write_text as write


class Size(BaseModel):
    width: int


def rewrite(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("new")


@pytest.mark.parametrize("replace", [lambda path: write(path, "new"), rewrite], ids=["write", "replacing"])
@pytest.mark.parametrize("full", [False, True])
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch, replace, full) -> None:
    """On a full disk the old file stays, and nothing beside it."""
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def fsync(descriptor: int) -> None:
        assert path.read_text() == "old" or not full
        if full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    if full:
        with pytest.raises(OSError, match="No space left"):
            replace(path)
    else:
        replace(path)
    assert path.read_text() == ("old" if full else "new")
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


LEAVES_A_TEMPORARY = """
import os, sys
from pathlib import Path
from pipelines.runtime.files import replacing, replacing_files
with replacing_files(Path(sys.argv[1]), "files.json") as folder, replacing(Path(sys.argv[1], "file.png")) as temporary:
    (folder / "a").write_text("half")
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """By the next writer in the folder, which leaves alone what a writer that is alive is writing."""
    writer = subprocess.Popen(
        [sys.executable, "-c", LEAVES_A_TEMPORARY, tmp_path], stdin=-1, stdout=-1, cwd=Path(__file__).parents[3]
    )
    try:
        assert writer.stdout.readline() == b"writing\n"
        write(tmp_path / "latest", "new")
        assert len(list(tmp_path.iterdir())) == 3
    finally:
        writer.kill()
        writer.communicate()
    rewrite(tmp_path / "other.yaml")
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "other.yaml"}


@pytest.mark.parametrize("fails", [False, True])
def test_files_that_belong_together_are_replaced_together(tmp_path: Path, fails: bool) -> None:
    def replace(names: list[str], stale: list[str], content: str) -> None:
        with replacing_files(tmp_path / "made", "index.json", stale) as folder:
            for name in names:
                write(folder / name, content)
            if fails and content == "new":
                raise OSError(28, "No space left on device")

    replace(["a", "index.json", "b"], [], "old")
    with pytest.raises(OSError, match="No space left") if fails else contextlib.nullcontext():
        replace(["c", "index.json", "b"], ["a"], "new")
    found = {path.name: path.read_text() for path in (tmp_path / "made").iterdir()}
    old, new = dict.fromkeys(("a", "b", "index.json"), "old"), dict.fromkeys(("b", "c", "index.json"), "new")
    assert found == (old if fails else new)


@pytest.mark.parametrize(
    ("content", "needed"),
    [(None, []), ("{", []), ("[]", []), ("{}", ["width"]), ('{"width": "wide"}', ["width"])],
    ids=["missing", "no JSON", "a list", "a field is missing", "wrong type"],
)
def test_json_that_cannot_be_read(tmp_path: Path, content, needed) -> None:
    path = tmp_path / "size.json"
    write_json(path, Size(width=3))
    assert read_json(path, Size, "way out") == Size(width=3)
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError) as error:
        read_json(path, Size, "measure again")
    for part in (str(path), "measure again", *needed):
        assert part in str(error.value)


def test_json_that_was_changed(tmp_path: Path) -> None:
    """By one digit; not by another layout, nor without its digest."""
    path = tmp_path / "size.json"
    write_json(path, Size(width=3))
    content = json.loads(path.read_text())
    for same in (json.dumps(content), json.dumps(dict(reversed(content.items())), indent=4), '{"width": 3}'):
        path.write_text(same)
        assert read_json(path, Size, "way out") == Size(width=3)
    path.write_text(json.dumps(content | {"width": 2}))
    with pytest.raises(UserError) as error:
        read_json(path, Size, "measure again")
    for part in (str(path), "measure again", SEAL):
        assert part in str(error.value)


def test_a_lock_excludes_other_processes_until_its_process_ends(tmp_path: Path) -> None:
    lock = tmp_path / "flow" / ".lock"
    script = (
        "import sys; from pathlib import Path; from pipelines.runtime.files import locked\n"
        f"with locked(Path({str(lock)!r}), 'busy'):\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, cwd=Path(__file__).parents[3])
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"held by {holder.pid}$"), locked(lock, "held by {pid}"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with locked(lock, "busy"), pytest.raises(UserError, match=f"^{os.getpid()}$"), locked(lock, "{pid}"):
        pass


def rewrite_tensors(path: Path) -> None:
    with replacing(path) as temporary:
        save_file({"a": torch.zeros(1)}, temporary)


@pytest.mark.parametrize("replace", [lambda path: write(path, "new"), rewrite, rewrite_tensors])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, replace) -> None:
    """Whatever a library gives to its files, and whatever an older file of that name had."""
    path = tmp_path / "made" / "model.safetensors"
    before = os.umask(0o027)
    try:
        for _ in range(2):
            replace(path)
            assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)] == [0o640, 0o750]
            path.chmod(0o600)
    finally:
        os.umask(before)


def test_backups_have_free_names(tmp_path: Path) -> None:
    """However soon one asks after another."""
    with ThreadPoolExecutor(4) as pool:
        names = {path.name for path in pool.map(backup_folder, [tmp_path / "flow"] * 8)}
    assert len(names) == 8
    assert all(name.startswith("flow.") for name in names)
    (tmp_path / "flow" / "checkpoints").mkdir(parents=True)
    (tmp_path / "flow").rename(backup_folder(tmp_path / "flow"))


def test_digest_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    sizes = {12: "12 bytes", 1500: "1.5 kB", 5_700_000: "5.7 MB", 30_100_000_000: "30.1 GB"}
    assert {size: size_text(size) for size in sizes} == sizes
