"""Tensor parallelism (Megatron-LM, arXiv:1909.08053) around the one model definition.

W = processes, each on a device of its own; T = packed tokens, D = model width, V = vocabulary. A process holds H / W
query heads and their key heads, a W-th of each MLP and a W-th of the vocabulary's head; embeddings and norms are whole
everywhere. A block costs two sums over the processes (behind attention and MLP), a pass one gathering of logits.
`Decoder` knows nothing of it: its linear layers are exchanged for the two modules below.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmasos.errors import DeviceError, InvalidInputError, UnsupportedError
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Decoder

HEAD_ROWS = 64
"""A share of the vocabulary is a multiple of this: matrix kernels want aligned rows."""
# torch 2.13 gave it another name and warns of the old one
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
CPU_TIMEOUT = timedelta(seconds=60)
GPU_TIMEOUT = timedelta(minutes=10)  # one process may compile kernels that another finds in its cache
SUM_ROWS, GATHER_ROWS = 64, 8
"""Tokens whose sums, and rows whose logits, go through mailboxes; more go through NCCL, which moves fewer bytes."""
GATHER_BLOCKS = 1024
_had_mail = False


@dataclass(frozen=True)
class Mailbox:
    """A place in the memory of every GPU of a group where all the others write."""

    rank: int
    rows: int
    boxes: Tensor
    """[W] int64: the addresses of all processes' boxes, [W, rows, words] int64 each: what process w sent, 32 bits of
    data and 32 of the number of the exchange in every word."""
    counts: Tensor
    """[rows · blocks] int32: exchanges that this process has made, for each program of the kernels that make them."""
    memory: Tensor
    """What lies behind this process's own address: the boxes live as long as somebody may write to them."""


def words_per_row(width: int, dtype: torch.dtype) -> int:
    """Words of 32 bits that hold a row."""
    return width * dtype.itemsize // 4


class Group:
    """The processes that share a model. Made by all of them at once: the constructor waits for the others.

    `rendezvous` is a path where they meet, without a file at the start. CUDA devices talk through NCCL, CPUs through
    gloo; one group per process. Raises DeviceError if torch.distributed is in use already.
    """

    def __init__(self, rank: int, size: int, device: torch.device, rendezvous: Path) -> None:
        self.rank, self.size, self.device = rank, size, device
        if dist.is_initialized():
            raise DeviceError(
                "torch.distributed is already in use in this process.",
                hint="Close the other tensor-parallel model first, or use another process.",
            )
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.FileStore(str(rendezvous), size),  # type: ignore[attr-defined]  # exported by its documentation
            rank=rank,
            world_size=size,
            timeout=GPU_TIMEOUT if on_gpu else CPU_TIMEOUT,
            device_id=device if on_gpu else None,
        )

        self._mail: dict[tuple[tuple[int, int], ...], list[Mailbox] | None] = {}

    def mailboxes(self, *sizes: tuple[int, int]) -> list[Mailbox] | None:
        """One for each (rows, words per row). Every process must ask alike. None on CPUs, where GPUs can't write to
        each other's memory, and where a process had such memory with others before: torch counts these in each process,
        and peers that have counted on do not meet."""
        if sizes not in self._mail:
            self._mail[sizes] = self._shared(sizes) if self.device.type == "cuda" else None
        return self._mail[sizes]

    def _shared(self, sizes: tuple[tuple[int, int], ...]) -> list[Mailbox] | None:
        global _had_mail
        pairs = ((a, b) for a in range(self.size) for b in range(self.size) if a != b)
        reachable = all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        fresh = not _had_mail or any(self._mail.values())
        able = torch.tensor(reachable and fresh, dtype=torch.int32, device=self.device)
        dist.all_reduce(able, dist.ReduceOp.MIN)
        if not able.item():
            return None
        _had_mail = True
        # multicast is not needed, and setting it up can fail where the rest works
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        import torch.distributed._symmetric_memory as symmetric

        assert dist.group.WORLD is not None
        lengths = [self.size * rows * words for rows, words in sizes]
        memory = symmetric.empty(sum(lengths), dtype=torch.int64, device=self.device)
        addresses = symmetric.rendezvous(memory, dist.group.WORLD.group_name).buffer_ptrs
        memory.zero_()
        torch.cuda.synchronize(self.device)
        dist.barrier()
        ends = list(itertools.accumulate(lengths))
        return [
            Mailbox(
                rank=self.rank,
                rows=rows,
                boxes=torch.tensor([a + 8 * (end - n) for a in addresses], dtype=torch.int64, device=self.device),
                counts=torch.zeros(rows * GATHER_BLOCKS, dtype=torch.int32, device=self.device),
                memory=memory,
            )
            for (rows, _), n, end in zip(sizes, lengths, ends, strict=True)
        ]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each. `x` is used up."""
        dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[W, *x.shape]: what each process gave."""
        out = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        _gather(out.view(-1), x.contiguous().view(-1))
        return out

    def abort(self) -> None:
        """Let go what waits for a GPU peer that is gone; the group is of no use afterwards. gloo lets go by itself."""
        if dist.is_initialized() and self.device.type == "cuda":
            dist.distributed_c10d._abort_process_group()

    def close(self) -> None:
        """Leave, without waiting for the others. CUDA graphs that hold its sums must be gone."""
        self._mail.clear()
        self.abort()
        if dist.is_initialized():
            dist.destroy_process_group()


