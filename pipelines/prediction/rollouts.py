"""Trained networks at work: rollouts of a vector field in batches that fit into memory, and the refiner after them."""

import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.runtime.context import computing_in, sampling_precision
from pipelines.runtime.progress import warn
from stage1_autoencoder.packing import can_pack
from stage1_autoencoder.rcan import RCAN
from stage2_flow.conditioning import FrameDraws, SamplingDraws, known_frames, past_window
from stage2_flow.config import SamplingConfig
from stage2_flow.packed_trunk import PackedTrunk
from stage2_flow.rollout import Rollout, Trunk, evaluation_mode
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField

# Clips per batch with batch_size: auto. More are slower on a CPU (caches), and not faster on a GPU.
MAX_CLIPS = {"cpu": 32, "cuda": 512}
# Share of a GPU's free memory that a rollout may take.
MEMORY_SHARE = 0.6
# Activations of a block that are alive together, as multiples of its tokens: qkv, attention, feed-forward, skips.
LIVE_ACTIVATIONS = 24
# Frames, or solver steps, that run eagerly before one is recorded: they compile, tune kernels and allocate workspaces.
WARM_UP_STEPS = 2
# Evaluations per call from which compilation, which takes a minute, pays.
MIN_EVALUATIONS_TO_COMPILE = 10_000


