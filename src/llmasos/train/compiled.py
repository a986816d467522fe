"""What a compiled block keeps for its backward pass: the compiler's own partitioner is asked, and nothing is compiled.

A block is traced once, both ways; the partitioner chooses what is kept and what is computed again. What the two graphs
hold while they run is counted as the code generator would: elementwise steps are fused into what reads or writes them,
so only operands and results of matrix products, attention and indexing exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule, Node

from llmasos.models.attention import Attend
from llmasos.models.decoder import Block
from llmasos.models.layers import Rope

Tables = tuple[Tensor, Tensor] | None
_HEAVY = ("mm", "addmm", "bmm", "baddbmm", "index_put", "embedding_dense_backward", "flash", "flash_backward")
_VIEWS = (
    *("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze"),
    *("squeeze", "as_strided", "alias", "detach", "split", "split_with_sizes", "getitem", "unbind"),
)


@dataclass(frozen=True)
class Kept:
    """Bytes. saved: from the forward pass for the backward pass, the block's input not counted. forward, backward: what
    else exists at most while one of them runs."""

    saved: int
    forward: int
    backward: int


def kept(block: Block, dtype: torch.dtype, num_tokens: int, rope: Rope | None, attend: Attend) -> Kept:
    """Of a block on fake tensors, whose adapters and casts are in it as they train."""
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[GraphModule] = []

    def note(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    weights = {
        name: p.detach()
        .to(p.dtype if name.endswith((".a", ".b", ".length")) else dtype)
        .requires_grad_(p.requires_grad)
        for name, p in block.named_parameters()
    }
    weights |= dict(block.named_buffers())
    names = list(weights)

    def run(x: Tensor, tables: Tables, *given: Tensor) -> Tensor:
        out: Tensor = functional_call(block, dict(zip(names, given, strict=True)), (x, rope, tables, attend))
        return out

    width = block.attn.qkv.in_features
    x = torch.empty(num_tokens, width, dtype=dtype).requires_grad_()
    table = None if rope is None else torch.empty(num_tokens, 1, rope.dim, dtype=dtype)
    compiled = aot_function(
        run,
        fw_compiler=note,
        bw_compiler=note,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    compiled(x, None if table is None else (table, table.clone()), *weights.values()).sum().backward()
    forward, backward = graphs
    saved = _saved(forward)
    return Kept(saved, max(0, _most(forward) - saved), max(0, _most(backward) - saved))


def _saved(graph: GraphModule) -> int:
    """Of what the forward graph returns beside the block's result and its own inputs."""
    [output] = [node for node in graph.graph.nodes if node.op == "output"]
    found = {_base(node) for node in output.args[0][1:] if isinstance(node, Node)}
    return sum(_bytes(node) for node in found if node.op != "placeholder")


def _most(graph: GraphModule) -> int:
    """The most bytes at once of what exists, what the graph is given of the other one included."""
    nodes = list(graph.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 1)
    for node in nodes:
        size = _bytes(node)
        if node.op not in ("call_function", "placeholder") or not size or _is(node, _VIEWS) or not _exists(node):
            continue
        if node.op == "placeholder" and not node.name.startswith(("saved", "tangents")) and "primals" in node.name:
            continue
        changes[0 if node.op == "placeholder" else place[node]] += size
        changes[_last_use(node, place) + 1] -= size
    most = live = 0
    for change in changes:
        live += change
        most = max(most, live)
    return most


def _exists(node: Node) -> bool:
    """Something reads or writes it that cannot be fused."""
    if node.op == "placeholder" or _is(node, _HEAVY):
        return True
    readers = list(node.users)
    while readers:
        reader = readers.pop()
        if reader.op == "output" or _is(reader, _HEAVY):
            return True
        if _is(reader, _VIEWS):
            readers += reader.users
    return False


def _last_use(node: Node, place: dict[Node, int]) -> int:
    """Through views and whatever is fused into its readers."""
    last = place[node]
    readers, seen = list(node.users), set()
    while readers:
        reader = readers.pop()
        if reader in seen:
            continue
        seen.add(reader)
        last = max(last, place[reader])
        if reader.op == "call_function" and (_is(reader, _VIEWS) or not _exists(reader)):
            readers += reader.users
    return last


def _base(node: Node) -> Node:
    while node.op == "call_function" and _is(node, _VIEWS) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is(node: Node, names: tuple[str, ...]) -> bool:
    if node.op != "call_function":
        return False
    target = node.target
    name = target.__name__ if not hasattr(target, "_schema") else target._schema.name.split("::")[-1]  # type: ignore[union-attr]
    return name in names


def _bytes(node: Node) -> int:
    values = node.meta.get("val")
    each = values if isinstance(values, tuple | list) else [values]
    return sum(math.prod(v.shape) * v.dtype.itemsize for v in each if isinstance(v, Tensor))


@torch.library.custom_op("llmasos::flash", mutates_args=())
def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What FlashAttention gives (arXiv:2307.08691): its result, and a number for every row. For tracing only."""
    raise NotImplementedError


@torch.library.custom_op("llmasos::flash_backward", mutates_args=())
def _flash_backward(
    outer: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise NotImplementedError


@_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_flash_backward.register_fake
def _(
    outer: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shared = 2 * q.numel() * q.dtype.itemsize if q.shape[1] != k.shape[1] else 0
    # float32 sums of the queries' gradients, and those of shared keys and values before they are added up
    room = q.new_empty(4 * q.numel() + shared, dtype=torch.uint8)
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape), room


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _back(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = _flash_backward(outer, *ctx.saved_tensors)
    return grads[:3]


_flash.register_autograd(_back, setup_context=_keep)


def flash(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = _flash(q, k, v)[0]
    return out


class StandIn:
    """In the place of a compiled block: takes and keeps as much. recompute: keeps its input only."""

    def __init__(self, block: Block, found: Kept, recompute: bool) -> None:
        self.block = block
        self.saved = 0 if recompute else found.saved
        self.forward = found.forward + (found.saved if recompute else 0)
        self.backward = found.backward + (found.saved if recompute else 0)

    def __call__(self, x: Tensor, rope: Rope, tables: Tables, attend: Attend) -> Tensor:
        weights = [p for module in self.block.modules() for p in module._parameters.values() if p is not None]
        out: Tensor = _Take.apply(x, self, *weights)  # type: ignore[no-untyped-call]
        return out


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: StandIn, *weights: Tensor) -> Tensor:
        ctx.how, ctx.weights = how, weights
        ctx.kept = x, _room(how.saved)
        _during = _room(how.forward)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        # results are part of what the backward graph holds: they come when the rest has gone
        _during = _room(ctx.how.backward)
        x, _ = ctx.kept
        needed = ctx.needs_input_grad[2:]
        del _during
        ctx.kept = None
        weights, ctx.weights = ctx.weights, None
        grads = [torch.empty_like(w) if need else None for w, need in zip(weights, needed, strict=True)]
        return torch.empty_like(x), None, *grads


def _room(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)
