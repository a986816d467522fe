"""Adapters by name: slots, counts, eviction; passes with adapters equal the same model without the registry."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from family_equality import our_logits, random_prompts
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from peft_adapters import write_adapter
from torch import Tensor

from llmasos.errors import (
    BusyError,
    FormatError,
    InsufficientMemoryError,
    InvalidInputError,
    NotFoundError,
    UnsupportedError,
)
from llmasos.inference.adapters import Adapters, GPULoraState
from llmasos.models.load import LoadedModel, load_model
from llmasos.models.lora import LoraLinear
from llmasos.models.parallel import RowParallel

PARTS = {  # of the tiny model: outputs, inputs
    "self_attn.q_proj": (32, 32),
    "self_attn.v_proj": (16, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}


def random_adapter(folder: Path, seed: int, rank: int, parts: list[str] | None = None) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for part in parts or PARTS:
            rows, width = PARTS[part]
            name = f"model.layers.{layer}.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.3
    return write_adapter(folder, tensors, r=rank)


@pytest.fixture
def model(tiny_model: Path) -> Iterator[LoadedModel]:
    yield load_model(tiny_model, device="cpu", dtype="float32", with_tokenizer=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters a .. d of several ranks; d touches other layers than the others."""
    root = tmp_path_factory.mktemp("adapters")
    made = {
        name: random_adapter(root / name, i, rank) for i, (name, rank) in enumerate({"a": 4, "b": 18, "c": 2}.items())
    }
    return made | {"d": random_adapter(root / "d", 9, 3, ["self_attn.v_proj"])}


def wrapped(model: LoadedModel) -> list[str]:
    return [name for name, layer in model.module.named_modules() if isinstance(layer, LoraLinear)]


def logits(model: LoadedModel, adapters: Adapters, names: list[str | None]) -> list[Tensor]:
    prompts = random_prompts(300, (7, 5, 4, 6)[: len(names)])
    adapters.state.plan(adapters.token_slots(names, [len(p) for p in prompts]))
    return our_logits(model, prompts)


def alone(tiny_model: Path, folder: Path, num: int) -> list[Tensor]:
    """Logits of a fresh model with this adapter only."""
    model = load_model(tiny_model, device="cpu", dtype="float32", with_tokenizer=False)
    adapters = Adapters(model)
    adapters.load("it", folder)
    return logits(model, adapters, ["it"] * num)


def test_a_mixed_pass_equals_models_with_one_adapter_each(
    model: LoadedModel, tiny_model: Path, folders: dict[str, Path]
) -> None:
    adapters = Adapters(model)
    plain = logits(model, adapters, [None] * 4)
    assert not wrapped(model)
    assert [adapters.load(name, folders[name]) for name in "dab"] == [0, 1, 2]
    names = ["b", None, "d", "a"]
    mixed = logits(model, adapters, names)
    for i, name in enumerate(names):
        wanted = plain[i] if name is None else alone(tiny_model, folders[name], 4)[i]
        torch.testing.assert_close(mixed[i], wanted, rtol=1e-5, atol=1e-5)
        assert name is None or (mixed[i] - plain[i]).abs().max() > 0.01


def test_the_gpu_kernels_in_the_same_place_give_the_same_logits(model: LoadedModel, folders: dict[str, Path]) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the model is on the CPU; kernels run in the interpreter only where no GPU is")
    adapters = Adapters(model, max_adapters=3)
    for name in "ad":
        adapters.load(name, folders[name])
    names = ["d", None, "a"]
    prompts = random_prompts(300, (4, 3, 5))
    slots = adapters.token_slots(names, [4, 3, 5])
    assert slots is not None
    adapters.state.plan(slots)
    wanted = our_logits(model, prompts)
    state = GPULoraState(3, torch.device("cpu"))
    for layer in model.module.modules():
        if isinstance(layer, LoraLinear):
            layer.state = state
    routes = state.buffers(12)  # as a CUDA graph does it: made once, filled for each pass
    state.capturing(routes)
    state.fill(routes, slots)
    by_buffers = our_logits(model, prompts)
    state.plan(slots)
    for found in (by_buffers, our_logits(model, prompts)):
        # not at the line of 1e-5: whose product adds in what order is the CPU's affair
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-5)
    state.plan(np.full(12, -1))
    assert not state.active


