"""Names, attributes and arrays of the store, and the checks that recognize it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.errors import ContainsArrayError
from zarr.storage import LocalStore

from latent_cache.errors import (
    REMAKE,
    RESTORE,
    CorruptStoreError,
    IncompleteStoreError,
    LostManifestError,
    StoreError,
)
from latent_cache.manifest import MANIFEST, MANIFEST_KEY, CheckedStore, ManifestError
from latent_cache.reading.remote import open_remote

FORMAT = "river-latents"
FORMAT_VERSION = 1

# Below about 1 MiB the cost per chunk (0.1-0.3 ms, whatever its size) is visible in the loading time.
CHUNK_BYTES = 8 * 2**20
# More files than this burden file systems and copies: then chunks are grouped into shards.
MOST_FILES, SHARD_CHUNKS = 5000, 8
# More than any store has; metadata can claim any number.
MOST_VIDEOS, MOST_CHUNKS, MOST_FPS = 10**8, 10**7, 10**6
# Names and offsets per chunk, so that one name is read without all the others.
NAME_CHUNK, OFFSET_CHUNK = 2**14, 2**20

LATENTS, CODES, CODEBOOK, PREVIEW, ACTIONS = "latents", "codes", "codebook", "preview", "actions"
VIDEO_OFFSET, VIDEO_ID, VIDEO_VIEW, VIDEO_FINGERPRINT = "video_offset", "video_id", "video_view", "video_fingerprint"
VIDEO_FPS, VIDEO_SIZE = "video_fps", "video_size"
# Arrays beside the latents with a value per frame, none of which every store has, and their types.
FRAME_TYPES = {CODES: np.dtype(np.uint16), PREVIEW: np.dtype(np.uint8), ACTIONS: np.dtype(np.float32)}
# Stores that were written before these arrays existed have none of them.
DIMENSIONS = {
    LATENTS: ("frame", "channel", "y", "x"),
    CODES: ("frame", "y", "x"),
    PREVIEW: ("frame", "preview_y", "preview_x", "color"),  # xarray needs one size for each name
    ACTIONS: ("frame", "action"),
    VIDEO_OFFSET: ("video_boundary",),
    VIDEO_ID: ("video",),
    VIDEO_VIEW: ("video",),
    VIDEO_FINGERPRINT: ("video",),
    VIDEO_FPS: ("video",),
    VIDEO_SIZE: ("video", "width_height"),
    CODEBOOK: ("code", "channel"),
}
DESCRIPTIONS = {
    LATENTS: "Outputs of the autoencoder's encoder before quantization, one per frame; the videos lie end to end. The "
    "attributes mean and std are those of each channel over the training split, in every split: (latents - mean) / std "
    "is what a flow with flow.training.standardize sees. To decode: nearest code of each position, then the decoder.",
    CODES: "Row of the nearest vector in /codebook for each position of the latents.",
    PREVIEW: "The frames as the autoencoder saw them, made small: RGB, 0 to 255.",
    ACTIONS: "What the robot was told to do at each frame; a mirrored view has the actions of its video.",
    VIDEO_OFFSET: "Video i is frames video_offset[i] to video_offset[i + 1], the latter excluded.",
    VIDEO_ID: "Name of each video.",
    VIDEO_VIEW: "View of each video: identity is the video itself, others are augmented copies.",
    VIDEO_FINGERPRINT: "Digest of each source video when it was encoded.",
    VIDEO_FPS: "Frames per second of each video, as its frames are stored.",
    VIDEO_SIZE: "Width and height of each source video in pixels, before preprocessing; 0 where it is drawn, not read.",
    CODEBOOK: "Vector of each code, as the decoder takes it: codebook[codes] with the channels moved to axis 1 are the "
    "quantized latents.",
}

TRAIN = "train"  # the split whose statistics standardize all splits
SPLIT_ORDER = (TRAIN, "val", "test")
IDENTITY_VIEW = "identity"

PROGRESS_FOLDER = ".encoding"  # the writer's lock and markers; removed from a complete store


@dataclass(frozen=True)
class StoreMetadata:
    """What the latents of a store were made from: the attributes of its root group.

    Args:
        dataset: name of the data set.
        fps: the most common rate of the training videos, in frames per second after the frame step. Each video's own
            is in the array `video_fps`; in stores without it, all videos have this one.
        preprocessing: image size, resize filter, crop, frame step.
        autoencoder: at least `sha256` of the weights; also architecture and down-sampling factor.
        software: versions that wrote it. Stores that differ only here, or in `fps`, have the same latents.
    Raises:
        ValueError: a value of another type or that JSON cannot represent, or no `autoencoder.sha256`.
    """

    dataset: str
    fps: float
    preprocessing: dict[str, Any]
    autoencoder: dict[str, Any]
    software: dict[str, Any]

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            try:
                # Compared with values read from JSON: a tuple given here must equal the list that is read.
                object.__setattr__(self, name, json.loads(json.dumps(value, allow_nan=False)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"metadata.{name} = {value!r} cannot be written as JSON: {error}") from error
        rate = self.fps
        if not isinstance(self.dataset, str) or isinstance(rate, bool) or not isinstance(rate, int | float):
            raise ValueError(f"metadata.dataset = {self.dataset!r}, fps = {rate!r}: expected a name and a number")
        if not 0 <= rate <= MOST_FPS:
            raise ValueError(f"metadata.fps = {rate!r}: expected frames per second, at most {MOST_FPS}")
        for name in ("preprocessing", "autoencoder", "software"):
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"metadata.{name} = {value!r}: expected keys and values")
        if not self.autoencoder.get("sha256"):
            raise ValueError(
                f"metadata.autoencoder = {self.autoencoder!r}: `sha256`, the digest of the weights, is missing; it "
                "identifies the autoencoder that decodes the store"
            )

    def to_attrs(self, splits: Sequence[str], complete: bool) -> dict[str, Any]:
        """The root group's attributes, in the order in which they are written."""
        known = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return known | {"splits": in_order(splits), "complete": complete}

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any], url: str) -> "StoreMetadata":
        """Inverse of `to_attrs`.

        Raises:
            CorruptStoreError: a missing or invalid attribute.
        """
        try:
            return cls(**{name: attrs[name] for name in cls.__dataclass_fields__})
        except (KeyError, ValueError, AttributeError) as error:
            raise CorruptStoreError(
                f"{url}: the root attributes are damaged ({error}): write the store again with --overwrite"
            ) from error

    def differences(self, other: "StoreMetadata") -> list[str]:
        """Differences that matter for latents, as lines `key: <value of self> here, <value of other> there`."""
        here, there = dict(_flatten(asdict(self))), dict(_flatten(asdict(other)))
        return [
            f"{key}: {here.get(key)!r} here, {there.get(key)!r} there"
            for key in sorted(here.keys() | there.keys())
            if not key.startswith(("software", "fps")) and here.get(key) != there.get(key)
        ]


