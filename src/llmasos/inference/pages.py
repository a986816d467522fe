"""The memory of the pages, and attention over them: what stands behind `attend` when the engine runs a model.

T = packed tokens, B = sequences, H = query heads, K = key/value heads, D = head width. Every layer has its own keys and
values [num_slots, K, D]; token t of a sequence lives in slot page * page_size + offset of its layer's group. `plan`
announces a pass; then each layer calls the object once (or `write` and `read`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmasos.inference import paged_torch
from llmasos.inference.batch import Batch
from llmasos.models.attention import layer_specs

if TYPE_CHECKING:
    from llmasos.inference import paged_kernels
    from llmasos.inference.cache import Copy
    from llmasos.models.config import ModelConfig

STORED = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def page_groups(config: ModelConfig) -> tuple[list[int], list[int]]:
    """Layers that keep the same tokens share page numbers: (window of each group, 0 first; group of each layer)."""
    windows = [config.window(i) for i in range(config.num_layers)]
    groups = sorted(set(windows))
    return groups, [groups.index(w) for w in windows]


def uses_kernels(config: ModelConfig, device: torch.device) -> bool:
    """Whether a model's attention is computed by the GPU's kernels: all but ALiBi that is rounded to bfloat16."""
    return device.type == "cuda" and not config.alibi_bf16


class Pages:
    """Keys and values of all sequences. On a CPU the memory is virtual until it is written.

    With kv_dtype fp8 or int8 every token and head has a float32 scale; "auto" is the model's dtype. `batch_invariant`:
    no bit of a query's result depends on what else is in the pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: Sequence[int],
        page_size: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        kv_dtype: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        self.config, self.page_size, self.dtype = config, page_size, dtype
        self.device = torch.device(device)
        self.num_pages = list(num_pages)
        self.groups, self.layer_group = page_groups(config)
        self.specs = layer_specs(config)
        self.batch_invariant = batch_invariant
        self.graphable = uses_kernels(config, self.device)
        """Passes can be captured in CUDA graphs: planning and attention wait for nothing on the device."""
        self.kv_dtype = stored_dtype(kv_dtype, dtype)
        self.renew()
        self._plans: Sequence[paged_torch.Plan | paged_kernels.Plan] = []
        self._shared: paged_kernels.SharedBuffers | None = None
        self._prepare_kernels()

    def renew(self) -> None:
        """Take the memory, as at the start; what it held before is gone."""
        self.keys, self.values = ([self._empty(g) for g in self.layer_group] for _ in range(2))
        scaled = is_scaled(self.kv_dtype)
        self.key_scales, self.value_scales = (
            [self._empty_scales(g) if scaled else None for g in self.layer_group] for _ in range(2)
        )
        layers = list(zip(self.keys, self.values, self.key_scales, self.value_scales, strict=True))
        self._layers = layers if self.graphable else [_by_head(layer) for layer in layers]

    def release(self) -> int:
        """Give the memory back until `renew`; returns its bytes."""
        memory = [*self.keys, *self.values, *self.key_scales, *self.value_scales]
        freed = sum(m.numel() * m.element_size() for m in memory if m is not None)
        self.keys, self.values, self.key_scales, self.value_scales, self._layers = [], [], [], [], []
        return freed

    def _prepare_kernels(self) -> None:
        if self.graphable:
            from llmasos.inference.paged_kernels import Workspaces

            self._workspaces = Workspaces(self.config, self.device)
            slopes, scale = self.specs[0].slopes, self.specs[0].alibi_scale
            self._slopes = torch.tensor(slopes, device=self.device) * scale if slopes else None

    def _empty(self, group: int) -> Tensor:
        return self._memory(group, (self.config.head_dim,), self.kv_dtype)

    def _empty_scales(self, group: int) -> Tensor:
        return self._memory(group, (), torch.float32)

    def _memory(self, group: int, rest: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        slots, heads = self.num_pages[group] * self.page_size, self.config.num_kv_heads
        if self.graphable:
            return torch.empty(slots, heads, *rest, dtype=dtype, device=self.device)
        # one head's keys lie side by side: torch reads them head by head, and in place
        return torch.empty(heads, slots, *rest, dtype=dtype, device=self.device).transpose(0, 1)

    @staticmethod
    def bytes_per_page(config: ModelConfig, group: int, page_size: int, kv_dtype: str, dtype: torch.dtype) -> int:
        """Bytes that one page of a group takes over all of the group's layers."""
        num_layers = page_groups(config)[1].count(group)
        stored = stored_dtype(kv_dtype, dtype)
        head = config.head_dim * stored.itemsize + (4 if is_scaled(stored) else 0)
        return 2 * num_layers * page_size * config.num_kv_heads * head

    def prefix_buffers(self, num_sequences: int) -> paged_kernels.SharedBuffers:
        """Where a CUDA graph of decodes finds the shared prefixes of each pass (`fill` them before it is replayed)."""
        from llmasos.inference.paged_kernels import SharedBuffers

        return SharedBuffers(self.config, num_sequences, self.device)

    def capturing(self, shared: paged_kernels.SharedBuffers | None) -> None:
        """The next pass that is planned reads its shared prefixes from these buffers."""
        self._shared = shared

    def plan(self, batch: Batch) -> None:
        """Announce a pass."""
        if self.graphable:
            self._plans = self._kernel_plans(batch)
            return
        heads = self.config.num_kv_heads
        self._plans = [
            paged_torch.Plan(batch, group, window, heads, self.num_pages[group], self.batch_invariant)
            for group, window in enumerate(self.groups)
        ]

    def _kernel_plans(self, batch: Batch) -> list[paged_kernels.Plan]:
        from llmasos.inference.paged_kernels import Plan

        shared, self._shared = self._shared, None
        if shared is None and batch.prefixes and batch.decodes and not self.batch_invariant:
            shared = self.prefix_buffers(batch.num_sequences)
            shared.fill(batch.prefixes)
        return [
            Plan(batch, group, self._workspaces, self._slopes, shared, self.batch_invariant)
            for group in range(len(self.groups))
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v [T, K, D] of the new tokens and return what the queries [T, H, D] saw."""
        self.write(layer, k, v)
        return self.read(layer, q)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        plan = self._plans[self.layer_group[layer]]
        plan.write(self._layers[layer], k, v)

    def read(self, layer: int, q: Tensor) -> Tensor:
        """Attention of the queries [T, H, D] over the pages; this pass's keys and values are written."""
        plan = self._plans[self.layer_group[layer]]
        return plan.read(self._layers[layer], q, self.specs[layer])

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copy whole pages; run before the next pass writes."""
        for group in range(len(self.groups)):
            own = [c for c in copies if c.group == group]
            if not own:
                continue
            source, target = (
                torch.tensor([getattr(c, end) for c in own], device=self.device) for end in ("source", "target")
            )
            for layer, of in enumerate(self.layer_group):
                if of == group:
                    for memory in (self.keys, self.values, self.key_scales, self.value_scales):
                        if (slots := memory[layer]) is not None:
                            pages = paged_torch.plain(slots).unflatten(0, (-1, self.page_size))
                            pages[target] = pages[source]


def _by_head(layer: paged_torch.Stored) -> paged_torch.Stored:
    keys, values, key_scales, value_scales = layer
    return (
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        None if key_scales is None else key_scales.transpose(0, 1)[None, ..., None],
        None if value_scales is None else value_scales.transpose(0, 1)[None, ..., None],
    )


def stored_dtype(kv_dtype: str, dtype: torch.dtype) -> torch.dtype:
    return dtype if kv_dtype == "auto" else STORED[kv_dtype]


def is_scaled(stored: torch.dtype) -> bool:
    return stored.itemsize == 1
