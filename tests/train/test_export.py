"""What comes out of a run is what was trained: as a folder, as an adapter, in the library; and `verify` can tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmasos.errors import DiskFullError, FormatError, InvalidInputError, NotFoundError, StoreError
from llmasos.models.load import hf_state, load_model
from llmasos.store import Library, import_model
from llmasos.store.adapters import find_adapter, installed_adapters, remove_adapter
from llmasos.train.checkpoint import read_weights
from llmasos.train.config import TrainConfig
from llmasos.train.export import Run, checkpoints_of, export_run
from llmasos.train.run import train
from llmasos.train.verify import verify_run
from tiny import write_tiny_model

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>: {% endif %}"
)


def chats(path: Path, num: int = 24) -> Path:
    rows = (
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(num)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path: Path, home: Path):
    """Trains a tiny model, which the library has, for a few steps; gives the run's folder."""
    write_tiny_model(tmp_path / "tiny")
    import_model(tmp_path / "tiny", name="tiny")
    data = chats(tmp_path / "chats.jsonl")

    def carry_out(name: str = "mine", **options: object) -> Path:
        options = {"model": "tiny", "steps": 3, "save_every": 1, "lr": 1e-2} | options
        options |= {"max_length": 64, "batch_tokens": 64, "validation": 0.0, "device": "cpu", "install": False}
        return train(TrainConfig.of(name=name, data=[str(data)], **options), export=False).folder

    return carry_out


def corrupt(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    path.unlink()  # the library has the same bytes under another name
    save_file(tensors, path, metadata={"format": "pt"})


def test_an_adapter_is_what_was_trained_for_peft_for_us_and_when_served(run, home: Path) -> None:
    pytest.importorskip("peft")
    folder = run(tuning="lora", lora={"r": 4})
    made = export_run(folder, install=True)
    assert made.adapter == folder / "adapter" and made.model is None and made.installed == "mine"
    found = verify_run(folder, device="cpu")
    assert found.ok and not found.problems and found.num_positions > 50
    ours, peft, served = found.comparisons
    assert max(ours.max_difference, peft.max_difference) < 1e-4 and ours.top1 == peft.top1 == 1.0
    assert (peft.name, served.name, peft.skipped) == ("peft", "served engine", "")
    [adapter] = installed_adapters()
    assert (adapter.name, adapter.base, adapter.path) == ("mine", "tiny", home / "adapters" / "mine")
    card = json.loads((adapter.path / "llmasos.json").read_text())
    assert card["lineage"]["run"] == str(folder) and card["lineage"]["step"] == 3
    assert len(card["lineage"]["data"][0]["digest"]) == 64
    assert {file["path"] for file in card["files"]} >= {"adapter_config.json", "tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_is_what_was_trained_rounded_to_its_dtype(run, dtype) -> None:
    pytest.importorskip("transformers")
    folder = run(tuning="full")
    made = export_run(folder, dtype=dtype, install=True)
    trained = read_weights(checkpoints_of(folder)[3])
    exported = load_model(made.model, device="cpu", dtype="float32")
    own = dict(exported.module.named_parameters())
    assert trained.keys() == own.keys()
    for name, weight in trained.items():
        assert torch.equal(weight.to(getattr(torch, dtype)).float(), own[name]), name
    found = verify_run(folder, device="cpu")
    assert found.ok and found.comparisons[1].name == "transformers" and not found.comparisons[1].skipped
    assert found.comparisons[0].max_difference < (1e-4 if dtype == "float32" else 1.0)
    card = Library().get("mine")
    assert card.lineage is not None and (card.lineage.base, card.lineage.tuning) == ("tiny", "full")
    assert card.format == "safetensors" and Library().verify("mine").ok


def test_dora_and_own_templates_become_whole_models_because_no_engine_serves_them_beside_theirs(run, tmp_path) -> None:
    dora = run("dora", tuning="lora", lora={"r": 4, "dora": True})
    made = export_run(dora, install=True)
    assert made.model is not None and made.adapter is not None
    assert Library().has("dora") and find_adapter("dora") is None
    assert verify_run(dora, device="cpu").ok
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    own = run("own", tuning="lora", template=str(tmp_path / "own.jinja"))
    (tmp_path / "own.jinja").unlink()  # the run has it
    assert export_run(own, install=True).model == own / "model"
    assert load_model(own / "model", device="cpu").tokenizer.chat_template == TEMPLATE


def test_merging_gives_the_model_that_the_adapter_makes(run) -> None:
    folder = run(tuning="lora", lora={"r": 4, "rslora": True})
    made = export_run(folder, merge=True, dtype="float32")
    assert made.installed is None and not Library().has("mine")
    merged = dict(hf_state(load_model(made.model, device="cpu", dtype="float32")))
    base = dict(hf_state(load_model(Library().path("tiny"), device="cpu", dtype="float32")))
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert len(changed) == 2 * 7  # all linear layers of both blocks, and nothing else
    assert verify_run(folder, device="cpu").ok


def test_a_run_has_one_place_in_the_library_as_adapter_or_model(run) -> None:
    folder = run(tuning="lora")
    export_run(folder, install=True)
    assert find_adapter("mine") is not None and not Library().has("mine")
    export_run(folder, install=True, merge=True)
    assert find_adapter("mine") is None and Library().has("mine")
    assert verify_run(folder, device="cpu").folder.name == "model"
    export_run(folder, install=True, step=2)
    assert find_adapter("mine") is not None and not Library().has("mine")
    found = verify_run(folder, step=2, device="cpu")
    assert found.folder.name == "adapter" and found.ok  # not the model of another step, which is there still


def test_an_earlier_step_can_be_exported_and_exporting_again_replaces(run) -> None:
    folder = run(tuning="lora")
    assert sorted(checkpoints_of(folder)) == [2, 3]
    first, last = export_run(folder, step=2, install=True), None
    weights = load_file(first.adapter / "adapter_model.safetensors")
    last = export_run(folder, install=True)
    assert (first.step, last.step) == (2, 3) and len(installed_adapters()) == 1
    again = load_file(last.adapter / "adapter_model.safetensors")
    assert any(not torch.equal(weights[name], again[name]) for name in weights)
    assert not verify_run(folder, step=2, device="cpu").ok  # what is there is of another step
    assert remove_adapter("mine") >= 0 and not installed_adapters()


def test_verify_names_the_tensor_that_differs(run) -> None:
    folder = run(tuning="full")
    export_run(folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"] *= -1

    corrupt(folder / "model" / "model.safetensors", change)
    found = verify_run(folder, device="cpu")
    assert not found.ok and len(found.different) == 1
    assert "model.layers.1.mlp.down_proj.weight differs by up to" in found.problems[0]
    assert any("log-probabilities differ" in one for one in found.problems)


def test_verify_sees_an_adapter_of_another_strength(run) -> None:
    folder = run(tuning="lora", lora={"r": 4}, lr=0.1)
    export_run(folder)
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 4000}))
    found = verify_run(folder, device="cpu")
    assert found.different == ("adapter_config.json has another rank or strength.",)
    assert not found.comparisons[0].ok and not found.comparisons[-1].ok


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_an_export_that_fails_leaves_the_one_before(error: Exception, run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tuning="full")
    export_run(folder, step=2)
    before = (folder / "model" / "model.safetensors").read_bytes()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("llmasos.text.Tokenizer.save_pretrained", fail)
    with pytest.raises(DiskFullError, match=r"model could not be written: No space left on device\.") as caught:
        export_run(folder)
    assert "`llmasos train export` then does it from the checkpoint" in caught.value.hint
    assert (folder / "model" / "model.safetensors").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_what_is_wrong_is_said(run, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"is no run: it has no config\.yaml"):
        export_run(tmp_path)
    folder = run(tuning="lora")
    with pytest.raises(NotFoundError, match=r"no chat template none\.jinja"):
        run("untold", template="none.jinja")
    with pytest.raises(NotFoundError, match=r"Nothing of mine was exported"):
        verify_run(folder)
    with pytest.raises(NotFoundError, match=r"no checkpoint of step 9") as e:
        export_run(folder, step=9)
    assert e.value.hint == "It has: 2, 3."
    with pytest.raises(InvalidInputError, match="float8"):
        export_run(folder, dtype="float8")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="a model 'tiny' already"):
        export_run(folder, install=True, name="tiny")
    other = run("other", tuning="lora")
    export_run(folder, install=True)
    with pytest.raises(StoreError, match="an adapter 'mine' already"):
        export_run(other, install=True, name="mine")
    whole = run("whole", tuning="full")
    with pytest.raises(StoreError, match="an adapter 'mine' already"):
        export_run(whole, install=True, name="mine")


