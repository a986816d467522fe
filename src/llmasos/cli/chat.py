"""`llmasos chat`: a conversation in the terminal, or one message a line from a pipe.

Lines that begin with `/` are commands (see `Chat.COMMANDS`); two slashes begin a message with one. Ctrl-C stops the
answer, Ctrl-D leaves. Nothing is ever cut from a conversation silently: what exceeds the context is said with counts.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.cli.engine import take_engine
from llmasos.cli.messages import t
from llmasos.cli.render import pairs, say, show_error
from llmasos.errors import (
    ContextOverflowError,
    FormatError,
    InvalidInputError,
    LLMasOSError,
    NoChatTemplateError,
    NotFoundError,
    StoreError,
    UnsupportedError,
)
from llmasos.inference.llm import LLM
from llmasos.inference.request import SamplingParams
from llmasos.settings import settings

if TYPE_CHECKING:
    from llmasos.cli.answer import Answer, Messages
    from llmasos.inference.remote import RemoteLLM

MAX_TOKENS = 1024
"""New tokens of an answer where nobody said otherwise, as far as the context has room."""
QUOTES = '"""'


def chat(
    model: str | None = None,
    /,
    *,
    system: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    adapter: str | None = None,
    **sampling: Any,
) -> int | None:
    """`llmasos chat`. From a pipe the exit code is that of the first message that failed."""
    place: dict[str, Any] = {"device": device, "dtype": dtype, "quantization": quantization, "adapter": adapter}
    return converse(model, system, place | take_engine(sampling), sampling)


def converse(model: str | None, system: str | None, place: dict[str, Any], sampling: dict[str, Any]) -> int | None:
    """`place`: keyword arguments of `fetch.load`."""
    from llmasos.store import DEFAULT_MODEL

    SamplingParams.of(**sampling)
    conversation = Chat(place, sampling, system)
    try:
        conversation.use(model or DEFAULT_MODEL)
        if sys.stdin.isatty():
            say(t("chat.welcome", model=conversation.llm.name))
            conversation.run(terminal_lines(settings().home))
            return None
        conversation.run(piped_lines(), stop_on_interrupt=True)
        return conversation.exit_code
    finally:
        conversation.close()


def piped_lines() -> Iterator[str]:
    """Messages from standard input, one a line; several lines between lines of triple quotes."""
    lines = iter(sys.stdin)
    for line in lines:
        yield join_quoted(line.rstrip("\r\n"), lambda: next(lines, None))


def join_quoted(first: str, more: Callable[[], str | None]) -> str:
    """`first`, or everything between it and the closing quotes if it opens triple quotes."""
    if not first.lstrip().startswith(QUOTES):
        return first
    text = first.lstrip().removeprefix(QUOTES)
    while QUOTES not in text:
        line = more()
        if line is None:
            break
        text += ("\n" if text else "") + line.rstrip("\r\n")
    return text.partition(QUOTES)[0].strip("\n")


