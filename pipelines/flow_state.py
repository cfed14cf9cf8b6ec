"""What the checkpoints of a flow's training say in `state.json`: what it depends on, and what sampling needs."""

from typing import Any

import torch

from latent_cache import LatentCache
from pipelines.config import RiverConfig
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.runs import training_identity
from stage2_flow.standardization import Standardization


def flow_identity(config: RiverConfig) -> dict[str, Any]:
    """What the trained vector field depends on besides the store and its first weights, as plain data."""
    flow = config.flow.model_dump(mode="json", exclude={"training": {"accumulate"}})
    if flow["training"]["condition_draw"] == "uniform":  # what trainings did before there was a choice
        del flow["training"]["condition_draw"]
    return training_identity({"seed": config.seed, "flow": flow})


def flow_settings(config: RiverConfig) -> dict[str, Any]:
    """All settings of the training, also those that its result does not depend on."""
    return {"seed": config.seed, "flow": config.flow.model_dump(mode="json")}


def flow_state(config: RiverConfig, cache: LatentCache, standardization: Standardization) -> dict[str, Any]:
    """The JSON of a training of this configuration on this store."""
    return {
        "identity": flow_identity(config),
        "settings": flow_settings(config),
        "model": config.flow.model.model_dump(mode="json"),
        "latent_shape": list(cache.latent_shape),
        "standardization": {"mean": standardization.mean.tolist(), "std": standardization.std.tolist()},
        "fps": cache.metadata.fps,
        "store": {
            "path": str(cache.url),
            "fingerprint": cache.fingerprint,
            "autoencoder": cache.metadata.autoencoder["sha256"],
        },
    }


def standardization_in(checkpoint: Checkpoint) -> Standardization:
    """That which a flow was trained with."""
    statistics = checkpoint.state["standardization"]
    return Standardization(torch.tensor(statistics["mean"]), torch.tensor(statistics["std"]))
