"""`encode --verify`: all checksums of a store, and some of its frames encoded again. Writes nothing."""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

import latent_cache
from latent_cache import CorruptStoreError, DamagedFramesError, LatentCache
from latent_cache.schema import IDENTITY_VIEW
from pipelines.config import RiverConfig
from pipelines.data.datasets import open_raw_splits
from pipelines.encoding.frame_verifier import FrameCheck, FrameVerifier, draw_frames
from pipelines.encoding.store_checks import check_sources, store_status
from pipelines.errors import CheckFailed, UserError
from pipelines.loading import find_autoencoder, load_trained_autoencoder
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import size_text
from pipelines.runtime.progress import progress, say
from pipelines.runtime.run_folder import software_versions
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.videos import VideoError, VideoSource, dataset_root

# Up to this many videos of a damaged chunk are named; of more, the first, the last, and their rows.
MOST_NAMES = 20
CHECKSUMS_ONLY = "or check only the checksums, which needs neither videos nor autoencoder: `encode --verify 0`"
WAY_OUT = "restore the files from a copy, or encode again with `encode --overwrite`"


def verify_store(config: RiverConfig, run_context: RunContext, count: int) -> None:
    """Check all checksums of the configuration's store, and encode `count` of its frames again.

    Raises:
        CheckFailed: something is damaged or wrong; each finding was printed on stderr.
        UserError: the store is missing, incomplete, or of another autoencoder, other preprocessing or other videos
            than those that are here; `count` is above 0 and autoencoder or videos are not here.
    """
    path = config.store_path
    if run_context.overwrite:
        raise UserError("--verify writes nothing: remove --overwrite, or remove --verify to encode again")
    status = store_status(config)
    if status.state == "conflicting":
        raise UserError(status.detail)
    if not status.is_done:
        raise UserError(f"{path}: {status.detail}: run the same `river encode` without --verify first")
    if count:
        autoencoder, splits = _load_autoencoder(config, run_context), _open_videos(config)
        with contextlib.suppress(CorruptStoreError):  # damaged names are listed below, with all other damage
            check_sources(config, splits)
    problem, caches = check_checksums(str(path))
    problems = [problem]
    if not count:
        say("verify: 0 frames encoded again")
    elif not caches:
        problems.append("no frame was encoded again, since names or offsets of videos are damaged")
    else:
        problems += _check_frames(config, caches, FrameVerifier(caches, splits, autoencoder, run_context.device), count)
    if any(problems):
        raise CheckFailed(f"{path}: {'; '.join(filter(None, problems))}: {WAY_OUT}")


def check_checksums(store: str) -> tuple[str, list[LatentCache]]:
    """Read all chunks, names and offsets of a complete store. Each damage is printed on stderr, with file and videos.

    Returns:
        What is wrong, empty when nothing is; and all splits, or none when names or offsets of videos are damaged.
    Raises:
        StoreError: no complete store, or one that cannot be reached.
    """
    findings: list[str] = []

    def tell(text: str) -> None:
        findings.append(text)
        _print_finding(text)

    names_are_sound, caches = True, []
    for split in latent_cache.splits(store):
        try:
            caches.append(latent_cache.open(store, split))
        except CorruptStoreError as error:
            names_are_sound = False
            tell(f"{error}. The other files of {split} were not checked")
    for error in latent_cache.codebook_damages(store):
        tell(str(error))
    readers = {cache: cache.frame_readers.values() for cache in caches}
    chunks = sum(reader.chunk_count for group in readers.values() for reader in group)
    size = sum(reader.array.nbytes for group in readers.values() for reader in group)
    with progress(total=chunks, description="checksums", unit="chunk") as bar:

        def cause(damage: DamagedFramesError | None) -> tuple[str, str] | None:
            bar.update()
            return None if damage is None else (damage.file, damage.what)

        for cache in caches:
            index_damages = list(cache.index_damages())
            for error in index_damages:
                tell(str(error))
            names_are_sound &= not index_damages
            for reader in readers[cache]:
                # Adjacent chunks in one file with one cause, such as a missing shard, are one damage.
                for found, group in itertools.groupby(reader.damages(), cause):
                    if found is None:
                        continue
                    joined = list(group)
                    start, stop = joined[0].start, joined[-1].stop
                    videos = "videos of unknown names" if index_damages else _name_videos(cache, start, stop)
                    tell(f"{' '.join(found)}. It carries frames {start} to {stop - 1} of {cache.split}, of {videos}")
    for text in _exchanged_files(store, findings):
        tell(text)
    if findings:
        return f"{len(findings)} damaged file(s) or chunk(s), listed above", caches if names_are_sound else []
    manifest = "checksums and the manifest" if latent_cache.is_sealed(store) else "checksums"
    *names, last = caches[0].frame_readers
    arrays = f"{', '.join(names)} and {last}" if names else last
    say(
        f"verify: {store}: all {chunks} chunks of {arrays}, {size_text(size)}, and the "
        f"names and offsets of all videos match their {manifest}"
    )
    return "", caches


