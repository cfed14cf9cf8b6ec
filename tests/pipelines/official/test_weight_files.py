"""Official files: what is read, and what is refused with the file and the way out."""

import argparse
import gzip
import io
import os
import pathlib
import re
from pathlib import Path

import pytest
import torch

from pipelines.official import OfficialFormatError, load_pickle, read_official

FIXTURES = Path(__file__).parents[2] / "fixtures"
MAIN, TAMING = FIXTURES / "main_ln_ddp.pth.gz", FIXTURES / "vqgan_f8s_ch32.ckpt.gz"


@pytest.fixture(scope="module")
def main_content() -> dict:
    return torch.load(io.BytesIO(gzip.decompress(MAIN.read_bytes())), weights_only=True)


def test_the_main_model_holds_the_autoencoder_of_its_own_file():
    inside, apart = read_official(MAIN), read_official(TAMING)
    assert list(inside.autoencoder) == list(apart.autoencoder)
    assert all(torch.equal(inside.autoencoder[name], tensor) for name, tensor in apart.autoencoder.items())
    assert not any(name.startswith("loss.") for name in inside.autoencoder)
    assert "quant_conv.weight" in inside.autoencoder
    assert inside.iterations == 2
    assert not apart.vector_field


@pytest.mark.parametrize("legacy", [False, True])
def test_prefix_compression_and_old_formats_make_no_difference(tmp_path, main_content, legacy):
    bare = {name.removeprefix("module."): tensor for name, tensor in main_content["model"].items()}
    torch.save({"model": bare}, tmp_path / "single.pth", _use_new_zipfile_serialization=not legacy)
    expected, found = read_official(MAIN), read_official(tmp_path / "single.pth")
    assert found.iterations is None
    for part in ("autoencoder", "vector_field"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"weights": {}}, "but weights"),
        ([1, 2], "but list"),
        ({"model": {"a": 1}}, "'model'"),
        ({"state_dict": [torch.ones(1)]}, "'state_dict'"),
        ({"refiner": {"a": 1}}, "'refiner'"),
        ({"model": {"ae.a": torch.ones(1), "other.weight": torch.ones(1)}}, "other.weight"),
    ],
)
def test_other_content_is_refused(tmp_path, content, named):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(OfficialFormatError, match=f"{re.escape(str(path))}.*{named}"):
        read_official(path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_file_is_refused(official, part, packed):
    content = official.model().read_bytes()
    content = gzip.compress(content, compresslevel=1) if packed else content
    path = official.path / ("cut.pth.gz" if packed else "cut.pth")
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(OfficialFormatError, match=rf"{re.escape(str(path))} .*truncated.*download it again"):
        read_official(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\xef\xbb\xbf\n<!DOCTYPE html>404: file not found", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull`"),
        (bytes(range(256)), "download it again"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, named):
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(OfficialFormatError, match=f"page.pth .*{named}"):
        read_official(tmp_path / "page.pth")
    with pytest.raises(FileNotFoundError):
        read_official(tmp_path / "absent.pth")


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("holder", ["state_dict", "model", "refiner"])
@pytest.mark.parametrize("where", ["beside", "in the Namespace", "in a legacy file"])
def test_no_pickled_code_is_run(tmp_path, holder, where):
    canary, path = Canary(tmp_path / "canary"), tmp_path / "evil.ckpt"
    content = {holder: {}, "args": argparse.Namespace()}
    if where == "in the Namespace":
        content["args"].callback = canary
    else:
        content["callback"] = canary
    torch.save(content, path, _use_new_zipfile_serialization=where != "in a legacy file")
    with pytest.raises(OfficialFormatError, match=r"evil.ckpt holds a pickled \w+.mkdir.*refused.*torch.save"):
        read_official(path)
    assert not canary.path.exists()


def test_allowed_classes_are_allowed_for_one_call_only(tmp_path):
    path = tmp_path / "refiner.pth"
    torch.save({"args": argparse.Namespace(inner=argparse.Namespace(x=[1, None, "a"]))}, path)
    for _ in range(2):
        with pytest.raises(OfficialFormatError, match=r"pickled argparse.Namespace"):
            load_pickle(path)
        assert load_pickle(path, [argparse.Namespace])["args"].inner.x == [1, None, "a"]
    torch.save({"refiner": {}, "args": argparse.Namespace(data_path=pathlib.PurePosixPath("videos"))}, path)
    with pytest.raises(OfficialFormatError, match=r"pickled pathlib[.\w]*PurePosixPath"):
        read_official(path)
