"""Batches: every token once, inside its sample, in an order that can be had again from any place, by any ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmasos.data import IGNORED, Batch, Batches, Source, loader, mix, parse_sources, show_batch, tokens
from llmasos.data.inspect import runs
from llmasos.data.order import is_validation, permutation, row_key
from llmasos.data.pack import best_fit, pack, windows
from llmasos.errors import FormatError, InvalidInputError, LLMasOSError
from llmasos.text import Tokenizer

Write = Callable[..., Path]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = [{"text": " ".join(LETTERS[(i * j) % 26] for j in range(1 + i * 7 % 40))} for i in range(1, 61)]
"""Of 2 to 80 tokens."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, windows and buffers so small that a few rows cross them all."""
    monkeypatch.setattr(tokens, "PIECE_ROWS", 7)
    monkeypatch.setattr(mix, "WINDOW", 3)
    monkeypatch.setattr(loader, "BUFFER", 2)


def plain(batch: Batch) -> tuple[Any, ...]:
    return (batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist(), batch.lengths, batch.num_trained)


def samples(batch: Batch) -> list[tuple[int, ...]]:
    ends = np.cumsum(batch.lengths)
    return [tuple(part.tolist()) for part in np.split(batch.tokens.numpy(), ends[:-1])]


# packing and order


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_best_fit_packs_every_sample_once_and_fills_bins(lengths: list[int], capacity: int) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in one) for one in bins]
    assert all(load <= capacity for load in loads) and all(bins)
    # no two bins could be one, and so there are less than twice as many as needed
    assert len(loads) < 2 or sum(sorted(loads)[:2]) > capacity


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_packing_takes_no_more_bins_than_best_fit_and_fills_them_alike(lengths: list[int], capacity: int) -> None:
    bins, fitted = pack(lengths, capacity), best_fit(lengths, capacity)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    assert len(bins) == len(fitted)
    loads = [sum(lengths[i] for i in one) for one in bins]
    assert max(loads, default=0) <= capacity
    assert bins == fitted or max(loads) - min(loads) <= max(lengths)


def test_no_batch_of_a_long_stream_is_nearly_empty() -> None:
    lengths = [10] * 641
    assert sorted(len(one) for one in best_fit(lengths, 100))[0] == 1
    assert {len(one) for one in pack(lengths, 100)} == {9, 10}


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="51 tokens does not fit into 50"):
        best_fit([51], 50)


@given(st.integers(1, 200), st.integers(1, 50))
def test_windows_hold_every_token_once(length: int, longest: int) -> None:
    cut = list(windows(length, longest, "split"))
    assert [at for begin, end in cut for at in range(begin, end)] == list(range(length))
    assert all(end - begin <= longest for begin, end in cut)
    assert list(windows(length, longest, "truncate")) == [(0, min(length, longest))]
    assert list(windows(length, longest, "drop")) == ([(0, length)] if length <= longest else [])


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_index_once(n: int, seed: int) -> None:
    order = permutation(n, seed)
    assert sorted(order.tolist()) == list(range(n))
    assert n < 20 or order.tolist() != permutation(n, seed ^ 1).tolist()


def test_the_order_is_that_of_every_machine_and_version() -> None:
    assert permutation(8, 1).tolist() == [1, 3, 5, 7, 4, 0, 6, 2]
    assert row_key(b"tea") == 10431608578837538234


def test_a_larger_share_for_validation_only_adds_rows() -> None:
    keys = np.array([row_key(str(i).encode()) for i in range(2000)], np.uint64)
    small, large = is_validation(keys, 0.1), is_validation(keys, 0.3)
    assert not (small & ~large).any()
    assert 150 < small.sum() < 250 and 520 < large.sum() < 680


# batches


@settings(max_examples=25)
@given(seed=st.integers(0, 99), max_length=st.integers(3, 90), extra=st.integers(0, 60), shuffle=st.booleans())
def test_every_token_comes_once_and_no_sample_is_mixed_with_another(
    tokenizer: Tokenizer,
    write: Write,
    small: None,
    seed: int,
    max_length: int,
    extra: int,
    shuffle: bool,
) -> None:
    path = write(TEXTS)
    batches = Batches(
        path, tokenizer, max_length=max_length, batch_tokens=max_length + extra, seed=seed, shuffle=shuffle, prefetch=0
    )
    whole = {
        (*tokenizer.encode(row["text"]), tokenizer.eos_token_id): f"{path}:{line}" for line, row in enumerate(TEXTS, 1)
    }
    expected = Counter(ids[at : at + max_length] for ids in whole for at in range(0, len(ids), max_length))
    found: Counter[Any] = Counter()
    for batch in batches:
        assert sum(batch.lengths) == len(batch.tokens) <= max_length + extra
        assert batch.positions.tolist() == [at for length in batch.lengths for at in range(length)]
        assert batch.num_trained == sum(label != IGNORED for label in batch.labels.tolist())
        start = 0
        for length, sample, where in zip(batch.lengths, samples(batch), batch.where, strict=True):
            found[sample] += 1
            labels = batch.labels[start : start + length].tolist()
            assert labels[:-1] == list(sample[1:])
            # the last label goes on in the document where that goes on
            last = [ids for ids, place in whole.items() if place == where and _continues(ids, sample, labels[-1])]
            assert last, "the label behind a window is the document's next token, or none at its end"
            start += length
    assert found == expected


