"""`llmasos train`: each action takes the flags that it uses and refuses all others, naming who uses them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from cli_runner import Cli

from llmasos.cli.train import ACTIONS, flag, train_types, uses
from llmasos.cli.train import train as train_command
from llmasos.errors import InvalidInputError

OWN: dict[str, Any] = {"method": "ties", "weights": "1,2", "base": "b", "density": 0.5, "checkpoint": 3, "json": True}
"""Flags of the command beside a run's options, with a value each."""


def all_flags() -> set[str]:
    return {*train_types(), *OWN}


def test_every_flag_of_the_command_is_known_to_the_table() -> None:
    own = {p.name for p in inspect.signature(train_command).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert own == set(OWN)
    assert set().union(*map(uses, ACTIONS)) == all_flags()


@pytest.mark.parametrize("action", ACTIONS)
def test_a_flag_that_an_action_does_not_use_is_refused_with_who_uses_it(action: str) -> None:
    for name in sorted(all_flags() - uses(action)):
        with pytest.raises(InvalidInputError) as caught:
            train_command(action, **{name: OWN.get(name, "x")})  # type: ignore[arg-type]  # one of the table
        assert caught.value.message == f"{flag(name)} is of no use to `train {action}`."
        users = caught.value.hint.removeprefix("It is of: ").split(".")[0].split(", ")
        assert users == [other for other in ACTIONS if name in uses(other)] and users


@pytest.mark.parametrize(
    "words", [["sft", "--checkpoint", "3"], ["export", "one", "--lr", "1"], ["merge", "--lora.r", "4"]]
)
def test_it_is_an_error_of_the_line(words: list[str], cli: Cli) -> None:
    said = cli("train", *words)
    assert said.code == 2 and said.out == "" and f"is of no use to `train {words[0]}`" in said.err


@pytest.mark.parametrize("action", ACTIONS)
def test_a_flag_that_an_action_uses_passes(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the work of the action, which is replaced by one that only counts."""
    from llmasos.cli import train

    reached: list[str] = []
    for work in ("_run", "_resume", "_plan", "_inspect", "_merge", "_export", "_verify"):
        monkeypatch.setattr(train, work, lambda *args, **options: reached.append(action) or 0)
    monkeypatch.setattr(train, "_config", lambda *args: None)
    for name in uses(action):
        assert not train_command(action, **{name: OWN.get(name, "x")})  # type: ignore[arg-type]  # one of the table
    assert len(reached) == len(uses(action))


@pytest.mark.parametrize("action", ACTIONS)
def test_the_help_of_an_action_has_its_flags_and_no_others(action: str, cli: Cli) -> None:
    said = cli("train", action, "--help").out
    listed = {word for line in said.splitlines() if line.startswith("  --") for word in line.split()[:1]}
    assert {word.rstrip(",") for word in listed} == {flag(name) for name in uses(action)}


def test_the_help_of_the_command_has_all_flags(cli: Cli) -> None:
    said = cli("train", "--help").out
    assert all(f"  {flag(name)}" in said for name in all_flags())


def test_who_uses_a_flag_is_said_in_chinese_as_well(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_LANG", "zh")
    said = cli("train", "export", "one", "--lr", "1")
    assert said.code == 2 and "--lr 对 `train export` 不起作用" in said.err and "sft, pretrain, distill" in said.err
