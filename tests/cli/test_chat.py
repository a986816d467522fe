"""`llmasos chat`: conversations from a pipe, its commands, the prompt with its keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Cli

from llmasos.cli.chat import Chat, join_quoted, parse_option, read_conversation, terminal_lines
from llmasos.errors import ContextOverflowError, FormatError, InvalidInputError, NotFoundError
from llmasos.inference.llm import LLM
from tiny import write_tiny_model

EXACT = ("--dtype", "float32", "--temperature", "0", "--max-tokens", "6")


@pytest.fixture
def talk(tiny_llm: LLM) -> Chat:
    """A conversation with the tiny model, whose context is 256."""
    conversation = Chat({}, {"temperature": 0.0, "max_tokens": 6}, None)
    conversation._llm = tiny_llm
    return conversation


def test_every_line_of_a_pipe_is_a_message_and_the_conversation_is_remembered(
    cli: Cli, tiny_model: Path, tiny_llm: LLM
) -> None:
    result = cli("chat", str(tiny_model), *EXACT, stdin="Hello\n\nAnd you?\n")
    first = tiny_llm.chat("Hello", temperature=0, max_tokens=6)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    second = tiny_llm.chat([*messages, {"role": "user", "content": "And you?"}], temperature=0, max_tokens=6)
    assert result.code == 0 and result.out == f"{first}\n{second}\n"
    assert result.err.count("tokens/s") == 2


def test_a_pipe_goes_on_after_an_error_and_keeps_its_exit_code(cli: Cli, tiny_model: Path) -> None:
    result = cli("chat", str(tiny_model), *EXACT, stdin="/nonsense\n/load nowhere.json\nHello\n")
    assert result.code == 2 and "/nonsense" in result.err and "nowhere.json" in result.err
    assert result.out.strip()


def test_exit_ends_before_the_rest(cli: Cli, tiny_model: Path) -> None:
    result = cli("chat", str(tiny_model), stdin="/exit\nHello\n")
    assert (result.code, result.out) == (0, "")


def test_triple_quotes_hold_several_lines() -> None:
    rest = iter(["second", 'third""" ignored', "next"])
    assert join_quoted('"""first', lambda: next(rest, None)) == "first\nsecond\nthird"
    assert next(rest) == "next"
    assert join_quoted("plain", lambda: None) == "plain"
    assert join_quoted('"""', iter(["a", "b", '"""']).__next__) == "a\nb"
    assert join_quoted('"""open', lambda: None) == "open"


def test_a_message_may_begin_with_a_slash(talk: Chat) -> None:
    talk.take("//etc is a folder")
    assert talk.messages[0] == {"role": "user", "content": "/etc is a folder"}