def test_the_least_recently_used_idle_adapter_makes_room_and_comes_back_when_asked_for(
    model: LoadedModel, tiny_model: Path, folders: dict[str, Path]
) -> None:
    adapters = Adapters(model, max_adapters=2)
    for name in "ab":
        adapters.load(name, folders[name])
    first = adapters.acquire("a")
    adapters.load("c", folders["c"])
    assert {e.name: e.slot for e in adapters.list()} == {"a": 0, "b": None, "c": 1}
    assert adapters.names == ("a", "b", "c")
    assert adapters.available("b")
    second = adapters.acquire("b")
    assert {e.name: e.slot for e in adapters.list()} == {"a": 0, "b": 1, "c": None}
    assert not adapters.available("c")
    with pytest.raises(BusyError, match="all 2 adapters"):
        adapters.acquire("c")
    adapters.release("a")
    third = adapters.acquire("c")
    assert len({first, second, third}) == 3
    for name, found in zip("bc", logits(model, adapters, ["b", "c"]), strict=True):
        wanted = alone(tiny_model, folders[name], 2)["bc".index(name)]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_adapter_in_use_is_not_unloaded_and_the_last_one_leaves_the_model_as_it_was(
    model: LoadedModel, folders: dict[str, Path]
) -> None:
    before = dict(model.module.named_modules())
    adapters = Adapters(model)
    adapters.load("a", folders["a"])
    assert adapters.num_bytes > 0
    adapters.acquire("a")
    adapters.acquire("a")
    with pytest.raises(BusyError, match="2 running requests"):
        adapters.unload("a")
    adapters.release("a")
    adapters.release("a")
    adapters.unload("a")
    assert dict(model.module.named_modules()) == before
    assert adapters.names == () and adapters.num_bytes == 0
    with pytest.raises(NotFoundError, match="'a'"):
        adapters.acquire("a")


def test_the_key_of_an_adapter_changes_with_its_content_and_its_version_with_the_layers(
    model: LoadedModel, folders: dict[str, Path]
) -> None:
    adapters = Adapters(model)
    adapters.load("a", folders["a"])
    version = adapters.state.version
    key = adapters.acquire("a")
    assert adapters.acquire("a") == key
    adapters.load("a", folders["a"])
    assert adapters.state.version == version
    adapters.load("b", folders["b"])  # a larger rank: the memory moves
    assert adapters.state.version > version
    adapters.release("a")
    adapters.release("a")
    adapters.unload("a")
    version = adapters.state.version
    adapters.load("a", folders["c"])
    assert adapters.state.version == version, "the room was there"
    assert adapters.acquire("a") != key


def test_an_adapter_is_found_by_name_in_the_home_folder(
    model: LoadedModel, folders: dict[str, Path], home: Path
) -> None:
    shutil.copytree(folders["a"], home / "adapters" / "sql")
    adapters = Adapters(model)
    adapters.load("sql")
    adapters.load("other", "sql")
    assert {e.path for e in adapters.list()} == {(home / "adapters" / "sql").resolve()}
    for wrong in ("none", "../sql", "..", "."):
        with pytest.raises((NotFoundError, UnsupportedError)):
            adapters.load("x", wrong)


