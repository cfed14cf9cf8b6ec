"""A trained vector field at work: rollouts in batches that fit, in the precision and by the means of the device."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.runtime.context import computing_in, sampling_precision
from pipelines.runtime.cuda_graph_step import CudaGraphStep
from pipelines.runtime.progress import warn
from stage1_autoencoder.rcan import RCAN
from stage2_flow.conditioning import SamplingDraws
from stage2_flow.config import SamplingConfig
from stage2_flow.rollout import Rollout
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import VectorField


@torch.inference_mode()
def refine_frames(refiner: RCAN, last_context: Tensor, decoded: Tensor) -> Tensor:
    """Refine the predicted frames of a batch of clips.

    The first frame's previous one is the real frame before the prediction, as it was given and not its
    reconstruction; from there on it is the refined frame before. Nothing is clamped on the way.

    Args:
        refiner: in eval mode, on the device of the frames.
        last_context: [b, 3, h, w] float in [-1, 1], the last real frame.
        decoded: [b, n, 3, h, w] float, the frames after it as the decoder gave them, not clamped.
    Returns:
        [b, n, 3, h, w] float32 in [-1, 1].
    """
    dtype = refiner.head.weight.dtype
    previous, refined = last_context.to(decoded.device, dtype), []
    for frame in decoded.to(dtype).unbind(1):
        previous = refiner(previous, frame)
        refined.append(previous.float().clamp(-1, 1))
    return torch.stack(refined, 1) if refined else decoded.float()


# Clips at once with batch_size: auto. More make a CPU slower (caches), and a GPU is busy with these.
MOST_CLIPS = {"cpu": 32, "cuda": 512}
# Of a GPU's free memory that a rollout may take.
MEMORY_SHARE = 0.6
# Activations of a block that are alive together, as multiples of its tokens: qkv, attention, feed-forward, skips.
LIVE_ACTIVATIONS = 24
# Evaluations of one call from which on compiling pays; it takes a minute.
EVALUATIONS_WORTH_COMPILING = 10_000


class FieldRollouts:
    """Rollouts of one field, whose weights stay what they are. What is made for one batch serves the next like it."""

    def __init__(self, field: nn.Module, device: torch.device) -> None:
        self.field, self.device = field, device
        self._fields: dict[str, nn.Module] = {}
        self._trunks: dict[str, Callable[..., Tensor]] = {}
        self._made: tuple[Any, Rollout] | None = None

    def generate(
        self,
        context: Tensor,
        num_frames: int,
        options: SamplingConfig,
        draws: SamplingDraws,
        on_frames: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Continue videos, a batch at a time.

        Args:
            context: [b, n, c, h, w] final latents on the device.
            num_frames: frames to predict.
            options: with all that `stage2_flow.rollout.generate_latents` is told, and how it is computed.
            draws: of all rows.
            on_frames: called with the number of frames predicted since the last call, over all rows.
        Returns:
            [b, n + num_frames, c, h, w] final latents.
        Raises:
            ValueError: shapes or draws that don't fit.
            UserError: not enough memory for `sampling.batch_size`, or for a single clip.
        """
        size = self._batch_size(context, num_frames, options)
        parts: list[Tensor] = []
        first = 0
        while first < len(context):
            rows = slice(first, min(first + size, len(context)))
            part = SamplingDraws(draws.noise[:, rows], draws.condition_indices[:, :, rows])
            try:
                parts.append(self._run(context[rows], num_frames, options, part, on_frames, len(context)))
            except torch.OutOfMemoryError:
                size = self._smaller(size, options)
                continue
            first = rows.stop
        return torch.cat(parts)

    def _run(
        self,
        context: Tensor,
        num_frames: int,
        options: SamplingConfig,
        draws: SamplingDraws,
        on_frames: Callable[[int], None] | None,
        clips: int,
    ) -> Tensor:
        plan = SamplingPlan.from_config(options)
        precision = sampling_precision(options, self.device)
        with computing_in(precision, self.device):
            rollout = self._rollout(plan, context, num_frames, precision, options)
            return rollout.run(
                context,
                draws,
                past_horizon=options.past_horizon,
                on_frame=None if on_frames is None else lambda _: on_frames(len(context)),
            )

    def _rollout(
        self, plan: SamplingPlan, context: Tensor, num_frames: int, precision: str, options: SamplingConfig
    ) -> Rollout:
        """Tensors, compiled trunk and recorded step for batches of this kind, made anew where the last were others."""
        recorded = self._records(options)
        compiled = self._compiles(options, plan.evaluations * num_frames)
        key = (plan, tuple(context.shape), num_frames, context.dtype, precision, recorded, compiled)
        if self._made is None or self._made[0] != key:
            self._made = None  # the former's memory is free before the next one's is taken
            field = self._field_in(precision)
            trunk = self._compiled_trunk(field, precision) if compiled else None
            shape = tuple(context.shape)
            record = _record if recorded else None
            made = Rollout(field, plan, shape, num_frames, context.dtype, self.device, trunk=trunk, record=record)
            self._made = (key, made)
        return self._made[1]

    def _field_in(self, precision: str) -> nn.Module:
        if precision != "bf16" or not isinstance(self.field, VectorField):
            return self.field
        if precision not in self._fields:
            self._fields[precision] = with_matrices_in(self.field, torch.bfloat16)
        return self._fields[precision]

    def _compiled_trunk(self, field: nn.Module, precision: str) -> Callable[..., Tensor]:
        if precision not in self._trunks:
            self._trunks[precision] = torch.compile(field.trunk, fullgraph=True, dynamic=False)
        return self._trunks[precision]

    def _compiles(self, options: SamplingConfig, evaluations: int) -> bool:
        if options.compile == "auto":
            wanted = self.device.type == "cuda" and evaluations >= EVALUATIONS_WORTH_COMPILING
        else:
            wanted = options.compile
        return wanted and isinstance(self.field, VectorField)

    def _records(self, options: SamplingConfig) -> bool:
        if not isinstance(self.field, VectorField):
            return False
        if options.cuda_graphs == "auto":
            return self.device.type == "cuda"
        if options.cuda_graphs and self.device.type != "cuda":
            raise UserError(f"sampling.cuda_graphs: true: the device is {self.device}; leave it at auto")
        return options.cuda_graphs

    def _batch_size(self, context: Tensor, num_frames: int, options: SamplingConfig) -> int:
        if options.batch_size != "auto":
            return options.batch_size
        most = MOST_CLIPS.get(self.device.type, MOST_CLIPS["cpu"])
        if self.device.type != "cuda" or not isinstance(self.field, VectorField):
            return most
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return max(1, min(most, int(MEMORY_SHARE * free / clip_bytes(self.field, context, num_frames))))

    def _smaller(self, size: int, options: SamplingConfig) -> int:
        """Half the clips at once; called where memory ran out.

        Raises:
            UserError: the user chose the number, or it is one already.
        """
        self._made = None
        torch.cuda.empty_cache()
        if options.batch_size != "auto":
            raise UserError(f"out of memory with sampling.batch_size {size}: lower it, or leave it at auto") from None
        if size == 1:
            raise UserError("out of memory predicting a single clip: take sampling.precision=bf16, or fewer frames")
        warn(f"sampling: {size} clips at once don't fit into memory; going on with {size // 2}")
        return size // 2


def with_matrices_in(field: VectorField, dtype: torch.dtype) -> VectorField:
    """A copy whose blocks and head hold their matrices in `dtype`, as autocast would make them anew at each call.

    Embeddings and norms keep their precision: so does what autocast computes with them.
    """
    copied = copy.deepcopy(field)
    for part in (copied.in_blocks, copied.mid_blocks, copied.out_blocks, copied.project_out):
        for module in part.modules():
            if not isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm2d):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
    return copied


def clip_bytes(field: VectorField, context: Tensor, num_frames: int) -> int:
    """What one clip of a batch takes at most, in fp32: its frames, and the activations of an evaluation."""
    _, given, channels, height, width = context.shape
    frames = 3 * (given + 1 + num_frames) * channels * height * width
    tokens = (height * width + 1) * field.config.width * (LIVE_ACTIVATIONS + field.config.depth)
    return 4 * (frames + tokens)


def _record(step: Callable[[], None]) -> Callable[[], None]:
    def without_result() -> tuple[Tensor, ...]:
        step()
        return ()

    recorded = CudaGraphStep(without_result)

    def replay() -> None:
        recorded()

    return replay
