"""The graph of encoding tasks, one a chunk: run by threads of this process, or by a dask cluster."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.threaded

from latent_cache import ChunkPlan
from latent_cache.writing.chunk_writer import session_path
from pipelines.encoding.chunk_encoder import (
    ChunkEncoder,
    EncodedChunk,
    EncodeJob,
    encode_chunk,
    install_encoder,
    remove_encoder,
)
from pipelines.errors import UserError
from pipelines.runtime.progress import say
from pipelines.runtime.runs import software_versions

Task = tuple[str, ChunkPlan]
CONNECT_SECONDS = 15


class StopAsked(Exception):
    """The user asked to stop while the graph ran. Chunks that are done are done."""


def build_graph(job: EncodeJob, tasks: list[Task]) -> tuple[dict[Any, Any], list[Any]]:
    """A dask graph and the keys of its results: each chunk is made by one task, and no task needs another's result."""
    # dask takes tasks that don't depend on each other by their keys, the last first: so they count down, and chunks
    # are made in their order, as people expect who look into a store that grows.
    keys = [
        f"encode-{job.writer.session}-{len(tasks) - number:08d}-{split}-{chunk.index}"
        for number, (split, chunk) in enumerate(tasks)
    ]
    job_key = f"encode-job-{job.writer.session}"
    graph: dict[Any, Any] = {job_key: job}
    graph |= {key: (encode_chunk, job_key, split, chunk) for key, (split, chunk) in zip(keys, tasks, strict=True)}
    return graph, keys


def run_here(encoder: ChunkEncoder, tasks: list[Task]) -> list[EncodedChunk]:
    """Run the graph by threads of this process.

    Raises:
        As `ChunkEncoder.encode`; EncodingStopped once the user has asked to stop.
    """
    graph, keys = build_graph(encoder.job, tasks)
    install_encoder(encoder)
    try:
        with ThreadPoolExecutor(encoder.tasks, thread_name_prefix="chunk") as pool:
            try:
                return list(dask.threaded.get(graph, keys, pool=pool))
            except BaseException:
                encoder.closing = True  # the pool waits for the other tasks
                raise
    finally:
        remove_encoder(encoder)


@contextlib.contextmanager
def connect(address: str) -> Iterator[Any]:
    """A client of the dask scheduler at an address, tcp://host:8786.

    Raises:
        UserError: no scheduler there.
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
    """Run the graph on a dask.distributed cluster, whose workers see this machine's paths.

    Args:
        client: from `connect`.
        on_done: called with each chunk as it is done.
        stop_asked: looked at several times a second.
    Raises:
        UserError: workers that see other files or have other libraries; workers that die; a lost connection.
        StopAsked: `stop_asked` became true.
        As `encode_chunk`.
    """
    from distributed.client import CancelledError  # that of a task; nobody but a lost scheduler cancels ours
    from distributed.scheduler import KilledWorker

    address = client.scheduler.address
    _wait_for_workers(client, address, stop_asked)
    _check_workers(client, job.writer.path)
    graph, keys = build_graph(job, tasks)
    waiting = client.get(graph, keys, sync=False)
    done: list[EncodedChunk] = []
    try:
        while waiting:
            for future in [future for future in waiting if future.done()]:
                waiting.remove(future)
                done.append(future.result())
                on_done(done[-1])
            if stop_asked:
                raise StopAsked
            time.sleep(0.1)
    except KilledWorker as error:
        raise UserError(f"--scheduler {address}: workers died again and again over one chunk: {error}") from error
    except (CancelledError, OSError) as error:
        if isinstance(error, CancelledError) or client.status != "running":
            raise UserError(f"--scheduler {address}: the connection was lost ({error})") from error
        raise
    finally:
        client.cancel(waiting)
    return done


def _wait_for_workers(client: Any, address: str, stop_asked: object) -> None:
    said = False
    while not client.scheduler_info(n_workers=-1)["workers"]:
        if not said:
            say(f"store: waiting for workers: start them by `dask worker {address}`")
            said = True
        if stop_asked:
            raise StopAsked
        time.sleep(0.2)


def _check_workers(client: Any, store: Path) -> None:
    """Refuse workers whose chunks would not be those that this process writes."""
    ours = software_versions()
    try:
        answers = client.run(_introduce, store)
    except ImportError as error:
        raise UserError(f"the dask workers cannot import this program ({error}): install it where they run") from error
    for worker, (versions, sees_store) in answers.items():
        other = [f"{name} {ours[name]} here, {versions[name]} there" for name in ours if ours[name] != versions[name]]
        if other:
            raise UserError(f"dask worker {worker} has other libraries: {', '.join(other)}: make them the same")
        if not sees_store:
            raise UserError(f"dask worker {worker} does not see {store}: workers need the same paths as this machine")


def _introduce(store: Path) -> tuple[dict[str, str], bool]:
    return software_versions(), session_path(store).exists()
