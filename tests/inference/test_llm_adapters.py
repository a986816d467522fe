"""LoRA adapters through LLM: loaded at any time, chosen per request, mixed in one pass."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmasos.errors import BusyError, InvalidInputError, NotFoundError, UnsupportedError
from llmasos.inference.llm import LLM
from llmasos.models.load import load_model
from tiny import write_tiny_adapter

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_tiny_adapter(root / name, seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(load_model(tiny_model, device="cpu", dtype="float32"), name="tiny") as llm:
        yield llm


def test_one_loaded_before_the_first_request_equals_one_loaded_after_it(
    llm: LLM, tiny_llm: LLM, folders: dict[str, Path]
) -> None:
    plain = tiny_llm.generate(PROMPT, max_tokens=12)
    llm.load_adapter("a", folders["a"])  # no engine yet
    first = llm.generate(PROMPT, max_tokens=12, adapter="a")
    assert llm.generate(PROMPT, max_tokens=12) == plain != first
    llm.load_adapter("b", folders["b"])
    second = llm.generate(PROMPT, max_tokens=12, adapter="b")
    assert second not in (plain, first)
    assert llm.embed(PROMPT) == pytest.approx(tiny_llm.embed(PROMPT), abs=1e-6)  # right after a pass with an adapter
    with LLM(load_model(llm.model.path, device="cpu", dtype="float32"), name="late") as late:
        assert late.generate(PROMPT, max_tokens=12) == plain
        late.load_adapter("b", folders["b"])
        assert late.generate(PROMPT, max_tokens=12, adapter="b") == second


async def test_requests_with_different_adapters_run_at_once_and_get_what_they_get_alone(
    llm: LLM, folders: dict[str, Path]
) -> None:
    for name, folder in folders.items():
        llm.load_adapter(name, folder)
    choices = ["a", None, "b", "a", "b", None]
    alone = {c: llm.generate(PROMPT, max_tokens=20, ignore_eos=True, adapter=c) for c in (None, "a", "b")}
    steps = llm.stats.num_steps
    texts = await asyncio.gather(*(llm.agenerate(PROMPT, max_tokens=20, ignore_eos=True, adapter=c) for c in choices))
    assert texts == [alone[c] for c in choices] and len(set(alone.values())) == 3
    assert llm.stats.num_steps - steps < 60  # one after the other it would be 120


def test_adapters_are_listed_forgotten_and_missed(llm: LLM, folders: dict[str, Path]) -> None:
    assert llm.adapters == []
    with pytest.raises(InvalidInputError, match="No adapter is loaded"):
        llm.generate(PROMPT, max_tokens=2, adapter="a")
    with pytest.raises(NotFoundError, match="'a'"):
        llm.unload_adapter("a")
    llm.load_adapter("a", folders["a"])
    [info] = llm.adapters
    assert (info.name, info.path, info.rank, info.num_requests) == ("a", folders["a"].resolve(), 4, 0)
    with pytest.raises(NotFoundError, match=r"'nope'.*Loaded: a"):
        llm.generate(PROMPT, max_tokens=2, adapter="nope")
    llm.unload_adapter("a")
    assert llm.adapters == []
    with pytest.raises(NotFoundError):
        llm.generate(PROMPT, max_tokens=2, adapter="a")


def test_one_in_use_is_not_unloaded_and_is_free_afterwards(llm: LLM, folders: dict[str, Path]) -> None:
    llm.load_adapter("a", folders["a"])
    chunks = llm.stream(PROMPT, max_tokens=200, ignore_eos=True, adapter="a")
    next(chunks)
    with pytest.raises(BusyError, match="in use by 1"):
        llm.unload_adapter("a")
    chunks.close()
    llm.unload_adapter("a")


def test_an_engine_that_breaks_leaves_no_adapter_in_use(
    llm: LLM, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.load_adapter("a", folders["a"])
    text = llm.generate(PROMPT, max_tokens=4, adapter="a")
    with monkeypatch.context() as patch:
        patch.setattr(llm._loop.current_engine, "step", lambda: 1 / 0)
        with pytest.raises(Exception, match="division"):
            llm.generate(PROMPT, max_tokens=4, adapter="a")
    assert llm.generate(PROMPT, max_tokens=4, adapter="a") == text
    assert [info.num_requests for info in llm.adapters] == [0]
    llm.unload_adapter("a")


def test_ranks_and_numbers_are_engine_options(tiny_model: Path, folders: dict[str, Path]) -> None:
    model = load_model(tiny_model, device="cpu", dtype="float32")
    with LLM(model, name="tiny", max_lora_rank=2) as llm:
        with pytest.raises(InvalidInputError, match=r"rank 4.*max_lora_rank"):
            llm.load_adapter("a", folders["a"])
        assert llm.adapters == []
    with LLM(model, name="tiny", max_loras=1) as llm:
        for name, folder in folders.items():
            llm.load_adapter(name, folder)
        assert [info.slot for info in llm.adapters] == [None, 0]
        texts = [llm.generate(PROMPT, max_tokens=8, adapter=name) for name in "abab"]
        assert texts[:2] == texts[2:]


async def test_more_adapters_than_fit_take_turns_and_nobody_starves(llm: LLM, tiny_model: Path, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    folders = {name: write_tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(names)}
    for name in names:
        llm.load_adapter(name, folders[name])
    alone = {name: llm.generate(PROMPT, max_tokens=12, ignore_eos=True, adapter=name) for name in names}
    with LLM(load_model(tiny_model, device="cpu", dtype="float32"), name="few", max_loras=2) as few:
        for name in names:
            few.load_adapter(name, folders[name])
        ask = [
            asyncio.ensure_future(few.agenerate(PROMPT, max_tokens=12, ignore_eos=True, adapter=name))
            for name in names * 6
        ]
        given_up = asyncio.ensure_future(few.agenerate(PROMPT, max_tokens=12, adapter="d"))
        while not few.stats.num_waiting:
            await asyncio.sleep(0)
        given_up.cancel()
        assert await asyncio.gather(*ask) == [alone[name] for name in names * 6]
        assert few.stats.num_running == few.stats.num_waiting == 0
        assert [info.num_requests for info in few.adapters] == [0] * 4


async def test_one_that_is_unloaded_while_requests_wait_for_it_fails_them_alone(
    tiny_model: Path, folders: dict[str, Path]
) -> None:
    with LLM(load_model(tiny_model, device="cpu", dtype="float32"), name="few", max_loras=1) as few:
        for name, folder in folders.items():
            few.load_adapter(name, folder)
        first = few.astream(PROMPT, max_tokens=100, ignore_eos=True, adapter="a")
        await anext(first)
        waits = asyncio.ensure_future(few.agenerate(PROMPT, max_tokens=4, adapter="b"))
        behind = asyncio.ensure_future(few.agenerate(PROMPT, max_tokens=4, adapter="a"))
        while few.stats.num_waiting < 2:
            await asyncio.sleep(0)
        few.unload_adapter("b")
        await first.aclose()
        with pytest.raises(NotFoundError, match="'b'"):
            await waits
        assert await behind == few.generate(PROMPT, max_tokens=4, adapter="a")


def test_an_encoder_takes_none(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_llm.model.config), "is_encoder", True)
    with pytest.raises(UnsupportedError, match="adapters"):
        tiny_llm.load_adapter("a", "anywhere")
