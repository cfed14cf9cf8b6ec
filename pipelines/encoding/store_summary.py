"""`inspect`: what is in a store, whether it is sound, and any of its videos decoded as a GIF."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import latent_cache
from latent_cache import CorruptStoreError, IncompleteStoreError, LatentCache
from latent_cache.schema import IDENTITY_VIEW, local_path
from pipelines.config import RiverConfig
from pipelines.encoding.verify_store import check_checksums
from pipelines.errors import CheckFailed, UserError
from pipelines.loading import find_autoencoder, load_trained_autoencoder, weights_digest
from pipelines.prediction.pictures import save_gif, to_video
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import duration, say

# Latents that are decoded at once.
DECODE_FRAMES = 64
MOST_NAMES = 5


def inspect_store(
    config: RiverConfig | None,
    run_context: RunContext,
    store: str,
    *,
    verify: bool = False,
    video: str | None = None,
    view: str | None = None,
    gif: Path | None = None,
) -> None:
    """Print a summary of a store, of an incomplete one how far it is; check it; decode one of its videos.

    Args:
        config: of the run that has the autoencoder; needed with `gif` alone.
        store: a local path, or a URL that fsspec knows.
        verify: read all of it and check the checksums.
        video: id of the video that is decoded; by default the first of `test`, or of what there is.
        view: of that video; by default as it is.
        gif: where the decoded video goes.
    Raises:
        StoreError: no store, or one that cannot be reached; an incomplete one with `verify` or `gif`.
        CheckFailed: `verify` found damage; each was printed on stderr.
        UserError: no such video, or no autoencoder that decodes the store; a video without a GIF to write it to.
    """
    if gif is None and (video is not None or view is not None):
        asked = f"--video {video}" if video is not None else f"--view {view}"
        name = Path(video or view or "").name
        raise UserError(f"{asked}: say also where to write it, for example --gif {name}.gif")
    if gif is not None and gif.suffix.lower() != ".gif":
        raise UserError(f"--gif {gif}: the name must end in .gif")
    if latent_cache.is_complete(store):
        try:
            describe_complete(store)
        except CorruptStoreError:  # which the check names, with all others
            if not verify:
                raise
    else:
        describe_incomplete(store)
        if verify or gif is not None:
            raise IncompleteStoreError(f"{store}: the store is not complete: `make encode` goes on; then ask again")
    if verify and (problem := check_checksums(store).problem):
        raise CheckFailed(f"{store}: {problem}: restore from a copy, or encode again with `encode --overwrite`")
    if gif is not None:
        save_video(config, run_context, store, video, view or IDENTITY_VIEW, gif)


def describe_complete(store: str) -> None:
    """Print what a complete store holds.

    Raises:
        StoreError: it is damaged, or cannot be reached.
    """
    metadata = latent_cache.open_metadata(store)
    path = local_path(store)
    written = ""
    if path is not None:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        written = f", written {_ago((path / 'zarr.json').stat().st_mtime)}, {size / 1e6:.1f} MB on disk"
    say(f"{store}: latents of {metadata.dataset}, {metadata.fps:g} frames/s; complete{written}")
    _describe_origin(metadata)
    notes = latent_cache.open_notes(store)
    cache = None
    for split in latent_cache.splits(store):
        cache = latent_cache.open(store, split)
        _describe_split(cache)
        skipped = list(notes.get("skipped", {}).get(split, {}))
        if skipped:
            names = ", ".join(skipped[:MOST_NAMES]) + (", ..." if len(skipped) > MOST_NAMES else "")
            say(f"         {len(skipped)} video(s) could not be decoded and are left out: {names}")
    assert cache is not None, "a complete store has splits"
    mean, std = (np.array2string(values, precision=3) for values in (cache.mean, cache.std))
    say(f"  per channel    mean {mean}, std {std} (of the training split)")


def describe_incomplete(store: str) -> None:
    """Print what is there of a store that is being written, and how far it is.

    Raises:
        StoreError: no store.
    """
    try:
        metadata = latent_cache.open_metadata(store)
    except IncompleteStoreError:  # a lock and no more
        say(f"{store}: only begun, no chunk is written; `make encode` goes on")
        return
    say(f"{store}: latents of {metadata.dataset}, {metadata.fps:g} frames/s; not complete: `make encode` goes on")
    _describe_origin(metadata)
    if local_path(store) is None:
        say("  how far it is can be seen only where it is written")
        return
    progress = latent_cache.open_progress(store)
    for split, there in progress.items():
        last = "" if there.last_write is None else f", the last one {_ago(there.last_write)}"
        say(
            f"  {split:<6} {there.written} of {there.chunks} chunks are written{last}; {there.frames} frames, "
            f"{there.frames_a_chunk} a chunk"
        )
    written, chunks = (sum(getattr(part, name) for part in progress.values()) for name in ("written", "chunks"))
    say(f"  in all {written} of {chunks} chunks")


def _describe_origin(metadata: latent_cache.StoreMetadata) -> None:
    for title, values in (
        ("preprocessing", metadata.preprocessing),
        ("autoencoder", metadata.autoencoder),
        ("software", metadata.software),
    ):
        say(f"  {title:<14} " + ", ".join(f"{key} {_words(value)}" for key, value in values.items()))


def _describe_split(cache: LatentCache) -> None:
    lengths, latents = cache.lengths, cache.latents
    # The views of a video lie side by side.
    views = list(dict.fromkeys(cache.video_views))
    chunk, reader = latents.chunks[0], cache.latent_reader
    shards = "" if latents.shards is None else f" in shards of {latents.shards[0] // chunk}"
    say(
        f"  {cache.split:<6} {len(cache.video_ids)} videos of {lengths.min()} to {lengths.max()} frames"
        + (f" (views: {', '.join(views)})" if views != [IDENTITY_VIEW] else "")
        + f"; latents {'x'.join(map(str, latents.shape))} {latents.dtype}, {reader.chunk_count} chunks of "
        f"{chunk} frames{shards}, {cache.nbytes / 1e6:.1f} MB"
    )
    try:
        usage = cache.notes if "code_perplexity" in cache.notes else code_usage(cache)
    except CorruptStoreError as error:
        say(f"         codes cannot be counted: {error}")
        usage = {}
    if usage:
        total = cache.metadata.autoencoder.get("codes", "?")
        text = f"{usage['codes_used']} of {total} codes used, perplexity {usage['code_perplexity']:.0f}"
        if "round_trip_psnr" in usage:
            text += f"; round trip {usage['round_trip_psnr']:.2f} dB"
        if "codes_changed" in usage:
            text += f"; {usage['codes_changed']:.3%} of codes changed by rounding"
        say(f"         {text}")


def code_usage(cache: LatentCache) -> Mapping[str, Any]:
    """How many codes a split uses, and their perplexity; empty for a store without codes."""
    if cache.code_reader is None:
        return {}
    counts = count_codes(cache)
    return {"codes_used": int((counts > 0).sum()), "code_perplexity": perplexity(counts)}


def count_codes(cache: LatentCache) -> np.ndarray:
    """[2^16] int64: how often each code is in a split that has codes.

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


