"""`llmasos run`: where the prompt comes from, what goes to which stream, what encoders do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Cli

from llmasos.cli import run as run_module
from llmasos.cli.answer import Answer
from llmasos.cli.run import is_prompt
from llmasos.inference.llm import LLM
from llmasos.inference.request import Chunk, RequestMetrics, StructuredOutput
from llmasos.models.load import _Filler
from tiny import write_tiny_model

EXACT = ("--dtype", "float32", "--temperature", "0", "--max-tokens", "8")


def test_the_answer_is_the_models_and_alone_on_stdout(cli: Cli, tiny_model: Path, tiny_llm: LLM) -> None:
    result = cli("run", str(tiny_model), "What", "is", "Paris?", *EXACT)
    assert result.code == 0
    assert result.out.rstrip("\n") == tiny_llm.chat("What is Paris?", temperature=0, max_tokens=8).rstrip("\n")
    assert "tokens/s" in result.err and "cut off at the limit" in result.err
    assert cli("run", str(tiny_model), "What is Paris?", *EXACT, "--no-stats").err == ""


def test_raw_continues_the_prompt_as_it_is(cli: Cli, tiny_model: Path, tiny_llm: LLM) -> None:
    result = cli("run", str(tiny_model), "The quick brown", "--raw", *EXACT)
    assert result.out.rstrip("\n") == tiny_llm.generate("The quick brown", temperature=0, max_tokens=8).rstrip("\n")
    assert result.out != cli("run", str(tiny_model), "The quick brown", *EXACT).out


def test_a_model_without_template_continues(cli: Cli, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base", chat=False)
    plain = cli("run", str(folder), "The quick", *EXACT)
    assert plain.code == 0 and plain.out == cli("run", str(folder), "The quick", "--raw", *EXACT).out


def test_json_has_text_usage_and_timings(cli: Cli, tiny_model: Path) -> None:
    result = cli("run", str(tiny_model), "Hello", "--json", *EXACT)
    data = result.json
    assert set(data) == {"model", "text", "finish_reason", "usage", "timings"}
    assert data["finish_reason"] == "length" and data["usage"]["completion_tokens"] == 8
    assert data["usage"]["total_tokens"] == data["usage"]["prompt_tokens"] + 8
    assert data["timings"]["tokens_per_second"] > 0 and data["timings"]["time_to_first_token"] > 0
    assert result.err == ""


def test_the_speed_is_the_engines_also_where_all_tokens_come_at_once() -> None:
    class Model:
        def stream(self, prompt: str) -> Iterator[Chunk]:
            yield Chunk(0, "a", (1,))
            yield Chunk(0, "bc", (2, 3), finish_reason="stop", metrics=RequestMetrics(0.1, 0.5, 3))

    answer = Answer(Model(), "?", {})
    assert "".join(answer) == "abc" and answer.tokens_per_second == 4.0 == answer.timings()["tokens_per_second"]


def test_the_system_text_changes_the_answer(cli: Cli, tiny_model: Path, tiny_llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    result = cli("run", str(tiny_model), "Hello", "--system", "Be brief.", "--json", *EXACT)
    assert result.json["text"] == tiny_llm.chat(messages, temperature=0, max_tokens=8)


def test_a_pipe_is_read_when_no_prompt_is_given(cli: Cli, tiny_model: Path) -> None:
    said = cli("run", str(tiny_model), "Hello there", *EXACT).out
    assert cli("run", str(tiny_model), *EXACT, stdin="Hello there\n").out == said
    assert cli("run", str(tiny_model), "-", *EXACT, stdin="Hello there\n").out == said
    assert cli("run", str(tiny_model), "Hello", "-", *EXACT, stdin="there").out == said


def test_a_pipe_is_left_alone_when_a_prompt_is_given(cli: Cli, tiny_model: Path) -> None:
    assert cli("run", str(tiny_model), "Hi", *EXACT, stdin="other").out == cli("run", str(tiny_model), "Hi", *EXACT).out


def test_words_after_two_dashes_are_prompt(cli: Cli, tiny_model: Path, tiny_llm: LLM) -> None:
    result = cli("run", str(tiny_model), *EXACT, "--json", "--", "--help", "me")
    assert result.json["text"] == tiny_llm.chat("--help me", temperature=0, max_tokens=8)


def test_sampling_flags_reach_the_model(cli: Cli, tiny_model: Path, tiny_llm: LLM) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "seed": 7, "max_tokens": 12, "stop": ("e", "a")}
    flags = ["--temperature", "1.5", "--top-k", "20", "--seed", "7", "--max-tokens", "12", "--stop", "e", "--stop", "a"]
    result = cli("run", str(tiny_model), "Hello", "--dtype", "float32", "--json", *flags)
    assert result.json["text"] == tiny_llm.chat("Hello", **options)


def test_several_answers_and_beams_come_at_once(cli: Cli, tiny_model: Path, tiny_llm: LLM) -> None:
    flags = ("--num-beams", "3", "--n", "2", "--max-tokens", "6", "--dtype", "float32")
    data = cli("run", str(tiny_model), "Hello", "--json", *flags).json
    best = tiny_llm.complete_chat("Hello", tiny_llm.params(num_beams=3, n=2, max_tokens=6))
    assert [o["text"] for o in data["outputs"]] == [c.text for c in best.outputs]
    assert data["text"] == data["outputs"][0]["text"]
    assert "\n\n" in cli("run", str(tiny_model), "Hello", *flags).out


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("Who are you?", True),
        ("你是谁", True),
        ("smollm2", False),
        ("owner/name:Q4_K_M", False),
        ("hello", False),
        ("openai:gpt-4.1", False),
        ("file:/a folder/model.gguf", False),
    ],
)
def test_a_first_argument_that_no_model_can_be_called_is_a_prompt(word: str, expected: bool) -> None:
    assert is_prompt(word) is expected


def test_a_path_with_spaces_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    assert not is_prompt(str(tmp_path / "my model"))


def test_a_prompt_alone_asks_the_default_model(cli: Cli, monkeypatch: pytest.MonkeyPatch, tiny_llm: LLM) -> None:
    asked: list[str] = []

    def load(ref: str, **_: Any) -> LLM:
        asked.append(ref)
        return tiny_llm

    monkeypatch.setattr("llmasos.cli.fetch.load", load)
    monkeypatch.setattr(LLM, "close", lambda self: None)
    assert cli("run", "Who are you?", *EXACT[2:]).code == 0
    assert asked == ["smollm2-135m-instruct"]


def test_an_encoder_fills_masks_classifies_or_embeds(cli: Cli, tiny_encoders: Callable[[str], Path]) -> None:
    masked = str(tiny_encoders("BertForMaskedLM"))
    result = cli("run", masked, "paris is a [MASK]", "--json")
    [row] = result.json["masks"]
    assert len(row) == 5 and row[0]["probability"] >= row[-1]["probability"]
    assert row[0]["token"] in cli("run", masked, "paris is a [MASK]").out.splitlines()[0]

    labels = cli("run", str(tiny_encoders("BertForSequenceClassification")), "paris is good", "--json").json["labels"]
    assert set(labels) == {"good", "bad"} and abs(sum(labels.values()) - 1) < 1e-5

    plain = str(tiny_encoders("BertModel"))
    vector = cli("run", plain, "paris is a city", "--json").json["embedding"]
    assert len(vector) == 16
    shown = cli("run", plain, "paris is a city")
    assert shown.out.startswith(f"{vector[0]:.4f} ") and "16" in shown.err


@pytest.mark.parametrize(
    "command",
    [("chat", "{}"), ("run", "{}", "Hello", "--system", "Be brief."), ("task", "sentiment", "Fine.", "--model", "{}")],
)
def test_a_model_for_embeddings_that_should_write_says_what_it_is_for(
    cli: Cli, tiny_encoders: Callable[[str], Path], command: tuple[str, ...]
) -> None:
    model = str(tiny_encoders("BertModel"))
    args = [word.format(model) for word in command]
    refused = cli(*args, stdin="Hello")
    assert refused.code != 0 and refused.out == ""
    assert f"{model} makes embeddings and does not write text." in refused.err
    hint = re.search(
        r"`llmasos (task embed) TEXT (--model .+?)` or /v1/embeddings; `llmasos (search chat)`", refused.err
    )
    assert hint is not None
    assert cli(*hint[1].split(), "paris", *hint[2].split(), "--json").json["vectors"]
    assert "smollm2-135m-instruct" in cli(*hint[3].split()).out and "all-minilm" not in cli(*hint[3].split()).out


def test_tasks_with_labels_take_a_classifier_and_others_refuse_it(
    cli: Cli, tiny_encoders: Callable[[str], Path]
) -> None:
    model = str(tiny_encoders("BertForSequenceClassification"))
    assert cli("task", "classify", "paris is good", "--model", model).out.strip() in ("good", "bad")
    refused = cli("task", "summarise", "paris is good", "--model", model)
    assert refused.code != 0 and "does not write text" in refused.err


def test_without_prompt_on_a_terminal_it_is_a_chat(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("llmasos.cli.chat.converse", lambda *given: called.append(given))
    flags = ("--temperature", "0.3", "--max-num-seqs", "2", "--adapter", "a", "--dtype", "float32")
    assert cli("run", "smollm2", *flags, terminal=True).code == 0
    [(model, _, place, sampling)] = called
    assert model == "smollm2" and sampling == {"temperature": 0.3}
    assert place == {"device": "auto", "dtype": "float32", "quantization": "auto", "adapter": "a", "max_num_seqs": 2}


def test_a_notice_is_said_once(cli: Cli, tiny_model: Path, home: Path) -> None:
    cli("import", str(tiny_model), "--name", "gpt-neo-1.3b")
    result = cli("run", "gpt3", "Hello", *EXACT)
    assert result.code == 0 and result.err.count("open replication") == 1


def test_ctrl_c_stops_a_streaming_answer_with_130(tiny_model: Path, home: Path) -> None:
    """In a process of its own, because a signal is meant: what has come stays, no traceback."""
    code = (
        "import sys, time\nfrom llmasos.inference.llm import LLM\nslow = LLM.stream_complete\n"
        "def stream(self, *a, **k):\n    for chunk in slow(self, *a, **k):\n        yield chunk\n"
        "        time.sleep(0.05)\n"
        "LLM.stream_complete = stream\nfrom llmasos.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    args = ["run", str(tiny_model), "Hello", "--ignore-eos", "--max-tokens", "200", "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LLMASOS_HOME": str(home), "LLMASOS_THREADS": "1"},
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first and rest.endswith("\n") and "Traceback" not in errors and "new tokens" in errors


def test_ctrl_c_while_a_model_loads_is_said_in_a_word(
    cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = _Filler._read
    seen: list[str] = []

    def interrupted(self: _Filler, name: str) -> Any:
        seen.append(name)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert self.stop.wait(60)
        return read(self, name)

    monkeypatch.setattr(_Filler, "_read", interrupted)
    for command in ("run", "chat"):
        result = cli(command, str(tiny_model), *EXACT, stdin="Hello")
        assert (result.code, result.out, result.err) == (130, "", "stopped\n")
    assert len(seen) == 2


SCHEMA = '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}'


def test_the_form_of_the_answer_reaches_the_model(cli: Cli, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(run_module, "_generate", lambda llm, prompt, options, **_: seen.append(options["structured"]))
    (tmp_path / "schema.json").write_text(SCHEMA)
    flags = (("--json-schema", SCHEMA), ("--json-schema", str(tmp_path / "schema.json")), ("--regex", "[0-9]+"))
    for given in (*flags, ("--choice", "yes", "--choice", "no")):
        assert cli("run", str(tiny_model), "Hello", *given).code == 0
    by_schema = StructuredOutput(json=SCHEMA)
    assert seen == [by_schema, by_schema, StructuredOutput(regex="[0-9]+"), StructuredOutput(choice=("yes", "no"))]


@pytest.mark.parametrize(
    ("given", "code", "word"),
    [
        (("--json-schema", "no-such-file.json"), 3, "no-such-file.json does not exist"),
        (("--json-schema", "{oops"), 2, "no JSON Schema"),
        (("--json-schema", "."), 2, "could not be read"),
        (("--regex", "a", "--choice", "b"), 2, "regex and choice"),
    ],
)
def test_a_wrong_form_is_said_before_a_model_is_loaded(cli: Cli, given, code: int, word: str) -> None:
    result = cli("run", "no-such-model-anywhere", "Hello", *given)
    assert result.code == code and word in result.err