def terminal_lines(home: Path) -> Iterator[str]:
    """Messages typed at a prompt with history; Enter sends, Alt-Enter begins a new line. Ends at Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    home.mkdir(parents=True, exist_ok=True)
    history = FileHistory(str(home / "chat_history"))
    session: PromptSession[str] = PromptSession(history=history, key_bindings=keys, multiline=False)
    while True:
        try:
            yield join_quoted(session.prompt(">>> "), lambda: session.prompt("... "))
        except KeyboardInterrupt:
            continue  # what was typed is dropped, the program stays
        except EOFError:
            return


class Chat:
    """A conversation with one model at a time."""

    def __init__(self, place: dict[str, Any], options: dict[str, Any], system: str | None) -> None:
        self.place, self.options, self.system = place, dict(options), system
        self.messages: Messages = []
        self.last: Answer | None = None
        self.exit_code = 0
        self._llm: LLM | RemoteLLM | None = None
        self._adapter: str | None = None

    @property
    def llm(self) -> LLM | RemoteLLM:
        assert self._llm is not None, "use() comes first"
        return self._llm

    def use(self, name: str) -> None:
        """Load a model to talk with; the one before is kept if that fails. An adapter belongs to the first one."""
        from llmasos.cli.fetch import load

        adapter = self.place.get("adapter") if self._llm is None else None
        llm = load(name, **self.place | {"adapter": adapter})
        try:
            check_chats(llm)
        except LLMasOSError:
            llm.close()
            raise
        self.close()
        self._llm, self._adapter = llm, adapter

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()

    def run(self, lines: Iterator[str], *, stop_on_interrupt: bool = False) -> None:
        """Take lines until they end or one of them is /exit. Errors are shown, and the conversation goes on."""
        for line in lines:
            try:
                if not self.take(line):
                    return
            except LLMasOSError as e:
                self.exit_code = self.exit_code or e.exit_code
                show_error(e)
            except KeyboardInterrupt:
                if stop_on_interrupt:
                    raise

    def take(self, line: str) -> bool:
        """Handle one line; False if it was the last."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            return self._command(text)
        if text:
            self.say(text.removeprefix("/") if text.startswith("//") else text)
        return True

    # the conversation

    def say(self, text: str) -> None:
        """Send a message and print the answer. If it fails, the message is taken back."""
        self.messages.append({"role": "user", "content": text})
        try:
            self._answer()
        except BaseException:
            if self.messages[-1]["role"] == "user":
                self.messages.pop()
            raise

    def _answer(self) -> None:
        from llmasos.cli.answer import Answer

        messages = self._with_system()
        answer = Answer(self.llm, messages, self.options | self._room(messages), adapter=self._adapter)
        try:
            for piece in answer:
                print(piece, end="", flush=True)
        except ContextOverflowError as e:
            raise self._overflow(e.prompt_tokens, e.max_tokens) from e
        except KeyboardInterrupt:
            if not answer.text:
                raise
            say(f"\n{t('chat.stopped')}")
        print(flush=True)
        self.last = answer
        self.messages.append({"role": "assistant", "content": answer.text})
        say(answer.stats())

    def _with_system(self) -> Messages:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.messages]

    def _room(self, messages: Messages) -> dict[str, int]:
        """The limit of new tokens, where none was chosen. Raises InvalidInputError if there is no room for any."""
        if self.options.get("max_tokens") is not None or not isinstance(self.llm, LLM):
            return {}
        used = self._num_tokens(messages)
        if used >= self.llm.context_length:
            raise self._overflow(used, 1)
        return {"max_tokens": min(MAX_TOKENS, self.llm.context_length - used)}

    def _num_tokens(self, messages: Messages) -> int:
        from llmasos.cli.answer import prompt_ids

        assert isinstance(self.llm, LLM)
        return len(prompt_ids(self.llm, messages))

    def _overflow(self, used: int, wanted: int) -> ContextOverflowError:
        error = ContextOverflowError(used, wanted, self.llm.context_length)
        error.message = t("chat.overflow", used=used, wanted=wanted, context=self.llm.context_length)
        error.hint = t("chat.overflow.hint")
        return error

    # commands

    def _command(self, line: str) -> bool:
        word, _, rest = line[1:].partition(" ")
        if word in ("exit", "quit", "bye"):
            return False
        action = self.COMMANDS.get(word)
        if action is None:
            raise InvalidInputError(t("chat.unknown", command=f"/{word}"), hint=t("chat.unknown.hint"))
        action(self, rest.strip())
        return True

    def _help(self, _: str) -> None:
        say(pairs([(usage, t(f"chat.help.{name}")) for name, usage in _USAGES.items()]))
        say(t("chat.help.keys"))

    def _system(self, text: str) -> None:
        if text:
            self.system = text
        say(t("chat.system", text=self.system or "-"))

    def _clear(self, _: str) -> None:
        self.messages.clear()
        say(t("chat.cleared"))

    def _save(self, file: str) -> None:
        path = _file(file, "save")
        data = {"model": self.llm.name, "system": self.system, "messages": self.messages}
        try:
            path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as e:
            raise StoreError(f"{path} could not be written: {e.strerror or e}.", hint=t("chat.file.hint")) from e
        say(t("chat.saved", count=len(self.messages), path=path))

    def _load(self, file: str) -> None:
        path = _file(file, "load")
        self.system, self.messages = read_conversation(path)
        say(t("chat.loaded", count=len(self.messages), path=path))

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            changed = self.options | {name: parse_option(name, value.strip())}
            SamplingParams.of(**{k: v for k, v in changed.items() if v is not None})
            self.options = changed
        chosen = {k: v for k, v in self.options.items() if v is not None}
        say(", ".join(f"{k}={v}" for k, v in chosen.items()) or t("chat.defaults"))

    def _model(self, name: str) -> None:
        if name:
            self.use(name)
        say(t("chat.model", model=self.llm.name))

    def _stats(self, _: str) -> None:
        facts = [(t("stats.model"), self.llm.name), (t("stats.messages"), str(len(self.messages)))]
        if isinstance(self.llm, LLM):
            used = self._num_tokens(self._with_system()) if self.messages else 0
            facts.append((t("stats.context"), f"{used} / {self.llm.context_length}"))
        if self.last:
            facts.append((t("stats.last"), self.last.stats()))
        say(pairs(facts))

    def _retry(self, _: str) -> None:
        if not any(message["role"] == "user" for message in self.messages):
            raise InvalidInputError(t("chat.no_retry"), hint=t("chat.no_retry.hint"))
        before = list(self.messages)
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        try:
            self._answer()
        except BaseException:
            self.messages = before
            raise

    COMMANDS: typing.ClassVar[dict[str, Callable[[Chat, str], None]]] = {
        "help": _help,
        "?": _help,
        "system": _system,
        "clear": _clear,
        "save": _save,
        "load": _load,
        "set": _set,
        "model": _model,
        "stats": _stats,
        "retry": _retry,
    }


