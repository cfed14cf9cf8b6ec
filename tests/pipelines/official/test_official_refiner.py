"""Official refiners: recorded outputs, sizes off the shapes, and what is refused with which words."""

import argparse
import os
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.official import OfficialFormatError, load_refiner
from stage1_autoencoder.config import RefinerModelConfig
from stage1_autoencoder.rcan import RCAN

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECORDED = FIXTURES / "rcan_s3_b3_c16_r4.pth"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    arrays = np.load(FIXTURES / "rcan_s3_b3_c16_r4.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def save(path: Path, *, prefix: str = "module.", change=None, args: Any = None, **sizes) -> RCAN:
    """Write a small refiner the way the official code does; `change` edits its state dict first."""
    torch.manual_seed(0)
    sizes = {"groups": 2, "blocks": 1, "features": 8, "reduction": 4} | sizes
    refiner = RCAN(RefinerModelConfig(**sizes)).eval()
    state = {f"{prefix}{name}": tensor for name, tensor in refiner.state_dict().items()}
    if change is not None:
        change(state)
    content = {"refiner": state, "epoch": 3, "args": argparse.Namespace(l1=False) if args is None else args}
    torch.save(content, path)
    return refiner


def test_the_recorded_refiner_gives_the_recorded_output(recorded):
    refiner = load_refiner(RECORDED)
    assert refiner.config == RefinerModelConfig(groups=3, blocks=3, features=16, reduction=4)
    assert not any(module.training for module in refiner.modules())
    assert not any(parameter.is_meta for parameter in refiner.parameters())
    previous, decoded = recorded["net_input"].split(3, dim=1)
    with torch.no_grad():
        assert (refiner(previous, decoded) - recorded["net_output"]).abs().max() < 5e-6
        assert (refiner(decoded, previous) - recorded["net_output"]).abs().max() > 0.1


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tanh": True},
        {"groups": 1, "blocks": 3},
        {"groups": 11},  # as text, 10 comes before 2
        {"features": 12, "reduction": 5},
        {"reduction": 8},
    ],
)
def test_sizes_are_read_off_the_shapes(tmp_path, prefix, sizes):
    written, read = save(tmp_path / "a.pth", prefix=prefix, **sizes), load_refiner(tmp_path / "a.pth")
    assert read.config.tanh == sizes.get("tanh", False)
    assert [(n, t.shape) for n, t in read.state_dict().items()] == [
        (n, t.shape) for n, t in written.state_dict().items()
    ]
    frames = torch.rand(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(read(*frames), written(*frames))


def test_half_precision_weights_become_fp32(tmp_path):
    save(tmp_path / "a.pth", change=lambda state: state.update({name: t.half() for name, t in state.items()}))
    assert {parameter.dtype for parameter in load_refiner(tmp_path / "a.pth").parameters()} == {torch.float32}


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["beside", "in the Namespace", "in a legacy file"])
def test_runs_no_pickled_code(tmp_path, where):
    canary, path = Canary(tmp_path / "canary"), tmp_path / "evil.pth"
    content = {"refiner": {}, "args": argparse.Namespace()}
    if where == "in the Namespace":
        content["args"].callback = canary
    else:
        content["callback"] = canary
    torch.save(content, path, _use_new_zipfile_serialization=where != "in a legacy file")
    message = r"evil.pth holds a pickled \w+.mkdir, .*refused. If you trust .*torch.save\(\{'refiner': checkpoint"
    with pytest.raises(OfficialFormatError, match=message):
        load_refiner(path)
    assert not canary.path.exists()


def test_refuses_a_namespace_with_other_objects(tmp_path):
    save(tmp_path / "a.pth", args=argparse.Namespace(data_path=pathlib.PurePosixPath("videos")))
    with pytest.raises(
        OfficialFormatError, match=r"a.pth holds a pickled pathlib[.\w]*PurePosixPath.*: refused"
    ) as told:
        load_refiner(tmp_path / "a.pth")
    assert "state_dict" not in str(told.value)
    torch.serialization.clear_safe_globals()
    save(tmp_path / "b.pth", args=argparse.Namespace(inner=argparse.Namespace(x=[1, None, "a"])))
    load_refiner(tmp_path / "b.pth")
    assert torch.serialization.get_safe_globals() == []  # allowed for one call only


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_refuses_a_truncated_file(tmp_path, part):
    content = RECORDED.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(part * len(content))])
    with pytest.raises(OfficialFormatError, match=r"cut.pth is truncated or no torch.save file.*: download it again"):
        load_refiner(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError):
        load_refiner(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "holds no 'refiner', but model: pass"),
        ([1], "holds no 'refiner', but list"),
        ({"refiner": {"a": 1}}, "'refiner' is not a dictionary of tensors"),
        ({"refiner": [torch.ones(1)]}, "'refiner' is not a dictionary of tensors"),
        ({"refiner": {}}, "missing: head.weight"),
    ],
)
def test_refuses_other_content(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(OfficialFormatError, match=f"other.pth.*{message}"):
        load_refiner(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("module.tail.bias"), "missing: tail.bias"),
        (lambda state: state.pop("module.body.1.body.0.body.2.weight"), "missing: body.1.body.0.body.2.weight"),
        (lambda state: state.update({"module.extra": torch.ones(1)}), "unexpected: extra"),
        (lambda state: state.update({"module.body.99999999.weight": torch.ones(1)}), "missing: body.2.body.0"),
        (
            lambda state: state.update({"module.tail.bias": torch.ones(4)}),
            r"of another shape: tail.bias \[4\] in place of \[3\]",
        ),
        (lambda state: state.update({"module.head.weight": torch.ones(8)}), r"head.weight has shape \[8\]"),
        (lambda state: state.update({"module.head.weight": torch.ones(8, 3, 3, 3)}), "of another shape: head.weight"),
        (lambda state: state.update({"module.head.weight": torch.ones(1, 6, 3, 3)}), "features"),
    ],
)
def test_refuses_a_state_that_is_not_the_networks(tmp_path, change, message):
    save(tmp_path / "a.pth", change=change)
    with pytest.raises(OfficialFormatError, match=f"a.pth[^\n]* does not fit[^$]*{message}|a.pth: {message}"):
        load_refiner(tmp_path / "a.pth")
