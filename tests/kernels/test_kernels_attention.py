"""The attention kernels equal the definition in float64 on random shapes, on memory that holds NaN wherever they must
not look, in Triton's interpreter (on the GPU where there is one)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llmasos.inference.batch import SharedPrefix
from llmasos.models.attention import AttentionSpec, alibi_slopes

pytest.importorskip("triton", reason="the kernels need Triton")

from llmasos.inference.kernels.decode import Workspace, new_workspace, paged_decode
from llmasos.inference.kernels.prefill import TILINGS, paged_prefill
from llmasos.inference.kernels.prefix import Prefixes, new_prefixes, prefix_tiles
from llmasos.inference.kernels.tiles import Tiling
from llmasos.inference.kernels.write import write_kv

SMALL = Tiling(block_m=16, block_n=16, warps=4, stages=2)


@dataclass
class Case:
    """Sequences in scattered pages; every slot that holds no key of theirs is NaN."""

    q: Tensor
    k: list[Tensor]
    v: list[Tensor]
    keys: Tensor
    values: Tensor
    table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    page_size: int

    @property
    def lengths(self) -> list[int]:
        return self.seq_lens.tolist()

    def pages(self) -> dict[str, Tensor | int]:
        names = "q", "keys", "values", "table", "seq_lens", "page_size"
        return {name: getattr(self, name) for name in names}

    def workspace(self, max_query: int = 1) -> Workspace:
        heads, kv_heads, width = self.q.shape[1], self.keys.shape[1], self.q.shape[2]
        return new_workspace(len(self.lengths), heads, kv_heads, width, self.q.device, max_query=max_query)


def make_case(
    lengths: Sequence[int],
    queries: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    page_size: int = 16,
    shared: int = 0,
    device: torch.device,
    seed: int = 0,
) -> Case:
    """`shared`: all sequences begin with the same pages, that many keys."""
    draw = torch.Generator().manual_seed(seed)
    columns = max(1, math.ceil(max(lengths) / page_size))
    free = itertools.count(1)
    table = torch.zeros(len(lengths), columns, dtype=torch.int32)
    common = [next(free) for _ in range(shared // page_size)]
    for row, n in zip(table, lengths, strict=True):
        pages = [*common, *(next(free) for _ in range(math.ceil(n / page_size)))][: math.ceil(n / page_size)]
        row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
    num_pages = next(free)
    order = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(num_pages - 1, generator=draw) + 1])
    table = order[table.long()].int()
    keys, values = (torch.full((num_pages * page_size, kv_heads, width), math.nan) for _ in range(2))
    k, v = [], []
    for row, n in zip(table.long(), lengths, strict=True):
        slots = (row[:, None] * page_size + torch.arange(page_size)).flatten()[:n]
        for storage, mine in ((keys, k), (values, v)):
            new = torch.randn(n, kv_heads, width, generator=draw)
            known = storage[slots]
            storage[slots] = torch.where(known.isnan(), new, known)
            mine.append(storage[slots].clone())
    q = torch.randn(sum(queries), heads, width, generator=draw)
    query_start = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    on_device = (x.to(device) for x in (keys, values, table, query_start, seq_lens))
    return Case(q.to(device), k, v, *on_device, page_size)


def expected(case: Case, spec: AttentionSpec, sinks: Tensor | None = None) -> Tensor:
    """softmax(scores) v in float64, written out; zeros where a sequence has no keys."""
    q, out = case.q.cpu().double(), torch.zeros(case.q.shape, dtype=torch.float64)
    starts = case.query_start.tolist()
    for b, length in enumerate(case.lengths):
        first, end = starts[b], starts[b + 1]
        if not length:
            continue
        k, v = (x[b].double().repeat_interleave(q.shape[1] // x[b].shape[1], 1) for x in (case.k, case.v))
        scores = torch.einsum("qhd,nhd->hqn", q[first:end], k) * spec.scale
        if spec.softcap:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        distance = torch.arange(length - (end - first), length)[:, None] - torch.arange(length)
        if spec.slopes:
            scores = scores - torch.tensor(spec.slopes, dtype=torch.float64)[:, None, None] * distance
        hidden = (distance < 0) & spec.causal
        if spec.window:
            hidden = hidden | (distance.abs() >= spec.window)
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.cpu().double()[:, None, None].expand(-1, end - first, 1)], -1)
        weights = scores.softmax(-1)[..., :length]
        out[first:end] = torch.einsum("hqn,nhd->qhd", weights, v)
    return out


def assert_equal(out: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    difference = (out.cpu().double() - reference).norm() / reference.norm()
    assert difference < tolerance, difference


SPECS = {
    "plain": AttentionSpec(scale=0.3),
    "window": AttentionSpec(scale=0.3, window=21),
    "softcap": AttentionSpec(scale=0.9, softcap=2.0),
    "alibi": AttentionSpec(scale=0.3, slopes=alibi_slopes(4)),
    "window and softcap": AttentionSpec(scale=0.9, window=40, softcap=2.0),
}
LENGTHS = [70, 1, 0, 33, 16]


def slopes_of(spec: AttentionSpec, device: torch.device) -> Tensor | None:
    return torch.tensor(spec.slopes, device=device) if spec.slopes else None


def decode(case: Case, spec: AttentionSpec, **options) -> Tensor:  # type: ignore[no-untyped-def]
    max_query = options.get("max_query", 1)
    return paged_decode(
        **case.pages(),
        workspace=options.pop("workspace", None) or case.workspace(max_query),
        spec=spec,
        slopes=slopes_of(spec, case.q.device),
        out=torch.zeros_like(case.q),
        **{"shortest": 32, "tiling": SMALL} | options,
    )


def prefill(case: Case, spec: AttentionSpec, **options) -> Tensor:  # type: ignore[no-untyped-def]
    return paged_prefill(
        **case.pages(),
        query_start=case.query_start,
        max_query=int(case.query_start.diff().max()),
        spec=spec,
        slopes=slopes_of(spec, case.q.device),
        out=torch.zeros_like(case.q),
        **options,
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_decode_equals_the_definition(spec: AttentionSpec, device: torch.device) -> None:
    case = make_case(LENGTHS, [1] * 5, device=device)
    assert_equal(decode(case, spec), expected(case, spec))


def test_sinks_only_take_weight_away(device: torch.device) -> None:
    case, sinks = make_case(LENGTHS, [1] * 5, device=device), torch.randn(4, device=device)
    assert_equal(decode(case, SPECS["plain"], sinks=sinks), expected(case, SPECS["plain"], sinks))
    assert_equal(prefill(case, SPECS["window"], sinks=sinks), expected(case, SPECS["window"], sinks))


@pytest.mark.parametrize("shape", [(1, 1, 16), (6, 2, 24), (7, 1, 32), (2, 2, 80), (5, 5, 64), (20, 1, 256)])
def test_decode_takes_any_ratio_of_heads_and_any_width(shape: tuple[int, int, int], device: torch.device) -> None:
    heads, kv_heads, width = shape
    case = make_case([50, 9], [1, 1], heads=heads, kv_heads=kv_heads, width=width, device=device)
    assert_equal(decode(case, SPECS["plain"]), expected(case, SPECS["plain"]))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("splits", [1, 3, 9])
def test_decode_does_not_depend_on_pages_or_on_how_keys_are_cut(
    splits: int, page_size: int, device: torch.device
) -> None:
    case = make_case([150, 3, 90], [1, 1, 1], page_size=page_size, device=device)
    workspace = new_workspace(9, 4, 2, 16, device)
    for tiling in (SMALL, replace(SMALL, block_n=64)):
        out = decode(case, SPECS["plain"], splits=splits, shortest=1, tiling=tiling, workspace=workspace)
        assert_equal(out, expected(case, SPECS["plain"]))


def test_decode_leaves_its_counters_at_zero_so_that_a_graph_can_replay_it(device: torch.device) -> None:
    case = make_case([200, 90], [1, 1], device=device)
    workspace = case.workspace()
    first = decode(case, SPECS["plain"], workspace=workspace)
    assert not workspace.done.any()
    workspace.acc.fill_(math.nan)
    assert torch.equal(decode(case, SPECS["plain"], workspace=workspace), first)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_decode_takes_several_queries_of_a_sequence(spec: AttentionSpec, device: torch.device) -> None:
    case = make_case([90, 0, 7, 40], [5, 2, 7, 1], device=device)
    out = decode(case, spec, query_start=case.query_start, max_query=7)
    assert_equal(out, expected(case, spec))


@pytest.mark.parametrize("tiling", [SMALL, TILINGS[64]], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_prefill_equals_the_definition(spec: AttentionSpec, tiling: Tiling, device: torch.device) -> None:
    case = make_case([70, 20, 0, 45, 9], [31, 20, 3, 1, 2], device=device)
    assert_equal(prefill(case, spec, tiling=tiling), expected(case, spec))


@pytest.mark.parametrize("window", [0, 20])
def test_prefill_without_causality_sees_both_sides(window: int, device: torch.device) -> None:
    spec = AttentionSpec(scale=0.3, causal=False, window=window)
    case = make_case([70, 30], [70, 30], device=device)
    assert_equal(prefill(case, spec, tiling=SMALL), expected(case, spec))


@pytest.mark.parametrize("shape", [(1, 1, 16), (6, 2, 24), (7, 1, 32), (2, 2, 80), (20, 1, 128)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_prefill_takes_any_ratio_of_heads_and_any_width(
    shape: tuple[int, int, int], page_size: int, device: torch.device
) -> None:
    heads, kv_heads, width = shape
    case = make_case([50, 9], [20, 3], heads=heads, kv_heads=kv_heads, width=width, page_size=page_size, device=device)
    assert_equal(prefill(case, SPECS["plain"]), expected(case, SPECS["plain"]))


@pytest.mark.usefixtures("rows_anywhere")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_invariant_rows_are_the_same_bits_however_a_prompt_is_chunked_and_whoever_is_beside_it(
    spec: AttentionSpec, device: torch.device
) -> None:
    whole = make_case([90], [90], device=device, heads=4, kv_heads=1)
    expected_bits = prefill(whole, spec, batch_invariant=True)
    assert_equal(expected_bits, expected(whole, spec))
    other = make_case([70], [20], device=device, heads=4, kv_heads=1, seed=1)
    for chunks in ([50, 40], [1, 88, 1]):
        end = 0
        for chunk in chunks:
            start, end = end, end + chunk
            mixed = make_case([70, end], [20, chunk], device=device, heads=4, kv_heads=1)
            size = mixed.page_size
            mixed.keys = torch.cat([other.keys, whole.keys])
            mixed.values = torch.cat([other.values, whole.values])
            mixed.table[0, : other.table.shape[1]] = other.table[0]
            own = whole.table[0] + other.keys.shape[0] // size
            mixed.table[1, : math.ceil(end / size)] = own[: math.ceil(end / size)]
            mixed.q = torch.cat([other.q, whole.q[start:end]])
            out = prefill(mixed, spec, batch_invariant=True)[20:]
            assert torch.equal(out, expected_bits[start:end])


def make_prefixes(case: Case, runs: list[SharedPrefix], num_tiles: int = 4) -> Prefixes:
    heads, kv_heads, width = case.q.shape[1], case.keys.shape[1], case.q.shape[2]
    num_queries, num_sequences = case.q.shape[0], len(case.lengths)
    made = new_prefixes(num_tiles, num_sequences, num_queries + 3, heads, width, kv_heads, case.q.device)
    starts = case.query_start.tolist()
    tiles, skip = prefix_tiles(runs, starts, group=heads // kv_heads, num_tiles=num_tiles)
    made.tiles.copy_(torch.from_numpy(tiles))
    made.skip.copy_(torch.from_numpy(skip))
    made.acc.fill_(math.nan)
    made.stats.fill_(math.nan)
    return made


RUNS = [SharedPrefix(1, 3, 48), SharedPrefix(3, 6, 32)]


@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["softcap"]], ids=["plain", "softcap"])
def test_decode_over_shared_prefixes_equals_the_definition(spec: AttentionSpec, device: torch.device) -> None:
    case = make_case([60, 49, 110, 64, 70, 33, 0], [1] * 7, shared=48, device=device)
    assert_equal(decode(case, spec, prefixes=make_prefixes(case, RUNS)), expected(case, spec))


def test_several_queries_over_shared_prefixes_equal_the_definition(device: torch.device) -> None:
    case = make_case([60, 52, 110, 64, 70, 38], [2, 3, 40, 1, 5, 6], shared=48, device=device)
    prefixes = make_prefixes(case, RUNS)
    assert_equal(prefill(case, SPECS["plain"], prefixes=prefixes), expected(case, SPECS["plain"]))
    few = make_case([60, 52, 70, 64, 90, 38], [2, 3, 4, 1, 5, 6], shared=48, device=device)
    prefixes = make_prefixes(few, RUNS)
    out = decode(few, SPECS["plain"], prefixes=prefixes, query_start=few.query_start, max_query=6)
    assert_equal(out, expected(few, SPECS["plain"]))


def test_shared_keys_are_read_once_and_not_by_each_sequence(device: torch.device) -> None:
    case = make_case([60, 61, 62, 63, 64, 65], [1] * 6, shared=48, device=device)
    reference = expected(case, SPECS["plain"])
    prefixes = make_prefixes(case, [SharedPrefix(0, 6, 48)])
    # only the run's first sequence still knows the shared pages: the others' entries name a page of NaN
    case.table[1:, :3] = 0
    assert_equal(decode(case, SPECS["plain"], prefixes=prefixes), reference)


def test_tiles_of_prefixes_cover_each_run_once_and_leave_out_what_saves_least() -> None:
    runs = [SharedPrefix(0, 2, 16), SharedPrefix(2, 202, 64), SharedPrefix(202, 204, 999)]
    starts = list(range(205))
    tiles, skip = prefix_tiles(runs, starts, group=2, num_tiles=5)
    assert tiles.tolist() == [[2, 64, 2, 64], [66, 64, 2, 64], [130, 64, 2, 64], [194, 8, 2, 64], [202, 2, 202, 999]]
    assert skip.tolist() == [0] * 2 + [64] * 200 + [999] * 2
    assert tiles.dtype == skip.dtype == np.int32


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_written_keys_are_read_back_as_the_storage_rounds_them(storage: torch.dtype, device: torch.device) -> None:
    plain = make_case([40, 0, 33], [5, 2, 1], device=device)
    size, slots = plain.page_size, plain.keys.shape[0]
    quantised = storage in (torch.float8_e4m3fn, torch.int8)
    given = torch.float32 if quantised else storage
    keys, values = (torch.zeros(slots, 2, 16, device=device, dtype=storage) for _ in range(2))
    scales = [torch.full((slots, 2), math.nan, device=device) if quantised else None for _ in range(2)]
    sequences = torch.tensor([0] * 40 + [1] * 2 + [2] * 33, dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n) for n in (40, 2, 33)]).to(device)
    new = [torch.cat([own[0], torch.full((2, 2, 16), 7.0), own[2]]).to(device, given) for own in (plain.k, plain.v)]
    write_kv(*new, keys, values, *scales, plain.table, positions, sequences, plain.seq_lens, page_size=size)

    stored = plain.table.cpu().long()[sequences.cpu().long(), positions.cpu() // size] * size + positions.cpu() % size
    real = sequences.cpu() != 1
    untouched = torch.ones(slots, dtype=torch.bool)
    untouched[stored[real]] = False
    assert not keys.cpu().float()[untouched].any(), "rows that only pad a graph were written"
    read = []
    for storage_of, scale, source in ((keys, scales[0], new[0]), (values, scales[1], new[1])):
        got = storage_of.cpu().float()[stored[real]]
        if scale is not None:
            got = got * scale.cpu()[stored[real]][..., None]
            # three bits after the first; the interpreter of Triton 3.6 halves what rounds up to a power of two
            step = 1 / 254 if storage == torch.int8 else 1 / 16 if device.type == "cuda" else 1 / 2
            largest = source.cpu()[real].abs().amax(-1, keepdim=True)
            assert ((got - source.cpu()[real]).abs() <= step * largest * 1.001).all()
        else:
            assert torch.equal(got, source.cpu()[real].float())
        read.append([got[:40], got[:0], got[40:]])
    plain.k, plain.v = read
    plain.keys, plain.values = keys, values
    options = {"k_scales": scales[0], "v_scales": scales[1]}
    few = decode(plain, SPECS["window"], query_start=plain.query_start, max_query=5, **options)
    assert_equal(few, expected(plain, SPECS["window"]))
    assert_equal(prefill(plain, SPECS["window"], tiling=SMALL, **options), expected(plain, SPECS["window"]))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_short_floats_are_as_close_as_their_rounding(dtype: torch.dtype, device: torch.device) -> None:
    case = make_case([70, 33], [20, 1], device=device)
    case.q, case.keys, case.values = (x.to(dtype) for x in (case.q, case.keys, case.values))
    case.k, case.v = ([x.to(dtype).float() for x in own] for own in (case.k, case.v))
    reference, tolerance = expected(case, SPECS["plain"]), 2 * torch.finfo(dtype).eps
    assert_equal(prefill(case, SPECS["plain"]), reference, tolerance)
    assert_equal(decode(case, SPECS["plain"], query_start=case.query_start, max_query=20), reference, tolerance)


def test_what_the_kernels_do_not_compute_is_refused(device: torch.device) -> None:
    case = make_case([20, 20], [1, 1], device=device)
    with pytest.raises(ValueError, match="torch path"):
        decode(case, AttentionSpec(scale=1.0, slopes=alibi_slopes(4), alibi_bf16=True))
    with pytest.raises(ValueError, match="causal"):
        decode(case, AttentionSpec(scale=1.0, causal=False))
    with pytest.raises(ValueError, match="query_start"):
        decode(case, AttentionSpec(scale=1.0), max_query=3)
    with pytest.raises(ValueError, match="too small"):
        decode(case, AttentionSpec(scale=1.0), splits=1000)
    with pytest.raises(ValueError, match="sliding window"):
        decode(case, SPECS["window"], prefixes=make_prefixes(case, []))
