"""Encoding frames again: which are drawn, how they are decoded and compared, and what is tolerated."""

import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import latent_cache
from latent_cache import LatentCache
from pipelines.encoding.frame_verifier import (
    BF16_TOLERANCE,
    LATENT_TOLERANCE,
    Encoded,
    FrameVerifier,
    draw_frames,
    latent_deviation,
    unexplained_codes,
)

VIEWS = ["identity", "hflip", "jitter-1"]


def open_splits(kit) -> list[LatentCache]:
    return [latent_cache.open(kit.store, split) for split in kit.splits]


def verifier_of(kit, caches: list[LatentCache]) -> FrameVerifier:
    return FrameVerifier(caches, kit.splits, kit.model, torch.device("cpu"))


# Drawing


def toy_cache(split: str, lengths: list[int]) -> SimpleNamespace:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return SimpleNamespace(split=split, offsets=offsets, frames=int(offsets[-1]))


def test_frames_are_drawn_uniformly_and_once() -> None:
    caches = [toy_cache("train", [3, 1, 5]), toy_cache("test", [2])]
    every = {("train", 0, n) for n in range(3)} | {("train", 1, 0)} | {("train", 2, n) for n in range(5)}
    every |= {("test", 0, 0), ("test", 0, 1)}
    drawn = draw_frames(caches, 11, 0)
    assert {(frame.cache.split, frame.row, frame.number) for frame in drawn} == every
    assert len(draw_frames(caches, 12, 0)) == 11
    counts = Counter()
    for seed in range(2000):
        some = draw_frames(caches, 4, seed)
        keys = [(frame.cache.split, frame.row, frame.number) for frame in some]
        assert len(set(keys)) == 4
        places = [caches.index(frame.cache) * 100 + frame.place for frame in some]
        assert places == sorted(places)
        assert all(frame.place == frame.cache.offsets[frame.row] + frame.number for frame in some)
        counts.update(keys)
    expected = 2000 * 4 / 11
    assert all(abs(counts[key] - expected) < 5 * np.sqrt(expected) for key in every)


def test_the_draw_is_a_function_of_the_seed() -> None:
    caches = [toy_cache("train", [100, 200])]
    places = [[frame.place for frame in draw_frames(caches, 10, seed)] for seed in (3, 3, 4)]
    assert places[0] == places[1] != places[2]


# Decoding and encoding


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cache", [{}, {"dtype": "float32", "codes": False}, {"precision": "bf16"}])
def test_every_frame_is_equal_bit_for_bit_and_its_video_decoded_once(kit, cache: dict, threads: int) -> None:
    kit.encode(views=VIEWS, **cache)
    for source in kit.splits.values():
        source.passes.clear()
    caches = open_splits(kit)
    drawn = draw_frames(caches, 10**6, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    checks = list(verifier_of(kit, caches).check(drawn))
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert len(checks) == len(drawn) == 3 * 48 + 13
    assert all(check.compared and check.bit_equal and not check.problem for check in checks)
    assert sorted(video for source in kit.splits.values() for video, *_ in source.passes) == list("abcdevw")


def test_precisions_differ_by_less_than_is_tolerated(kit) -> None:
    rough = kit.another("rough")
    kit.encode()
    rough.encode(precision="bf16")
    ours, theirs = (latent_cache.open(store).load().float() for store in (rough.store, kit.store))
    apart = ((ours - theirs) / theirs.std((0, 2, 3), keepdim=True)).square().mean().sqrt()
    assert LATENT_TOLERANCE / 10 < apart < BF16_TOLERANCE


def test_a_broken_video_is_a_finding_and_the_others_are_compared(kit) -> None:
    kit.encode()
    kit.splits["train"].ends["b"] = 5
    caches = open_splits(kit)
    checks = list(verifier_of(kit, caches).check(draw_frames(caches, 10**6, 0)))
    lost = [check for check in checks if not check.compared]
    assert {check.video for check in lost} == {("train", "b")}
    assert len(lost) == 13
    assert all("frame 5 is noise" in check.problem for check in lost)
    assert all(check.bit_equal for check in checks if check.compared)


def test_memory_does_not_grow_with_the_number_of_frames(kit, network_batch, monkeypatch) -> None:
    """Frames are compared while others are still to be decoded."""
    network_batch(4)
    kit.splits = {"train": kit.Source({f"v{row:02d}": 4 for row in range(40)})}
    kit.encode(views=VIEWS)
    caches = open_splits(kit)
    frame, decoded = kit.Source.frame, [0]

    def counted(*arguments: object) -> np.ndarray:
        decoded[0] += 1
        return frame(*arguments)

    monkeypatch.setattr(kit.Source, "frame", counted)
    most = compared = 0
    for _ in verifier_of(kit, caches).check(draw_frames(caches, 10**6, 0)):
        compared += 1
        most = max(most, len(VIEWS) * decoded[0] - compared)
    assert compared == 40 * 4 * len(VIEWS)
    assert 4 <= most <= 4 * len(VIEWS) + 4 * (2 * len(os.sched_getaffinity(0)) + 3)


# Comparing


@pytest.mark.parametrize(("stored_latent", "stored_code", "wrong"), [
    (0.49, 0, False),  # the same latent, the same code
    (0.49, 1, True),  # 0.49 is nearer to 0
    (0.52, 1, False),  # another device came out on the other side of the border between the codes
    (0.52, 2, True),
    (0.49, 7, True),  # no such code
])  # fmt: skip
def test_codes_near_a_border(stored_latent: float, stored_code: int, wrong: bool) -> None:
    """Codes at 0, 1 and 10; a latent of 0.49, whose code is 0."""
    ours = np.full((1, 1, 1), 0.49, np.float32)
    fresh = Encoded(latents=ours, rounded=ours.astype(np.float16), codes=np.zeros((1, 1), np.int64))
    stored = np.full((1, 1, 1), stored_latent, np.float16)
    codes = np.full((1, 1), stored_code, np.uint16)
    found = unexplained_codes(fresh, stored, codes, np.array([[0.0], [1.0], [10.0]], np.float32))
    assert found.tolist() == [[wrong]]


def test_deviation_by_known_answers() -> None:
    stored = np.zeros((2, 2, 2), np.float16)
    std = np.array([1.0, 10.0], np.float32)
    one_tolerance = (LATENT_TOLERANCE * std)[:, None, None] * np.ones((2, 2, 2), np.float32)
    assert latent_deviation(stored.astype(np.float32), stored, std) == 0
    assert latent_deviation(one_tolerance, stored, std) == pytest.approx(1, rel=1e-4)
    assert latent_deviation(one_tolerance, stored, std, 4 * LATENT_TOLERANCE) == pytest.approx(1 / 4, rel=1e-4)
    alone = one_tolerance.copy()
    alone[1] = 0
    assert latent_deviation(2 * alone, stored, std) == pytest.approx(np.sqrt(2), rel=1e-4)
    assert latent_deviation(np.full((2, 2, 2), np.nan, np.float32), stored, std) == float("inf")
    # A constant channel has no deviation of its own: only rounding is tolerated.
    constant = np.full((1, 2, 2), 3.0, np.float16)
    nothing = np.zeros(1, np.float32)
    ulp = float(np.spacing(np.float16(3)))
    assert latent_deviation(constant.astype(np.float32) + ulp, constant, nothing) < 1
    assert latent_deviation(constant.astype(np.float32) + 4 * ulp, constant, nothing) > 1
