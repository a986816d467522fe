"""The order of rows: by seed and epoch, the same on every machine; and which rows are for validation.

Nothing here depends on a library's random numbers, whose streams may change from version to version: an order is a
sort by splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ALL = (1 << 64) - 1


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_of(*parts: int | str) -> int:
    """One 64-bit seed of several things."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permutation(n: int, seed: int) -> NDArray[np.int64]:
    """int64 [n]: each of 0 ... n-1 once."""
    keys = _mixed(np.arange(1, n + 1, dtype=np.uint64) + np.uint64(seed & _ALL))
    return np.argsort(keys, kind="stable")


def row_key(content: bytes) -> int:
    """What decides for a row, by its content alone: the same text is on the same side wherever it stands."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def is_validation(keys: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """bool: rows whose keys lie in the first `fraction` of all keys. A larger fraction only adds rows."""
    return keys < np.uint64(min(int(fraction * 2.0**64), _ALL))
