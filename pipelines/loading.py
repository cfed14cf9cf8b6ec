"""Trained networks: where a run keeps them, and how they are loaded."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.context import image_memory_format
from pipelines.runtime.files import read_json
from pipelines.runtime.progress import say, warn
from pipelines.runtime.results import Study, StudyPoint
from pipelines.runtime.run_folder import chosen_checkpoint, is_student, read_run_config
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.config import (
    DecoderModelConfig,
    RefinerModelConfig,
    VQGANConfig,
    VQVAEConfig,
    parse_model_config,
)
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.fast_decoder import FastDecoder
from stage1_autoencoder.rcan import RCAN
from stage2_flow.config import SamplingConfig, VectorFieldConfig
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class PredictorParts:
    """Networks that were trained together, on the device, in eval mode, frozen.

    Attributes:
        autoencoder: `.encode(images)`, `.quantize(latents)`, `.decode(latents)`; called directly, these compute as the
            process is set.
        vector_field: called with final latents: (x_t, reference, condition, distance, t) -> velocity.
        standardization: between the raw latents of the autoencoder and the final latents of the field.
        sampling: the default sampler settings.
        sampler_is_chosen: whether `study` chose its solver and evaluations, because the run's settings leave them open.
        fps: frames per second of the training videos.
        longest_distance: largest number of frames between condition and reference in the field's training; None:
            unknown, as for imported weights.
        trained_grid: height and width of the latents in the field's training; None: unknown, as in official files.
        refiner: used on request only; None: the run has none.
        no_refiner: why the refiner is missing, and the way out.
        fast_decoder: used with `sampling.decoder: fast` only; None: the run has none.
        no_fast_decoder: why it is missing, and the way out.
    """

    autoencoder: Autoencoder
    vector_field: VectorField
    standardization: Standardization
    sampling: SamplingConfig
    fps: float
    device: torch.device
    sampler_is_chosen: bool = False
    longest_distance: int | None = None
    trained_grid: tuple[int, int] | None = None
    refiner: RCAN | None = None
    no_refiner: str = "this predictor was built without a refiner: pass refiner=..., or train one for a run"
    fast_decoder: FastDecoder | None = None
    no_fast_decoder: str = "this predictor was built without a fast decoder: use sampling.decoder=full, or a run"


def load_run(
    run: Path,
    device: torch.device,
    weights: Literal["ema", "raw"] | None = None,
    sampling: SamplingConfig | None = None,
) -> PredictorParts:
    """Load the networks of a run folder; see `VideoPredictor.from_run`.

    Args:
        sampling: sampler settings; None: those of the run. Either may leave the sampler to the choice of `study`.
    Raises:
        UserError: a part is missing, or the flow was trained on another autoencoder's latents.
    """
    flow = find_flow(run)
    if flow is None:
        raise UserError(f"{run}/flow/checkpoints holds no checkpoint: train one with `river train-flow`")
    try:
        config = read_run_config(run / "config.yaml")
    except OSError as error:
        raise UserError(f"{run}/config.yaml: missing or unreadable: {error}") from None
    # A named run's folder lies in that of the default run.
    shared = run if config.run is None else run.parent
    autoencoder_checkpoint = find_autoencoder(shared)
    if autoencoder_checkpoint is None:
        known = flow.state["store"]["autoencoder"]
        raise UserError(
            f"{shared}/autoencoder/checkpoints holds no checkpoint, and {flow.path} was trained on latents of "
            f"autoencoder {known[:12]}...: restore it (imported weights: `import-official`), or start over with "
            "`train-autoencoder`, `encode --overwrite` and `train-flow --restart`"
        )
    autoencoder = load_trained_autoencoder(autoencoder_checkpoint, device)
    trained_on, here = flow.state["store"]["autoencoder"], weights_digest(autoencoder)
    if trained_on != here:
        raise UserError(
            f"{flow.path} was trained on latents of autoencoder {trained_on[:12]}..., but "
            f"{autoencoder_checkpoint.path} is {here[:12]}...: encode and train the flow again "
            "(`encode --overwrite`, `train-flow --restart`), or restore the old autoencoder"
        )
    sampling = config.sampling if sampling is None else sampling
    if weights is not None:
        sampling = sampling.model_copy(update={"weights": weights})
    sampling, is_chosen = with_chosen_sampler(run, flow, sampling)
    if is_student(flow):
        learned = SamplingPlan.from_config(SamplingConfig(**flow.state["sampler"]))
        if (plan := SamplingPlan.from_config(sampling)) != learned:
            warn(f"{flow.path} is a student that learned {learned.describe()}, and is used with {plan.describe()}")
    refiner, no_refiner = _find_refiner(run, here, device)
    fast_decoder, no_fast_decoder = _find_fast_decoder(shared, autoencoder.config, here, device)
    return PredictorParts(
        autoencoder=autoencoder,
        vector_field=load_trained_field(flow, device, sampling.weights),
        standardization=standardization_in(flow).to(device),
        sampling=sampling,
        sampler_is_chosen=is_chosen,
        fps=flow.state["fps"],
        device=device,
        longest_distance=flow.state.get("longest_distance"),
        trained_grid=tuple(flow.state["latent_shape"][1:]),
        refiner=refiner,
        no_refiner=no_refiner,
        fast_decoder=fast_decoder,
        no_fast_decoder=no_fast_decoder,
    )


def with_chosen_sampler(run: Path, flow: Checkpoint, sampling: SamplingConfig) -> tuple[SamplingConfig, bool]:
    """The sampler settings of predictions: those that are given, with the choice of `study` where they leave it open.

    Args:
        run: folder of the flow's run.
    Returns:
        The settings, and whether `study` chose.
    """
    choice = _find_choice(run, flow, sampling)
    if choice is None:
        return sampling, False
    chosen = {"solver": choice.solver, "nfe": choice.nfe, "warm_start": choice.warm_start}
    return sampling.model_copy(update=chosen | {"condition": choice.condition}), True


def _find_choice(run: Path, flow: Checkpoint, sampling: SamplingConfig) -> StudyPoint | None:
    """The sampler that `study` chose for a flow; None, if need be with a message, where settings or it choose none."""
    path = run / "quality.json"
    if not sampling.leaves_sampler_open or not path.exists():
        return None
    try:
        study = read_json(path, Study, "`study` writes it again; the default sampler is used")
    except UserError as error:
        warn(str(error))
        return None
    if study.protocol.flow_sha256 != flow_digest(flow, sampling.weights):
        say(f"{path}: not used, it measured other weights of the flow; `study` measures these")
        return None
    return study.choice


def _find_refiner(run: Path, autoencoder_digest: str, device: torch.device) -> tuple[RCAN | None, str]:
    """The refiner of a run, or None and why it cannot be used."""
    found = find_refiner(run)
    if found is None:
        return None, f"{run}/refiner/checkpoints holds no checkpoint: train one with `river train-refiner`"
    trained_for = found.state["autoencoder"]
    if trained_for != autoencoder_digest:
        return None, (
            f"{found.path} was trained for autoencoder {trained_for[:12]}..., but the run has "
            f"{autoencoder_digest[:12]}...: train it again (`train-refiner --restart`), or restore the old autoencoder"
        )
    return load_trained_refiner(found, device), ""


def _find_fast_decoder(
    shared: Path, sizes: VQGANConfig | VQVAEConfig, autoencoder_digest: str, device: torch.device
) -> tuple[FastDecoder | None, str]:
    """The fast decoder of an autoencoder with these sizes, or None and why it cannot be used."""
    found = find_decoder(shared)
    if found is None:
        return None, (
            f"{shared}/decoder/checkpoints holds no checkpoint: train one with `river train-decoder`, or use "
            "sampling.decoder=full"
        )
    trained_for = found.state["autoencoder"]
    if trained_for != autoencoder_digest:
        return None, (
            f"{found.path} was trained for autoencoder {trained_for[:12]}..., but the run has "
            f"{autoencoder_digest[:12]}...: train it again (`train-decoder --restart`), or use sampling.decoder=full"
        )
    return load_trained_decoder(found, sizes, device), ""


def load_trained_autoencoder(checkpoint: Checkpoint, device: torch.device) -> Autoencoder:
    """The autoencoder of a checkpoint, in eval mode: the averaged weights if it has them."""
    name = "ema" if checkpoint.has("ema") else "model"
    model = _trained(checkpoint, name, lambda: build_autoencoder(parse_model_config(checkpoint.state["model"])))
    return model.to(device, memory_format=image_memory_format(device))


def _trained(checkpoint: Checkpoint, name: str, build: Callable[[], Network]) -> Network:
    """A network with the weights of a checkpoint's file, on the CPU, in eval mode, frozen.

    Raises:
        UserError: weights that are damaged, not finite, or don't fit the sizes in state.json.
    """
    try:
        network = build()
        network.load_state_dict(checkpoint.tensors(name))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: weights don't fit the sizes in state.json: {error}") from None
    if (broken := not_finite(network)) is not None:
        raise UserError(
            f"{checkpoint.path}/{name}.safetensors: {broken} has NaN or inf: remove {checkpoint.path} to use the "
            "previous checkpoint, or train again"
        )
    return network.eval().requires_grad_(False)


def not_finite(network: nn.Module) -> str | None:
    """The name of a network's first tensor with NaN or inf; None: all are finite."""
    tensors = ((name, tensor) for name, tensor in network.state_dict().items() if tensor.numel())
    return next((name for name, tensor in tensors if not torch.stack(tensor.aminmax()).isfinite().all()), None)


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights: the identity of a network."""
    return _tensors_digest(model.state_dict())


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def autoencoder_digest(checkpoint: Checkpoint) -> str:
    """`weights_digest` of a checkpoint's autoencoder, computed once per process unless its files change."""
    name = "ema" if checkpoint.has("ema") else "model"
    return _known_digest(
        checkpoint, name, lambda: weights_digest(load_trained_autoencoder(checkpoint, torch.device("cpu")))
    )


