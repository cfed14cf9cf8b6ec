"""A random order of many things that takes no memory: a keyed bijection of their numbers."""

import numpy as np

ROUNDS = 16  # with 8, the orders of five or seven things are visibly not alike frequent
_ODD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's finaliser
_SHIFT = np.uint64(31)


def permute(numbers: np.ndarray, count: int, key: np.ndarray) -> np.ndarray:
    """Where some of the numbers 0 .. count - 1 go in the permutation that a key stands for.

    A Feistel network over the next power of two, walked along its cycle until it comes out below `count` (Black and
    Rogaway 2002). Any few places look independent and uniform; not every one of the count! permutations has a key.

    Args:
        numbers: [n] int64 in 0 .. count - 1.
        count: >= 1.
        key: [ROUNDS] uint64.
    Returns:
        [n] int64 in 0 .. count - 1; all of 0 .. count - 1 in some order, if `numbers` are.
    """
    assert key.shape == (ROUNDS,), key.shape
    bits = max(2, (count - 1).bit_length())
    result = _feistel(numbers.astype(np.uint64), bits, key)
    outside = np.flatnonzero(result >= count)
    while outside.size:  # each walk of the cycle leads back inside, for it began there
        result[outside] = _feistel(result[outside], bits, key)
        outside = outside[result[outside] >= count]
    return result.astype(np.int64)


def _feistel(numbers: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (np.uint64(bits) - low_bits)) - np.uint64(1)
    low, high = numbers & low_mask, numbers >> low_bits
    for number, round_key in enumerate(key):
        if number % 2:
            low ^= _mix(high, round_key) & low_mask
        else:
            high ^= _mix(low, round_key) & high_mask
    return high << low_bits | low


def _mix(words: np.ndarray, key: np.uint64) -> np.ndarray:
    mixed = (words + key) * _ODD[0]  # arrays of unsigned integers wrap around without a warning
    mixed ^= mixed >> _SHIFT
    mixed *= _ODD[1]
    mixed ^= mixed >> _SHIFT
    return mixed
