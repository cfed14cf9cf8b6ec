"""What a run consists of: codes of its autoencoder, checkpoints, store, machine and configuration."""

from typing import Any

import numpy as np
from PIL import Image

import latent_cache
from latent_cache import LatentCache
from pipelines.encoding.store_summary import count_codes, perplexity
from pipelines.errors import UserError
from pipelines.report.charts import Line, chart
from pipelines.report.embedded_pictures import encode_all
from pipelines.report.quality import flattened
from pipelines.report.run_files import Run
from pipelines.runtime.runs import Environment, describe_progress

# Bytes of the sheet of reconstructions.
SHEET_BUDGET = 1_200_000


def autoencoder_section(run: Run) -> dict[str, Any]:
    """The last validation's reconstructions, and which codes the store's latents fall on."""
    sheets = sorted((run.path / "autoencoder" / "reconstructions").glob("step_*.png"))
    pictures, problem = [], ""
    try:
        for path in sheets[-1:]:
            with Image.open(path) as image:
                pictures = encode_all([np.asarray(image.convert("RGB"))], SHEET_BUDGET)
    except (OSError, ValueError) as error:
        problem = f"{sheets[-1]}: cannot be shown: {error}; the next validation writes another one"
    caches = _open_splits(run)
    usage = {cache.split: count_codes(cache) for cache in caches if cache.code_reader is not None}
    return {
        "sheets": [
            (int(path.stem.removeprefix("step_")), url) for path, url in zip(sheets[-1:], pictures, strict=False)
        ],
        "problem": problem,
        "usage": _code_usage(usage, caches[0].metadata.autoencoder.get("codes", 0)) if usage else None,
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
        rows.append([split, f"{total:,}", f"{used:,}", f"{100 * used / codes:.3g} %", f"{perplexity(counts):.0f}"])
        share = 100 * np.sort(counts[:codes])[::-1] / max(1, total)
        # Codes that are never chosen have no place on a logarithmic scale.
        lines.append(Line(split, range(1, codes + 1), np.where(share > 0, share, np.nan), f"s{number % 5 + 1}"))
    lines.append(Line("uniform", [1, codes], [100 / codes] * 2, "reference"))
    return {
        "head": ["split", "positions", "codes in use", f"of {codes:,}", "perplexity"],
        "rows": rows,
        "chart": chart(
            "How often each code is chosen", lines, "codes, the most frequent first", "% of positions", log_y=True,
            note="Perplexity: this many codes, used equally often, would carry as much information.",
        ),
    }  # fmt: skip


def contents_section(run: Run) -> dict[str, Any]:
    """Checkpoints with the hashes they belong to, the store, the machine, and the configuration."""
    path, environment = run.path / "config.yaml", run.read(Environment)
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
        "store": _store(run),
        "environment": environment and flattened(environment.model_dump(exclude={"software"}) | environment.software),
        "config_path": path,
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


def _open_splits(run: Run) -> list[LatentCache]:
    """The splits of the store; none where it is not done."""
    store = run.stages["store"]
    return [latent_cache.open(store.path, split) for split in latent_cache.splits(store.path)] if store.is_done else []


def _store(run: Run) -> dict[str, Any] | None:
    """Rows of a table of splits, and all attributes; None where the store is not done."""
    caches = _open_splits(run)
    if not caches:
        return None
    metadata = caches[0].metadata
    facts = {"path": caches[0].url, "data set": metadata.dataset, "frames per second": f"{metadata.fps:g}"}
    facts |= {"fingerprint": caches[0].fingerprint}
    for name in ("preprocessing", "autoencoder", "software"):
        facts |= dict(flattened(getattr(metadata, name), f"{name}."))
    rows = [
        [
            cache.split,
            f"{len(cache.video_ids):,}",
            f"{cache.frames:,}",
            "x".join(map(str, cache.latent_shape)),
            f"{cache.nbytes / 1e6:.1f}",
            f"{cache.notes['round_trip_psnr']:.2f}" if "round_trip_psnr" in cache.notes else "",
        ]
        for cache in caches
    ]
    return {"rows": rows, "facts": facts.items()}
