"""The dask graph of encoding, one task per chunk: run by threads of this process, or by a dask.distributed cluster."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.threaded

from latent_cache import ChunkPlan
from latent_cache.writing.chunk_writer import session_path
from pipelines.encoding.chunk_encoder import ChunkEncoder, EncodedChunk, EncodeJob, EncodingStopped, encode_chunk
from pipelines.errors import UserError
from pipelines.runtime.progress import say
from pipelines.runtime.runs import software_versions

Task = tuple[str, ChunkPlan]
CONNECT_SECONDS = 15


def _build_graph(job: EncodeJob, call: tuple[Any, ...], tasks: list[Task]) -> tuple[dict[Any, Any], list[Any]]:
    """A dask graph and the keys of its results. No task needs the result of another one.

    Args:
        call: function of each task and its first arguments; split and chunk follow.
    """
    # dask starts independent tasks in descending order of their keys. So keys count down, and chunks are written in
    # their order, as people expect who look into a store that grows.
    keys = [
        f"encode-{job.writer.session}-{len(tasks) - number:08d}-{split}-{chunk.index}"
        for number, (split, chunk) in enumerate(tasks)
    ]
    return {key: (*call, split, chunk) for key, (split, chunk) in zip(keys, tasks, strict=True)}, keys


def run_here(encoder: ChunkEncoder, tasks: list[Task]) -> list[EncodedChunk]:
    """Run the graph with threads of this process.

    Raises:
        As `ChunkEncoder.encode`.
    """
    graph, keys = _build_graph(encoder.job, (encoder.encode,), tasks)
    with ThreadPoolExecutor(encoder.tasks, thread_name_prefix="chunk") as pool:
        try:
            return list(dask.threaded.get(graph, keys, pool=pool))
        except BaseException:
            encoder.closing = True  # stops the other tasks, which the pool waits for
            raise


@contextlib.contextmanager
def connect(address: str) -> Iterator[Any]:
    """A client of the dask scheduler at an address such as tcp://host:8786.

    Raises:
        UserError: no scheduler answers.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--scheduler {address}: no dask scheduler answers there ({error})") from error
    with client:
        yield client


def run_on_cluster(
    client: Any, job: EncodeJob, tasks: list[Task], on_done: Callable[[EncodedChunk], object], stop_asked: object
) -> list[EncodedChunk]:
    """Run the graph on a dask.distributed cluster whose workers see the same paths as this machine.

    Args:
        client: from `connect`.
        on_done: called with each chunk when it is done.
        stop_asked: checked several times a second.
    Raises:
        UserError: workers see other files or have other libraries; workers die; the connection is lost.
        EncodingStopped: `stop_asked` became true.
        As `encode_chunk`.
    """
    from distributed.client import CancelledError  # nobody cancels our tasks: they end so when the scheduler is lost
    from distributed.scheduler import KilledWorker

    address = client.scheduler.address
    _wait_for_workers(client, address, stop_asked)
    check_workers(client, job.writer.path)
    job_key = f"encode-job-{job.writer.session}"  # in the graph as a node of its own, so that it is sent only once
    graph, keys = _build_graph(job, (encode_chunk, job_key), tasks)
    pending = client.get({job_key: job} | graph, keys, sync=False)
    done: list[EncodedChunk] = []
    try:
        while pending:
            for future in [future for future in pending if future.done()]:
                pending.remove(future)
                done.append(future.result())
                on_done(done[-1])
            if stop_asked:
                raise EncodingStopped
            time.sleep(0.1)
    except KilledWorker as error:
        raise UserError(f"--scheduler {address}: one chunk killed several workers: {error}") from error
    except (CancelledError, OSError) as error:
        if isinstance(error, CancelledError) or client.status != "running":
            raise UserError(f"--scheduler {address}: lost the connection ({error})") from error
        raise
    finally:
        client.cancel(pending)
    return done


def _wait_for_workers(client: Any, address: str, stop_asked: object) -> None:
    said = False
    while not client.scheduler_info(n_workers=-1)["workers"]:
        if not said:
            say(f"store: waiting for workers: start them with `dask worker {address}`")
            said = True
        if stop_asked:
            raise EncodingStopped
        time.sleep(0.2)


def check_workers(client: Any, store: Path) -> None:
    """Refuse workers that would not write the chunks that this process writes.

    Raises:
        UserError: a worker cannot import this program, has other library versions, or does not see the store.
    """
    ours = software_versions()
    try:
        answers = client.run(_introduce, store)
    except ImportError as error:
        raise UserError(f"dask workers cannot import this program ({error}): install it where they run") from error
    for worker, (versions, sees_store) in answers.items():
        other = [f"{name} {ours[name]} here, {versions[name]} there" for name in ours if ours[name] != versions[name]]
        if other:
            raise UserError(f"dask worker {worker} has other libraries: {', '.join(other)}: install the same versions")
        if not sees_store:
            raise UserError(f"dask worker {worker} does not see {store}: workers need the same paths as this machine")


def _introduce(store: Path) -> tuple[dict[str, str], bool]:
    return software_versions(), session_path(store).exists()