def flow_digest(checkpoint: Checkpoint, weights: Literal["ema", "raw"]) -> str:
    """`weights_digest` of what `load_trained_field` loads, computed once per process unless its files change."""
    name = _field_weights(checkpoint, weights)
    return _known_digest(checkpoint, name, lambda: _tensors_digest(checkpoint.tensors(name)))


def _known_digest(checkpoint: Checkpoint, name: str, digest: Callable[[], str]) -> str:
    weights = checkpoint.path / f"{name}.safetensors"
    key = weights, weights.stat().st_mtime_ns if weights.exists() else 0
    if key not in _digests:
        _digests[key] = digest()
    return _digests[key]


# (file of weights, its time of last change) -> digest. A command asks for the same one several times.
_digests: dict[tuple[Path, int], str] = {}


def find_autoencoder(run_path: Path) -> Checkpoint | None:
    """The autoencoder's checkpoint to use: the best if one was measured, else the newest."""
    return chosen_checkpoint(run_path / "autoencoder")


def find_flow(run_path: Path) -> Checkpoint | None:
    """The flow's checkpoint to use: the best if one was measured, else the newest."""
    return chosen_checkpoint(run_path / "flow")


def load_trained_field(
    checkpoint: Checkpoint, device: torch.device, weights: Literal["ema", "raw"] = "ema"
) -> VectorField:
    """The vector field of a checkpoint, in eval mode: the averaged weights if it has them, or the raw ones."""

    def build() -> VectorField:
        sizes = VectorFieldConfig.model_validate(checkpoint.state["model"])
        return VectorField(sizes, checkpoint.state["latent_shape"][0])

    return _trained(checkpoint, _field_weights(checkpoint, weights), build).to(device)


