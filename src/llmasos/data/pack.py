"""Packing: samples side by side in rows of so many tokens, by best fit (the sample goes where the least room is left).

Decreasing order and best fit need at most 11/9 of the fewest bins, and in practice waste next to nothing (Ding et al.
2024, "Fewer Truncations Improve Language Modeling"). All but the last bin are nearly full then, and that may hold next
to nothing; `pack` makes them alike. Samples never share a token, and none is cut here.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

from llmasos.errors import InvalidInputError

Overlong: TypeAlias = Literal["split", "truncate", "drop", "refuse"]
"""What becomes of a sample that is too long: windows, its beginning, nothing, or an error."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As few bins of indices into `lengths` as best fit needs, filled alike where that is possible: a step of a handful
    of tokens would move the weights as far as any other. Raises InvalidInputError for a length that does not fit."""
    bins = best_fit(lengths, capacity)
    even = _spread(lengths, len(bins))
    return even if all(sum(lengths[i] for i in one) <= capacity for one in even) else bins


def _spread(lengths: Sequence[int], number: int) -> list[list[int]]:
    """The longest first, each into the bin that has least (Graham 1969)."""
    bins: list[list[int]] = [[] for _ in range(number)]
    filled = [(0, which) for which in range(number)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, which = filled[0]
        bins[which].append(index)
        heapq.heapreplace(filled, (total + lengths[index], which))
    for one in bins:
        one.sort()  # in the order of the stream
    return bins


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, none of more than `capacity` in all. Raises InvalidInputError for a length that
    does not fit."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of every bin that is not full: what is left, which; sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise InvalidInputError(f"A sample of {length} tokens does not fit into {capacity}.", param="max_length")
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, which = room.pop(at)
            bins[which].append(index)
        else:
            left, which = capacity, len(bins)
            bins.append([index])
        if left > length:
            insort(room, (left - length, which))
    for one in bins:
        one.sort()  # in the order of the stream
    return bins


def windows(length: int, longest: int, overlong: Overlong) -> Iterable[tuple[int, int]]:
    """Start and end of what is taken of a sample. "refuse" is for the caller: nothing is taken."""
    if length <= longest:
        return ((0, length),)
    if overlong == "split":
        return _cut(length, longest)
    return ((0, longest),) if overlong == "truncate" else ()


def _cut(length: int, longest: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, longest):
        yield start, min(start + longest, length)
