"""What `inspect` shows of a store: a summary, how far an incomplete one is, and a video decoded from its latents."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import latent_cache
from latent_cache import CorruptStoreError, IncompleteStoreError, LatentCache, LostManifestError
from latent_cache.schema import IDENTITY_VIEW, local_path
from pipelines.config import RiverConfig
from pipelines.encoding.verification import WAY_OUT, check_checksums
from pipelines.errors import CheckFailed, UserError
from pipelines.loading import find_autoencoder, load_trained_autoencoder, weights_digest
from pipelines.prediction.pictures import LEGIBLE_SIDE, enlargement, save_gif, to_video
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.context import RunContext, computing_in
from pipelines.runtime.files import stored_bytes
from pipelines.runtime.progress import duration, say

DECODE_FRAMES = 64  # frames per batch of the decoder
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
    """Print a summary of a store, or how far an incomplete one is; check it; decode one of its videos.

    Args:
        config: of the run with the autoencoder; needed for `gif` only.
        store: a local path, or a URL that fsspec knows.
        verify: read all of it and check the checksums.
        video: id of the video to decode; default: the first of `test`, or of the last split.
        view: of that video; default: identity.
        gif: where to write the decoded video.
    Raises:
        StoreError: no store, or one that cannot be reached; an incomplete one with `verify` or `gif`.
        CheckFailed: `verify` found damage; each finding was printed on stderr.
        UserError: no such video, or no autoencoder that decodes the store; `video` or `view` without `gif`.
    """
    if gif is None and (video is not None or view is not None):
        asked, name = ("--video", video) if video is not None else ("--view", view)
        raise UserError(f"{asked} {name} needs a file to write to, for example --gif {Path(name).name}.gif")
    if gif is not None and gif.suffix.lower() != ".gif":
        raise UserError(f"--gif {gif}: the name must end in .gif")
    if latent_cache.is_complete(store):
        try:
            for line in summary_of_complete(store):
                say(line)
        except CorruptStoreError:  # `verify` names it, with all other damage
            if not verify:
                raise
    else:
        for line in summary_of_incomplete(store):
            say(line)
        if verify or gif is not None:
            raise IncompleteStoreError(
                f"{store}: the store is not complete: finish it with `river encode`, then repeat"
            )
    if verify and (problem := check_checksums(store)[0]):
        raise CheckFailed(f"{store}: {problem}: {WAY_OUT}")
    if gif is not None:
        _save_video(config, run_context, store, video, view or IDENTITY_VIEW, gif)


def seal_store(store: str) -> None:
    """Give a complete store in a local folder a manifest, if all its checksums match; one with a manifest keeps it.

    Raises:
        StoreError: no complete store, no local folder, or one that is being written.
        CheckFailed: the store is damaged; each finding was printed on stderr.
    """
    try:
        if latent_cache.is_sealed(store):
            say(f"inspect: {store} has a manifest already; --verify compares its files with it")
            return
    except LostManifestError as error:
        say(f"inspect: {error}")
        latent_cache.unseal(store)
    if problem := check_checksums(store)[0]:
        raise CheckFailed(f"{store}: {problem}: {WAY_OUT}")
    latent_cache.seal(store)
    say(f"inspect: {store} has a manifest now")


def summary_of_complete(store: str) -> Iterator[str]:
    """Lines that say what a complete store holds.

    Raises:
        StoreError: it is damaged, or cannot be reached.
    """
    metadata = latent_cache.open_metadata(store)
    path = local_path(store)
    notes = latent_cache.open_notes(store)
    caches = [latent_cache.open(store, split) for split in latent_cache.splits(store)]
    written = ""
    if path is not None:
        written = f", written {_ago((path / 'zarr.json').stat().st_mtime)}, {stored_bytes(path) / 1e6:.1f} MB on disk"
    yield f"{store}: latents of {metadata.dataset}, {rates_text(caches)} frames/s; complete{written}"
    yield from _origin(metadata)
    for cache in caches:
        try:
            lines, skipped = list(_summary_of_split(cache)), list(notes.get("skipped", {}).get(cache.split, {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptStoreError(f"{store}/{cache.split}: its notes are damaged ({error!r}): {WAY_OUT}") from error
        yield from lines
        if skipped:
            names = ", ".join(skipped[:MOST_NAMES]) + (", ..." if len(skipped) > MOST_NAMES else "")
            yield f"         without {len(skipped)} video(s) that could not be decoded: {names}"
    mean, std = (np.array2string(values, precision=3) for values in (caches[0].mean, caches[0].std))
    yield f"  per channel    mean {mean}, std {std} (of the training split)"


def summary_of_incomplete(store: str) -> Iterator[str]:
    """Lines that say how far an incomplete store is.

    Raises:
        StoreError: no store.
    """
    try:
        metadata = latent_cache.open_metadata(store)
    except IncompleteStoreError:  # nothing but a lock
        yield f"{store}: no chunk is written yet; finish it with `river encode`"
        return
    yield f"{store}: latents of {metadata.dataset}, {metadata.fps:g} frames/s; not complete: `river encode` resumes it"
    yield from _origin(metadata)
    if local_path(store) is None:
        yield "  its progress is visible only on the machine that writes it"
        return
    for split, progress in latent_cache.open_progress(store).items():
        last = "" if progress.last_write is None else f", the last one {_ago(progress.last_write)}"
        yield (
            f"  {split:<6} {progress.written} of {progress.chunks} chunks are written{last}; {progress.frames} frames, "
            f"{progress.frames_per_chunk} per chunk"
        )


def rates_text(caches: Sequence[LatentCache]) -> str:
    """Frames per second of the videos: one number, or the lowest and the highest."""
    rates = np.concatenate([cache.video_fps for cache in caches])
    low, high = rates.min(), rates.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _origin(metadata: latent_cache.StoreMetadata) -> Iterator[str]:
    for title in ("preprocessing", "autoencoder", "software"):
        yield f"  {title:<14} " + ", ".join(f"{key} {value}" for key, value in getattr(metadata, title).items())


def _summary_of_split(cache: LatentCache) -> Iterator[str]:
    lengths, latents = cache.lengths, cache.latents
    views = list(dict.fromkeys(cache.video_views))
    chunk, reader = latents.chunks[0], cache.latent_reader
    shards = "" if latents.shards is None else f" in shards of {latents.shards[0] // chunk}"
    yield (
        f"  {cache.split:<6} {len(cache.video_ids)} videos of {lengths.min()} to {lengths.max()} frames"
        + (f" (views: {', '.join(views)})" if views != [IDENTITY_VIEW] else "")
        + f"; latents {'x'.join(map(str, latents.shape))} {latents.dtype}, {reader.chunk_count} chunks of "
        f"{chunk} frames{shards}, {cache.nbytes / 1e6:.1f} MB"
        + ("" if cache.preview is None else f"; preview {'x'.join(map(str, cache.preview.shape[1:3]))}")
        + ("" if cache.actions is None else f"; actions of {cache.actions.shape[1]} values")
    )
    notes = cache.notes
    if "appended_videos" in notes:
        yield f"         {notes['appended_videos']} videos were appended later; what follows is of the others"
    if "codes_used" in notes:
        yield (
            f"         {notes['codes_used']} of {cache.metadata.autoencoder['codes']} codes used, perplexity "
            f"{notes['code_perplexity']:.0f}; round trip {notes['round_trip_psnr']:.2f} dB; "
            f"{notes['codes_changed']:.3%} of codes changed by rounding"
        )


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


def _save_video(
    config: RiverConfig | None, run_context: RunContext, store: str, video: str | None, view: str, gif: Path
) -> None:
    """Write one video of a store as a GIF: decoded, or without an autoencoder here as its preview shows it."""
    checkpoint = None if config is None else find_autoencoder(config.shared.run_path)
    caches = [latent_cache.open(store, split) for split in reversed(latent_cache.splits(store))]
    cache = next((c for c in caches if video is None or video in c.video_ids), None)
    if cache is None:
        examples = ", ".join(caches[0].video_ids[:MOST_NAMES])
        raise UserError(f"{store} has no video {video!r}; some that it has: {examples}")
    name = cache.video_ids[0] if video is None else video
    row = cache.row(name, view)
    if checkpoint is None:
        video, how = _preview(config, cache, row), "copied from its preview"
    else:
        video, how = _decode(checkpoint, run_context, cache, row), "decoded"
    save_gif(gif, video, float(cache.video_fps[row]), enlargement(video.shape[2], LEGIBLE_SIDE))
    of_view = "" if view == IDENTITY_VIEW else f", view {view},"
    say(f"inspect: {name}{of_view} of {cache.split} {how} to {gif}")


def _preview(config: RiverConfig | None, cache: LatentCache, row: int) -> np.ndarray:
    """The small frames [n, y, x, 3] of a video. Raises UserError for a store without them: it has to be decoded."""
    if cache.preview is not None:
        return cache.video_preview(row)
    if config is None:
        raise UserError(
            f"{cache.url} has no preview, so --gif needs the autoencoder: name its run's configuration with --config"
        )
    raise UserError(f"{config.training_folder('autoencoder')} has no checkpoint, which is needed to decode {cache.url}")


def _decode(checkpoint: Checkpoint, run_context: RunContext, cache: LatentCache, row: int) -> np.ndarray:
    """The decoded frames [n, h, w, 3] of a video."""
    autoencoder = load_trained_autoencoder(checkpoint, run_context.device)
    wanted = cache.metadata.autoencoder["sha256"]
    if weights_digest(autoencoder) != wanted:
        raise UserError(f"{cache.url} was encoded by autoencoder {wanted[:12]}..., but {checkpoint.path} is another")
    with torch.inference_mode(), computing_in("fp32", run_context.device):
        latents = torch.from_numpy(cache.video(row).astype(np.float32)).to(run_context.device)
        frames = torch.cat([autoencoder.decode(part) for part in latents.split(DECODE_FRAMES)])
    return to_video(frames)


def _ago(moment: float) -> str:
    return f"{duration(max(0.0, time.time() - moment))} ago"
