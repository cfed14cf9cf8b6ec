"""How far a stage is: one value for dry runs, chains of commands, the report and messages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["missing", "partial", "done", "conflicting"]


@dataclass(frozen=True)
class Status:
    """How far one stage is under a configuration.

    Attributes:
        state: `missing`: nothing exists yet; `partial`: the stage resumes from what exists; `done`: nothing to do;
            `conflicting`: what exists was made with other settings or inputs, and the stage refuses it.
        detail: for people, in a few words: `3000 of 5000 steps`; of a conflict, what differs and the way out.
        path: the file or folder that holds it, or would.
        standalone: done elsewhere with other inputs (imported weights): what the stage needs here does not matter.
    """

    state: State
    detail: str
    path: Path
    standalone: bool = False

    @property
    def is_done(self) -> bool:
        return self.state == "done"
