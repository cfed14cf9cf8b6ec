"""The log of a training: one JSON object a line, and wandb when the user wants it."""

import json
import math
import time
from pathlib import Path
from typing import Any

from pipelines.config import LoggingConfig, RiverConfig
from pipelines.runtime.progress import say


class TrainingLog:
    """Appends to `log.jsonl`. After a resume, lines of steps that are trained again are dropped first."""

    def __init__(self, folder: Path, config: RiverConfig, name: str, resumed_step: int) -> None:
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._keep_until(resumed_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(config.logging, folder, config, name)

    def write(self, record: dict[str, Any]) -> None:
        """Write one line; numbers that are not finite become strings, so that every line stays JSON."""
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line that a crash cut short
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)


def _start_wandb(logging: LoggingConfig, folder: Path, config: RiverConfig, name: str) -> Any:
    if logging.wandb == "off":
        return None
    import wandb

    say(f"wandb: {logging.wandb}, project {logging.wandb_project}, files in {folder}/wandb")
    return wandb.init(
        project=logging.wandb_project,
        name=f"{config.dataset.name}-{name}",
        id=f"{config.dataset.name}-{name}",
        resume="allow",
        dir=str(folder),
        mode=logging.wandb,
        config=config.model_dump(mode="json"),
    )


class StepTimer:
    """Steps a second since the last reading."""

    def __init__(self) -> None:
        self._time, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        self._steps += 1

    def rate(self) -> float:
        now = time.perf_counter()
        rate = self._steps / max(now - self._time, 1e-9)
        self._time, self._steps = now, 0
        return rate

    def rate_after(self, seconds: float) -> float | None:
        """As `rate`, without beginning anew; None before so many seconds have gone."""
        elapsed = time.perf_counter() - self._time
        return self._steps / elapsed if elapsed >= seconds and self._steps else None
