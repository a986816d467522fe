"""A run from its options to what it makes; and what is wrong with options is said before anything is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmasos.devices import pick_dtype
from llmasos.errors import FormatError, InvalidInputError, LLMasOSError, NotFoundError, UnsupportedError
from llmasos.inference.llm import LLM
from llmasos.models.load import load_model
from llmasos.store import Library
from llmasos.train.config import TrainConfig
from llmasos.train.events import Listener, StepReport
from llmasos.train.memory import forget_peak
from llmasos.train.process import JobOptions, settle
from llmasos.train.run import find_run, plan_run, prepare, resume, train
from tiny import write_tiny_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model")
    rows = [{"text": f"Row {i}: the quick brown fox number {i * 7 % 13} jumps over dog {i % 5}."} for i in range(90)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}] for i in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return tmp_path


def options(**changes: Any) -> dict[str, Any]:
    base = {"model": "model", "data": ["data.jsonl"], "device": "cpu", "dtype": "float32", "steps": 4, "lr": 1e-2}
    return {**base, "max_length": 64, "batch_tokens": 256, **changes}


class Losses(Listener):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def stepped(self, report: StepReport) -> None:
        self.seen.append(report.loss)


def test_two_options_are_enough_and_an_adapter_comes_out(home: Path) -> None:
    result = train(TrainConfig.of(model="model", data=["chats.jsonl"], device="cpu", steps=2, name="small"))
    assert (result.reason, result.step, result.installed) == ("finished", 2, "small")
    assert (
        result.exported and result.exported.adapter and (result.exported.adapter / "adapter_model.safetensors").exists()
    )
    settled = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert (settled["tuning"], settled["lr"], settled["optimizer"]) == ("lora", 2e-4, "adamw")
    assert {"run.json", "metrics.csv", "report.html", "log.jsonl"} <= {p.name for p in result.folder.iterdir()}


def test_all_weights_are_exported_as_they_were_trained(home: Path) -> None:
    result = train(TrainConfig.of(**options(tuning="full", steps=12, name="whole", validation=0.1)))
    assert result.exported and result.exported.model and result.evaluation
    trained = load_model(result.exported.model, device="cpu", dtype="float32")
    before = load_model(home / "model", device="cpu", dtype="float32")
    moved = [
        (a - b).abs().max().item() for a, b in zip(trained.module.parameters(), before.module.parameters(), strict=True)
    ]
    assert min(moved) > 1e-4
    first = json.loads((result.folder / "evaluations.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and result.evaluation.loss < first["loss"] - 0.3
    assert Library().has("whole")


def test_pretraining_has_one_dial(home: Path) -> None:
    losses = Losses()
    config = TrainConfig.of(method="pretrain", data=["data.jsonl"], depth=1, vocab_size=400, device="cpu",
                            dtype="float32", steps=12, max_length=64, batch_tokens=512, name="scratch")  # fmt: skip
    result = train(config, listeners=[losses])
    assert losses.seen[-1] < losses.seen[0] - 1
    assert result.exported and result.exported.model
    made = load_model(result.exported.model, device="cpu", dtype="float32")
    assert (made.config.num_layers, made.config.hidden_size) == (1, 64)
    assert losses.seen[0] == pytest.approx(math.log(made.config.vocab_size), abs=0.1)


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tuning: str, home: Path) -> None:
    lora = {"dropout": 0.1, "r": 4} if tuning != "full" else {}
    whole, first, rest = Losses(), Losses(), Losses()
    train(TrainConfig.of(**options(tuning=tuning, name="whole", steps=6, lora=lora)), listeners=[whole], export=False)

    class Stop(Listener):
        def stepped(self, report: StepReport) -> None:
            if report.step == 3:
                raise KeyboardInterrupt("power cut")

    cut = TrainConfig.of(**options(tuning=tuning, name="cut", steps=6, lora=lora, save_every=2))
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        train(cut, listeners=[first, Stop()])
    again = resume("cut", listeners=[rest], export=False)
    assert (again.reason, again.step) == ("finished", 6)
    assert first.seen == whole.seen[:3] and rest.seen == whole.seen[2:]


def test_a_run_is_not_begun_twice_nor_with_other_options(home: Path) -> None:
    train(TrainConfig.of(**options(name="one", steps=2)), export=False)
    with pytest.raises(InvalidInputError, match="There is a run 'one'") as caught:
        train(TrainConfig.of(**options(name="one", steps=2)))
    assert "llmasos train resume one" in caught.value.hint
    with pytest.raises(InvalidInputError, match="was begun with lr="):
        train(TrainConfig.of(**options(name="one", lr=1e-3, resume=True)))
    assert resume("one", steps=3, export=False).step == 3
    assert find_run("one").name == "one"


def test_steps_said_when_going_on_are_not_ended_by_epochs_of_before(home: Path) -> None:
    first = train(TrainConfig.of(**options(name="more", steps=None, batch_tokens=1024, validation=0)), export=False)
    assert first.reason == "finished"
    assert yaml.safe_load((first.folder / "config.yaml").read_text())["epochs"] == 1.0  # which nobody has said
    more = resume("more", steps=3 * first.step, export=False)
    assert (more.reason, more.step) == ("finished", 3 * first.step)


def test_a_templates_file_is_its_text_wherever_options_are_read(home: Path) -> None:
    (home / "own.jinja").write_text("{{ no_such_name.at_all }}")
    config = TrainConfig.of(**options(data=["chats.jsonl"], template="own.jinja"))
    for read in (train, plan_run, lambda config: settle(config, JobOptions())):
        with pytest.raises(InvalidInputError, match="no_such_name"):
            read(config)
    for read in (train, plan_run, lambda config: settle(config, JobOptions())):
        with pytest.raises(NotFoundError, match=r"no chat template gone\.jinja"):
            read(TrainConfig.of(**options(data=["chats.jsonl"], template="gone.jinja")))


@pytest.mark.parametrize("said", ["environment", "device"])
def test_training_computes_in_bfloat16_or_float32(
    said: str, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if said == "environment":
        monkeypatch.setenv("LLMASOS_DTYPE", "float16")
    else:  # an older GPU
        monkeypatch.setattr("llmasos.devices.pick_dtype", lambda *_: torch.float16)
        monkeypatch.setattr("llmasos.train.run.pick_dtype", lambda *_: torch.float16)
    prepared = prepare(TrainConfig.of(**options(output=str(home / "x"), name="x", dtype="auto")))
    native = pick_dtype("auto", torch.device("cpu"))
    assert prepared.dtype == (native if said == "environment" else torch.float32)
    assert "float16 loses small gradients" in caplog.text
    with pytest.raises(InvalidInputError, match=r"dtype='.*' should be 'auto', 'bfloat16' or 'float32'"):
        TrainConfig.of(**options(dtype="float16"))


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_where_a_cpu_has_no_units_for_it_is_said_to_be_slow(
    native: bool, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llmasos.train.run.cpu_has_bf16", lambda: native)
    prepare(TrainConfig.of(**options(output=str(home / "x"), name="x", dtype="bfloat16")))
    assert ("no bfloat16 units" in caplog.text) is not native


def test_a_run_on_a_gpu_does_not_count_what_one_before_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", begun.append)
    forget_peak(torch.device("cuda", 1))
    forget_peak(torch.device("cpu"))
    assert begun == [torch.device("cuda", 1)]


def test_epochs_are_steps_when_nobody_says_steps(home: Path) -> None:
    config = TrainConfig.of(**options(steps=None, epochs=2.5, output=str(home / "x"), name="x", validation=0))
    prepared = prepare(config)
    per_epoch = prepared.batches.count() / 3
    assert prepared.steps == math.ceil(per_epoch * 2.5 / prepared.accumulation)


WRONG: list[tuple[dict[str, Any], type[LLMasOSError], str]] = [
    ({"data": []}, InvalidInputError, "No data is named"),
    ({"data": ["gone.jsonl"]}, NotFoundError, "gone.jsonl"),
    ({"data": ["broken.jsonl"]}, FormatError, "broken.jsonl:2"),
    ({"data": ["empty-mask.jsonl"]}, FormatError, "empty-mask.jsonl:1"),
    ({"data": ["columns.csv"]}, FormatError, "columns.csv"),
    ({"data": ["data.jsonl=2", "chats.jsonl"]}, InvalidInputError, "has no weight"),
    ({"model": "nowhere/at-all"}, LLMasOSError, "nowhere"),
    ({"model": "encoder"}, UnsupportedError, "is an encoder"),
    ({"model": "bare"}, NotFoundError, "no model in the folder .*bare"),
    ({"max_length": 100_000}, InvalidInputError, "the model's context is"),
    ({"data": ["chats.jsonl"], "max_length": 8}, InvalidInputError, "are longer than 8 tokens"),
    ({"micro_batch_tokens": 10}, InvalidInputError, "cannot hold samples of max_length"),
    ({"batch_tokens": 32}, InvalidInputError, "gives each GPU 32 tokens of a step, less than max_length=64"),
    ({"batch_tokens": 100, "micro_batch_tokens": 128}, InvalidInputError, "less than micro_batch_tokens=128"),
    ({"data": ["chats.jsonl"], "batch_tokens": 8, "max_length": None}, InvalidInputError, "are longer than 8 tokens"),
    ({"lora": {"targets": ["q_prj"]}}, InvalidInputError, "no module q_prj"),
    ({"device": "cuda:7"}, LLMasOSError, "cuda:7"),
    ({"name": "a/b"}, InvalidInputError, "cannot be the name"),
    ({"template": "{% if %}", "data": ["chats.jsonl"]}, LLMasOSError, "emplate"),
    ({"template": "{{ messages[0]['content'] }}", "data": ["chats.jsonl"]}, FormatError, "chats.jsonl:1"),
    ({"validation_data": ["gone.jsonl"]}, NotFoundError, "gone.jsonl"),
    ({"method": "pretrain", "depth": None, "vocab_size": 400, "model": None, "max_length": 64,
      "data": ["blank.jsonl"]}, FormatError, "text is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "said"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_wrong_is_said_and_nothing_is_left(
    changes: dict[str, Any], kind: type[LLMasOSError], said: str, home: Path
) -> None:
    (home / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (home / "blank.jsonl").write_text('{"text": ""}\n')
    (home / "columns.csv").write_text("foo,bar\n1,2\n")
    (home / "empty-mask.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    (home / "bare").mkdir()
    write_tiny_model(home / "encoder", architectures=["BertModel"], model_type="bert")
    with pytest.raises(kind, match=said) as caught:
        train(TrainConfig.of(**options(**{"name": "wrong", **changes})))
    assert caught.value.message
    assert not Library().has("wrong")
    assert not (home / "home" / "runs" / "wrong").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": -1}, "lr=-1 should be greater than 0."),
        ({"lora.r": 0}, "lora.r=0 should be greater than or equal to 1."),
        ({"lorar": 8}, "no option 'lorar'"),
        ({"warmup": 0.9, "cooldown": 0.9}, "shares of one run"),
        ({"method": "dpo"}, "method='dpo' should be 'pretrain', 'sft' or 'distill'."),
        ({"method": "pretrain", "depth": 4}, "depth=4 has no effect"),
        ({"method": "pretrain", "model": None, "tuning": "lora"}, "needs a model to begin with"),
    ],
)
def test_options_that_cannot_be_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        TrainConfig.of(**options(**changes))
    assert said in caught.value.message


def test_options_of_a_file_are_overridden(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndata: [b]\nlora: {r: 4, alpha: 8}\n")
    config = TrainConfig.of(file, **{"lora.r": 32, "lr": 1e-3})
    assert (config.lora.r, config.lora.alpha, config.lr, config.model) == (32, 8, 1e-3, "a")
    file.write_text("model: [\n")
    with pytest.raises(FormatError, match=r"run\.yaml is not valid YAML"):
        TrainConfig.of(file)
    with pytest.raises(NotFoundError):
        TrainConfig.of(tmp_path / "gone.yaml")


def test_a_rank_that_no_matrix_has_is_refused_with_the_largest_one(home: Path) -> None:
    asked = options(method="sft", data=["chats.jsonl"])
    with pytest.raises(InvalidInputError, match=r"lora\.r=100,000 is more .* 32 is the largest") as caught:
        plan_run(TrainConfig.of(**asked, lora={"r": 100_000}))
    assert caught.value.param == "lora.r" and "at most 32" in caught.value.hint
    assert plan_run(TrainConfig.of(**asked, lora={"r": 32})).fits
    with pytest.raises(InvalidInputError, match="16 is the largest"):
        plan_run(TrainConfig.of(**asked, lora={"r": 17, "targets": ["v_proj", "k_proj"]}))


def test_an_adapter_of_a_large_rank_runs_by_its_name_and_elsewhere_with_the_option(home: Path) -> None:
    write_tiny_model(home / "wide", hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    asked = options(method="sft", model="wide", data=["chats.jsonl"], steps=1, name="large")
    made = train(TrainConfig.of(**asked, lora={"r": 128, "targets": ["q_proj"]}))
    with LLM.from_pretrained("large", device="cpu", dtype="float32") as llm:
        assert llm.adapters[0].rank == 128 and llm.generate("What is", max_tokens=2)
    assert made.exported and made.exported.adapter
    with LLM.from_pretrained("wide", device="cpu", dtype="float32") as llm:
        llm.load_adapter("large")
        with pytest.raises(InvalidInputError, match="rank 128; at most 64") as caught:
            llm.load_adapter("from-its-run", made.exported.adapter)
        assert "max_lora_rank to 128" in caught.value.hint
    with pytest.raises(InvalidInputError, match="rank 128; at most 32"):
        LLM.from_pretrained("large", device="cpu", dtype="float32", max_lora_rank=32)
    with LLM.from_pretrained("wide", device="cpu", dtype="float32", max_lora_rank=128) as llm:
        llm.load_adapter("from-its-run", made.exported.adapter)


def test_evaluations_that_were_asked_for_and_have_no_rows_are_refused_before_the_first_step(home: Path) -> None:
    chats = (home / "chats.jsonl").read_text().splitlines(keepends=True)
    (home / "few.jsonl").write_text("".join(chats[:6]))
    asked = options(method="sft", data=["few.jsonl"])
    with pytest.raises(InvalidInputError) as caught:
        train(TrainConfig.of(**asked, evaluate_every=2, name="few"))
    assert caught.value.param == "evaluate_every" and not list(home.glob("home/runs/few/*.*"))
    assert "of 6 rows, validation=0.02 holds out none. It needs about 50." in caught.value.message
    assert "--validation 0.34 or --validation-data FILE" in caught.value.hint
    for more in ({}, {"evaluate_every": 0}, {"evaluate_every": 2, "prompts": ["Hi"]}):
        assert prepare(TrainConfig.of(**asked, **more, output=home / "scratch")).held_out is None
    assert prepare(TrainConfig.of(**asked, evaluate_every=2, validation=0.34, output=home / "scratch")).held_out
