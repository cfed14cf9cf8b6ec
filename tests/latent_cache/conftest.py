"""Small stores to test with."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import numpy as np
import pytest

import latent_cache
from latent_cache import ChunkPlan, LatentCache, SplitPlan, StoreMetadata, StoreWriter

TYPES = {"preview": np.uint8, "actions": np.float32}


@dataclass
class StoreKit:
    """Plans of ragged videos, and latents that are a function of (video id, view, frame): any order writes the same."""

    shape: tuple[int, int, int] = (2, 3, 4)
    extras: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of further arrays, per frame
    metadata: StoreMetadata = field(
        default_factory=lambda: StoreMetadata(
            dataset="toys",
            fps=25.0,
            preprocessing={"image_size": 24, "resize": "area"},
            autoencoder={"architecture": "vqgan", "sha256": "3f9a", "downsampling": 8},
            software={"zarr": "3"},
        )
    )

    def plan(
        self, lengths: Sequence[int], chunk_frames: int = 4, names: Sequence[str] | None = None, **options: object
    ) -> SplitPlan:
        names = [f"clip-{row:02d}" for row in range(len(lengths))] if names is None else names
        return SplitPlan(names, ["identity"] * len(names), lengths, self.shape, chunk_frames, **options)

    def latents(self, plan: SplitPlan, chunk: ChunkPlan) -> np.ndarray:
        """[chunk.frames, c, h, w] float32."""
        return np.concatenate(
            [
                np.random.default_rng([*plan.video_ids[piece.video].encode(), frame]).normal(size=(1, *self.shape))
                for piece in chunk.pieces
                for frame in range(piece.start, piece.stop)
            ]
        ).astype(np.float32)

    def codes(self, latents: np.ndarray) -> np.ndarray:
        """[n, h, w] int64, a function of the latents."""
        return (np.abs(latents.sum(axis=1)) * 1000).astype(np.int64)

    def further(self, latents: np.ndarray) -> dict[str, np.ndarray]:
        """[n, ...] of each further array, a function of the latents."""
        values = np.abs(latents.sum(axis=(1, 2, 3)) * 1000) % 256
        each = {name: np.broadcast_to(values, (*shape, len(values))) for name, shape in self.extras.items()}
        return {name: np.moveaxis(values, -1, 0).astype(TYPES[name]) for name, values in each.items()}

    def write(self, writer: StoreWriter, split: str, chunk: ChunkPlan) -> None:
        latents = self.latents(writer.plans[split], chunk)
        codes = self.codes(latents) if writer.codes else None
        writer.write_chunk(split, chunk, latents, codes, extras=self.further(latents))

    def build(
        self,
        path: Path,
        plans: Mapping[str, SplitPlan] | None = None,
        *,
        codes: bool = True,
        stop_after: int | None = None,
        **options: object,
    ) -> Path:
        """Write a store, complete unless the writer stops after some chunks."""
        plans = {"train": self.plan([3, 7, 2, 1, 9]), "test": self.plan([5])} if plans is None else plans
        with StoreWriter.open(path, self.metadata, plans, codes=codes, extras=self.extras, **options) as writer:
            todo = [(split, chunk) for split in plans for chunk in writer.pending(split)]
            for split, chunk in todo[:stop_after]:
                self.write(writer, split, chunk)
            if stop_after is None:
                writer.finish(codebook=self.codebook if codes else None)
        return path

    @property
    def codebook(self) -> np.ndarray:
        """[code, channel] float32, of fewer codes than there may be."""
        return np.random.default_rng(0).normal(size=(8, self.shape[0])).astype(np.float32)

    def expected(self, plan: SplitPlan) -> np.ndarray:
        """[frame, c, h, w] float32, before rounding to the store's dtype."""
        return np.concatenate([self.latents(plan, chunk) for chunk in plan.chunks])


def read_all_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def kit() -> StoreKit:
    return StoreKit()


@pytest.fixture(scope="session")
def _toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return StoreKit().build(tmp_path_factory.mktemp("stores") / "toys.zarr")


@pytest.fixture
def toys(_toys: Path, tmp_path: Path) -> Path:
    """A complete store: in `train` 22 frames of five videos, in five full chunks and a partial last one."""
    return shutil.copytree(_toys, tmp_path / "toys.zarr")


@pytest.fixture
def shards(kit: StoreKit) -> dict[str, SplitPlan]:
    """Three chunks of 4 frames per file: 33 frames in 3 files, and 5 in one that is padded."""
    return {"train": kit.plan([3, 7, 2, 1, 9, 6, 5], shard_chunks=3), "test": kit.plan([5], shard_chunks=3)}


@pytest.fixture
def numbered(kit: StoreKit, tmp_path: Path) -> Callable[..., LatentCache]:
    """Build a split whose latents say where they come from: channel 0 is the video, channel 1 the frame within it."""

    def build(lengths: Sequence[int], chunk_frames: int = 4, name: str = "toys", **options: object) -> LatentCache:
        plan = kit.plan(lengths, chunk_frames)
        path = tmp_path / f"{name}.zarr"
        with StoreWriter.open(path, kit.metadata, {"train": plan}, codes=False, **options) as writer:
            for chunk in writer.pending("train"):
                numbers = [(video, frame) for video, start, stop in chunk.pieces for frame in range(start, stop)]
                latents = np.zeros((chunk.frames, *kit.shape), np.float32)
                latents[:, :2] = np.array(numbers)[:, :, None, None]
                writer.write_chunk("train", chunk, latents, None)
            writer.finish()
        return latent_cache.open(path)

    return build


@pytest.fixture
def publish() -> Iterator[Callable[[Path], str]]:
    """Copy a store behind a URL."""
    memory = fsspec.filesystem("memory")

    def copy(path: Path) -> str:
        if memory.exists("/published"):  # otherwise it would be put into the folder that is there
            memory.rm("/published", recursive=True)
        memory.put(str(path), "/published/toys.zarr", recursive=True)
        return "memory://published/toys.zarr"

    yield copy
    if memory.exists("/published"):
        memory.rm("/published", recursive=True)


def flip_a_bit(file: Path, place: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    file.write_bytes(content)


@pytest.fixture
def flip() -> Callable[..., None]:
    """Change a bit of a file, in the middle unless told where."""
    return flip_a_bit


@pytest.fixture(params=["flipped", "missing", "empty"])
def damage(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Damage a file in each of three ways."""
    return {"flipped": flip_a_bit, "missing": Path.unlink, "empty": lambda file: file.write_bytes(b"")}[request.param]


@pytest.fixture
def all_files() -> Callable[[Path], dict[str, bytes]]:
    return read_all_files


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Flushing tiny files is nine tenths of the time; what is flushed, and when, has a test of its own."""
    patch = pytest.MonkeyPatch()
    patch.setattr("os.fsync", lambda descriptor: None)
    yield
    patch.undo()