def _field_weights(checkpoint: Checkpoint, weights: Literal["ema", "raw"]) -> str:
    return "ema" if weights == "ema" and checkpoint.has("ema") else "model"


def standardization_in(checkpoint: Checkpoint) -> Standardization:
    """The standardization that a flow was trained with, on the CPU.

    Raises:
        UserError: its numbers are not finite, or deviations are not positive.
    """
    statistics = checkpoint.state["standardization"]
    try:
        return Standardization(torch.tensor(statistics["mean"]), torch.tensor(statistics["std"]))
    except ValueError as error:
        raise UserError(f"{checkpoint.path}/state.json: standardization: {error}: restore it, or train again") from None


def find_refiner(run_path: Path) -> Checkpoint | None:
    """The refiner's checkpoint to use: the best if one was measured, else the newest."""
    return chosen_checkpoint(run_path / "refiner")


def load_trained_refiner(checkpoint: Checkpoint, device: torch.device) -> RCAN:
    """The refiner of a checkpoint, in eval mode: the averaged weights if it has them."""
    name = "ema" if checkpoint.has("ema") else "model"
    refiner = _trained(checkpoint, name, lambda: RCAN(RefinerModelConfig.model_validate(checkpoint.state["model"])))
    return refiner.to(device, memory_format=image_memory_format(device))


def find_decoder(run_path: Path) -> Checkpoint | None:
    """The fast decoder's checkpoint to use: the best if one was measured, else the newest."""
    return chosen_checkpoint(run_path / "decoder")


def load_trained_decoder(checkpoint: Checkpoint, sizes: VQGANConfig | VQVAEConfig, device: torch.device) -> FastDecoder:
    """The fast decoder of a checkpoint, for an autoencoder of these sizes, in eval mode; averaged weights as above."""
    name = "ema" if checkpoint.has("ema") else "model"

    def build() -> FastDecoder:
        return FastDecoder(DecoderModelConfig.model_validate(checkpoint.state["model"]), sizes)

    return _trained(checkpoint, name, build).to(device, memory_format=torch.channels_last)
