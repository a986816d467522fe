"""Merged models hold what the formulas say, serve, and know where they come from; what cannot be merged is said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmasos.errors import InvalidInputError, StoreError, UnsupportedError
from llmasos.formats import open_checkpoint
from llmasos.formats.safetensors import stream_safetensors
from llmasos.models.load import load_model
from llmasos.models.lora import read_adapter
from llmasos.store import Library, import_model
from llmasos.store.card import read_card
from llmasos.train.merge import merge, slerp, ties
from tiny import write_tiny_adapter, write_tiny_model

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def of(name: str, **options: object) -> Path:
        return write_tiny_model(tmp_path / name, **options)  # type: ignore[arg-type]

    return of


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with closing(open_checkpoint(folder)) as checkpoint:
        return {name: checkpoint.tensor(name).clone() for name in checkpoint.tensors}


def test_an_average_has_the_shares_that_were_asked_for_and_loads(make: Make, tmp_path: Path) -> None:
    a, b, c = (make(name, seed=seed) for seed, name in enumerate("abc"))
    made = merge([a, b, c], weights=[2, 1, 1], output=tmp_path / "made")
    assert made.path == tmp_path / "made" and made.installed is None
    one, two, three, found = (tensors(folder) for folder in (a, b, c, made.path))
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, one[name] / 2 + two[name] / 4 + three[name] / 4)
    model = load_model(made.path, device="cpu", dtype="float32")
    assert model.tokenizer is not None and model.tokenizer.chat_template
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_same_model_merged_with_itself_is_itself_by_every_method(make: Make, tmp_path: Path) -> None:
    a, base = make("a", seed=1), make("base", seed=2)
    expected = tensors(a)
    for method in ("linear", "slerp", "task_arithmetic", "ties"):
        wants_base = method in ("task_arithmetic", "ties")
        models = [a] if method == "task_arithmetic" else [a, a]
        if len(models) == 1:
            models, weights = [a, base], [1.0, 0.5]  # the base has nothing to add to itself
        else:
            weights = None
        options = {"base": base} if wants_base else {}
        options |= {"density": 1.0} if method == "ties" else {}
        made = merge(models, method=method, weights=weights, output=tmp_path / method, **options)  # type: ignore[arg-type]
        for name, tensor in tensors(made.path).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_an_arc_keeps_the_length_that_a_chord_loses() -> None:
    torch.manual_seed(0)
    a = torch.randn(8, 16)
    b = torch.randn(8, 16)
    b -= a * ((a.flatten() @ b.flatten()) / a.square().sum())  # at a right angle
    b *= a.norm() / b.norm()
    half = slerp(a, b, 0.5)
    assert float(half.norm()) == pytest.approx(float(a.norm()), rel=1e-5)
    assert float(a.lerp(b, 0.5).norm()) == pytest.approx(float(a.norm()) / math.sqrt(2), rel=1e-5)
    third = slerp(a, b, 1 / 3)
    cosine = float((third.flatten() @ a.flatten()) / (third.norm() * a.norm()))
    assert math.degrees(math.acos(cosine)) == pytest.approx(30, abs=0.01)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)  # one direction: along the chord
    torch.testing.assert_close(slerp(torch.zeros(3), torch.ones(3), 0.5), torch.full((3,), 0.5))


def test_slerp_takes_the_share_of_the_second_model(make: Make, tmp_path: Path) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    made = merge([a, b], method="slerp", weights=[3, 1], output=tmp_path / "made")
    one, two = tensors(a), tensors(b)
    for name, tensor in tensors(made.path).items():
        torch.testing.assert_close(tensor, slerp(one[name], two[name], 0.25))


def test_ties_trims_elects_a_sign_and_averages_those_that_agree() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    first = torch.tensor([4.0, -3.0, 0.1, 2.0, 0.0])
    second = torch.tensor([2.0, 5.0, 0.2, -1.9, 0.3])
    # kept of each: three of five by size; signs by the sum; the mean of those that have it
    found = ties(base, [first, second], [1.0, 1.0], density=0.6)
    torch.testing.assert_close(found, torch.tensor([1 + 3.0, 1 + 5.0, 1.0, 1 + 2.0, 1.0]))
    weighted = ties(base, [first, second], [3.0, 1.0], density=0.6)
    torch.testing.assert_close(weighted, torch.tensor([1 + 14 / 4, 1 - 3.0, 1.0, 1 + 2.0, 1.0]))


def test_task_vectors_are_added_to_the_base(make: Make, tmp_path: Path) -> None:
    base, a, b = make("base", seed=0), make("a", seed=1), make("b", seed=2)
    made = merge([a, b], method="task_arithmetic", base=base, weights=[0.5, -1], output=tmp_path / "made")
    zero, one, two = tensors(base), tensors(a), tensors(b)
    for name, tensor in tensors(made.path).items():
        expected = zero[name] + 0.5 * (one[name] - zero[name]) - (two[name] - zero[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_folded_adapters_compute_what_they_computed_beside_the_model(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = make("model")
    adapter = write_tiny_adapter(tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "v_proj", "gate_proj"]  # PEFT reads no others
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    made = merge([model, adapter], output=tmp_path / "made")
    ids = torch.arange(20)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    folded = AutoModelForCausalLM.from_pretrained(made.path)
    plain = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        expected, found, before = theirs(ids).logits, folded(ids).logits, plain(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - before).abs().max()) > 0.1


def test_several_adapters_act_as_strongly_as_their_weights_say(make: Make, tmp_path: Path) -> None:
    model = make("model")
    one, two = (write_tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    made = merge([model, one, two], weights=[0.5, -2], output=tmp_path / "made")
    loaded = load_model(model, device="cpu", dtype="float32")
    expected = dict(loaded.module.state_dict())
    for folder, weight in ((one, 0.5), (two, -2.0)):
        for layer, lora in read_adapter(folder, loaded).layers.items():
            wide = torch.zeros_like(expected[f"{layer}.weight"])
            size = len(wide) // len(lora.ranks) if "mlp" in layer else None
            bounds = [0, 32, 48, 64] if size is None else [0, size, 2 * size]
            for part, (begin, end) in enumerate(pairwise(bounds)):
                wide[begin:end] = lora.b[begin:end] @ lora.a[part]
            expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + weight * wide
    found = load_model(made.path, device="cpu", dtype="float32").module.state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


def test_a_merged_model_is_in_the_library_with_its_origin_and_answers(make: Make, home: Path) -> None:
    from llmasos.inference.llm import LLM

    for seed, name in enumerate(("one", "two")):
        import_model(make(name, seed=seed), name=name)
    made = merge(["one", "two"], method="slerp", weights=[0.5, 0.5], name="both")
    assert made.installed == "both" and made.path == home / "models" / "both"
    card = read_card(made.path)
    assert card.lineage is not None and card.lineage.method == "merge" and card.lineage.tuning == "slerp"
    assert card.lineage.run == card.source == "merge one=0.5 two=0.5"
    assert ".merge-" not in (made.path / "llmasos.json").read_text(), "no path that is gone"
    verified = Library().verify("both")
    assert not (verified.missing or verified.changed or verified.extra)
    with LLM.from_pretrained("both", device="cpu", dtype="float32") as llm:
        assert isinstance(llm.generate("The", max_tokens=4), str)
    assert merge(["one", "two"], method="slerp", weights=[0.5, 0.5], name="both").installed == "both"  # once more
    with pytest.raises(StoreError, match="has a model 'both' already"):
        merge(["one", "two"], weights=[0.9, 0.1], name="both")
    assert not [p for p in (home / "cache").iterdir() if p.name.startswith(".merge")]


def test_the_dtype_is_the_first_models_or_the_one_that_is_asked_for(make: Make, tmp_path: Path) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    low = merge([a, b], dtype="bfloat16", output=tmp_path / "low").path
    assert {t.dtype for t in load_file(low / "model.safetensors").values()} == {torch.bfloat16}
    again = merge([low, a], output=tmp_path / "again").path
    assert {t.dtype for t in load_file(again / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(InvalidInputError, match="dtype='int8'"):
        merge([a, b], dtype="int8", output=tmp_path / "no")


def test_models_that_differ_in_more_than_weights_are_refused_with_what_differs(make: Make, tmp_path: Path) -> None:
    a = make("a")
    for name, changes, what in (
        ("layers", {"num_hidden_layers": 3}, r"num_layers \(2, 3\)"),
        ("wide", {"hidden_size": 64}, r"hidden_size \(32, 64\)"),
        ("turned", {"rope_theta": 5e5}, r"rope_theta"),
        ("loose", {"tie_word_embeddings": False}, r"tie_embeddings \(True, False\)"),
    ):
        with pytest.raises(UnsupportedError, match=what):
            merge([a, make(name, **changes)], output=tmp_path / "no")
    other = make("other")
    text = (other / "tokenizer.json").read_text().replace('"<|user|>"', '"<|person|>"')
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(UnsupportedError, match="different vocabularies"):
        merge([a, other], output=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_wrong_requests_say_what_is_wrong(make: Make, tmp_path: Path) -> None:
    a, b, adapter = make("a"), make("b"), write_tiny_adapter(tmp_path / "adapter")
    out = tmp_path / "no"
    for models, options, what in (
        ([a], {}, "alone is merged already"),
        ([], {}, "No model is named"),
        ([a, b], {"weights": [1]}, "1 weights are given for 2 models"),
        ([a, b], {"weights": [1, -1]}, "are no shares"),
        ([a, b], {"weights": [0, 0]}, "are no shares"),
        ([a, b], {"weights": [1, math.nan]}, "are no shares"),
        ([a, b, b], {"method": "slerp"}, "slerp is between two models, and 3"),
        ([a, b], {"method": "best"}, "method='best' is not known"),
        ([a, b], {"method": "ties"}, "ties needs the model"),
        ([a, b], {"base": a}, "have a base"),
        ([a, b], {"method": "ties", "base": a, "density": 0.0}, "density=0.0"),
        ([a, b], {"method": "task_arithmetic", "base": a, "density": 0.2}, "density=0.2 has no effect"),
        ([a, b, adapter], {}, "folded into one model"),
        ([adapter, a], {}, "does not come first"),
        ([a, adapter], {"method": "slerp"}, "slerp is for models"),
        ([a, adapter], {"weights": [1, 2]}, "2 weights are given for 1 adapters"),
        ([adapter], {}, "does not say which model"),
    ):
        with pytest.raises(InvalidInputError, match=what):
            merge(models, output=out, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="has no name"):
        merge([a, b])
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    for taken in (full, a):
        before = sorted(one.name for one in taken.iterdir())
        with pytest.raises(InvalidInputError, match="is there already, and 'merge' has not made it"):
            merge([a, b], output=taken)
        assert sorted(one.name for one in taken.iterdir()) == before
    assert not out.exists()


def test_streamed_shards_are_what_the_library_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {f"t{i}": torch.randn(5, 3 + i) for i in range(4)}
    given["half"] = torch.randn(7).bfloat16()
    like = {name: tensor.to("meta") for name, tensor in given.items()}
    files = stream_safetensors(like, iter(given.items()), tmp_path / "made", max_shard_size=180)
    assert len(files) > 3 and files[-1].name == "model.safetensors.index.json"
    found = tensors(tmp_path / "made")
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    assert all(name in load_file(files[0]) for name in ("t0", "t1"))
