"""The dask graph of encoding, one task per chunk: run by threads of this process, or by a dask.distributed cluster."""

import contextlib
import functools
import getpass
import hashlib
import itertools
import logging
import pickle
import socket
import tempfile
import textwrap
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import dask.threaded
import numpy as np
import torch

import latent_cache
import pipelines
import stage1_autoencoder
from latent_cache import ChunkPlan, ChunkWriter, StoreError, StoreWriter
from latent_cache.writing.chunk_writer import session_path
from latent_cache.writing.markers import ChunkMarker
from pipelines.encoding.chunk_encoder import (
    BrokenVideosError,
    ChunkEncoder,
    EncodeJob,
    EncodingStopped,
    UnreadableVideosError,
)
from pipelines.errors import UserError
from pipelines.loading import load_trained_autoencoder, weights_digest
from pipelines.runtime.context import resolve_device
from pipelines.runtime.files import locked
from pipelines.runtime.progress import say
from pipelines.runtime.run_folder import software_versions
from stage1_autoencoder.videos import VideoError
from stage1_autoencoder.videos.source import DivisibleSource, VideoSource

Task = tuple[str, ChunkPlan]  # (split, chunk)
CONNECT_SECONDS = 10
# A dask server begins with the length of a greeting, which is some hundred bytes.
LONGEST_GREETING = 1 << 20
# Errors of tasks that commands report as what they are.
EXPECTED_ERRORS = (
    BrokenVideosError, UnreadableVideosError, EncodingStopped, UserError, StoreError, VideoError, OSError,
)  # fmt: skip
LONGEST_ERROR = 500  # characters of an unexpected one


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
    encoder: ChunkEncoder,
    writer: StoreWriter,
    tasks: Sequence[Task],
    on_frames: Callable[[int], object],
    on_unreadable: Callable[[dict[str, str]], object],
) -> None:
    """Run the graph with threads of this process.

    Args:
        on_frames: called with the number of frames just encoded.
        on_unreadable: called with the videos that kept a chunk from being encoded (id -> reason). The others go on.
    Raises:
        As `ChunkEncoder.encode`, but for unreadable videos.
    """
    encoder.on_frames = on_frames

    def encode(split: str, chunk: ChunkPlan) -> None:
        try:
            writer.accept(split, chunk, encoder.encode(writer.chunk_writer, split, chunk))
        except UnreadableVideosError as error:
            on_unreadable(error.reasons)

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

    log = logging.getLogger("distributed.client")
    level = log.level
    log.setLevel(logging.CRITICAL)  # with a traceback what our errors say in a line
    try:
        _check_that_dask_answers(address)
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"--scheduler {address}: no dask scheduler answers there ({error})") from error
    try:
        with client:
            yield client
    finally:
        log.setLevel(level)


def _check_that_dask_answers(address: str) -> None:
    """Dask's client waits for a name that does not exist, and takes what any server says for the length of a message.

    Raises:
        OSError, ValueError, OverflowError: no address; nobody answers within `CONNECT_SECONDS`; somebody else does.
    """
    from distributed.comm.addressing import get_address_host_port, parse_address

    protocol, _ = parse_address(address)
    if protocol not in ("tcp", "tls"):
        return
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            with socket.create_connection(get_address_host_port(address), timeout=CONNECT_SECONDS) as connection:
                greeting = connection.recv(8, socket.MSG_WAITALL) if protocol == "tcp" else b""
            break
        except ConnectionRefusedError:  # by a scheduler that is about to start
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    if int.from_bytes(greeting, "little") > LONGEST_GREETING:
        raise ValueError("another program listens there")


def run_on_cluster(
    client: Any,
    job: EncodeJob,
    stop_asked: object,
    writer: StoreWriter,
    tasks: Sequence[Task],
    on_frames: Callable[[int], object],
    on_unreadable: Callable[[dict[str, str]], object],
) -> None:
    """Run the graph on a dask.distributed cluster whose workers see the same paths as this machine.

    Args:
        client: from `connect`.
        stop_asked: checked several times a second.
        on_frames, on_unreadable: as of `run_here`.
    Raises:
        UserError: workers see other files, have other libraries, or run another version of this program.
        ConnectionError: the scheduler is lost, workers die over one chunk, or a task ends in an unexpected error.
        EncodingStopped: `stop_asked` became true.
        As `encode_chunk`, but for unreadable videos.
    """
    from distributed.client import CancelledError  # nobody cancels our tasks: they end so when the scheduler is lost
    from distributed.scheduler import KilledWorker

    address, session = client.scheduler.address, writer.chunk_writer.session
    _wait_for_workers(client, address, stop_asked)
    check_workers(client, writer.path, job.splits)
    job_key = f"encode-job-{session}"  # in the graph as a node of its own, so that it is sent only once
    graph, keys = _build_graph((answer_task, job_key, writer.chunk_writer), tasks, session)
    pending = dict(enumerate(client.get({job_key: job} | graph, keys, sync=False)))
    try:
        while pending:
            for number in [number for number, future in pending.items() if future.done()]:
                split, chunk = tasks[number]
                try:
                    answer = pending.pop(number).result()
                    if isinstance(answer, Failure):
                        raise answer.error(f"--scheduler {address}: chunk {chunk.index} of {split}")
                    writer.accept(split, chunk, answer)
                    on_frames(chunk.frames)
                except UnreadableVideosError as error:
                    on_unreadable(error.reasons)
            if stop_asked:
                raise EncodingStopped
            time.sleep(0.1)
    except KilledWorker as error:
        raise ConnectionError(f"--scheduler {address}: one chunk killed several workers: {error}") from error
    except (CancelledError, OSError) as error:
        if isinstance(error, CancelledError) or client.status != "running":
            raise ConnectionError(
                f"--scheduler {address}: the connection is lost; {writer.path} keeps its finished chunks: start the "
                "scheduler again, and the same command resumes"
            ) from error
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


