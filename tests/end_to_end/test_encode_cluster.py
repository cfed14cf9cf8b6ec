"""Encoding on a dask cluster of worker processes: the bytes of one process, whatever becomes of the workers."""

import contextlib
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cloudpickle
import dask
import pytest

import latent_cache
from latent_cache import ChunkWriter, StaleWriterError, StoreWriter
from pipelines.encoding import cluster as cluster_module
from pipelines.encoding.chunk_encoder import ChunkEncoder, EncodeJob, EncodingStopped
from pipelines.encoding.cluster import Introduction, check_workers, close_idle_encoders, encode_chunk, introduce
from pipelines.errors import UserError
from pipelines.runtime.run_folder import software_versions

CHUNKS = ("cache.chunk_frames=20",)  # of 24 x 12 frames: 15 chunks, and 3 each of val and test
ALL = 15 + 3 + 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes of one thread each, forked from a server that has imported torch."""
    from distributed import Client, LocalCluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pipelines.encoding.cluster", "distributed"])
    settings = {"distributed.worker.multiprocessing-method": "forkserver", "distributed.admin.log-length": 0}
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50) as two,
        Client(two, set_as_default=False) as client,
    ):
        client.wait_for_workers(2)
        yield SimpleNamespace(address=two.scheduler_address, client=client)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def place(trained, tmp_path: Path) -> Any:
    place = trained.copy(tmp_path / "place", "runs")
    return type(trained)(place.folder, CHUNKS)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory: pytest.TempPathFactory, story: ModuleType) -> dict[str, bytes]:
    """The store that one process makes."""
    place = trained.copy(tmp_path_factory.mktemp("one process") / "whole", "runs")
    place.with_sets(*CHUNKS).run("encode").ok()
    files = story.tree(place.store)
    assert sum("latents/c/" in name for name in files) == ALL
    return files


def watch(log: Path, seconds: float = 0.0) -> None:
    """On a worker: note each chunk that is written, and take some time over it."""
    original = getattr(ChunkWriter.write, "original", ChunkWriter.write)

    def write(*arguments: Any) -> Any:
        time.sleep(seconds)
        marker = original(*arguments)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {arguments[1]} {arguments[2].index}\n")
        return marker

    write.original = original
    ChunkWriter.write = write


@pytest.fixture
def watched(cluster, tmp_path: Path) -> Iterator[Callable[..., list[list[str]]]]:
    """Start watching; what is returned reads the log: process, split, chunk."""
    log = tmp_path / "log.txt"

    def start(**options: Any) -> Callable[[], list[list[str]]]:
        cluster.client.run(watch, log, **options)
        return lambda: [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    yield start
    cluster.client.run(watch, Path(os.devnull))


def test_two_workers_make_the_bytes_of_one_process(place, cluster, whole, watched, story: ModuleType) -> None:
    lines = watched(seconds=0.02)
    outcome = place.run("encode", "--scheduler", cluster.address).ok()
    assert story.tree(place.store) == whole
    workers = {process for process, *_ in lines()}
    assert len(workers) == 2
    assert str(os.getpid()) not in workers
    assert len(lines()) == ALL
    assert "frames/s" in outcome.out
    # Its videos are as they were: no worker is needed to see it.
    assert "store: done" in place.run("encode", "--scheduler", "tcp://127.0.0.1:1").ok().out


# Before a worker starts: "late" joins when one has died and the slow one has begun. "dying" is killed over its second
# chunk, and "slow" waits over its second one until "late" has written some.
PRELOAD = """
import os, pathlib, signal, time
from latent_cache import ChunkWriter

folder, name = pathlib.Path({folder!r}), {name!r}

def written(who):
    return len((folder / who).read_text().splitlines()) if (folder / who).exists() else 0

def dask_setup(worker):
    write = ChunkWriter.write

    def watched(*arguments):
        if name == "dying" and written(name) == 1:
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while name == "slow" and written(name) == 1 and not written("late"):
            time.sleep(0.1)
        marker = write(*arguments)
        with (folder / name).open("a") as file:
            file.write(f"{{arguments[1]}} {{arguments[2].index}}\\n")
        return marker

    ChunkWriter.write = watched
    while name == "late" and not ((folder / "died").exists() and written("slow")):
        time.sleep(0.1)
