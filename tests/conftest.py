"""What all tests share: one thread, no waiting for the disk, and networks and settings small enough to test with."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.runtime.progress import set_quiet

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--trials", type=int, help="of each kind of random fault (-m faults); default: see test_random_faults"
    )
    parser.addoption("--videos", type=int, default=20_000, help="in the large folder of test_many_videos (-m long)")
    parser.addoption("--seed", type=int, default=0, help="of the first random fault of each kind")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """These tensors are tiny: threads would only wait for each other, the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # predictions measure nothing
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Only a loss of power would show the difference, which no test simulates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes of all files and folders that were flushed to the disk."""
    inodes: set[int] = set()
    monkeypatch.setattr("os.fsync", lambda descriptor: inodes.add(os.fstat(descriptor).st_ino))
    return inodes


@pytest.fixture(autouse=True)
def _loud() -> None:
    """Whatever a test before ran with --quiet in this process."""
    set_quiet(False)


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parents[1]


@pytest.fixture
def first_store(tmp_path: Path) -> Path:
    """A store as the first writer of format_version 1 left it: `shapes` in 32x32, three videos in train, one in each
    other split; its autoencoder is lost."""
    shutil.unpack_archive(FIXTURES / "store_format_1.zip", tmp_path / "first")
    return tmp_path / "first" / "tiny.zarr"


@pytest.fixture
def fixtures() -> Path:
    """Recorded outputs of the official code."""
    return FIXTURES