def save_video(
    config: RiverConfig | None, run_context: RunContext, store: str, video: str | None, view: str, gif: Path
) -> None:
    """Decode one video of a store to a GIF."""
    if config is None:
        raise UserError("decoding needs the autoencoder: name the run's configuration with --config")
    checkpoint = find_autoencoder(config.run_path)
    if checkpoint is None:
        raise UserError(f"{config.run_path}/autoencoder holds no checkpoint, so {store} can't be decoded")
    autoencoder = load_trained_autoencoder(checkpoint, run_context.device)
    wanted = latent_cache.open_metadata(store).autoencoder["sha256"]
    if weights_digest(autoencoder) != wanted:
        raise UserError(f"{store} was encoded by autoencoder {wanted[:12]}..., but {checkpoint.path} is another")
    caches = [latent_cache.open(store, split) for split in reversed(latent_cache.splits(store))]
    cache = next((c for c in caches if video is None or video in c.video_ids), None)
    if cache is None:
        examples = ", ".join(caches[0].video_ids[:MOST_NAMES])
        raise UserError(f"{store} has no video {video!r}; there are for example: {examples}")
    name = cache.video_ids[0] if video is None else video
    with torch.inference_mode():
        latents = torch.from_numpy(cache.video(name, view).astype(np.float32)).to(run_context.device)
        frames = torch.cat([autoencoder.decode(part) for part in latents.split(DECODE_FRAMES)])
    gif.parent.mkdir(parents=True, exist_ok=True)
    save_gif(gif, to_video(frames), cache.metadata.fps)
    of_view = "" if view == IDENTITY_VIEW else f", view {view},"
    say(f"inspect: {name}{of_view} of {cache.split} decoded to {gif}")


def _ago(moment: float) -> str:
    return f"{duration(max(0.0, time.time() - moment))} ago"


def _words(value: object) -> str:
    """A value of the store's attributes in a line: long digests cut short, lists and mappings without their marks."""
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_words(part)}" for key, part in value.items()) + ")"
    if isinstance(value, list):
        return " ".join(map(_words, value))
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text
