"""Load the weights that the official code released: `(path) -> module`, in evaluation mode on the CPU."""

from pipelines.official.official_networks import load_autoencoder, load_refiner, load_vector_field
from pipelines.official.weight_files import (
    OfficialCheckpoint,
    OfficialFormatError,
    is_state_dict,
    load_pickle,
    read_official,
)

__all__ = [
    "OfficialCheckpoint",
    "OfficialFormatError",
    "is_state_dict",
    "load_autoencoder",
    "load_pickle",
    "load_refiner",
    "load_vector_field",
    "read_official",
]
