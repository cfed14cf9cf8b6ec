"""What `gpu-check` compares: the same draws, trainings, predictions, codes and metrics on the device and on the CPU.

Every comparison has a bound that follows from the arithmetic. On a CPU it is a rehearsal, which compares the CPU with
itself.
"""

import copy
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

import latent_cache
from latent_cache import FlowBatch, LatentCache, ResidentSampler, Sampler, StreamingSampler
from pipelines.bench.flow_speed import BUDGET_SHARE, WARM_UP_STEPS
from pipelines.config import RiverConfig, parse_config
from pipelines.data.datasets import open_videos
from pipelines.encoding.frame_verifier import Encoded, unexplained_codes
from pipelines.encoding.store_encoder import encode
from pipelines.errors import StoppedBySignal
from pipelines.evaluation.evaluator import evaluate
from pipelines.loading import load_trained_autoencoder
from pipelines.prediction.rollouts import FieldRollouts
from pipelines.predictor import VideoPredictor
from pipelines.runtime.checkpoints import Checkpoint, CheckpointFolder
from pipelines.runtime.context import RunContext, resolve_precision, training_in
from pipelines.training.autoencoder_trainer import AutoencoderTrainer, train_autoencoder
from pipelines.training.flow_trainer import FlowTrainer, train_flow
from stage1_autoencoder.autoencoder import Autoencoder, image_to_unit
from stage1_autoencoder.frame_encoder import FrameEncoder, exact_kernels
from stage1_autoencoder.frame_pool import FramePool
from stage1_autoencoder.views import ViewTransform
from stage2_flow.conditioning import make_draws

CPU = torch.device("cpu")
Tier = Literal["device", "host", "stream"]
TIERS: tuple[Tier, ...] = ("device", "host", "stream")

# Of losses, relative: between what another order of fp32 sums, or fp64, changes in 50 steps (at most 7e-7, measured on
# a CPU at the demo's sizes) and what TF32 changes (4e-4).
SAME_FP32 = 2.0**-16
# Four times what bf16 changes in 50 steps, and what another order of sums changes with Muon, which computes in bf16;
# measured likewise (1.3e-2 and 1e-2).
BF16 = 0.05
# Another order of fp32 sums changes about as much as fp32 changes against fp64, which is measured. TF32 changes 45
# times as much in latents, 800 times as much in predictions (its rounding imitated on a CPU, at the demo's sizes).
ROUNDINGS = 10
# Of means over clips, in dB and in SSIM. A code that is one of two equally near ones may be the other one elsewhere: in
# some thousand latents it moves the mean by 1e-3 dB.
PSNR_BOUND, SSIM_BOUND = 0.01, 2e-4
# Of stored latents: those that `encode` moves by some last places to keep their codes, which may be others elsewhere.
HELD_SHARE = 1e-3
# Steps whose batches are compared: the first ones, and some far away.
DRAWN_STEPS = (0, 1, 2, 3, 1000, 999_999)
FRAMES_COMPARED = 64
NO_COMPILING = "left out of a rehearsal: takes a minute on a CPU"
PREDICTED = 4


