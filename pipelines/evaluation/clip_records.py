"""Records of an evaluation's clips: on disk until all is done, so that it goes on where it was stopped."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from pipelines.evaluation.measures.measure import Records
from pipelines.runtime.files import write_bytes

# Of the folder in a run with the records of its evaluation.
RECORDS_NAME = "evaluation_records"


class RecordFolder:
    """Files `<batch>-<sha256>.safetensors` in a folder that is named after everything that the records depend on.

    Attributes:
        path: of this evaluation's folder.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Records of one evaluation; those of others that were stopped are removed.

        Args:
            folder: of the records of all evaluations of a run.
            about: JSON values; everything that decides what is recorded.
        """
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        self._folder, self.path = folder, folder / name
        for other in folder.glob("*"):
            if other != self.path:
                shutil.rmtree(other, ignore_errors=True)

    def read(self, batch: int) -> Records | None:
        """The records of a batch; None: not measured, or damaged."""
        for path in self.path.glob(f"{batch:06}-*.safetensors"):
            content = path.read_bytes()
            if path.name == _name(batch, content):
                return load(content)
            path.unlink()
        return None

    def write(self, batch: int, records: Records) -> None:
        """Keep the records of a batch."""
        content = save({name: tensor.contiguous() for name, tensor in records.items()})
        self.path.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path / _name(batch, content), content)

    def remove(self) -> None:
        """Remove everything, once the evaluation is done."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _name(batch: int, content: bytes) -> str:
    return f"{batch:06}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
