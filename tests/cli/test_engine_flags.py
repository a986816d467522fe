"""The engine's flags and adapters on the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Cli

from llmasos.cli.engine import engine_types, take_engine
from llmasos.cli.messages import LANGUAGES, table
from llmasos.inference.config import EngineConfig
from llmasos.inference.host.host import Host
from llmasos.inference.host.process import ModelSpec
from llmasos.inference.llm import LLM
from tiny import write_tiny_adapter

EXACT = ("--dtype", "float32", "--temperature", "0", "--max-tokens", "8", "--no-stats")
FLAGS = (
    *("--max-num-seqs=3", "--max-num-batched-tokens=256", "--max-model-len=128", "--page-size=32"),
    *("--kv-cache-dtype=int8", "--gpu-memory-utilization=0.5", "--kv-cache-memory=10000000"),
    *("--no-enable-prefix-caching", "--enforce-eager", "--batch-invariant", "--tensor-parallel-size=1"),
    *("--max-loras=2", "--max-lora-rank=16", "--speculative-ngram=5"),
)


def test_every_field_of_the_config_has_a_flag_that_sets_it(
    cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EngineConfig] = []
    made = LLM.__init__

    def init(self: LLM, model: Any, **options: Any) -> None:
        made(self, model, **options)
        seen.append(self.engine_config)
        raise KeyboardInterrupt  # it need not answer

    def add(self: Host, spec: ModelSpec, **options: Any) -> None:
        seen.append(EngineConfig.of(**spec.engine))
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "__init__", init)
    monkeypatch.setattr(Host, "add", add)
    for command in ("run", "chat", "serve"):
        more = ("--port=0",) if command == "serve" else ()
        assert cli(command, str(tiny_model), *FLAGS, *more, stdin="hi").code == 130
    assert seen[0] == seen[1] == seen[2]
    config, usual = dataclasses.asdict(seen[0]), dataclasses.asdict(EngineConfig())
    same = {name for name in config if config[name] == usual[name]}
    assert same == {"tensor_parallel_size"}
    assert (config["enable_prefix_caching"], config["speculative"]["num_speculative_tokens"]) == (False, 5)


def test_nothing_typed_leaves_everything_to_the_config_and_a_draft_model_is_one() -> None:
    options: dict[str, Any] = {"temperature": 0.5}
    assert take_engine(options) == {} and options == {"temperature": 0.5}
    [speculative] = take_engine({"speculative_model": "small"}).values()
    assert (speculative.method, speculative.model) == ("draft", "small")


def test_every_flag_is_explained_in_every_language() -> None:
    for language in LANGUAGES:
        assert all(f"option.{flag}" in table(language) for flag in engine_types())


def test_flags_reach_the_engine_and_the_answer_stays(cli: Cli, tiny_model: Path) -> None:
    plain = cli("run", str(tiny_model), "The quick brown fox", *EXACT).out
    flags = ("--max-num-batched-tokens", "16", "--page-size", "16", "--speculative-ngram", "3", "--max-num-seqs", "1")
    assert cli("run", str(tiny_model), "The quick brown fox", *EXACT, *flags).out == plain != ""
    short = cli("run", str(tiny_model), "The quick brown fox", *EXACT, "--max-model-len", "10")
    assert short.code == 2 and "context holds 10" in short.err


def test_run_and_chat_answer_with_an_adapter(cli: Cli, tiny_model: Path, tmp_path: Path, home: Path) -> None:
    folder = write_tiny_adapter(tmp_path / "mine")
    installed = write_tiny_adapter(home / "adapters" / "mine")
    model, prompt = str(tiny_model), "The quick brown fox"
    plain = cli("run", model, prompt, *EXACT).out
    adapted = cli("run", model, prompt, *EXACT, "--adapter", str(folder))
    assert adapted.code == 0 and adapted.out not in (plain, "")
    assert cli("run", model, prompt, *EXACT, "--adapter", installed.name).out == adapted.out
    several = cli("run", model, prompt, *EXACT[:-1], "--adapter", str(folder), "--num-beams", "1", "--n", "2", "--json")
    assert several.json["outputs"][1]["text"] == adapted.out.rstrip("\n")
    chat = cli(
        "chat", model, *EXACT[:-1], "--adapter", str(folder), stdin=f"{prompt}\n/model {model}\n/clear\n{prompt}\n"
    )
    assert chat.code == 0, chat.err
    assert chat.out == adapted.out + plain  # the adapter belongs to the first model