def has_only_begun(folder: Path) -> bool:
    """Whether nothing of a store that a writer left is worth keeping.

    It stopped while it removed an older store or wrote the documents of this one: some are missing or, after a loss of
    power, cut off, and there is no chunk.
    """
    if not (folder / PROGRESS_FOLDER).exists():
        return False
    if not (folder / "zarr.json").exists():
        return True
    return not any(folder.glob(f"*/{LATENTS}/c/*")) and not all(map(_is_whole, folder.rglob("zarr.json")))


def _is_whole(document: Path) -> bool:
    try:
        json.loads(document.read_bytes())
    except ValueError:
        return False
    return True


def open_group(url: str | Path, *, checked: bool = True) -> zarr.Group:
    """Open a store's root group for reading, whether complete or not.

    Args:
        url: a local path, or a URL that fsspec supports.
        checked: compare the files of a complete store with its manifest, now and when they are read.
    Returns:
        The group. Its `store` is a `CheckedStore`.
    Raises:
        StoreError: no such path, no Zarr v3 group, a group of another format, an unknown version.
        IncompleteStoreError: a store whose writer stopped before the root group was written.
        CorruptStoreError: metadata that cannot be parsed, or are not those in the manifest.
        LostManifestError: the manifest is missing or damaged.
    """
    url = str(url).rstrip("/")
    path = local_path(url)
    if path is not None and not path.exists():
        raise StoreError(f"{url}: no such path: write the store with `river encode`, or check paths.latents")
    if path is not None and not path.is_dir():
        raise StoreError(f"{url}: a file, but a store is a folder: check paths.latents")
    if path is not None and (path / "zarr.json").is_fifo():  # it would be waited for
        raise StoreError(f"{url}/zarr.json: a pipe, not a file: check paths.latents")
    try:
        group = zarr.open_group(_read_only_store(url), mode="r", zarr_format=3, use_consolidated=False)
    except ContainsArrayError as error:
        raise StoreError(f"{url}: a Zarr array, not a store: use the folder above it that ends in .zarr") from error
    except FileNotFoundError as error:
        if path is not None and has_only_begun(path):
            raise IncompleteStoreError(f"{url}: writing has only begun: run `river encode` again") from error
        raise StoreError(f"{url}: not a Zarr v3 group (no zarr.json): check paths.latents") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        if path is not None and has_only_begun(path):
            raise IncompleteStoreError(f"{url}: writing has only begun: run `river encode` again") from error
        raise CorruptStoreError(
            f"{url}/zarr.json cannot be parsed ({error}): remove the store and write it again with `river encode`"
        ) from error

    found = group.attrs.get("format")
    if found != FORMAT:
        raise StoreError(f"{url}: not a store of latents: its format is {found!r}, expected {FORMAT!r}")
    version = group.attrs.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{url}: format_version is {version!r}, but this version of the program supports {FORMAT_VERSION}: update "
            "the program, or move the store away and encode again"
        )
    if checked and group.attrs.get("complete") is True:
        try:
            _read_manifest(url, group)
        except CorruptStoreError:
            if group.store.was_replaced():  # between the reading of its two documents
                return open_group(url)
            raise
    return group


