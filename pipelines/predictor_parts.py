"""All that a predictor consists of, and how it is loaded from a run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml

from pipelines.config import parse_config
from pipelines.errors import UserError
from pipelines.train_autoencoder import find_autoencoder, load_trained_autoencoder, weights_digest
from pipelines.train_flow import find_flow, load_trained_field
from pipelines.train_refiner import find_refiner, load_trained_refiner
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.rcan import RCAN
from stage2_flow.config import SamplingConfig
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField


@dataclass(frozen=True, eq=False)
class PredictorParts:
    """Networks that were trained together, on the device, in evaluation mode, frozen.

    Attributes:
        autoencoder: `.encode(images)`, `.quantize(latents)`, `.decode(latents)`.
        vector_field: called with final latents: (x_t, reference, condition, distance, t) -> velocity.
        standardization: between the raw latents of the autoencoder and the final latents of the field.
        sampling: the defaults of every prediction.
        fps: frames a second of the videos it was trained on.
        refiner: used only where it is asked for; None: there is none.
        no_refiner: why there is none, and the way out.
    """

    autoencoder: Autoencoder
    vector_field: VectorField
    standardization: Standardization
    sampling: SamplingConfig
    fps: float
    device: torch.device
    refiner: RCAN | None = None
    no_refiner: str = "this predictor was made without a refiner: pass refiner=..., or train one for a run"


def load_run(run: Path, device: torch.device, weights: Literal["ema", "raw"] | None = None) -> PredictorParts:
    """Load the checkpoints of a run folder that are to be used; see `VideoPredictor.from_run`.

    Raises:
        UserError: something of it is missing, or its flow was trained on another autoencoder's latents.
    """
    flow, autoencoder_checkpoint = find_flow(run), find_autoencoder(run)
    if flow is None:
        raise UserError(f"{run}/flow/checkpoints holds no checkpoint; `make train-flow` makes one")
    if autoencoder_checkpoint is None:
        known = flow.state["store"]["autoencoder"]
        raise UserError(
            f"{run}/autoencoder/checkpoints holds no checkpoint, and {flow.path} knows latents of autoencoder "
            f"{known[:12]}...: bring that one back (`import-official` does, where it came from there), or begin "
            "anew with `train-autoencoder`, `encode --overwrite` and `train-flow --restart`"
        )
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{run}/config.yaml: missing or unreadable: {error}") from None
    autoencoder = load_trained_autoencoder(autoencoder_checkpoint, device)
    trained_on, here = flow.state["store"]["autoencoder"], weights_digest(autoencoder)
    if trained_on != here:
        raise UserError(
            f"{flow.path} was trained on latents of autoencoder {trained_on[:12]}..., but "
            f"{autoencoder_checkpoint.path} is {here[:12]}...: encode and train the flow again "
            "(`encode --overwrite`, `train-flow --restart`), or bring the old autoencoder back"
        )
    statistics = flow.state["standardization"]
    sampling = parse_config(values, f"{run}/config.yaml").sampling
    if weights is not None:
        sampling = sampling.model_copy(update={"weights": weights})
    refiner, no_refiner = _find_refiner(run, here, device)
    return PredictorParts(
        autoencoder=autoencoder,
        vector_field=load_trained_field(flow, device, sampling.weights),
        standardization=Standardization(
            torch.tensor(statistics["mean"], device=device), torch.tensor(statistics["std"], device=device)
        ),
        sampling=sampling,
        fps=flow.state["fps"],
        device=device,
        refiner=refiner,
        no_refiner=no_refiner,
    )


def _find_refiner(run: Path, autoencoder_digest: str, device: torch.device) -> tuple[RCAN | None, str]:
    """The refiner of a run, or None and why there is none to use."""
    found = find_refiner(run)
    if found is None:
        return None, f"{run}/refiner/checkpoints holds no checkpoint; `make train-refiner` makes one"
    trained_for = found.state["autoencoder"]
    if trained_for != autoencoder_digest:
        return None, (
            f"{found.path} was trained for autoencoder {trained_for[:12]}..., but {run}/autoencoder is "
            f"{autoencoder_digest[:12]}...: train it anew (`train-refiner --restart`), or bring the old autoencoder "
            "back"
        )
    return load_trained_refiner(found, device), ""
