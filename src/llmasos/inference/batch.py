"""What one forward pass is told about its packed sequences.

T = packed tokens, B = sequences, P = columns of a page table, G = page groups (layers that keep the same tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Batch:
    """One forward pass. Sequence b owns the packed tokens query_start[b] : query_start[b + 1]; its keys are those at
    positions 0 .. seq_lens[b] - 1, the new tokens included, so that its last query sits at position seq_lens[b] - 1.

    Rows that only pad a CUDA graph have seq_lens 0: nothing is read or written for them. Token t lives in slot
    tables[g][sequences[t], positions[t] // page_size] * page_size + positions[t] % page_size of group g.
    """

    tokens: Tensor
    """[T], int64; int32 on a GPU."""
    positions: Tensor
    """[T], int64; int32 on a GPU."""
    sequences: Tensor
    """[T], int32: which sequence of the batch each token belongs to."""
    query_start: Tensor
    """[B + 1], int32."""
    seq_lens: Tensor
    """[B], int32."""
    tables: list[Tensor]
    """One [B, P] int32 per group: page numbers; entries behind a sequence's last page, and those of pages that a
    sliding window has freed, are 0 and never used."""
    page_size: int
    max_query: int
    """The longest run of new tokens of one sequence; 1 for a batch of decodes."""
    max_seq_len: int
    """The most keys of one sequence (a CUDA graph: the most that it was captured for)."""
    prefixes: list[SharedPrefix] = field(default_factory=list)
    """Runs of neighbouring sequences that begin with the same pages; empty: every sequence is read for itself."""

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def decodes(self) -> bool:
        """Every sequence has exactly one new token."""
        return self.max_query == 1


@dataclass(frozen=True)
class SharedPrefix:
    """Sequences start .. end - 1 share their first `length` keys (whole pages, before any of their queries)."""

    start: int
    end: int
    length: int