def _read_manifest(url: str, group: zarr.Group) -> None:
    """Find the manifest of a complete store. A missing one is no error in a store that never had one."""
    try:
        manifest = group.store.read_manifest()
    except ManifestError as error:
        raise LostManifestError(f"{url}/{MANIFEST_KEY} {error}: {REMAKE}") from None
    if manifest is None:
        if MANIFEST in group.attrs:
            raise LostManifestError(f"{url}/{MANIFEST_KEY} is missing: {REMAKE}")
        return
    try:
        group.store.compare_with(manifest)
    except ManifestError as error:
        raise CorruptStoreError(f"{url}/{error}: {RESTORE}") from None


def create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    shards: tuple[int, ...] | None = None,
) -> zarr.Array:
    """Create an array, or replace it. Empty chunks are written, so a missing file always means that data was lost."""
    is_latents = name == LATENTS
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        shards=shards,
        dtype=dtype,
        # Latents compress by 10 % at most. The other arrays are protected by zstd's own checksum.
        compressors=[Crc32cCodec() if is_latents else ZstdCodec(level=3, checksum=True)],
        filters=None,
        fill_value=float("nan")
        if dtype.kind == "f" and DIMENSIONS[name][0] == "frame"
        else ""
        if dtype.kind == "T"
        else 0,
        attributes={"description": DESCRIPTIONS[name]},
        dimension_names=DIMENSIONS[name],
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def in_order(splits: Iterable[str]) -> list[str]:
    """Names of splits: train, val, test, then any others."""
    names = set(splits)
    return [name for name in SPLIT_ORDER if name in names] + sorted(names - set(SPLIT_ORDER))


def local_path(url: str | Path) -> Path | None:
    """The local path of a URL; None for remote URLs."""
    text = str(url)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text or "::" in text else Path(text)


def _read_only_store(url: str) -> CheckedStore:
    path = local_path(url)
    return CheckedStore(open_remote(url) if path is None else LocalStore(path, read_only=True))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
