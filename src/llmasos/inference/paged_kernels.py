"""A pass over pages on a GPU: what the kernels are told, made once and without waiting for the device.

B = sequences, H = query heads, K = key/value heads. Import this module only where the kernels run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmasos.inference.batch import Batch, SharedPrefix
from llmasos.inference.kernels.decode import Workspace, new_workspace, paged_decode
from llmasos.inference.kernels.prefill import paged_prefill
from llmasos.inference.kernels.prefix import new_prefixes, prefix_tiles, queries_of_a_tile
from llmasos.inference.kernels.write import write_kv

if TYPE_CHECKING:
    from llmasos.inference.paged_torch import Stored
    from llmasos.models.attention import AttentionSpec
    from llmasos.models.config import ModelConfig

FEW_ROWS = 64
"""Rows (queries × heads of a key head) of one sequence up to which the decode kernel, which cuts keys, is taken."""
MOST_RUNS = 8
"""Shared prefixes of a batch that have tiles of their own even if each is shared by few."""


class SharedBuffers:
    """Where decodes of up to `num_sequences` find their shared prefixes; stays in place under a CUDA graph."""

    def __init__(self, config: ModelConfig, num_sequences: int, device: torch.device) -> None:
        self.group = config.num_heads // config.num_kv_heads
        self.num_sequences = num_sequences
        self.num_tiles = -(-num_sequences // queries_of_a_tile(self.group)) + MOST_RUNS
        shape = (num_sequences, config.num_heads, config.head_dim, config.num_kv_heads)
        self.prefixes = new_prefixes(self.num_tiles, num_sequences, *shape, device)

    def fill(self, runs: Sequence[SharedPrefix]) -> None:
        """Announce the runs of the next pass."""
        starts = range(self.num_sequences + 1)
        for array, target in zip(
            prefix_tiles(runs, starts, group=self.group, num_tiles=self.num_tiles),
            (self.prefixes.tiles, self.prefixes.skip),
            strict=True,
        ):
            host = torch.from_numpy(array)
            target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)


class Workspaces:
    """Memory in which the pieces of a sequence's keys meet, by batch size; graphs keep what they were captured with."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._made: dict[tuple[int, int], Workspace] = {}

    def get(self, num_sequences: int, max_query: int) -> Workspace:
        key = (1 << (num_sequences - 1).bit_length(), 1 << (max_query - 1).bit_length())
        if key not in self._made:
            c = self.config
            shape = (c.num_heads, c.num_kv_heads, c.head_dim)
            self._made[key] = new_workspace(key[0], *shape, self.device, max_query=key[1])
        return self._made[key]


class Plan:
    """One pass over the pages of one group; the same methods as `paged_torch.Plan`."""

    def __init__(
        self,
        batch: Batch,
        group: int,
        workspaces: Workspaces,
        slopes: Tensor | None,
        shared: SharedBuffers | None,
        invariant: bool,
    ) -> None:
        self.batch, self.table = batch, batch.tables[group]
        self.slopes, self.shared, self.invariant = slopes, shared, invariant
        config = workspaces.config
        few = batch.max_query * (config.num_heads // config.num_kv_heads) <= FEW_ROWS
        self.workspace = workspaces.get(batch.num_sequences, batch.max_query) if few and not invariant else None

    def write(self, stored: Stored, k: Tensor, v: Tensor) -> None:
        """Keep k and v [T, K, D] in the slots of their tokens."""
        b = self.batch
        where = self.table, b.positions, b.sequences, b.seq_lens
        write_kv(k.contiguous(), v.contiguous(), *stored, *where, page_size=b.page_size)

    def read(self, stored: Stored, q: Tensor, spec: AttentionSpec) -> Tensor:
        """Queries [T, H, D] -> what they saw, [T, H, D]."""
        b, (keys, values, k_scales, v_scales) = self.batch, stored
        shared = None if self.shared is None or spec.window or spec.slopes else self.shared.prefixes
        if self.workspace is None:
            return paged_prefill(
                q.contiguous(),
                keys,
                values,
                self.table,
                b.query_start,
                b.seq_lens,
                max_query=b.max_query,
                page_size=b.page_size,
                spec=spec,
                k_scales=k_scales,
                v_scales=v_scales,
                slopes=self.slopes,
                batch_invariant=self.invariant,
            )
        return paged_decode(
            q.contiguous(),
            keys,
            values,
            self.table,
            b.seq_lens,
            self.workspace,
            page_size=b.page_size,
            spec=spec,
            k_scales=k_scales,
            v_scales=v_scales,
            slopes=self.slopes,
            query_start=None if b.decodes else b.query_start,
            max_query=b.max_query,
            prefixes=shared,
        )