class Introduction(NamedTuple):
    """What a worker, or this process, is.

    Attributes:
        versions: package -> version.
        code: fingerprint of the program.
        sees_store: whether it sees the store that is being written.
        unreadable: split -> why its first video cannot be read.
    """

    versions: dict[str, str]
    code: str
    sees_store: bool
    unreadable: dict[str, str]


def check_workers(client: Any, store: Path, splits: Mapping[str, VideoSource]) -> None:
    """Refuse workers that would not write the chunks that this process writes.

    Raises:
        UserError: a worker cannot import this program, has another version of it or of its libraries, or does not see
            the store or the videos.
    """
    firsts = {
        split: source.select(np.arange(1))
        for split, source in splits.items()
        if isinstance(source, DivisibleSource) and len(source.videos)
    }
    ours = introduce(store, firsts)
    try:
        answers = client.run(introduce, store, firsts)
    except ImportError as error:
        raise UserError(f"dask workers cannot import this program ({error}): install it where they run") from error
    except (AttributeError, TypeError) as error:
        raise UserError(f"dask workers run another version of this program ({error}): install the same one") from error
    for worker, theirs in answers.items():
        other = [
            f"{name} {version} here, {theirs.versions[name]} there"
            for name, version in ours.versions.items()
            if version != theirs.versions[name]
        ]
        if other:
            raise UserError(f"dask worker {worker} has other libraries: {', '.join(other)}: install the same versions")
        if theirs.code != ours.code:
            raise UserError(
                f"dask worker {worker} runs another version of this program (code {theirs.code[:12]}... there, "
                f"{ours.code[:12]}... here): install the same one"
            )
        if not theirs.sees_store:
            raise UserError(f"dask worker {worker} does not see {store}: workers need the same paths as this machine")
        for split, problem in theirs.unreadable.items():
            if split not in ours.unreadable:
                raise UserError(
                    f"dask worker {worker} cannot read the videos of {split} ({problem}): workers need the same paths "
                    "as this machine"
                )


def introduce(store: Path, firsts: Mapping[str, VideoSource]) -> Introduction:
    """What this process is.

    Args:
        firsts: of some splits a source of the first video.
    """
    unreadable = {}
    for split, source in firsts.items():
        try:
            next(source.iterate(0, 0, 1))
        except VideoError as error:
            unreadable[split] = str(error)
    return Introduction(software_versions(), code_fingerprint(), session_path(store).exists(), unreadable)


@functools.cache
def code_fingerprint() -> str:
    """sha256 (hexadecimal) of all sources that encode."""
    digest = hashlib.sha256()
    for package in (latent_cache, pipelines, stage1_autoencoder):
        folder = Path(package.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{package.__name__}/{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


# On a worker

_encoders: dict[ChunkWriter, ChunkEncoder] = {}  # of this process, by the encoding they belong to
_running: Counter[ChunkWriter] = Counter()
_encoders_lock = threading.RLock()


class Failure(NamedTuple):
    """How a task failed, in a form that can always be sent.

    Attributes:
        expected: an error that `run_on_cluster` may raise, as dask sends it; None for an unexpected one.
        text: type, message and place of an unexpected one.
    """

    expected: Exception | None
    text: str

    @classmethod
    def of(cls, error: Exception) -> Self:
        if isinstance(error, EXPECTED_ERRORS):
            with contextlib.suppress(Exception):
                # Only what this process made is loaded here: whether the client can load it.
                if type(pickle.loads(pickle.dumps(error))) is type(error):
                    return cls(error, "")
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = textwrap.shorten("".join(traceback.format_exception_only(error)), LONGEST_ERROR, placeholder="...")
        return cls(None, f"{words} (line {place.lineno} of {place.filename})")

    def error(self, task: str) -> Exception:
        """The error to raise; `task` begins the message of an unexpected one."""
        if self.expected is not None:
            return self.expected
        return ConnectionError(f"{task} failed on a worker, whose log has the traceback: {self.text}")


def answer_task(job: EncodeJob, writer: ChunkWriter, split: str, chunk: ChunkPlan) -> ChunkMarker | Failure:
    """`encode_chunk`, with errors as results. Dask's client waits for ever for an error that it cannot unpickle."""
    try:
        return encode_chunk(job, writer, split, chunk)
    except Exception as error:
        failure = Failure.of(error)
        if failure.expected is None:
            logging.getLogger("distributed.worker").exception("chunk %d of %s failed", chunk.index, split)
        return failure


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
    if job.code != code_fingerprint():  # a worker that came after the others had been checked
        raise UserError("a dask worker runs another version of this program: install the same one")
    autoencoder = load_trained_autoencoder(job.checkpoint, device)
    digest = weights_digest(autoencoder)
    if digest != job.digest:
        raise UserError(
            f"{job.checkpoint.path} holds autoencoder {digest[:12]}... here, expected {job.digest[:12]}...: "
            "workers must see the same run folder as the command"
        )
    return ChunkEncoder(job, autoencoder, device)
