"""The dask graph of encoding, one task per chunk: run by threads of this process, or by a dask.distributed cluster."""

import contextlib
import functools
import getpass
import itertools
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.threaded
import torch

from latent_cache import ChunkPlan, ChunkWriter, StoreWriter
from latent_cache.writing.chunk_writer import session_path
from latent_cache.writing.markers import ChunkMarker
from pipelines.encoding.chunk_encoder import ChunkEncoder, EncodeJob, EncodingStopped
from pipelines.errors import UserError
from pipelines.loading import load_trained_autoencoder, weights_digest
from pipelines.runtime.context import resolve_device
from pipelines.runtime.files import locked
from pipelines.runtime.progress import say
from pipelines.runtime.run_folder import software_versions

Task = tuple[str, ChunkPlan]  # (split, chunk)
CONNECT_SECONDS = 15


def _build_graph(call: tuple[Any, ...], tasks: Sequence[Task], session: str) -> tuple[dict[Any, Any], list[Any]]:
    """A dask graph and the keys of its results. No task needs the result of another one.

    Args:
        call: function of each task and its first arguments; split and chunk follow.
        session: of the encoding, to tell its tasks from those of others.
    """
    # dask starts independent tasks in descending order of their keys. So keys count down, and chunks are written in
    # order.
    keys = [
        f"encode-{session}-{len(tasks) - number:08d}-{split}-{chunk.index}"
        for number, (split, chunk) in enumerate(tasks)
    ]
    return {key: (*call, *task) for key, task in zip(keys, tasks, strict=True)}, keys


def run_here(
    encoder: ChunkEncoder, writer: StoreWriter, tasks: Sequence[Task], on_frames: Callable[[int], object]
) -> None:
    """Run the graph with threads of this process.

    Args:
        on_frames: called with the number of frames just encoded.
    Raises:
        As `ChunkEncoder.encode`.
    """
    encoder.on_frames = on_frames

    def encode(split: str, chunk: ChunkPlan) -> None:
        writer.accept(split, chunk, encoder.encode(writer.chunk_writer, split, chunk))

    graph, keys = _build_graph((encode,), tasks, writer.chunk_writer.session)
    with ThreadPoolExecutor(encoder.threads.chunks, thread_name_prefix="chunk") as pool:
        try:
            dask.threaded.get(graph, keys, pool=pool)
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
    client: Any,
    job: EncodeJob,
    stop_asked: object,
    writer: StoreWriter,
    tasks: Sequence[Task],
    on_frames: Callable[[int], object],
) -> None:
    """Run the graph on a dask.distributed cluster whose workers see the same paths as this machine.

    Args:
        client: from `connect`.
        stop_asked: checked several times a second.
        on_frames: called with the number of frames just encoded.
    Raises:
        UserError: workers see other files or have other libraries; workers die; the connection is lost.
        EncodingStopped: `stop_asked` became true.
        As `encode_chunk`.
    """
    from distributed.client import CancelledError  # nobody cancels our tasks: they end so when the scheduler is lost
    from distributed.scheduler import KilledWorker

    address, session = client.scheduler.address, writer.chunk_writer.session
    _wait_for_workers(client, address, stop_asked)
    check_workers(client, writer.path)
    job_key = f"encode-job-{session}"  # in the graph as a node of its own, so that it is sent only once
    graph, keys = _build_graph((encode_chunk, job_key, writer.chunk_writer), tasks, session)
    pending = dict(enumerate(client.get({job_key: job} | graph, keys, sync=False)))
    try:
        while pending:
            for number in [number for number, future in pending.items() if future.done()]:
                split, chunk = tasks[number]
                writer.accept(split, chunk, pending.pop(number).result())
                on_frames(chunk.frames)
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
        client.cancel(list(pending.values()))


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


# On a worker

_encoders: dict[ChunkWriter, ChunkEncoder] = {}  # of this process, by the encoding they belong to
_running: Counter[ChunkWriter] = Counter()
_encoders_lock = threading.RLock()


def encode_chunk(job: EncodeJob, writer: ChunkWriter, split: str, chunk: ChunkPlan) -> ChunkMarker:
    """Encode one chunk in a worker, with the worker's own `ChunkEncoder`. Safe to run twice.

    Raises:
        As `ChunkEncoder.encode`, and UserError when the worker sees another autoencoder than the job's.
    """
    with _encoders_lock:
        close_idle_encoders(keep=writer)
        if writer not in _encoders:
            _encoders[writer] = _make_encoder(job)
        encoder = _encoders[writer]
        _running[writer] += 1
    try:
        return encoder.encode(writer, split, chunk)
    finally:
        with _encoders_lock:
            _running[writer] -= 1


def close_idle_encoders(keep: ChunkWriter | None = None) -> None:
    """Close the encoders that `encode_chunk` made in this process, except that of `keep` and those in use."""
    with _encoders_lock:
        for writer in [writer for writer in _encoders if writer != keep and not _running[writer]]:
            _encoders.pop(writer).close()


@functools.cache
def _worker_device(asked: str) -> torch.device:
    """The device of this worker, the same for all its encodings."""
    return claim_device(asked, _held)


_held = contextlib.ExitStack()  # until the process ends


def claim_device(asked: str, held: contextlib.ExitStack) -> torch.device:
    """The device of a worker: of the GPUs that it sees, the first one with the fewest workers on this machine.

    GPUs are known by their UUID, so workers may see them in different orders (`CUDA_VISIBLE_DEVICES`, dask-cuda).

    Args:
        asked: auto, cpu, cuda or cuda:1; an index is not changed.
        held: keeps the claim until it is closed or the process ends.
    Raises:
        UserError: no such device on this machine.
    """
    device = resolve_device(asked)
    if device.type != "cuda" or device.index is not None:
        return device
    gpus = [torch.cuda.get_device_properties(index).uuid for index in range(torch.cuda.device_count())]
    folder = Path(tempfile.gettempdir(), f"river-workers-{getpass.getuser()}")
    for seat in itertools.count():
        for index, gpu in enumerate(gpus):
            with contextlib.suppress(UserError):  # another worker has this seat
                held.enter_context(locked(folder / f"{gpu}.{seat}", ""))
                return torch.device("cuda", index)


def _make_encoder(job: EncodeJob) -> ChunkEncoder:
    device = _worker_device(job.device)
    autoencoder = load_trained_autoencoder(job.checkpoint, device)
    digest = weights_digest(autoencoder)
    if digest != job.digest:
        raise UserError(
            f"{job.checkpoint.path} holds autoencoder {digest[:12]}... here, expected {job.digest[:12]}...: "
            "workers must see the same run folder as the command"
        )
    return ChunkEncoder(job, autoencoder, device)
