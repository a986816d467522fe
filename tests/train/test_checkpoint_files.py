"""Checkpoints that are damaged, foreign, old or dangerous are refused with what happened and what to do; whatever is
cut off leaves the one before."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmasos.errors import DiskFullError, FormatError
from llmasos.models.decoder import Decoder
from llmasos.models.families import config_from_hf
from llmasos.train import checkpoint as module
from llmasos.train.checkpoint import Checkpoints, read_weights
from llmasos.train.optim import OptimizerOptions, Optimizers


def model(width: int = 32, seed: int = 0) -> tuple[Decoder, Optimizers]:
    torch.manual_seed(seed)
    shape = config_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 96,
        }
    )
    decoder = Decoder(shape)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    optimizers = Optimizers(decoder, OptimizerOptions(lr=1e-2))
    for parameter in optimizers.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1.0)
    return decoder, optimizers


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path / "checkpoints") as kept:
        for step in (1, 2):
            kept.save(step, *model(seed=step), {"place": {"row": step}})
    return tmp_path / "checkpoints"


def load(path: Path, width: int = 32) -> dict[str, Any]:
    return Checkpoints(path.parent).load(path, *model(width, seed=9))


def shard(path: Path) -> Path:
    return max(path.glob("__0_*.distcp"), key=lambda p: p.stat().st_size)


def signed(path: Path) -> None:
    """state.json says what is there now: as one who means harm would write it."""
    state = json.loads((path / "state.json").read_text())
    state["files"] = {name: module._crc(path / name) for name in state["files"]}
    (path / "state.json").write_text(json.dumps(state))


def test_what_was_saved_is_read_to_the_bit(run: Path) -> None:
    decoder, optimizers = model(seed=9)
    state = Checkpoints(run).load(run / "000002", decoder, optimizers)
    assert state["place"] == {"row": 2} and state["step"] == 2
    expected, others = model(seed=2)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, decoder.state_dict()[name]), name
    for ours, theirs in zip(optimizers.state_dict(), others.state_dict(), strict=True):
        for index, values in theirs["state"].items():
            assert all(torch.equal(value, ours["state"][index][key]) for key, value in values.items())


def truncate(path: Path) -> None:
    file = shard(path)
    os.truncate(file, file.stat().st_size // 2)


def flip(path: Path) -> None:
    file = shard(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def flip_index(path: Path) -> None:
    data = bytearray((path / ".metadata").read_bytes())
    data[len(data) // 2] ^= 1
    (path / ".metadata").write_bytes(data)


def cut_state(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text[: len(text) // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (truncate, "distcp is not what was written"),
    "flipped bit": (flip, "distcp is not what was written"),
    "flipped bit of the index": (flip_index, "metadata is not what was written"),
    "missing shard": (lambda path: shard(path).unlink(), "No such file"),
    "missing index": (lambda path: (path / ".metadata").unlink(), "No such file"),
    "missing random numbers": (lambda path: (path / "random-0.pt").unlink(), "No such file"),
    "missing state": (lambda path: (path / "state.json").unlink(), "No such file"),
    "half a state": (cut_state, "damaged"),
    "empty state": (lambda path: (path / "state.json").write_text(""), "damaged"),
    "a state that is a list": (lambda path: (path / "state.json").write_text("[]"), "damaged"),
    "a state that is no text": (lambda path: (path / "state.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    "files that are a list": (
        lambda path: (path / "state.json").write_text(json.dumps({"version": 2, "files": ["a"]})),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(run: Path, name: str) -> None:
    damage, said = DAMAGES[name]
    damage(run / "000002")
    with pytest.raises(FormatError, match=said) as refused:
        load(run / "000002")
    assert str(run / "000002") in refused.value.message
    assert "goes on from 000001" in refused.value.hint
    with pytest.raises(FormatError, match=said):
        read_weights(run / "000002")
    assert load(run / "000001")["step"] == 1, "the one before is whole"


def test_where_there_is_none_before_a_new_run_is_proposed(run: Path) -> None:
    flip(run / "000001")
    with pytest.raises(FormatError) as refused:
        load(run / "000001")
    assert refused.value.hint == "Begin a new run; there is no checkpoint before it."


def test_damage_leaves_the_model_as_it_was(run: Path) -> None:
    truncate(run / "000002")
    signed(run / "000002")  # a file of half the length that says it is whole
    decoder, optimizers = model(seed=9)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with pytest.raises(FormatError, match="cannot be read"):
        Checkpoints(run).load(run / "000002", decoder, optimizers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(run: Path) -> None:
    with pytest.raises(FormatError, match="other weights") as refused:
        load(run / "000002", width=64)
    assert "begin a new run" in refused.value.hint


@pytest.mark.parametrize("version", [1, 3, None])
def test_another_version_is_named(run: Path, version: int | None) -> None:
    state = json.loads((run / "000002" / "state.json").read_text())
    (run / "000002" / "state.json").write_text(json.dumps({**state, "version": version}))
    with pytest.raises(FormatError, match=f"version {version!r}") as refused:
        load(run / "000002")
    assert refused.value.hint


class Harm:
    """What a pickle can do: call anything."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("file", "protocol"), [(".metadata", 0), (".metadata", 2), (".metadata", 4), ("random-0.pt", 2)]
)
def test_code_in_a_checkpoint_is_not_executed(run: Path, tmp_path: Path, file: str, protocol: int) -> None:
    done = tmp_path / "done"
    harm = Harm(os.mkdir, str(done))
    if file == ".metadata":
        (run / "000002" / file).write_bytes(pickle.dumps(harm, protocol=protocol))
    else:
        torch.save({"torch": harm}, run / "000002" / file, pickle_protocol=protocol)
    signed(run / "000002")
    decoder, optimizers = model(seed=9)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with pytest.raises(FormatError, match="000002") as refused:
        Checkpoints(run).load(run / "000002", decoder, optimizers)
    assert not done.exists() and refused.value.hint
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    pickle.loads(pickle.dumps(harm))
    assert done.exists(), "it would have done it"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch.distributed.checkpoint.filesystem", "os.mkdir"),
        ("torch.distributed.checkpoint.utils", "io.open"),
        ("torch.distributed.checkpoint._version", "torch"),
        ("torch", "load"),
        ("builtins", "eval"),
        ("pathlib", "os.system"),
        ("pathlib", "PosixPath.unlink"),
    ],
)
def test_the_index_names_its_own_classes_only(run: Path, owner: str, name: str) -> None:
    words = (owner, name)
    opcodes = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in words) + b"\x93."
    (run / "000002" / ".metadata").write_bytes(opcodes)
    signed(run / "000002")
    with pytest.raises(FormatError, match=r"\.metadata"):
        load(run / "000002")


def test_an_interrupted_save_is_no_checkpoint_and_is_removed_by_the_next(run: Path) -> None:
    left = run / "000003.tmp"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert Checkpoints(run).latest() == run / "000002"
    assert load(run / "000002")["step"] == 2
    with Checkpoints(run) as kept:
        kept.save(4, *model(seed=4), {})
    assert sorted(p.name for p in run.iterdir()) == ["000002", "000004"]


@pytest.mark.parametrize("place", ["write_tensors", "_crc", "os.replace"])
def test_a_save_that_fails_leaves_the_last_good_one(run: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    owner, _, name = place.rpartition(".")
    with monkeypatch.context() as patched, Checkpoints(run) as kept:
        patched.setattr(module.os if owner else module, name, full)
        with pytest.raises(DiskFullError, match="step 3") as failed:
            kept.save(3, *model(seed=3), {})
    assert "No space left" in failed.value.message and str(run) in failed.value.hint
    assert sorted(p.name for p in run.iterdir()) == ["000001", "000002"]
    assert load(run / "000002")["step"] == 2
