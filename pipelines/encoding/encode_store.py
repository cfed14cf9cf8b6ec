"""Entry points that train the autoencoder first, until `stages.py` does."""

from pathlib import Path

from pipelines.config import RiverConfig
from pipelines.encoding import store_encoder
from pipelines.encoding.store_checks import store_status
from pipelines.errors import UserError
from pipelines.runtime.context import RunContext
from pipelines.training.autoencoder_stage import train_autoencoder


def encode(config: RiverConfig, run_context: RunContext) -> Path:
    """Train the autoencoder when it is missing, then `store_encoder.encode`."""
    checkpoint = train_autoencoder(config, run_context.for_prerequisites())
    return store_encoder.encode(config, run_context, checkpoint)


def ensure_store(config: RiverConfig, run_context: RunContext) -> Path:
    """The complete store of this configuration; encodes when it is missing or partial.

    Raises:
        UserError: the store conflicts with the configuration; it is not complete, and this is one of several processes.
    """
    status = store_status(config)
    if status.is_done:
        return status.path
    if status.state == "conflicting":
        raise UserError(status.detail)
    if run_context.processes.count > 1:
        raise UserError(f"{status.path}: no complete store; `encode` makes it, in one process, before this")
    return encode(config, run_context.for_prerequisites())
