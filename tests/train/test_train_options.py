"""An option that would be ignored is an error, wherever it is said; a run's own file, which has them all, is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmasos.client.types.finetuning import FineTuningRequest, Hyperparameters
from llmasos.errors import FormatError, InvalidInputError
from llmasos.serve.finetuning.options import options_of
from llmasos.train import sft
from llmasos.train.config import _EFFECTS, Distillation, Lora, TrainConfig
from llmasos.train.methods import METHODS
from llmasos.train.parallel import Ranks, launch
from llmasos.train.process import read_job
from llmasos.train.run import resume
from tiny import write_tiny_model

FULL = {"tuning": "full"}
DISTILL = {"method": "distill", "distillation.teacher": "t", "distillation.keep_layers": 2}
SCRATCH = {"method": "pretrain", "model": None}

IGNORED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("distillation.teacher", "t", {}, "method=distill"),
    ("distillation.on_policy", 0.5, {"method": "pretrain"}, "method=distill"),
    ("lora.r", 8, FULL, "tuning=lora"),
    ("lora.dora", True, {"method": "pretrain"}, "tuning=lora"),
    ("lora.r", 8, DISTILL, "tuning=lora"),
    ("quantization", "nf4", {}, "tuning=qlora"),
    ("quantization", "int4", FULL, "tuning=qlora"),
    ("merge", True, FULL, "Leave merge out"),
    ("depth", 4, {}, "method=pretrain without a model"),
    ("depth", 4, {"method": "pretrain"}, "method=pretrain without a model"),
    ("tokenizer", "gpt2", {}, "method=pretrain without a model"),
    ("tokenizer", "gpt2", {"method": "pretrain"}, "method=pretrain without a model"),
    ("vocab_size", 32_768, {}, "method=pretrain without a model"),
    ("vocab_size", 400, SCRATCH | {"tokenizer": "gpt2"}, "Leave tokenizer out"),
    ("cooldown", 0.2, {"schedule": "cosine"}, "schedule=wsd"),
    ("validation", 0.1, {"validation_data": ["held.jsonl"]}, "Leave validation out"),
    ("evaluate_every", 5, {"validation": 0}, "validation, validation_data or prompts"),
    ("keep", 3, {"save_every": 0}, "save_every"),
    ("parallel", "fsdp", {}, "gpus=N"),
    ("distillation.keep_layers", 2, DISTILL | {"model": "m"}, "Leave model out"),
    ("distillation.teacher", "t", {"method": "distill", "distillation.weight": 0}, "weight above 0"),
    ("distillation.divergence", "jsd", DISTILL | {"distillation.weight": 0}, "weight above 0"),
    ("distillation.temperature", 2.0, DISTILL | {"distillation.weight": 0}, "weight above 0"),
    ("distillation.beta", 0.5, DISTILL, "divergence=jsd"),
    ("distillation.max_new_tokens", 256, DISTILL, "on_policy or sequence"),
]


def given(name: str, value: Any, beside: dict[str, Any]) -> dict[str, Any]:
    model = None if "distillation.keep_layers" in {*beside, name} else "m"
    return {"model": model, "data": ["d.jsonl"], **beside, name: value}


def nested(options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in options.items():
        group, _, inner = name.rpartition(".")
        (found.setdefault(group, {}) if group else found)[inner] = value
    return found


def from_yaml(options: dict[str, Any], folder: Path) -> None:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(nested(options)))
    TrainConfig.of(file)


def from_python(options: dict[str, Any], folder: Path) -> None:
    TrainConfig(**nested(options))


def from_flags(options: dict[str, Any], folder: Path) -> None:
    TrainConfig.of(**options)


WAYS: list[Callable[[dict[str, Any], Path], None]] = [from_yaml, from_python, from_flags]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "value", "beside", "instead"), IGNORED)
def test_an_option_without_effect_is_named_with_what_to_say_instead(
    name: str,
    value: Any,
    beside: dict[str, Any],
    instead: str,
    way: Callable[[dict[str, Any], Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InvalidInputError) as caught:
        way(given(name, value, beside), tmp_path)
    assert caught.value.param == name
    assert caught.value.message.startswith(f"{name}={value!r} has no effect: ")
    assert instead in caught.value.hint


def test_every_row_of_the_table_is_tried() -> None:
    tried = {name.split(".")[0] for name, *_ in IGNORED} | {name for name, *_ in IGNORED}
    assert {effect.option for effect in _EFFECTS} <= tried
    groups = {f"{g}.{name}" for g, of in (("lora", Lora), ("distillation", Distillation)) for name in of.model_fields}
    assert {effect.option for effect in _EFFECTS} <= {*TrainConfig.model_fields} | groups


@pytest.mark.parametrize(
    "options",
    [
        {"lora.r": 8, "lora.dora": True, "merge": True},
        {"tuning": "qlora", "quantization": "int8", "lora.rslora": True},
        {"method": "pretrain", "tuning": "lora", "lora.r": 8},
        {**SCRATCH, "depth": 2, "vocab_size": 400},
        {**SCRATCH, "depth": 2, "tokenizer": "gpt2"},
        {**DISTILL, "distillation.divergence": "jsd", "distillation.beta": 0.3, "model": None},
        {**DISTILL, "distillation.on_policy": 0.3, "distillation.max_new_tokens": 8, "model": None},
        {"method": "distill", "distillation.teacher": "t", "distillation.weight": 0, "distillation.sequence": True},
        {"validation": 0, "prompts": "Hi", "evaluate_every": 5},
        {"validation_data": "held.jsonl", "validation": 0, "evaluate_every": 5},
        {"schedule": "cosine", "warmup": 0.9},
        {"gpus": 2, "parallel": "fsdp"},
        {"tuning": "full", "merge": False, "lora": {}, "distillation": {"sequence": False}, "depth": None},
    ],
)
def test_options_with_an_effect_and_those_that_ask_for_nothing_are_accepted(options: dict[str, Any]) -> None:
    TrainConfig.of(**{"model": "m", "data": "d.jsonl", **options})


def test_torchrun_tells_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert TrainConfig.of(parallel="hsdp").parallel == "hsdp"


def test_every_method_trains_an_adapter_where_the_table_thinks_so() -> None:
    for name, method in METHODS.items():
        config = TrainConfig.of(method=name)
        assert config.has_adapter == (method.defaults(config)["tuning"] != "full")


def test_a_request_for_fine_tuning_is_refused_as_well() -> None:
    body = FineTuningRequest(model="m", training_file="file-1", llmasos={"tuning": "full", "lora": {"r": 8}})
    with pytest.raises(InvalidInputError, match=r"llmasos: lora.r=8 has no effect") as caught:
        options_of(body, Hyperparameters())
    assert caught.value.param == "llmasos.lora.r"
    assert options_of(body.model_copy(update={"llmasos": None}), Hyperparameters()) == {"validation": 0.0, "seed": 0}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model")
    rows = [{"text": f"Row {i}: the quick brown fox number {i * 7 % 13} jumps over dog {i % 5}."} for i in range(90)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_run_goes_on_with_all_its_settled_options_and_only_what_is_new_must_have_an_effect(home: Path) -> None:
    made = sft(model="model", data="data.jsonl", tuning="full", steps=2, max_length=64, batch_tokens=128, name="one",
               device="cpu", dtype="float32", validation=0, export=False)  # fmt: skip
    settled = yaml.safe_load((made.folder / "config.yaml").read_text())
    assert settled["lora"]["r"] and settled["vocab_size"] and settled["evaluate_every"]
    with pytest.raises(InvalidInputError, match="merge=True has no effect"):
        resume("one", steps=3, merge=True)
    with pytest.raises(InvalidInputError, match="evaluate_every=1 has no effect"):
        resume("one", steps=3, evaluate_every=1)
    assert resume("one", steps=3, save_every=0).exported


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("lr: fast", "lr='fast' should be a valid number, unable to parse string as a number.", ""),
        ("lr: .nan", "lr=nan should be a finite number.", ""),
        ("lr: 0", "lr=0 should be greater than 0.", ""),
        ("steps: true", "steps=True should be no switch.", ""),
        ("name: ''", "name='' should not be empty.", ""),
        ("schedule: cosin", "schedule='cosin' should be 'wsd', 'cosine', 'linear' or 'constant'.", ""),
        ("trackers: foo", "trackers='foo' should be 'tensorboard', 'wandb' or 'mlflow'.", ""),
        ("prompts: 3", "prompts=3 should be a list.", ""),
        ("lora: 8", "lora=8 should be a group of names and values.", ""),
        ("lora: {alpha: 0}", "lora.alpha=0 should be greater than 0.", ""),
        ("columns: 3", "columns=3 should be a group of names and values, or be a list.", ""),
        ("warmup: 0.9", "warmup=0.9 and cooldown=0.2 are shares of one run, and more than all of it.", "at most 1"),
        ("learning_rate: 1", "A run has no option 'learning_rate'.", "Did you mean lr?"),
        ("max-length: 1", "A run has no option 'max-length'.", "Did you mean max_length?"),
        ("lora: {rr: 1}", "A run has no option 'lora.rr'.", "Did you mean lora.r?"),
        ("1: 2", "A run has no option '1'.", "--help"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_should_be(text: str, said: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InvalidInputError) as caught:
        TrainConfig.of(tmp_path / "run.yaml")
    assert caught.value.message == said and hint in caught.value.hint and caught.value.hint


def test_nested_names_may_have_dots_in_yaml_and_a_group_may_be_empty(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora.r: 8\nlora:\n  alpha: 4\ndistillation:\nprompts: Hi\ndata: d.jsonl\n")
    config = TrainConfig.of(file, **{"lora.dropout": 0.5})
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 4, 0.5)
    assert (config.prompts, config.data) == (("Hi",), ("d.jsonl",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nsteps: 2\nlr: 3\n", "lr twice: in line 1 and in line 3."),
        ("lora:\n  r: 8\n  alpha: 4\n  r: 16\n", "lora.r twice: in line 2 and in line 4."),
        ("lora: {r: 8}\nlora: {alpha: 4}\n", "lora twice: in line 1 and in line 2."),
        ("lora.r: 8\nlora:\n  r: 16\n", "lora.r twice: in line 1 and in line 3."),
        ("job: {serves_as: a}\njob: {serves_as: b}\n", "job twice: in line 1 and in line 2."),
    ],
)
@pytest.mark.parametrize("read", [TrainConfig.of, read_job])
def test_a_name_given_twice_is_refused_with_both_lines(read: Any, text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(FormatError) as caught:
        read(file)
    assert caught.value.message == f"{file} gives {said}" and caught.value.hint


def test_a_value_beside_those_that_yaml_merges_in_has_the_last_word(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora:\n  <<: {r: 8, alpha: 4}\n  r: 16\n")
    lora = TrainConfig.of(file).lora
    assert (lora.r, lora.alpha) == (16, 4)


def test_the_hint_is_the_page_of_the_method() -> None:
    with pytest.raises(InvalidInputError) as refused:
        TrainConfig.of(method="pretrain", data="x", depth=-1)
    assert "train pretrain --help" in str(refused.value.hint)


@pytest.mark.parametrize("said", [{"LLMASOS_DEVICE": "auto"}, {"LLMASOS_DEVICE": "cpu"}])
def test_processes_without_gpus_are_asked_for_by_name(said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(launch, "_launched", lambda *_: nullcontext())
    monkeypatch.setattr(launch, "_of_group", lambda _: Ranks())
    config = TrainConfig.of(model="m", data="x", gpus=3)
    without = nullcontext() if said["LLMASOS_DEVICE"] == "cpu" else pytest.raises(InvalidInputError, match="are none")
    with without, launch.joined(config):
        pass