"""


@pytest.mark.long
def test_workers_that_die_lag_and_come_late(place, whole, tmp_path: Path, story: ModuleType) -> None:
    """A cluster as docs/cluster.md starts it, of four programs over TCP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "tcp://{}:{}".format(*free.getsockname())
    programs = [["scheduler", "--host", address, "--no-dashboard"]]
    for name in ("dying", "slow", "late"):
        preload = tmp_path / f"{name}.py"
        preload.write_text(PRELOAD.format(folder=str(tmp_path), name=name))
        programs.append(["worker", address, "--no-nanny", "--nthreads=1", "--no-dashboard", f"--preload={preload}"])
    environment = os.environ | {"PYTHONPATH": str(story.REPOSITORY)}
    with contextlib.ExitStack() as stack:
        for words in programs:
            started = subprocess.Popen(
                [sys.executable, "-m", "dask", *words], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
            )
            stack.callback(started.wait)
            stack.callback(started.kill)
        wait_until_it_listens(address)
        place.run("encode", "--scheduler", address).ok()
    assert (tmp_path / "died").exists()
    assert len((tmp_path / "dying").read_text().splitlines()) == 1
    assert (tmp_path / "late").read_text()
    assert story.tree(place.store) == whole


def wait_until_it_listens(address: str) -> None:
    host, port = address.removeprefix("tcp://").split(":")
    while True:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.1)


def test_a_signal_keeps_what_is_finished(place, cluster, whole, watched, story: ModuleType, monkeypatch) -> None:
    lines = watched(seconds=0.05)
    with monkeypatch.context() as patch:
        story.send_at(patch, StoreWriter, "accept", call=3)
        place.run("encode", "--scheduler", cluster.address).refused(143, str(place.store))
    assert not latent_cache.is_complete(place.store)
    time.sleep(0.3)  # the chunks that were in the making end, and must not come into the store any more
    done = {(file.parent.name, file.stem) for file in place.store.glob(".encoding/*/*.json")}
    assert 3 <= len(done) < ALL - 3
    first = len(lines())
    place.run("encode", "--scheduler", cluster.address).ok()
    assert story.tree(place.store) == whole
    again = {(split, chunk) for _, split, chunk in lines()[first:]}
    assert len(again) == ALL - len(done)
    assert not again & done


def test_a_signal_while_no_worker_is_there(place, story: ModuleType, monkeypatch) -> None:
    from distributed import Client, LocalCluster

    story.send_at(monkeypatch, Client, "scheduler_info", call=1)
    with LocalCluster(n_workers=0, processes=False, dashboard_address=":0", silence_logs=50) as none:
        outcome = place.run("encode", "--scheduler", none.scheduler_address)
    outcome.refused(143, "stopped")
    assert f"dask worker {none.scheduler_address}" in outcome.out


def test_a_scheduler_that_goes_away(place, whole, story: ModuleType, monkeypatch) -> None:
    from distributed import Client, LocalCluster

    get = Client.get

    def closes(*arguments: Any, **options: Any) -> Any:
        threading.Timer(0.5, alone.close).start()
        return get(*arguments, **options)

    local = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
    with monkeypatch.context() as patch, LocalCluster(**local, silence_logs=50) as alone:
        patch.setattr(Client, "get", closes)
        patch.setattr(cluster_module, "CONNECT_SECONDS", 1)
        patch.setattr(cluster_module, "encode_chunk", lambda *_: time.sleep(1))
        outcome = place.run("encode", "--scheduler", alone.scheduler_address)
    outcome.refused(1, "--scheduler", "the connection is lost", str(place.store))
    assert outcome.err.count("\n") == 1
    place.run("encode").ok()
    assert story.tree(place.store) == whole


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:1", "nonsense", "x://y:1", "tcp://no-such-host.invalid:8786", "tcp://127.0.0.1:{web}"]
)
def test_no_scheduler_there(place, whole, story: ModuleType, monkeypatch, tmp_path, address: str) -> None:
    refused_for = 0.3
    monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", refused_for if ":1" in address else 60)
    for file, content in whole.items():
        (place.store / file).parent.mkdir(parents=True, exist_ok=True)
        (place.store / file).write_bytes(content)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address = address.format(web=port)
        if str(port) in address:
            threading.Thread(target=answer_as_a_web_server, args=[server]).start()
        started = time.monotonic()
        place.run("encode", "--overwrite", "--scheduler", address).refused(2, f"--scheduler {address}")
        assert time.monotonic() - started < 15
    assert story.tree(place.store) == whole  # nothing is deleted before there are workers