def _continues(ids: tuple[int, ...], sample: tuple[int, ...], label: int) -> bool:
    for at in range(len(ids) - len(sample) + 1):
        if ids[at : at + len(sample)] == sample:
            end = at + len(sample)
            if label == (ids[end] if end < len(ids) else IGNORED):
                return True
    return False


@settings(max_examples=25)
@given(
    seed=st.integers(0, 9),
    stop=st.integers(0, 40),
    weighted=st.booleans(),
    prefetch=st.sampled_from([0, 3]),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(
    tokenizer: Tokenizer,
    write: Write,
    small: None,
    seed: int,
    stop: int,
    weighted: bool,
    prefetch: int,
    ranks: tuple[int, int],
) -> None:
    data = [write(TEXTS[:40], "a.jsonl"), write(TEXTS[40:], "b.jsonl")]
    refs = [Source(data[0], 0.4), Source(data[1], 0.6)] if weighted else [Source(one) for one in data]
    before, after = ranks
    options: dict[str, Any] = {"max_length": 64, "batch_tokens": 96, "seed": seed, "epochs": 2}
    straight = [plain(batch) for batch in Batches(refs, tokenizer, **options, prefetch=0)]
    first = Batches(refs, tokenizer, **options, prefetch=prefetch, world_size=before)
    given_batches = iter(first)
    num = len(list(islice(given_batches, stop)))
    place = json.loads(json.dumps(first.state_dict()))
    given_batches.close()
    found: dict[int, Any] = {}
    for rank in range(after):
        again = Batches(refs, tokenizer, **options, prefetch=prefetch, rank=rank, world_size=after)
        again.load_state_dict(place)
        for i, batch in enumerate(again):
            if batch.num_samples:
                found[min(num * before, len(straight)) + i * after + rank] = plain(batch)
    rest = range(min(num * before, len(straight)), len(straight))
    assert found == {i: straight[i] for i in rest}


def test_ranks_share_the_batches_and_stop_together(tokenizer: Tokenizer, write: Write, small: None) -> None:
    path = write(TEXTS)
    options: dict[str, Any] = {"max_length": 96, "prefetch": 0}
    alone = [plain(batch) for batch in Batches(path, tokenizer, **options)]
    parts = [list(Batches(path, tokenizer, **options, rank=rank, world_size=4)) for rank in range(4)]
    assert {len(part) for part in parts} == {-(-len(alone) // 4)} and len(alone) % 4
    assert Batches(path, tokenizer, **options, world_size=4).count() == len(parts[0])
    together = [part[i] for i in range(len(parts[0])) for part in parts]
    assert [plain(batch) for batch in together[: len(alone)]] == alone
    assert all(batch.num_trained == batch.num_samples == 0 and len(batch.tokens) for batch in together[len(alone) :])


def test_epochs_have_all_rows_in_other_orders(tokenizer: Tokenizer, write: Write, small: None) -> None:
    path = write(TEXTS)
    once = list(Batches(path, tokenizer, max_length=96))
    twice = list(Batches(path, tokenizer, max_length=96, epochs=2))
    count = Counter(sample for batch in once for sample in samples(batch))
    assert Counter(sample for batch in twice for sample in samples(batch)) == count + count
    assert [plain(batch) for batch in twice[: len(once)]] == [plain(batch) for batch in once]
    assert [batch.where for batch in twice[len(once) :]] != [batch.where for batch in once]
    endless = Batches(path, tokenizer, max_length=96, epochs=None)
    assert len(list(islice(endless, 3 * len(once)))) == 3 * len(once)
    with pytest.raises(InvalidInputError, match="without end"):
        endless.count()


def test_reset_begins_anew(tokenizer: Tokenizer, write: Write) -> None:
    batches = Batches(write(TEXTS), tokenizer, max_length=96, shuffle=False)
    first = [plain(batch) for batch in batches]
    assert list(batches) == []
    batches.reset()
    assert [plain(batch) for batch in batches] == first


def test_weights_are_shares_of_tokens_and_all_is_read(tokenizer: Tokenizer, write: Write, small: None) -> None:
    many, few = write([{"text": f"a a {i}"} for i in range(300)], "many.jsonl"), write(TEXTS[:5], "few.jsonl")
    counts: Counter[str] = Counter()
    seen = set()
    for batch in Batches([Source(many, 3), Source(few, 1)], tokenizer, max_length=96):
        for where, length in zip(batch.where, batch.lengths, strict=True):
            counts[Path(where).name.partition(".")[0]] += length
            seen.add(where)
    assert abs(counts["few"] / counts.total() - 0.25) < 0.05
    assert len(seen) == 305


def test_a_source_without_rows_for_the_mix_is_told(tokenizer: Tokenizer, write: Write) -> None:
    held_out = next(row for row in TEXTS if row_key(json.dumps(row).encode()) < 0.1 * 2**64)
    sources = [Source(write(TEXTS, "a.jsonl"), 1), Source(write([held_out], "b.jsonl"), 1)]
    with pytest.raises(FormatError, match=r"b\.jsonl has no samples"):
        list(Batches(sources, tokenizer, max_length=96, validation=0.1))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["a=x"], "'x' is no weight"), (["a=1", "b"], "b has no weight"), (["a=0"], "not above 0"), ([], "No data")],
)
def test_weights_are_read_strictly(words: list[str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_sources(words)


def test_training_and_validation_share_no_row_and_miss_none(tokenizer: Tokenizer, write: Write) -> None:
    path = write([*TEXTS, *TEXTS])
    parts = {
        split: {sample for batch in Batches(path, tokenizer, max_length=96, split=split, validation=0.3)  # type: ignore[arg-type]
                for sample in samples(batch)}
        for split in ("train", "validation", "all")
    }  # fmt: skip
    assert parts["train"] and parts["validation"] and not parts["train"] & parts["validation"]
    assert parts["train"] | parts["validation"] == parts["all"]


def test_long_chats_are_refused_with_their_number_unless_it_is_said_what_to_do(
    tokenizer: Tokenizer, write: Write
) -> None:
    def chat(asked: str, answered: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}

    path = write([chat("a", "b"), chat("a", "b " * 50), chat("a " * 50, "b")])
    with pytest.raises(InvalidInputError, match=r"2 of 3 samples are longer than 32 tokens; the longest has \d+") as e:
        Batches(path, tokenizer, max_length=32).prepare()
    assert "rows.jsonl:" in e.value.message and "max_length=" in e.value.hint
    with pytest.raises(InvalidInputError, match="longer than 32"):
        list(Batches(path, tokenizer, max_length=32))

    def lines(**options: Any) -> list[str]:
        found = Batches(path, tokenizer, max_length=32, **options)
        return sorted(where.rpartition(":")[2] for batch in found for where in batch.where)

    assert lines(overlong="drop") == ["1"]
    assert lines(overlong="truncate") == ["1", "2"], "of the third, nothing that is trained would be left"
    assert set(lines(overlong="split")) == {"1", "2", "3"}


def test_nothing_to_train_on_is_an_error(tokenizer: Tokenizer, write: Write) -> None:
    path = write([row for row in TEXTS if len(row["text"]) > 9])
    for batches in (
        Batches(path, tokenizer, max_length=2, overlong="drop"),
        Batches(path, tokenizer, max_length=2, overlong="drop", epochs=None),
        Batches(path, tokenizer, split="validation", validation=1e-9),
    ):
        with pytest.raises(FormatError, match="has no samples"):
            list(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 100, "max_length": 200}, "Batches of 100 tokens cannot hold samples of 200"),
        ({"validation": 1.5}, "share of 1.5"),
        ({"split": "validation"}, "share of 0"),
        ({"rank": 2, "world_size": 2}, "no rank 2 of 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tokenizer: Tokenizer, write: Write, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Batches(write(TEXTS), tokenizer, **options)


def test_a_place_in_other_data_is_refused(tokenizer: Tokenizer, write: Write) -> None:
    place = Batches(write(TEXTS), tokenizer, max_length=96).state_dict()
    with pytest.raises(InvalidInputError, match="saved with max_length=96, and this is max_length=97"):
        Batches(write(TEXTS), tokenizer, max_length=97, batch_tokens=96 + 1).load_state_dict(place)
    with pytest.raises(InvalidInputError, match="other data or another tokenizer"):
        Batches(write(TEXTS[1:]), tokenizer, max_length=96).load_state_dict(place)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bad_row_ends_the_batches_with_its_place(tokenizer: Tokenizer, write: Write, prefetch: int) -> None:
    path = write([*TEXTS, {"text": 5}])
    with pytest.raises(LLMasOSError, match=r"rows\.jsonl:61: text is a int, not text: 5"):
        list(Batches(path, tokenizer, max_length=96, prefetch=prefetch))


# looking at them


def test_a_batch_is_shown_with_what_is_trained(tokenizer: Tokenizer, write: Write) -> None:
    messages = [{"role": "user", "content": "Hi\x1b[2J"}, {"role": "assistant", "content": "猫 here."}]
    path = write([{"messages": messages}])
    [batch] = Batches(path, tokenizer, max_length=96)
    [found] = runs(batch, tokenizer)
    assert [(run.look, run.text) for run in found] == [
        ("read", "<|user|>Hi\x1b[2J<|end|><|assistant|>"),
        ("trained", "猫 here."),
        ("stop", "<|end|>"),
    ]
    text = show_batch(batch, tokenizer, colour=False)
    assert f"{path}:1, " in text and "⟦猫 here.⟧⟪<|end|>⟫" in text and "Hi\\x1b[2J" in text
    assert "\x1b[32m猫 here.\x1b[0m" in show_batch(batch, tokenizer)