def test_loads_that_fail_leave_everything_as_it_was(
    model: LoadedModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = random_adapter(tmp_path / "broken", 0, 4)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    adapters = Adapters(model, max_adapters=1, max_rank=16)
    with pytest.raises(FormatError):
        adapters.load("broken", broken)
    assert adapters.names == () and not wrapped(model)
    adapters.load("a", folders["a"])
    before = adapters.list()
    with pytest.raises(FormatError):
        adapters.load("broken", broken)
    with pytest.raises(InvalidInputError, match="rank 18; at most 16"):
        adapters.load("b", folders["b"])
    with pytest.raises(InvalidInputError, match="Unload it first"):
        adapters.load("a", folders["c"])
    with pytest.raises(NotFoundError, match="nowhere"):
        adapters.load("x", tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="no name"):
        adapters.load(" ", folders["a"])
    assert adapters.list() == before


def test_a_device_without_room_is_an_error_with_numbers_and_leaves_no_trace(
    model: LoadedModel, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = LoraLinear.reserve
    calls = 0

    def full(layer: LoraLinear, num_slots: int, rank: int) -> bool:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reserve(layer, num_slots, rank)

    monkeypatch.setattr(LoraLinear, "reserve", full)
    adapters = Adapters(model)
    with pytest.raises(InsufficientMemoryError, match="rank 4"):
        adapters.load("a", folders["a"])
    assert adapters.names == () and not wrapped(model)
    adapters.load("a", folders["a"])
    calls = 0
    with pytest.raises(InsufficientMemoryError, match="rank 18"):
        adapters.load("b", folders["b"])
    assert [e.name for e in adapters.list()] == ["a"]
    for layer in model.module.modules():
        if isinstance(layer, LoraLinear):
            assert not any(any(ranks) for ranks in layer.ranks[1:])


def test_impossible_registries_are_refused(model: LoadedModel) -> None:
    with pytest.raises(UnsupportedError, match="encoder"):
        Adapters(replace(model, config=replace(model.config, causal=False)))
    out = model.module.layers[0].attn.out
    model.module.layers[0].attn.out = RowParallel(out, None)  # type: ignore[arg-type]  # no process is asked
    with pytest.raises(UnsupportedError, match="several devices"):
        Adapters(model)
    model.module.layers[0].attn.out = out
    with pytest.raises(InvalidInputError, match="max_adapters=0"):
        Adapters(model, max_adapters=0)
    with pytest.raises(InvalidInputError, match="max_rank=0"):
        Adapters(model, max_rank=0)


def test_tokens_get_the_slots_of_their_sequences(model: LoadedModel, folders: dict[str, Path]) -> None:
    adapters = Adapters(model)
    adapters.load("a", folders["a"])
    adapters.load("b", folders["b"])
    assert adapters.token_slots([None, None], [3, 4]) is None
    slots = adapters.token_slots(["b", None, "a"], [2, 1, 3])
    assert np.array_equal(slots, [1, 1, -1, 0, 0, 0])


class Registry(RuleBasedStateMachine):
    """Random loads, unloads, requests against a plain count of what runs."""

    model: LoadedModel
    folders: dict[str, Path]

    def __init__(self) -> None:
        super().__init__()
        self.adapters = Adapters(self.model, max_adapters=2)
        self.running: dict[str, int] = {}

    names = st.sampled_from("abcd")

    def busy(self) -> set[str]:
        return {name for name, count in self.running.items() if count}

    @rule(name=names)
    def load(self, name: str) -> None:
        slots = {e.name: e.slot for e in self.adapters.list()}
        if slots.get(name) is None and len(self.busy()) == 2:
            with pytest.raises(BusyError):
                self.adapters.load(name, self.folders[name])
            return
        self.adapters.load(name, self.folders[name])
        self.running.setdefault(name, 0)

    @rule(name=names)
    def unload(self, name: str) -> None:
        if name not in self.running:
            with pytest.raises(NotFoundError):
                self.adapters.unload(name)
        elif self.running[name]:
            with pytest.raises(BusyError):
                self.adapters.unload(name)
        else:
            self.adapters.unload(name)
            del self.running[name]

    @rule(name=names)
    def acquire(self, name: str) -> None:
        if name not in self.running:
            with pytest.raises(NotFoundError):
                self.adapters.acquire(name)
        elif not self.adapters.available(name):
            with pytest.raises(BusyError):
                self.adapters.acquire(name)
        else:
            self.adapters.acquire(name)
            self.running[name] += 1

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.busy())))
        self.adapters.release(name)
        self.running[name] -= 1

    @invariant()
    def nothing_that_runs_lost_its_slot(self) -> None:
        infos = self.adapters.list()
        assert {e.name: e.num_requests for e in infos} == self.running
        slots = [e.slot for e in infos if e.slot is not None]
        assert len(slots) == len(set(slots)) and all(0 <= slot < 2 for slot in slots)
        assert all(e.slot is not None for e in infos if e.num_requests)
        assert bool(wrapped(self.model)) == bool(infos)
        for layer in self.model.module.modules():
            if isinstance(layer, LoraLinear):
                held = {slot for slot, ranks in enumerate(layer.ranks) if any(ranks)}
                assert held <= set(slots)
                assert all(layer.a[s].any() == layer.b[s].any() == (s in held) for s in range(len(layer.ranks)))

    def teardown(self) -> None:
        for name, count in self.running.items():
            for _ in range(count):
                self.adapters.release(name)
            self.adapters.unload(name)
        assert not wrapped(self.model)


def test_counts_and_slots_stay_right_under_random_use(model: LoadedModel, folders: dict[str, Path]) -> None:
    machine = type("Machine", (Registry,), {"model": model, "folders": folders})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=15, stateful_step_count=20, suppress_health_check=list(HealthCheck)),
    )
