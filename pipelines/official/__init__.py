"""Load the weights that the official code released: `(path) -> module`, in evaluation mode on the CPU."""

from pipelines.official.autoencoders import load_autoencoder
from pipelines.official.refiners import load_refiner
from pipelines.official.vector_fields import load_vector_field
from pipelines.official.weight_files import (
    OfficialCheckpoint,
    OfficialFormatError,
    autoencoder_state,
    load_pickle,
    read_official,
)

__all__ = [
    "OfficialCheckpoint",
    "OfficialFormatError",
    "autoencoder_state",
    "load_autoencoder",
    "load_pickle",
    "load_refiner",
    "load_vector_field",
    "read_official",
]