class CheckRow(BaseModel):
    """One comparison.

    Attributes:
        name: what is compared.
        measured: the deviation; None: it was not measured.
        bound: what it must not exceed.
        why: what the bound comes from; or why it was skipped, or how it failed.
        trace: of an exception.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    name: str
    state: Literal["passed", "failed", "skipped"]
    measured: float | None = None
    bound: float | None = None
    why: str = ""
    trace: str | None = None


def compared(name: str, measured: float, bound: float, why: str) -> CheckRow:
    """A row that passes if the deviation is within its bound; NaN is not."""
    return CheckRow(
        name=name, state="passed" if measured <= bound else "failed", measured=measured, bound=bound, why=why
    )


def skipped(name: str, why: str) -> CheckRow:
    return CheckRow(name=name, state="skipped", why=why)


def story_config(config: RiverConfig, folder: Path, *, videos: int, steps: int) -> RiverConfig:
    """A small story in a temporary folder: procedural videos, and the networks of a configuration.

    Args:
        videos: of the training split; the other splits have a sixth of them.
        steps: of the flow's training.
    """
    values = config.model_dump(mode="json", include={"seed", "autoencoder", "flow"})
    values["paths"] = {name: str(folder / name) for name in ("data", "latents", "runs")}
    few = max(2, videos // 6)
    values["dataset"] = {
        "name": "gpu_check",
        "source": "shapes",
        "image_size": config.dataset.image_size,
        "splits": {"train": videos, "val": few, "test": few},
    }
    values["autoencoder"]["training"] = {
        "steps": 20, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 5, "validation_frames": 8,
        "precision": "fp32", "perceptual": "none", "adversarial": {"weight": 0.0}, "pool_memory": "64 MiB",
    }  # fmt: skip
    # No dropout: a CPU and a GPU drop other values. Standardized latents and a high rate: weights move in 50 steps.
    values["flow"]["model"]["dropout"] = 0.0
    values["flow"]["training"] = {
        "steps": steps, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 5, "grad_clip": 1.0,
        "ema_decay": 0.999, "precision": "fp32", "compile": False, "standardize": True, "clip_frames": 8,
        "validation_pairs": 16, "validation_samples": 0,
    }  # fmt: skip
    values["cache"] = {"chunk_frames": 24, "residency": "host"}
    values["sampling"] = {"solver": "midpoint", "nfe": 8, "precision": "fp32", "compile": False}
    values["evaluation"] = {"context": 2, "horizon": 8, "videos": few, "resamples": 0}
    return parse_config(values, "gpu-check")


@dataclass(frozen=True, eq=False)
class Story:
    """A small story whose results on the device are compared with those on the CPU.

    What both start from is made once, on the CPU, when a check first needs it.

    Attributes:
        config: see `story_config`.
        device: that is checked.
        compiles: whether compiled trainings and predictions are compared; on a CPU that takes a minute.
    """

    config: RiverConfig
    device: torch.device
    compiles: bool = True
    known: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def steps(self) -> int:
        return self.config.flow.training.steps

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Of the autoencoder."""
        return train_autoencoder(self.config, RunContext(CPU))

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return load_trained_autoencoder(self.checkpoint, CPU)

    @cached_property
    def cache(self) -> LatentCache:
        """The training split of a store that was encoded on the CPU."""
        return latent_cache.open(encode(self.config, RunContext(CPU), self.checkpoint), "train")

    @cached_property
    def run(self) -> Path:
        """The folder of a run with a trained flow."""
        assert self.cache.frames
        train_flow(self.config, RunContext(CPU))
        return self.config.run_path

    @cached_property
    def context(self) -> Tensor:
        """[4, 2, c, h, w] raw latents: the first frames of four videos."""
        return torch.from_numpy(np.stack([self.cache.video(row)[:2] for row in range(4)])).float()

    def sampler(self, device: torch.device, tier: Tier = "device") -> Sampler:
        training, cache = self.config.flow.training, self.cache
        common = (cache, device, self.config.seed, training.batch_size, training.clip_frames)
        if tier == "stream":
            return StreamingSampler(*common, int(cache.nbytes * BUDGET_SHARE))
        return ResidentSampler(*common, storage_device=device if tier == "device" else CPU)

    @contextmanager
    def trainer(
        self, device: torch.device, tier: Tier = "device", sampler: Any = None, **training: Any
    ) -> Iterator[FlowTrainer]:
        """A training from its beginning, with noise and times drawn on the CPU, so that they are the same everywhere.

        Args:
            sampler: instead of the tier's.
            training: settings that differ from the story's.
        """
        config, flow = self.config, self.config.flow
        changed = flow.training.model_copy(update=training)
        config = config.model_copy(update={"flow": flow.model_copy(update={"training": changed})})
        with closing(sampler or self.sampler(device, tier)) as batches:
            trainer = FlowTrainer(config, device, self.cache, batches)
            trainer.draw_device = CPU
            with training_in(trainer.precision):
                yield trainer
        if trainer.compile_mode is not None:
            torch.compiler.reset()  # a compiled method is compiled again at most eight times

    def losses(self, device: torch.device, **training: Any) -> Tensor:
        """[steps] float64 losses of a training; of equal settings trained once."""
        key = (str(device), *sorted(training.items()))
        if key not in self.known:
            with self.trainer(device, **training) as trainer:
                self.known[key] = run_steps(trainer, range(self.steps))
        return self.known[key]

    def predictor(self, device: torch.device) -> VideoPredictor:
        return VideoPredictor.from_run(self.run, device)