def answer_as_a_web_server(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_a_broken_video_that_a_worker_meets(place, cluster, story: ModuleType) -> None:
    place = place.with_sets("dataset.source=videos", "dataset.splits={}", "cache.chunk_frames=10")
    story.write_videos(place.data / "train", ["a", "b", "c", "d"])
    (place.data / "train" / "b" / "frame9.png").write_bytes(b"no picture")
    place.run("train-autoencoder", "--restart")
    place.run("encode", "--scheduler", cluster.address).refused(3, "\n  b: frame9.png")
    found = {
        video for split in latent_cache.splits(place.store) for video in latent_cache.open(place.store, split).video_ids
    }
    assert found == {"a", "c", "d"}
    latent_cache.open(place.store).load()


class ForeignError(Exception):
    """Of a library: it takes other arguments than it keeps."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")


def recurse(number: int) -> int:
    return 1 + recurse(number + 1)


def fail(how: str) -> None:
    """On a worker: each task ends in an error."""

    def encode(*_: Any) -> None:
        if how == "recursion":
            recurse(0)
        raise ForeignError(7, "the library\nis tired")

    ChunkEncoder.original = getattr(ChunkEncoder, "original", ChunkEncoder.encode)
    ChunkEncoder.encode = encode if how else ChunkEncoder.original


@pytest.mark.parametrize(
    ("how", "needed"),
    [
        ("recursion", "RecursionError: maximum recursion depth exceeded"),
        ("foreign", "ForeignError: the library is tired (7)"),
    ],
)
def test_an_error_of_a_library_on_a_worker(place, cluster, whole, story: ModuleType, how: str, needed: str) -> None:
    """Dask's client cannot read some of them, and then waits for the task for ever."""
    cluster.client.run(fail, how)
    try:
        outcome = place.run("encode", "--scheduler", cluster.address)
    finally:
        cluster.client.run(fail, "")
    outcome.refused(1, f"--scheduler {cluster.address}: chunk ", Path(__file__).name, needed)
    assert outcome.err.count("\n") == 1
    place.run("encode").ok()
    assert story.tree(place.store) == whole


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"versions": software_versions() | {"torch": "0.1"}}, ["dask worker tcp://w:2", "torch", "0.1 there"]),
        ({"versions": software_versions() | {"numpy": "9"}}, ["dask worker tcp://w:2", "numpy", "9 there"]),
        ({"code": "0" * 64}, ["dask worker tcp://w:2", "another version", "000000000000..."]),
        ({"sees_store": False}, ["dask worker tcp://w:2 does not see toys.zarr"]),
        ({"unreadable": {"val": "a.mp4: no such file"}}, ["dask worker tcp://w:2", "val", "a.mp4: no such file"]),
        (ModuleNotFoundError("No module named 'pipelines'"), ["import", "'pipelines'"]),
        (AttributeError("module 'pipelines.encoding.cluster' has no attribute 'introduce'"), ["another version"]),
    ],
)
def test_workers_that_would_write_something_else_are_refused(change: Any, needed: list[str]) -> None:
    class FakeClient:
        def run(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
            if isinstance(change, Exception):
                raise change
            same: Introduction = introduce(*arguments)._replace(sees_store=True)
            return {"tcp://w:1": same, "tcp://w:2": same._replace(**change)}

    with pytest.raises(UserError) as raised:
        check_workers(FakeClient(), Path("toys.zarr"), {})
    for text in needed:
        assert text in str(raised.value)


class WorkerHere:
    """A client whose one worker is this process."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        return {"tcp://here:1": function(*arguments)}


def test_a_worker_sees_a_store_only_while_it_is_written(place, monkeypatch) -> None:
    def check() -> None:
        check_workers(WorkerHere(), place.store, {})

    finish, checked = StoreWriter.finish, []

    def checks(self: StoreWriter, *arguments: Any) -> None:
        check()
        checked.append(self.path)
        finish(self, *arguments)

    with pytest.raises(UserError, match="does not see"):
        check()
    monkeypatch.setattr(StoreWriter, "finish", checks)
    place.run("encode").ok()
    assert checked == [place.store]
    with pytest.raises(UserError, match="does not see"):
        check()


# Tasks as workers run them, in this process


@pytest.fixture
def jobs(place, monkeypatch) -> Callable[..., Any]:
    """Calls a function with the job and the tasks that workers would get; the encoding is open until it returns."""

    def with_jobs(use: Callable[[EncodeJob, list[Any]], Any], at: Any = place) -> Any:
        answers = []

        def run_here(encoder: Any, writer: StoreWriter, tasks: list[Any], *_: Any) -> None:
            encoder.close()
            answers.append(use(encoder.job, [(writer.chunk_writer, *task) for task in tasks]))
            raise EncodingStopped

        with monkeypatch.context() as patch:
            patch.setattr("pipelines.encoding.store_encoder.run_here", run_here)
            at.run("encode")
        (answer,) = answers
        return answer

    yield with_jobs
    close_idle_encoders()


def chunk_files(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("c/*/**/*") if file.is_file()}


def test_tasks_that_run_twice_and_at_once(jobs, place, whole) -> None:
    def use(job: EncodeJob, tasks: list[Any]) -> dict[str, bytes]:
        with ThreadPoolExecutor(4) as pool:
            twice = [pool.submit(encode_chunk, job, *task) for task in tasks for _ in range(2)]
            encoded = [future.result() for future in twice]
        for one, other in zip(encoded[::2], encoded[1::2], strict=True):
            assert one == other
        before = chunk_files(place.store)
        for task in tasks:
            encode_chunk(job, *task)
        assert chunk_files(place.store) == before
        assert not list(place.store.rglob("*.partial"))
        return before

    found = jobs(use)
    of_chunks = re.compile(r"(train|val|test)/(latents|codes)/c/")
    assert found == {name: content for name, content in whole.items() if of_chunks.match(name)}


def test_a_late_task_writes_nothing(jobs, place, whole, story: ModuleType) -> None:
    late = jobs(lambda job, tasks: (job, tasks))
    before = story.tree(place.store)
    with pytest.raises(StaleWriterError, match=re.escape(str(place.store))):
        encode_chunk(late[0], *late[1][0])
    assert story.tree(place.store) == before

    def during_another(job: EncodeJob, tasks: list[Any]) -> None:
        with pytest.raises(StaleWriterError, match=re.escape(str(place.store))):
            encode_chunk(late[0], *late[1][0])
        assert not chunk_files(place.store)
        encode_chunk(job, *tasks[0])
        assert len(chunk_files(place.store)) == 2  # latents and codes

    jobs(during_another)
    place.run("encode").ok()
    assert story.tree(place.store) == whole
    with pytest.raises(StaleWriterError, match=re.escape(str(place.store))):
        encode_chunk(late[0], *late[1][0])
    assert story.tree(place.store) == whole


def test_two_encodings_may_share_a_worker(jobs, place, trained, tmp_path: Path, whole) -> None:
    """Two commands at one cluster: a task of the one does not end a running task of the other."""
    other = type(place)(trained.copy(tmp_path / "other", "runs").folder, CHUNKS)

    def first(job: EncodeJob, tasks: list[Any]) -> None:
        def second(other_job: EncodeJob, other_tasks: list[Any]) -> None:
            work = [(job, *task) for task in tasks[:8]], [(other_job, *task) for task in other_tasks[:8]]
            with ThreadPoolExecutor(2) as pool:
                for done in [pool.submit(lambda lot: [encode_chunk(*task) for task in lot], lot) for lot in work]:
                    done.result()

        jobs(second, other)

    jobs(first)
    for store in (place.store, other.store):
        files = chunk_files(store)
        assert len(files) == 2 * 8
        assert files.items() <= whole.items()


def test_a_worker_with_another_autoencoder_is_refused(jobs, place, trained, tmp_path: Path) -> None:
    def use(job: EncodeJob, tasks: list[Any]) -> None:
        with pytest.raises(UserError, match=rf"{place.runs}/autoencoder.* 000000000000\.\.\."):
            encode_chunk(replace(job, digest="0" * 64), *tasks[0])
        with pytest.raises(UserError, match="another version"):
            encode_chunk(replace(job, code="0" * 64), *tasks[0])
        with pytest.raises(UserError, match="--device cuda:77"):
            encode_chunk(replace(job, device="cuda:77"), *tasks[0])
        assert not chunk_files(place.store)

    jobs(use)
