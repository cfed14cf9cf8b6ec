"""The autoencoder: reconstructions, and which codes the store's latents fall on."""

from collections.abc import Mapping

import numpy as np

import latent_cache
from latent_cache import LatentCache, StoreError
from pipelines.report.charts import Line, chart
from pipelines.report.embedding import data_url, encode_all, smaller
from pipelines.report.inputs import Problem, Run
from pipelines.report.markup import Html, code, el, join, note, table
from pipelines.report.recorded_pictures import read_reconstructions

MOST_IMAGES = 16
LARGEST_SIDE = 256
# Bytes of all reconstructions.
BUDGET = 1_200_000
STYLES = ("s1", "s2", "s3", "s4", "s5")


def autoencoder_section(run: Run) -> Html:
    """Reconstructions and code usage; raises `Problem` where the store is damaged."""
    return join([_reconstructions(run), el("h3", "Code usage"), _code_usage(run)])


def _reconstructions(run: Run) -> Html:
    sheets = sorted((run.path / "autoencoder" / "reconstructions").glob("step_*.png"))
    if not sheets:
        return note(
            "missing", "There is no sheet of reconstructions: ", code(run.command("train-autoencoder")),
            " writes one at each validation; weights that were imported have none.",
        )  # fmt: skip
    try:
        columns = read_reconstructions(sheets[-1], run.image_size)[:MOST_IMAGES]
    except ValueError as error:
        return note("problem", error)
    side = run.image_size
    divisor = next(part for part in range(1, side + 1) if side % part == 0 and side // part <= LARGEST_SIDE)
    pictures = [np.concatenate(list(smaller(column, divisor)), axis=0) for column in columns]
    encoded = encode_all(pictures, BUDGET)
    if encoded is None:
        return note("problem", f"{sheets[-1]}: the pictures would make the page too large")
    step = int(sheets[-1].stem.removeprefix("step_"))
    images = [
        el(
            "img", src=data_url(picture), width=pictures[0].shape[1], height=pictures[0].shape[0], loading="eager",
            alt=f"validation image {number}, its reconstruction, and four times the difference",
        )
        for number, picture in enumerate(encoded, start=1)
    ]  # fmt: skip
    words = f"Validation images after step {step}, below each its reconstruction and four times the difference."
    return join([el("p", words, class_="lead"), el("div", images, class_="reconstructions")])


def _code_usage(run: Run) -> Html:
    path = run.config.store_path
    try:
        if not latent_cache.is_complete(path):
            return note("missing", f"There is no complete store {path}: ", code(run.command("encode")), " makes it.")
        caches = [latent_cache.open(path, split) for split in latent_cache.splits(path)]
        counts = {cache.split: count_codes(cache) for cache in caches if cache.code_reader is not None}
    except StoreError as error:
        raise Problem(str(error)) from None
    if not counts:
        return note(
            "missing", "The store has no codes, which are optional: ",
            code(run.command("encode") + ' ARGS="--set cache.codes=true --overwrite"'), " adds them.",
        )  # fmt: skip
    total = number_of_codes(caches[0].metadata.autoencoder, counts)
    rows = []
    for split, of_split in counts.items():
        used = int((of_split > 0).sum())
        share = f"{100 * used / total:.3g} %"
        rows.append([split, f"{of_split.sum():,}", f"{used:,}", share, f"{perplexity(of_split):.0f}"])
    heads = ["split", "positions", "codes in use", f"of {total:,}", "perplexity"]
    lines = [
        _curve(split, of_split, total, STYLES[number % len(STYLES)])
        for number, (split, of_split) in enumerate(counts.items())
    ]
    lines.append(Line("all alike", [1, total], [100 / total] * 2, "reference"))
    remark = "Perplexity: as many codes, used equally often, would carry as much information."
    figure = chart(
        "How often each code is chosen", lines, "codes, the most frequent first", "% of positions", log_y=True,
        note=remark,
    )  # fmt: skip
    return el("div", table(heads, rows, "code usage"), figure, class_="beside")


def count_codes(cache: LatentCache) -> np.ndarray:
    """[2^16] int64: how often each code stands in a split.

    Raises:
        StoreError: a chunk is damaged.
    """
    reader = cache.code_reader
    assert reader is not None
    counts = np.zeros(2**16, np.int64)
    for start in range(0, cache.frames, reader.chunk_frames):
        codes = reader.read(start, min(start + reader.chunk_frames, cache.frames))
        counts += np.bincount(codes.ravel(), minlength=len(counts))
    return counts


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of the codes' frequencies."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def number_of_codes(autoencoder: Mapping[str, object], counts: Mapping[str, np.ndarray]) -> int:
    """How many codes there are; where the store does not tell, up to the last one that is used."""
    total = autoencoder.get("codes")
    last = max(int(np.flatnonzero(of_split).max(initial=0)) + 1 for of_split in counts.values())
    return max(total, last) if isinstance(total, int) else last


def _curve(split: str, counts: np.ndarray, total: int, style: str) -> Line:
    ranked = np.sort(counts[:total])[::-1]
    share = 100 * ranked / max(1, ranked.sum())
    # Codes that nobody chose have no place on a logarithmic scale.
    return Line(split, range(1, total + 1), [float(value) if value else None for value in share], style)