class FieldRollouts:
    """Rollouts of one vector field, whose weights must not change.

    Packed or compiled weights are used again for all later batches, tensors and the CUDA graph of a batch for those of
    the same shape.
    """

    def __init__(self, field: nn.Module, device: torch.device, threads: int | None = None) -> None:
        self.field, self.device, self.threads = field, device, threads
        self._networks: dict[tuple[str, bool], tuple[nn.Module, Trunk | None]] = {}
        self._prepared: tuple[Any, Rollout] | None = None

    def generate(
        self,
        context: Tensor,
        num_frames: int,
        options: SamplingConfig,
        draws: SamplingDraws,
        on_frames: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Continue videos, one batch at a time.

        Args:
            context: [b, n, c, h, w] final latents on the device.
            num_frames: frames to predict.
            options: how to sample, and how to compute it.
            draws: of all rows.
            on_frames: called with the number of frames that were predicted since the last call, over all rows.
        Returns:
            [b, n + num_frames, c, h, w] final latents.
        Raises:
            ValueError: shapes or draws that do not fit.
            UserError: not enough memory for `sampling.batch_size`, or for a single clip.
        """
        size, precision = options.batch_size, sampling_precision(options, self.device)
        if size == "auto":
            size = clips_that_fit(self.field, context, num_frames, self.device)
        parts: list[Tensor] = []
        farthest = past_window(known_frames(context.shape[1]) + num_frames - 1, options.past_horizon).count
        first = 0
        while first < len(context):
            rows = slice(first, min(first + size, len(context)))
            clips = rows.stop - rows.start
            part = SamplingDraws(draws.noise[:, rows], draws.condition_indices[:, :, rows])
            on_frame = None if on_frames is None else lambda _, clips=clips: on_frames(clips)
            try:
                with computing_in(precision, self.device, self.threads):
                    rollout = self._prepare(context[rows, 0], farthest, options, precision, num_frames)
                    frames = rollout.run(
                        context[rows], num_frames, part, past_horizon=options.past_horizon, on_frame=on_frame
                    )
                parts.append(frames)
            except torch.OutOfMemoryError:
                size = self._smaller(clips, options)
                continue
            first = rows.stop
        return torch.cat(parts)

    def stream(self, context: Tensor, options: SamplingConfig, draws: Iterable[FrameDraws]) -> Iterator[Tensor]:
        """Continue videos frame by frame, all at once, as long as there are draws.

        Other rollouts may go on meanwhile.

        Args:
            context: [b, n, c, h, w] final latents on the device.
            options: with a `past_horizon`, which bounds the memory. `batch_size` is not used.
            draws: of all rows.
        Returns:
            Final latents [b, c, h, w] of one frame after the other.
        Raises:
            UserError: not enough memory.
        """
        assert options.past_horizon is not None
        precision = sampling_precision(options, self.device)
        try:
            with computing_in(precision, self.device, self.threads):
                rollout = self._prepare(context[:, 0], options.past_horizon - 1, options, precision, num_frames=0)
            self._prepared = None  # nobody else may use it from now on
            rollout.begin(context)
            with evaluation_mode(rollout.field):
                for draw in draws:
                    # Not while the caller has the frame. It may share the threads.
                    threads = self.threads and min(self.threads, torch.get_num_threads())
                    with computing_in(precision, self.device, threads):
                        frame = rollout.predict(draw.noise, draw.condition_indices)
                    yield frame
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory predicting {len(context)} rows at once: predict fewer videos or samples, or use "
                "sampling.precision=bf16"
            ) from None

    def _prepare(
        self, frame: Tensor, farthest: int, options: SamplingConfig, precision: str, num_frames: int
    ) -> Rollout:
        """The rollout of the last batch, if it was like this one, else a new one.

        Args:
            frame: [b, c, h, w], of the shape and dtype of all frames.
            farthest: largest distance between a condition and its reference.
            num_frames: frames to predict; 0: who knows.
        """
        plan, shape = SamplingPlan.from_config(options), tuple(frame.shape)
        records = uses_cuda_graphs(self.field, options, self.device)
        compiles = uses_compilation(self.field, options, self.device, plan.evaluations * num_frames)
        key = (plan, shape, farthest, frame.dtype, precision, records, compiles)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None  # frees its memory before the new one is allocated
            field, trunk = self._network(precision, compiles)
            record = partial(RecordedStep, device=self.device) if records else None
            rollout = Rollout(field, plan, shape, farthest, frame.dtype, self.device, trunk=trunk, record=record)
            self._prepared = (key, rollout)
        return self._prepared[1]

    def _network(self, precision: str, compiles: bool) -> tuple[nn.Module, Trunk | None]:
        """The field in a precision, and what replaces its trunk."""
        key, dtype = (precision, compiles), torch.bfloat16 if precision == "bf16" else torch.float32
        if key not in self._networks:
            field, trunk = self.field, None
            if not compiles and packs(field, self.device, dtype):
                trunk = PackedTrunk(field, dtype)
            elif precision == "bf16" and isinstance(field, VectorField):
                field = with_matrices_in(field, dtype)
            if compiles:
                # Shapes that vary become dynamic. Beyond torch's limit of versions of one function, which all
                # predictors of a process share, it runs uncompiled; with `fullgraph` that would be an error.
                trunk = torch.compile(field.trunk)
            self._networks[key] = field, trunk
        return self._networks[key]

    def _smaller(self, clips: int, options: SamplingConfig) -> int:
        """The next batch size, after an out-of-memory error with this many clips.

        Raises:
            UserError: the user chose the batch size, or there was one clip.
        """
        self._prepared = None
        torch.cuda.empty_cache()
        if options.batch_size != "auto":
            raise UserError(
                f"out of memory with sampling.batch_size {options.batch_size}: lower it, or use auto"
            ) from None
        if clips == 1:
            raise UserError("out of memory predicting a single clip: use sampling.precision=bf16, or fewer frames")
        warn(f"sampling: {clips} clips at once do not fit into memory; continuing with {clips // 2}")
        return clips // 2


def uses_compilation(field: nn.Module, options: SamplingConfig, device: torch.device, evaluations: int) -> bool:
    """Whether the trunk is compiled: as `sampling.compile` says; auto: on a GPU, for many evaluations."""
    if not isinstance(field, VectorField):
        return False
    if options.compile == "auto":
        return device.type == "cuda" and evaluations >= MIN_EVALUATIONS_TO_COMPILE
    return options.compile


def uses_cuda_graphs(field: nn.Module, options: SamplingConfig, device: torch.device) -> bool:
    """Whether a frame is recorded as a CUDA graph: as `sampling.cuda_graphs` says; auto: on a GPU.

    Raises:
        UserError: it is set, and the device is no GPU.
    """
    if not isinstance(field, VectorField):
        return False
    if options.cuda_graphs == "auto":
        return device.type == "cuda"
    if options.cuda_graphs and device.type != "cuda":
        raise UserError(f"sampling.cuda_graphs: true: the device is {device}; use auto")
    return options.cuda_graphs


def packs(field: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a field of float32 weights is computed in `dtype` by a `PackedTrunk`: on a CPU where oneDNN does it."""
    return (
        isinstance(field, VectorField)
        and device.type == "cpu"
        and field.project_out["0"].weight.dtype == torch.float32
        and can_pack(dtype)
    )


def clips_that_fit(field: nn.Module, context: Tensor, num_frames: int, device: torch.device) -> int:
    """Clips per batch by the free memory of a GPU, at most `MAX_CLIPS`; arguments as of `FieldRollouts.generate`."""
    most = MAX_CLIPS.get(device.type, MAX_CLIPS["cpu"])
    if device.type != "cuda" or not isinstance(field, VectorField):
        return most
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(most, int(MEMORY_SHARE * free / clip_bytes(field, context, num_frames))))


