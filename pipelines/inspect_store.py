"""`inspect`: what is in a store, and any of its videos decoded as a GIF."""

import time
from pathlib import Path

import numpy as np
import torch
import zarr

import latent_cache
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.pictures import save_gif
from pipelines.predictor import to_video
from pipelines.runtime.progress import say
from pipelines.runtime.session import Session
from pipelines.train_autoencoder import find_autoencoder, load_trained_autoencoder, weights_digest


def inspect_store(
    config: RiverConfig | None, session: Session, store: Path, video: str | None, gif: Path | None
) -> None:
    """Print a summary of a store; with `gif` decode one of its videos.

    Raises:
        StoreError: no store, or an incomplete one.
        UserError: no such video, or no autoencoder that decodes the store; a video without a GIF to write it to.
    """
    if video is not None and gif is None:
        raise UserError(f"--video {video}: say also where to write it, for example --gif {Path(video).name}.gif")
    if gif is not None and gif.suffix.lower() != ".gif":
        raise UserError(f"--gif {gif}: the name must end in .gif")
    metadata = latent_cache.open_metadata(store)
    age = (time.time() - (store / "zarr.json").stat().st_mtime) / 3600 if store.exists() else None
    say(
        f"{store}: latents of {metadata.dataset}, {metadata.fps:g} frames/s" + (f", {age:.1f} hours old" if age else "")
    )
    say("  preprocessing  " + ", ".join(f"{key} {value}" for key, value in metadata.preprocessing.items()))
    say("  autoencoder    " + ", ".join(f"{key} {str(value)[:16]}" for key, value in metadata.autoencoder.items()))
    say("  software       " + ", ".join(f"{key} {value}" for key, value in metadata.software.items()))
    for split in latent_cache.splits(store):
        cache = latent_cache.open(store, split)
        chunks = -(-cache.frames // cache.latents.chunks[0])
        lengths = cache.lengths
        say(
            f"  {split:<6} {len(cache.video_ids)} videos of {lengths.min()} to {lengths.max()} frames; latents "
            f"{'x'.join(map(str, cache.latents.shape))} {cache.latents.dtype}, {chunks} chunks of "
            f"{cache.latents.chunks[0]} frames, {cache.nbytes / 1e6:.1f} MB"
            + (f"; {code_usage(cache.codes, metadata)}" if cache.codes is not None else "")
        )
    mean, std = (np.array2string(values, precision=3) for values in (cache.mean, cache.std))
    say(f"  per channel    mean {mean}, std {std}")
    if gif is not None:
        save_video(config, session, store, video, gif)


def code_usage(codes: zarr.Array, metadata: latent_cache.StoreMetadata) -> str:
    """How many codes a split uses, and the perplexity of their use."""
    total = int(metadata.autoencoder["codes"])
    counts = np.zeros(total, np.int64)
    for start in range(0, codes.shape[0], codes.chunks[0]):
        counts += np.bincount(codes[start : start + codes.chunks[0]].ravel(), minlength=total)
    share = counts[counts > 0] / counts.sum()
    return f"{(counts > 0).sum()} of {total} codes, perplexity {np.exp(-(share * np.log(share)).sum()):.0f}"


def save_video(config: RiverConfig | None, session: Session, store: Path, video: str | None, gif: Path) -> None:
    """Decode one video of a store (by default the first of `test`, or of what there is) to a GIF."""
    if config is None:
        raise UserError("decoding needs the autoencoder: name the run's configuration with --config")
    checkpoint = find_autoencoder(config.run_path)
    if checkpoint is None:
        raise UserError(f"{config.run_path}/autoencoder holds no checkpoint, so {store} can't be decoded")
    autoencoder = load_trained_autoencoder(checkpoint, session.device)
    wanted = latent_cache.open_metadata(store).autoencoder["sha256"]
    if weights_digest(autoencoder) != wanted:
        raise UserError(f"{store} was encoded by autoencoder {wanted[:12]}..., but {checkpoint.path} is another")
    splits = latent_cache.splits(store)
    caches = [latent_cache.open(store, split) for split in reversed(splits)]
    cache = next((c for c in caches if video is None or video in c.video_ids), None)
    if cache is None:
        examples = ", ".join(caches[0].video_ids[:5])
        raise UserError(f"{store} has no video {video!r}; there are for example: {examples}")
    name = cache.video_ids[0] if video is None else video
    with torch.inference_mode():
        latents = torch.from_numpy(cache.video(name).astype(np.float32)).to(session.device)
        frames = torch.cat([autoencoder.decode(part) for part in latents.split(64)])
    gif.parent.mkdir(parents=True, exist_ok=True)
    save_gif(gif, to_video(frames[None])[0], cache.metadata.fps)
    say(f"inspect: {name} of {cache.split} decoded to {gif}")
