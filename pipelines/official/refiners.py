"""Official refinement networks."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pipelines.official.weight_files import OfficialFormatError, count_blocks, fill, listed, load_pickle, require, unfit
from stage1_autoencoder.config import RefinerModelConfig
from stage1_autoencoder.rcan import RCAN

HEAD, SQUEEZE = "head.weight", "body.0.body.0.body.3.conv_du.0.weight"


def load_refiner(path: str | Path) -> RCAN:
    """Build the refiner of an official file, in evaluation mode on the CPU. Its sizes are read off the shapes.

    Args:
        path: a refiner's `.pth`: `{"refiner": {[module.]*}, "args": argparse.Namespace, ...}`, gzip'd if named `.gz`.
    Raises:
        FileNotFoundError: no such file.
        OfficialFormatError: a truncated or foreign file; pickled objects other than tensors and the Namespace;
            missing, unexpected or misshapen tensors.
    """
    state = _refiner_state(path)
    with torch.device("meta"):
        refiner = RCAN(_sizes(path, state))
    fill(path, refiner, state)
    return refiner


def _refiner_state(path: str | Path) -> dict[str, Tensor]:
    try:
        content = load_pickle(path, safe_globals=[argparse.Namespace])
    except OfficialFormatError as error:
        refusal, advice, _ = str(error).partition("If you trust the file")
        if not (advice and isinstance(error.__cause__, pickle.UnpicklingError)):
            raise
        raise OfficialFormatError(
            f"{refusal}{advice}, load it where it was written and save its tensors alone: "
            "torch.save({'refiner': checkpoint['refiner']}, 'clean.pth')"
        ) from error
    if not isinstance(content, Mapping) or "refiner" not in content:
        found = listed(content) if isinstance(content, Mapping) else type(content).__name__
        raise OfficialFormatError(f"{path} holds no 'refiner', but {found}: pass the .pth of a refiner's training")
    state = content["refiner"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise OfficialFormatError(f"{path}: 'refiner' is not a dictionary of tensors: pass a refiner's checkpoint")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _sizes(path: str | Path, state: Mapping[str, Tensor]) -> RefinerModelConfig:
    require(path, state, (HEAD, SQUEEZE), ndims=(4, 4))
    features, hidden = state[HEAD].shape[0], state[SQUEEZE].shape[0]
    # The last of each is no group and no block but the closing convolution.
    groups, blocks = count_blocks(state, "body") - 1, count_blocks(state, "body.0.body") - 1
    try:
        return RefinerModelConfig(
            groups=groups,
            blocks=blocks,
            features=features,
            reduction=features // max(hidden, 1),
            tanh="tail.0.weight" in state,
        )
    except ValidationError as error:
        raise unfit(path, error) from None