_USAGES = {
    "help": "/help",
    "system": "/system TEXT",
    "set": "/set temperature 0.7",
    "model": "/model NAME",
    "retry": "/retry",
    "clear": "/clear",
    "save": "/save FILE",
    "load": "/load FILE",
    "stats": "/stats",
    "exit": "/exit",
}


def check_writes(llm: LLM | RemoteLLM) -> None:
    """Raises UnsupportedError for an encoder."""
    if llm.is_encoder:
        raise UnsupportedError(
            t("chat.encoder", model=llm.name), hint=t("chat.encoder.hint", model=llm.name), param="model"
        )


def check_chats(llm: LLM | RemoteLLM) -> None:
    """Raises UnsupportedError for an encoder and NoChatTemplateError for a model that was not trained to chat."""
    check_writes(llm)
    if not llm.has_chat_template:
        raise NoChatTemplateError(
            t("chat.no_template", model=llm.name), hint=t("chat.no_template.hint", model=llm.name)
        )


def read_conversation(path: Path) -> tuple[str | None, Messages]:
    """System text and messages of a saved conversation. Raises NotFoundError and FormatError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        messages = data["messages"]
        system = data.get("system")
        good = isinstance(messages, list) and (system is None or isinstance(system, str))
        for message in messages:
            good &= message["role"] in ("system", "user", "assistant") and isinstance(message["content"], str)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist.", hint=t("chat.file.hint")) from None
    except OSError as e:
        raise StoreError(f"{path} could not be read: {e.strerror or e}.", hint=t("chat.file.hint")) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise FormatError(t("chat.not_saved", path=path), hint=t("chat.file.hint")) from e
    if not good:
        raise FormatError(t("chat.not_saved", path=path), hint=t("chat.file.hint"))
    return system, [{"role": m["role"], "content": m["content"]} for m in messages]


def parse_option(name: str, text: str) -> Any:
    """The value of `/set name text`; `none` goes back to the model's default. Raises InvalidInputError."""
    from llmasos.cli.app import sampling_types

    kinds = sampling_types()
    if name not in kinds:
        raise InvalidInputError(
            f"{name!r} is not a sampling parameter.", hint=f"Known: {', '.join(sorted(kinds))}.", param=name
        )
    if text.lower() in ("none", "default"):
        return None
    kind = next((k for k in (typing.get_args(kinds[name]) or (kinds[name],)) if k in (int, float, bool)), str)
    many = typing.get_origin(kinds[name]) is tuple
    try:
        if kind is bool:
            return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[text.lower()]
        if many:
            return (text,) if kind is str else tuple(kind(part) for part in text.split())
        return kind(text)
    except (ValueError, KeyError):
        raise InvalidInputError(
            t("usage.bad_value", option=name, value=text, kind=kind.__name__), hint=t("chat.set.hint"), param=name
        ) from None


def _file(text: str, command: str) -> Path:
    if not text:
        raise InvalidInputError(t("chat.no_file", command=f"/{command}"), hint=f"/{command} FILE")
    return Path(text).expanduser()