def run_steps(trainer: FlowTrainer, steps: Sequence[int]) -> Tensor:
    """[n] float64 losses of some steps, on the CPU."""
    return torch.stack([trainer.train_step(step).terms["loss"] for step in steps]).double().cpu()


def relative(values: Tensor, reference: Tensor) -> float:
    """The largest relative deviation."""
    return ((values - reference).abs() / reference.abs()).max().item()


def deviation(values: Tensor, reference: Tensor) -> float:
    """The largest deviation, in standard deviations of the reference."""
    return ((values - reference).abs().max() / reference.std()).item()


def different(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> int:
    """Number of values that are not equal bit for bit."""
    assert tensors.keys() == others.keys()
    return sum(int((tensor != others[name].to(tensor.device)).sum()) for name, tensor in tensors.items())


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Only kernels that add in a fixed order, so that equal trainings are equal bit for bit."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def same_draws(story: Story) -> Iterator[CheckRow]:
    """The batches of all tiers, and the draws of a prediction.

    Noise and times of a training are drawn by the device's generator, so a GPU's differ from a CPU's by design.
    """
    for tier in TIERS:
        wrong = 0
        with closing(story.sampler(story.device, tier)) as ours, closing(story.sampler(CPU, tier)) as theirs:
            for step in DRAWN_STEPS:
                wrong += int((ours.targets(step) != theirs.targets(step)).sum())
                wrong += different(vars(ours.batch(step).to(CPU)), vars(theirs.batch(step)))
        yield compared(
            f"draws, tier {tier}: values that differ", wrong, 0, "drawn by numpy on the CPU, gathered without rounding"
        )
    keys, shape = [(row, row % 2) for row in range(4)], story.cache.latent_shape
    ours, theirs = (make_draws(0, keys, 3, 8, 2, shape, None, device) for device in (story.device, CPU))
    yield compared(
        "draws of a prediction: values that differ", different(vars(ours), vars(theirs)), 0, "drawn by numpy on the CPU"
    )


def same_losses(story: Story) -> Iterator[CheckRow]:
    """fp32 training with both optimizers, compared with the CPU's."""
    yield compared(
        f"losses of {story.steps} fp32 steps against the CPU, relative",
        relative(story.losses(story.device), story.losses(CPU)),
        SAME_FP32,
        "another order of fp32 sums changes 7e-7 in 50 steps, TF32 4e-4; between these",
    )
    yield compared(
        f"losses of {story.steps} fp32 steps with Muon against the CPU, relative",
        relative(story.losses(story.device, optimizer="muon"), story.losses(CPU, optimizer="muon")),
        BF16,
        "Muon orthogonalizes in bf16: another order of sums changes 1e-2 in 50 steps",
    )


def exact_resume(story: Story) -> Iterator[CheckRow]:
    """A training that was saved and resumed, compared with one that was not; and two equal trainings."""
    half = story.steps // 5
    folder = CheckpointFolder(story.config.run_path / "resumed")
    with deterministic_kernels():
        with story.trainer(story.device) as trainer:
            whole, files = run_steps(trainer, range(2 * half)), trainer.files()
        with story.trainer(story.device) as trainer:
            first = run_steps(trainer, range(half))
            folder.save(half, trainer.files(), trainer.state())
        with story.trainer(story.device) as trainer:
            found = folder.latest()
            assert found is not None
            trainer.load(found)
            second, resumed = run_steps(trainer, range(half, 2 * half)), trainer.files()
    wrong = different({"losses": whole}, {"losses": torch.cat([first, second])})
    wrong += sum(different(tensors, resumed[name]) for name, tensors in files.items())
    yield compared(
        f"{half} steps, resumed for {half} more: values that differ", wrong, 0,
        "losses, weights, average and optimizer, with kernels that add in a fixed order",
    )  # fmt: skip
    with story.trainer(story.device) as trainer:
        again = run_steps(trainer, range(2 * half))
    same = "the same bits" if torch.equal(again, story.losses(story.device)[: 2 * half]) else "not the same bits"
    yield compared(
        "two equal trainings with the usual kernels, relative",
        relative(again, story.losses(story.device)[: 2 * half]),
        SAME_FP32,
        f"as for the losses; here {same}",
    )


def same_compiled(story: Story) -> Iterator[CheckRow]:
    """Compiled trainings and predictions, and CUDA graphs of solver steps, compared with eager ones."""
    name = f"losses of {story.steps} fp32 steps, compiled against eager, relative"
    if story.compiles:
        compiled = story.losses(story.device, compile=True)
        yield compared(name, relative(compiled, story.losses(story.device)), SAME_FP32, "as for the losses")
    else:
        yield skipped(name, NO_COMPILING)
    predictor, on_cpu = story.predictor(story.device), story.predictor(CPU)
    options: dict[str, Any] = {"compile": False, "cuda_graphs": False}

    def predict(predictor: VideoPredictor, context: Tensor, **changes: Any) -> Tensor:
        latents = predictor.generate_latents(context, PREDICTED, sampling=options | changes)
        return latents[:, context.shape[1] :].double().cpu()

    eager, reference = predict(predictor, story.context), predict(on_cpu, story.context)
    in_double = replace(on_cpu, vector_field=copy.deepcopy(on_cpu.vector_field).double())
    bound = ROUNDINGS * deviation(reference, predict(in_double, story.context.double()))
    why = f"{ROUNDINGS} times what fp32 changes against fp64"
    yield compared("predicted latents against the CPU, in standard deviations", deviation(eager, reference), bound, why)
    for name, change, possible, reason in (
        ("CUDA graph", {"cuda_graphs": True}, story.on_gpu, "needs CUDA"),
        ("compiled", {"compile": True}, story.compiles, NO_COMPILING),
    ):
        name = f"predicted latents, {name} against eager, in standard deviations"
        if possible:
            yield compared(name, deviation(predict(predictor, story.context, **change), eager), bound, why)
            torch.compiler.reset()
        else:
            yield skipped(name, reason)


def bf16_losses(story: Story) -> Iterator[CheckRow]:
    """Training in bf16, compared with fp32 on the same device."""
    name = f"losses of {story.steps} steps, bf16 against fp32, relative"
    if story.on_gpu and resolve_precision("auto", story.device) != "bf16":
        yield skipped(name, "the device has no bf16")
        return
    bf16 = story.losses(story.device, precision="bf16")
    yield compared(
        name, relative(bf16, story.losses(story.device)), BF16,
        "8 bits of mantissa change 1.3e-2 in 50 steps on a CPU; four times that",
    )  # fmt: skip


def same_tiers(story: Story) -> Iterator[CheckRow]:
    """Trainings from latents on the device, from host memory, and streamed."""
    count, device = story.steps // 5, story.device
    why = "equal batches, and kernels that add in a fixed order"
    with deterministic_kernels():
        losses = []
        for tier in ("device", "host"):
            with story.trainer(device, tier) as trainer:
                losses.append(run_steps(trainer, range(count)))
        wrong = int((losses[0] != losses[1]).sum())
        yield compared(f"losses of {count} steps, host against device tier: that differ", wrong, 0, why)
        with story.trainer(device, "stream") as trainer:
            streamed = run_steps(trainer, range(count))
        # The streaming tier has an order of its own: compared with its batches, drawn in advance one by one on the CPU.
        with closing(story.sampler(CPU, "stream")) as sampler:
            batches = [sampler.batch(step).to(device) for step in range(count)]
        with story.trainer(device, sampler=Recorded(batches)) as trainer:
            wrong = int((run_steps(trainer, range(count)) != streamed).sum())
        yield compared(
            f"losses of {count} steps, streamed against its batches drawn before: that differ", wrong, 0, why
        )


class Recorded(SimpleNamespace):
    """A sampler of given batches."""

    def __init__(self, batches: Sequence[FlowBatch]) -> None:
        super().__init__(batch=lambda step, rank, count: batches[step], close=lambda: None)


def same_codes(story: Story) -> Iterator[CheckRow]:
    """Encoding: latents and codes of the network, and a whole store, compared with the CPU's."""
    source = open_videos(story.config, RunContext(CPU))["train"]
    pixels = np.concatenate([source.read(row) for row in range(len(source.videos))])[:FRAMES_COMPARED]
    on_cpu, codebook = story.autoencoder, story.autoencoder.quantizer.codebook.numpy()
    on_device = load_trained_autoencoder(story.checkpoint, story.device)
    ours, theirs = (encode_frames(model, pixels, d) for model, d in ((on_device, story.device), (on_cpu, CPU)))
    with torch.inference_mode():
        exact = copy.deepcopy(on_cpu).double().encode(image_to_unit(torch.from_numpy(pixels)).double()).numpy()
    bound = ROUNDINGS * float(np.abs(theirs[0] - exact).max())
    yield compared(
        f"latents of {len(pixels)} frames against the CPU", float(np.abs(ours[0] - theirs[0]).max()), bound,
        f"{ROUNDINGS} times what fp32 changes against fp64",
    )  # fmt: skip
    yield _codes(f"codes of {len(pixels)} frames against the CPU", ours, theirs, codebook)
    paths = story.config.paths.model_copy(update={"latents": f"{story.config.paths.latents}_device"})
    path = encode(story.config.model_copy(update={"paths": paths}), RunContext(story.device), story.checkpoint)
    stores = [latent_cache.open(where, "train") for where in (path, story.cache.url)]
    ours, theirs = ((store.latents[:], store.codes[:].astype(np.int64)) for store in stores)
    # A difference at the edge of a rounding to fp16 becomes one last place.
    place = np.maximum(np.spacing(np.abs(theirs[0])).astype(np.float32), bound)
    apart = np.abs(ours[0].astype(np.float32) - theirs[0].astype(np.float32)) > place
    yield compared(
        f"latents of {stores[0].frames} stored frames, share more than one last place from the CPU's",
        float(apart.mean()), HELD_SHARE, "latents between two codes are moved until rounding keeps their code",
    )  # fmt: skip
    yield _codes(f"codes of {stores[0].frames} stored frames against the CPU", ours, theirs, codebook)


def encode_frames(autoencoder: Autoencoder, pixels: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Latents [n, c, h, w] float32 and codes [n, h, w] of frames [n, h, w, 3] uint8."""
    encoder = FrameEncoder(autoencoder, device, pixels.shape[1:3])
    latents, codes = [], []
    with exact_kernels():
        for start in range(0, len(pixels), encoder.frames):
            part = pixels[start : start + encoder.frames]
            encoded = encoder.encode(part, [ViewTransform()] * len(part))
            latents.append(encoded.latents[: len(part)].cpu().numpy())
            codes.append(encoded.codes[: len(part)].cpu().numpy())
    return np.concatenate(latents), np.concatenate(codes)


def _codes(
    name: str, ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray], codebook: np.ndarray
) -> CheckRow:
    """Codes of the device that are farther from the CPU's latents than the deviation of the latents explains."""
    wrong = 0
    for latents, codes, latents_of_cpu, codes_of_cpu in zip(*ours, *theirs, strict=True):
        on_cpu = Encoded(latents_of_cpu.astype(np.float32), latents_of_cpu, codes_of_cpu)
        wrong += int(unexplained_codes(on_cpu, latents, codes, codebook).sum())
    ties = int((ours[1] != theirs[1]).sum())
    why = f"{ties} of {ours[1].size} codes differ; allowed where two are equally near within the latents' deviation"
    return compared(f"{name}: that are not the nearest", wrong, 0, why)


def same_metrics(story: Story) -> Iterator[CheckRow]:
    """The evaluation of one run on both."""
    assert story.run
    ours, theirs = (evaluate(story.config, RunContext(device)) for device in (story.device, CPU))
    protocols = [result.protocol.model_dump(exclude={"device"}) for result in (ours, theirs)]
    wrong = [name for name, value in protocols[0].items() if value != protocols[1][name]]
    why = f"all but the device{': ' + ', '.join(wrong) if wrong else ''}"
    yield compared("evaluation: settings of the protocol that differ", len(wrong), 0, why)
    for metric, bound, unit in (("psnr", PSNR_BOUND, " in dB"), ("ssim", SSIM_BOUND, "")):
        curves = [result.metrics[metric].per_frame for result in (ours, theirs)]
        gaps = [np.abs(np.subtract(curves[0][subject], curves[1][subject])).max() for subject in curves[0]]
        yield compared(
            f"evaluation: {metric} of each frame against the CPU{unit}", float(max(gaps)), bound,
            "rounding, and codes that are as near as another",
        )  # fmt: skip


def no_waiting(story: Story) -> Iterator[CheckRow]:
    """Steps in which the host must not wait for the device."""
    for what, run in {
        "a training step of the flow": _flow_step,
        "a training step of the autoencoder": _autoencoder_step,
        "predicted frames after the first": _prediction,
    }.items():
        name = f"host waits for the device in {what}"
        if not story.on_gpu:
            yield skipped(name, "needs CUDA")
            continue
        try:
            run(story)
        except Exception as error:
            yield CheckRow(name=name, state="failed", why=first_line(error), trace=traceback.format_exc())
        else:
            yield compared(name, 0, 0, "torch.cuda.set_sync_debug_mode('error')")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _flow_step(story: Story) -> None:
    with story.trainer(story.device) as trainer:
        trainer.draw_device = story.device
        _guard_last(lambda step: trainer.train_step(step), story.device)


def _autoencoder_step(story: Story) -> None:
    training = story.config.autoencoder.training
    pool = FramePool(
        open_videos(story.config, RunContext(CPU))["train"], batch_size=training.batch_size, steps=training.steps,
        memory=2**26, seed=0, on_broken=lambda error: None,
    )  # fmt: skip
    with closing(pool), training_in("fp32"):
        trainer = AutoencoderTrainer(story.config, story.device, pool)
        _guard_last(lambda step: trainer.train_step(step), story.device)


def _prediction(story: Story) -> None:
    predictor = story.predictor(story.device)
    context = predictor.standardization.to_final(story.context.to(story.device))
    options, keys = predictor.sampling, [(row, 0) for row in range(len(context))]
    draws = make_draws(0, keys, PREDICTED, 8, context.shape[1], tuple(context.shape[2:]), None, story.device)
    rollouts, predicted = FieldRollouts(predictor.vector_field, story.device), iter(range(2 * PREDICTED))

    def on_frames(clips: int) -> None:
        # The second prediction, between its first frame and its last one, which has been launched then.
        place = next(predicted) - PREDICTED
        torch.cuda.set_sync_debug_mode("error" if 0 <= place < PREDICTED - 1 else "default")

    for _ in range(2):
        rollouts.generate(context, PREDICTED, options, draws, on_frames)


def _guard_last(step: Callable[[int], object], device: torch.device) -> None:
    """Some steps, in the last of which waiting is an error."""
    for number in range(WARM_UP_STEPS):
        step(number)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    step(WARM_UP_STEPS)


CHECKS: dict[str, Callable[[Story], Iterator[CheckRow]]] = {
    "same draws": same_draws,
    "losses against the CPU": same_losses,
    "resume": exact_resume,
    "compiled against eager": same_compiled,
    "bf16 against fp32": bf16_losses,
    "tiers": same_tiers,
    "encoding against the CPU": same_codes,
    "evaluation against the CPU": same_metrics,
    "no waiting": no_waiting,
}


def run_checks(story: Story) -> Iterator[CheckRow]:
    """All checks, one after another. An exception is the failure of its check, and the others are still run."""
    for name, check in CHECKS.items():
        try:
            yield from check(story)
        except StoppedBySignal:
            raise
        except Exception as error:
            yield CheckRow(name=name, state="failed", why=first_line(error), trace=traceback.format_exc())


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