def _exchanged_files(store: str, findings: Sequence[str]) -> Iterator[str]:
    """What `findings` do not tell of files that differ from the manifest: one text for each array and kind."""
    with progress(description="manifest", unit="file") as bar:
        kinds: dict[tuple[str, str], list[str]] = {}
        for key, what in latent_cache.changed_files(store):
            bar.update()
            if what and not any(f"{key} " in finding for finding in findings):
                kinds.setdefault((key.partition("/c/")[0], what), []).append(key)
    for (_, what), keys in kinds.items():
        more = f", and so are {len(keys) - 1} more files of this array" if len(keys) > 1 else ""
        yield f"{store}/{keys[0]} {what}{more}"


def _load_autoencoder(config: RiverConfig, run_context: RunContext) -> Autoencoder:
    checkpoint = find_autoencoder(config.shared.run_path)
    if checkpoint is None:
        raise UserError(
            f"{config.training_folder('autoencoder')} has no checkpoint, which is needed to encode frames again: "
            f"restore it, {CHECKSUMS_ONLY}"
        )
    return load_trained_autoencoder(checkpoint, run_context.device)


def _open_videos(config: RiverConfig) -> dict[str, VideoSource]:
    """The raw videos that are here; nothing is fetched, since verifying writes nothing."""
    root = dataset_root(config.dataset, config.data_root)
    if config.dataset.source != "shapes" and not root.exists():
        raise UserError(
            f"{root} does not exist: the raw videos are needed to encode frames again: restore them, {CHECKSUMS_ONLY}"
        )
    try:
        return dict(open_raw_splits(config))
    except VideoError as error:
        raise UserError(f"{error}; {CHECKSUMS_ONLY}") from error


def _check_frames(
    config: RiverConfig, caches: Sequence[LatentCache], verifier: FrameVerifier, count: int
) -> Iterator[str]:
    """Encode drawn frames again. Yields what is wrong with them."""
    drawn = draw_frames(caches, count, config.seed)
    checks: list[FrameCheck] = []
    with progress(total=len(drawn), description="encode again", unit="frame") as bar:
        for check in verifier.check(drawn):
            bar.update()
            checks.append(check)
            if check.problem:
                _print_finding(check.problem)
    compared = [check for check in checks if check.compared]
    wrong = sum(bool(check.problem) for check in compared)
    rounded = [check.deviation for check in compared if not check.bit_equal and not check.problem]
    text = (
        f"verify: {len(drawn)} of {sum(cache.frames for cache in caches)} frames, of "
        f"{len({check.video for check in checks})} video(s), encoded again: "
        f"{sum(check.bit_equal for check in compared)} equal bit for bit"
    )
    if rounded:
        here, there = software_versions(), caches[0].metadata.software
        others = [f"{name} {there[name]}, here {here.get(name)}" for name in there if there[name] != here.get(name)]
        text += (
            f", {len(rounded)} within the tolerance: they deviate by at most {max(rounded):.1%} of it, which another "
            f"device or library version explains (the store's libraries: {'; '.join(others) or 'the same as here'})"
        )
    say(text)
    if wrong:
        yield f"{wrong} of {len(compared)} frames differ from what their videos encode to, listed above"
    if len(compared) < len(drawn):
        yield f"{len(drawn) - len(compared)} frame(s) could not be compared, listed above"


def _name_videos(cache: LatentCache, start: int, stop: int) -> str:
    """Names of the videos that frames `start` to `stop` (excluded) of a split belong to."""
    first, last = (int(row) for row in cache.offsets.searchsorted([start, stop - 1], side="right") - 1)
    rows = range(first, last + 1)

    def name(row: int) -> str:
        view = cache.video_views[row]
        return repr(cache.video_ids[row]) + ("" if view == IDENTITY_VIEW else f" ({view})")

    if len(rows) <= MOST_NAMES:
        return f"{len(rows)} video(s): " + ", ".join(map(name, rows))
    return f"{len(rows)} videos, rows {first} to {last}: {name(first)}, {name(first + 1)}, ..., {name(last)}"


def _print_finding(text: str) -> None:
    """Print on stderr, also with --quiet, without tearing a progress bar apart."""
    tqdm.write(f"verify: {text}", file=sys.stderr)