def test_help_names_every_command(talk: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk.take("/help")
    shown = capsys.readouterr().err
    assert all(f"/{name}" in shown for name in (*Chat.COMMANDS, "exit") if name != "?")


def test_system_set_clear_and_stats(talk: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    talk.take("/system Be brief.")
    talk.take("Hello")
    assert talk.llm.tokenizer.encode("Be brief.") and talk._with_system()[0]["content"] == "Be brief."
    talk.take("/stats")
    shown = capsys.readouterr().err
    assert "Be brief." in shown and "/ 256" in shown and "6 new tokens" in shown
    talk.take("/set max_tokens 3")
    talk.take("/set stop END")
    assert talk.options["max_tokens"] == 3 and talk.options["stop"] == ("END",)
    talk.take("/set stop none")
    talk.take("/set")
    assert "max_tokens=3" in capsys.readouterr().err
    talk.take("/clear")
    assert talk.messages == [] and talk.system == "Be brief."


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("temperature", "1", 1.0),
        ("top_k", "40", 40),
        ("seed", "3", 3),
        ("seed", "none", None),
        ("ignore_eos", "on", True),
        ("stop", "two words", ("two words",)),
        ("stop_token_ids", "1 2", (1, 2)),
    ],
)
def test_set_reads_a_value_by_its_fields_type(name: str, text: str, value: Any) -> None:
    found = parse_option(name, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text"), [("temperature", "warm"), ("top_k", "1.5"), ("heat", "1"), ("ignore_eos", "?")]
)
def test_set_refuses_what_makes_no_sense(name: str, text: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        parse_option(name, text)


def test_a_refused_value_changes_nothing(talk: Chat) -> None:
    with pytest.raises(InvalidInputError, match="temperature=-1"):
        talk.take("/set temperature -1")
    assert talk.options["temperature"] == 0.0


def test_retry_replaces_the_last_answer(talk: Chat) -> None:
    talk.take("Hello")
    before = [dict(m) for m in talk.messages]
    talk.take("/retry")
    assert talk.messages == before
    talk.options["max_tokens"] = 2
    talk.take("/retry")
    assert len(talk.messages) == 2 and len(talk.messages[1]["content"]) < len(before[1]["content"])


def test_nothing_to_retry_is_said(talk: Chat) -> None:
    with pytest.raises(InvalidInputError, match="answer again"):
        talk.take("/retry")


def test_save_and_load_give_the_conversation_back(talk: Chat, tmp_path: Path, tiny_llm: LLM) -> None:
    talk.take("/system 简短")
    talk.take("Hello")
    talk.take(f"/save {tmp_path / 'talk.json'}")
    other = Chat({}, {"temperature": 0.0, "max_tokens": 6}, None)
    other._llm = tiny_llm
    other.take(f"/load {tmp_path / 'talk.json'}")
    assert (other.system, other.messages) == ("简短", talk.messages)
    other.take("And?")
    assert len(other.messages) == 4


@pytest.mark.parametrize(
    "text", ["[]", "{}", "no json", '{"messages": [{"role": "cat", "content": "miau"}]}', '{"messages": 3}']
)
def test_a_file_that_is_no_conversation_is_refused_and_changes_nothing(talk: Chat, tmp_path: Path, text: str) -> None:
    talk.take("Hello")
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(FormatError, match=r"other\.json"):
        talk.take(f"/load {tmp_path / 'other.json'}")
    assert len(talk.messages) == 2
    with pytest.raises(NotFoundError):
        read_conversation(tmp_path / "none.json")
    with pytest.raises(InvalidInputError, match="/save"):
        talk.take("/save")


def test_a_full_context_is_said_with_counts_and_the_way_out(talk: Chat) -> None:
    del talk.options["max_tokens"]
    talk.messages = [{"role": "user", "content": "a b c d e f " * 20}, {"role": "assistant", "content": "g"}] * 2
    before = list(talk.messages)
    with pytest.raises(ContextOverflowError) as caught:
        talk.take("One more")
    assert "256" in caught.value.message and str(caught.value.prompt_tokens) in caught.value.message
    assert "/clear" in caught.value.hint
    assert talk.messages == before, "the message that does not fit is taken back"
    talk.take("/clear")
    assert talk.take("One more") and len(talk.messages) == 2


def test_an_explicit_limit_that_does_not_fit_is_said_too(talk: Chat) -> None:
    talk.options["max_tokens"] = 500
    with pytest.raises(ContextOverflowError, match="500"):
        talk.take("Hello")
    assert talk.messages == []


def test_ctrl_c_stops_the_answer_and_keeps_what_came(talk: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LLM.stream_complete

    def interrupted(self: LLM, *args: Any, **request: Any) -> Iterator[Any]:
        for number, chunk in enumerate(whole(self, *args, **request)):
            if number == 3:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(LLM, "stream_complete", interrupted)
    assert talk.take("Hello")
    assert talk.messages[1]["role"] == "assistant" and talk.last is not None
    assert talk.messages[1]["content"] == talk.last.text != ""


def test_ctrl_c_before_the_first_token_takes_the_message_back(talk: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: LLM, *args: Any, **request: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(LLM, "stream_complete", interrupted)
    talk.run(iter(["Hello", "/stats"]))
    assert talk.messages == []


def test_another_model_takes_over_and_a_wrong_name_changes_nothing(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    result = cli("chat", str(tiny_model), *EXACT, stdin=f"/model nosuchmodel\n/model\n/model {other}\nHello\n")
    assert result.code == 3 and f"Talking with {tiny_model}." in result.err and f"Talking with {other}." in result.err
    assert result.out.strip()


def test_the_prompt_has_history_new_lines_and_keys(home: Path) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text('one\r\x1b\rtwo\rdropped\x03"""a\rb"""\r\x04')
        lines = list(terminal_lines(home))
    assert lines == ["one", "\ntwo", "a\nb"]
    assert "+one" in (home / "chat_history").read_text()


def test_a_chat_on_a_terminal_welcomes_and_leaves_at_ctrl_d(
    cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmasos.cli.chat.terminal_lines", lambda home: iter(["Hello", "/model"]))
    result = cli("chat", str(tiny_model), *EXACT, terminal=True)
    assert result.code == 0 and "/help" in result.err and result.out.strip()


def test_saved_conversations_are_plain_json(talk: Chat, tmp_path: Path) -> None:
    talk.take("你好")
    talk.take(f"/save {tmp_path / 'a.json'}")
    data = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert data["messages"][0] == {"role": "user", "content": "你好"} and data["model"] == "tiny"