def test_a_damaged_checkpoint_is_named(run) -> None:
    folder = run(tuning="lora")
    for file in checkpoints_of(folder)[3].rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(FormatError, match="000003 is damaged"):
        export_run(folder)
    assert export_run(folder, step=2).step == 2


def test_a_checkpoint_of_other_weights_is_refused(run) -> None:
    folder = run(tuning="lora", lora={"r": 4})
    text = (folder / "config.yaml").read_text()
    assert "r: 4" in text
    (folder / "config.yaml").write_text(text.replace("r: 4", "r: 8"))
    with pytest.raises(FormatError, match="other weights"):
        export_run(folder)


def test_a_run_without_checkpoints_has_nothing_to_export(run) -> None:
    folder = run(tuning="lora")
    import shutil

    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(NotFoundError, match="no checkpoint yet"):
        Run.open(folder)


def test_an_adapter_in_the_library_runs_by_its_name(run, tmp_path: Path) -> None:
    from llmasos.inference.llm import LLM

    export_run(run(tuning="lora", lr=0.3), install=True)
    with LLM.from_pretrained("mine", device="cpu", dtype="float32") as tuned:
        with LLM.from_pretrained("tiny", device="cpu", dtype="float32") as base:
            base.load_adapter("a", tmp_path / "home" / "adapters" / "mine")
            said = {name: base.generate("What is", max_tokens=8, **options)
                    for name, options in (("base", {}), ("tuned", {"adapter": "a"}))}  # fmt: skip
        assert tuned.name == "mine" and tuned.generate("What is", max_tokens=8) == said["tuned"] != said["base"]
        assert tuned.score("What is it?").logprob != 0


def test_an_option_of_export_without_effect_is_refused(run) -> None:
    with pytest.raises(InvalidInputError, match="dtype='float32' has no effect"):
        export_run(run("adapter"), dtype="float32")
    with pytest.raises(InvalidInputError, match="merge has no effect"):
        export_run(run("whole", tuning="full"), merge=True)