class RowParallel(nn.Module):
    """A linear layer whose inputs are shared out: the processes' products are summed. `base` holds this one's columns,
    and the bias in the first process only."""

    def __init__(self, base: nn.Module, group: Group) -> None:
        super().__init__()
        self.base, self.group = base, group

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K / W] -> [T, N]."""
        return self.group.all_reduce(self.base(x))


class VocabParallelHead(nn.Module):
    """The head, rows shared out. Shares are equal: where they exceed the vocabulary, the last ones overlap and
    `overlaps` says how many leading rows of each are dropped."""

    def __init__(self, base: nn.Module, group: Group, vocab_size: int) -> None:
        super().__init__()
        self.base, self.group = base, group
        self.vocab_size = vocab_size
        self.shares = [head_rows(vocab_size, rank, group.size) for rank in range(group.size)]
        self.overlaps = [min(rows.stop, i * len(rows)) - rows.start for i, rows in enumerate(self.shares)]

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [.., D] -> [.., V]."""
        return self.join(self.base(hidden))

    def join(self, own: Tensor) -> Tensor:
        """This process's scores [.., V / W], and those of the others -> [.., V]."""
        parts = self.group.all_gather(own)
        return torch.cat([part[..., skip:] for part, skip in zip(parts, self.overlaps, strict=True)], -1)


def head_rows(vocab_size: int, rank: int, size: int) -> range:
    """Rows of the vocabulary that one process scores."""
    share = min(vocab_size, -(-vocab_size // (size * HEAD_ROWS)) * HEAD_ROWS)
    start = min(rank * share, vocab_size - share)
    return range(start, start + share)


def shard_config(config: ModelConfig, size: int) -> ModelConfig:
    """What one of `size` processes computes: its numbers of heads and its width of the MLP. Fewer key heads than
    processes are held several times.

    Raises InvalidInputError for numbers that can't be shared out, UnsupportedError for arithmetic that can't.
    """
    if size == 1:
        return config
    _check_shareable(config, size)
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=max(1, config.num_kv_heads // size),
        intermediate_size=config.intermediate_size // size,
    )


def _check_shareable(config: ModelConfig, size: int) -> None:
    reason = ""
    if config.is_encoder:
        reason = "it is an encoder"
    elif config.position == "alibi":
        reason = "its attention is biased by ALiBi"
    elif config.qk_norm == "full":
        reason = "its query-key norm spans all heads"
    if reason:
        raise UnsupportedError(
            f"{config.architecture} can't be shared out over {size} devices: {reason}.",
            hint="Use tensor_parallel_size=1.",
            param="tensor_parallel_size",
        )
    if not _divides(config, size):
        fitting = ", ".join(str(n) for n in range(1, config.num_heads + 1) if _divides(config, n))
        raise InvalidInputError(
            f"tensor_parallel_size={size} does not divide this {config.architecture}: {config.num_heads} heads, "
            f"{config.num_kv_heads} key-value heads, MLP width {config.intermediate_size}.",
            hint=f"Use one of {fitting}.",
            param="tensor_parallel_size",
        )


def _divides(config: ModelConfig, size: int) -> bool:
    keys = config.num_kv_heads
    return not (config.num_heads % size or config.intermediate_size % size or (keys % size and size % keys))


@dataclass(frozen=True)
class Shard:
    """One process's share of a model; `config` describes the whole."""

    config: ModelConfig
    rank: int
    size: int

    def take(self, parameter: str, whole: Tensor) -> Tensor | None:
        """This process's part of a whole parameter, a view where it can be one; None: others hold it."""
        module, leaf = parameter.split(".")[-2:]
        match module:
            case "qkv":
                return self._qkv(whole)
            case "up":
                gates = whole.chunk(2) if self.config.gated else [whole]
                return torch.cat([self._part(gate) for gate in gates])
            case "out" | "down" if leaf == "weight":
                return self._part(whole, 1)
            case "out" | "down":
                return whole if self.rank == 0 else None
            case "q_norm" if whole.dim() == 2:
                return self._part(whole)
            case "k_norm" if whole.dim() == 2:
                return whole[self._key_heads()]
            case "head":
                rows = head_rows(self.config.vocab_size, self.rank, self.size)
                return whole[rows.start : rows.stop]
        return whole

    def _part(self, whole: Tensor, dim: int = 0) -> Tensor:
        share = whole.shape[dim] // self.size
        return whole.narrow(dim, self.rank * share, share)

    def _key_heads(self) -> slice:
        keys = self.config.num_kv_heads
        first = self.rank * keys // self.size
        return slice(first, first + max(1, keys // self.size))

    def _qkv(self, whole: Tensor) -> Tensor:
        config = self.config
        heads = whole.unflatten(0, (-1, config.head_dim))
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads])
        own = self._key_heads()
        return torch.cat([self._part(q), k[own], v[own]]).flatten(0, 1)


def parallelize(module: Decoder, group: Group) -> Decoder:
    """Exchange the layers of a decoder that was made from a `shard_config` and holds this process's weights."""
    for block in module.layers:
        for owner, name in ((block.attn, "out"), (block.mlp, "down")):
            setattr(owner, name, RowParallel(getattr(owner, name), group))
    module.add_module("head", VocabParallelHead(module.head, group, module.config.vocab_size))
    return module