def clip_bytes(field: VectorField, context: Tensor, num_frames: int) -> int:
    """Upper bound of the memory of one clip in a batch, in fp32: its frames, and the activations of an evaluation."""
    _, given, channels, height, width = context.shape
    frames = 4 * (given + 1 + num_frames) * channels * height * width
    tokens = (height * width + 1) * field.config.width * (LIVE_ACTIVATIONS + field.config.depth)
    return 4 * (frames + tokens)


def with_matrices_in(field: VectorField, dtype: torch.dtype) -> VectorField:
    """A copy whose blocks and head have their matrices in `dtype`, which autocast would cast again in each call.

    Embeddings and norms keep their precision, as under autocast.
    """
    copied = copy.deepcopy(field)
    for part in (copied.in_blocks, copied.mid_blocks, copied.out_blocks, copied.project_out):
        for module in part.modules():
            if not isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm2d):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
    return copied


def overlapped(
    work: Callable[[Any], Tensor],
    items: Iterator[Any],
    device: torch.device,
    precision: str,
    threads: int | None = None,
    light: bool = False,
) -> Iterator[Tensor]:
    """The work on each item, in fp32, while the next item is computed.

    On a GPU it is done in another stream; on a CPU by another thread, and both have at most half of the process's
    threads. But there the work is done before the next item if the process has a single thread, if light work would
    cost the items threads that they use, or if items are computed in another precision, a setting of the whole process.

    Args:
        items: endless.
        precision: of what computes the items.
        threads: that each of both can use; None: those of the process.
        light: the work takes far less time than an item.
    """
    share = torch.get_num_threads() // 2
    threads = threads or torch.get_num_threads()
    if device.type != "cuda" and (share == 0 or precision != "fp32" or (light and threads > share)):
        for item in items:
            with computing_in("fp32", device, threads):
                result = work(item)
            yield result
        return
    with _beside(device) as begin:
        item = next(items)
        while True:
            with computing_in("fp32", device, max(1, min(threads, share))):
                finish = begin(work, item)
                item = next(items)
                result = finish()
            yield result


@contextmanager
def _beside(device: torch.device) -> Iterator[Callable[[Callable[[Any], Tensor], Any], Callable[[], Tensor]]]:
    """A function that begins work on an item beside what the caller does next, and returns what finishes it."""
    if device.type != "cuda":
        with ThreadPoolExecutor(1) as pool:
            yield lambda work, item: pool.submit(work, item).result
        return
    stream = torch.cuda.Stream(device)

    def begin(work: Callable[[Any], Tensor], item: Any) -> Callable[[], Tensor]:
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)  # for the item

        def finish() -> Tensor:  # queued after the next item, which is a single call if it is a graph
            with torch.cuda.stream(stream):
                result = work(item)
            current.wait_stream(stream)
            return result

        return finish

    yield begin


class RecordedStep:
    """A step of a rollout as a CUDA graph: a few calls run it, the next one captures it, and then it is replayed.

    For steps without gradients that read and write the same tensors at each call.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.step, self.device, self.warm_up = step, device, WARM_UP_STEPS
        self.stream = torch.cuda.Stream(device)  # the default one can't be captured
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the step.

        Raises:
            UserError: CUDA refuses to capture it.
        """
        if self.warm_up:
            self.warm_up -= 1
            self._run_eagerly()
            return
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _run_eagerly(self) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.step()
        current.wait_stream(self.stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as a loader's, may use the GPU meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"CUDA cannot record a frame as a graph ({reason}): use --set sampling.cuda_graphs=false"
            ) from error
        return graph


@torch.inference_mode()
def refine_frames(refiner: RCAN, last_context: Tensor, decoded: Tensor) -> Tensor:
    """Refine the predicted frames of a batch of clips.

    The previous frame of the first one is the real frame before the prediction, not its reconstruction; later it is the
    refined frame before. Nothing is clamped in between.

    Args:
        refiner: in eval mode, on the device of the frames.
        last_context: [b, 3, h, w] float in [-1, 1], the last real frame.
        decoded: [b, n, 3, h, w] float, the frames after it as the decoder returned them, not clamped; n >= 1.
    Returns:
        [b, n, 3, h, w] float32 in [-1, 1].
    """
    dtype = refiner.head.weight.dtype
    previous, refined = last_context.to(decoded.device, dtype), []
    for frame in decoded.to(dtype).unbind(1):
        previous = refiner(previous, frame)
        refined.append(previous.float().clamp(-1, 1))
    return torch.stack(refined, 1)
