"""What a run consists of: codes of its autoencoder, checkpoints, store, machine and configuration."""

from typing import Any

import numpy as np

from pipelines.encoding.store_summary import count_codes, perplexity, rates_text
from pipelines.errors import UserError
from pipelines.report.charts import Chart, Line
from pipelines.report.predictions import picture_file_url
from pipelines.report.run_files import Run
from pipelines.runtime.run_folder import Environment, describe_progress


def autoencoder_section(run: Run) -> dict[str, Any]:
    """The last validation's reconstructions, and which codes the store's latents fall on."""
    path = max((run.config.training_folder("autoencoder") / "reconstructions").glob("step_*.png"), default=None)
    sheet, problem = None, None
    if path is not None:
        try:
            sheet = picture_file_url(path)
        except (OSError, ValueError) as error:
            problem = f"{path}: cannot be shown: {error}; the next validation writes another one"
    usage = {cache.split: count_codes(cache) for cache in run.splits if cache.code_reader is not None}
    return {
        "sheet": sheet,
        "step": path and int(path.stem.removeprefix("step_")),
        "problem": problem,
        "usage": _code_usage(usage, run.splits[0].metadata.autoencoder.get("codes", 0)) if usage else None,
    }


def _code_usage(usage: dict[str, np.ndarray], codes: int) -> dict[str, Any]:
    """Table and chart of how often each code was chosen.

    Args:
        usage: split -> [2^16] counts.
        codes: of the codebook; where fewer than the last one in use, that one.
    """
    codes = max(codes, *(int(np.flatnonzero(counts).max(initial=0)) + 1 for counts in usage.values()))
    rows, lines = [], []
    for number, (split, counts) in enumerate(usage.items()):
        used, total = int((counts > 0).sum()), int(counts.sum())
        rows.append([split, total, used, f"{100 * used / codes:.3g} %", perplexity(counts)])
        share = 100 * np.sort(counts[:codes])[::-1] / max(1, total)
        # Codes that are never chosen have no place on a logarithmic scale.
        lines.append(Line(split, range(1, codes + 1), np.where(share > 0, share, np.nan), f"s{number % 5 + 1}"))
    lines.append(Line("uniform", [1, codes], [100 / codes] * 2, "reference"))
    return {
        "head": ["split", "positions", "codes in use", f"of {codes:,}", "perplexity"],
        "rows": rows,
        "chart": Chart(
            "How often each code is chosen", lines, "codes, the most frequent first", "% of positions", log_y=True
        ),
    }


def contents_section(run: Run) -> dict[str, Any]:
    """Checkpoints with the hashes they belong to, the store, the machine, and the configuration."""
    environment, path = run.read(Environment), run.path / "config.yaml"
    try:
        config = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        config = None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return {
        "checkpoints": [
            [name, describe_progress(checkpoint), checkpoint.path.name, _hashes(checkpoint.state)]
            for name, checkpoint in run.checkpoints.items()
            if checkpoint is not None
        ],
        "rates": rates_text(run.splits) if run.splits else "",
        "environment": environment,
        "config_text": config,
    }


def _hashes(state: dict[str, Any]) -> list[tuple[str, str]]:
    """What a checkpoint belongs to: (name, sha256)."""
    store, imported = state.get("store", {}), state.get("imported", {})
    found = {
        "store": store.get("fingerprint"),
        "autoencoder": store.get("autoencoder") or state.get("autoencoder"),
        "imported file": imported.get("sha256"),
        "imported weights": imported.get("weights"),
    }
    return [(name, str(value)) for name, value in found.items() if value]
