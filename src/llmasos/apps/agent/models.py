"""What an agent needs of a model, and models that have it: one in this process, one behind an API, a scripted one.

The server has a fourth (`llmasos.serve.native.agents`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmasos.client.providers import PROVIDERS
from llmasos.client.types import ChatCompletionChunk, Usage
from llmasos.errors import ContextOverflowError, InvalidInputError, LLMasOSError
from llmasos.text.reply import ReasoningDelta, ReplyEvent, ReplyParser, TextDelta, ToolCallDelta, ToolCallStart

if TYPE_CHECKING:
    from llmasos.inference.remote import RemoteLLM
    from llmasos.inference.request import SamplingParams
    from llmasos.inference.textmodel import TextModel

Message = dict[str, Any]
Messages = Sequence[Mapping[str, Any]]
Finish = Literal["stop", "length", "tool_calls"]
FINAL_ANSWER = "final_answer"
"""The function whose arguments are the answer, where an API knows no other form of answers."""
_BYTES_PER_TOKEN = 3
"""Where an API tells no number of tokens: most texts have more."""


@dataclass(frozen=True)
class Question:
    """One answer is wanted. `tools`: OpenAI's objects; `required`: it must call one; `form`: the JSON Schema of an
    answer that calls none; `parallel`: it may call several; `options`: sampling, as SamplingParams names it."""

    messages: Messages
    tools: list[dict[str, Any]] = field(default_factory=list)
    required: bool = False
    parallel: bool = True
    form: Mapping[str, Any] | None = None
    max_tokens: int = 1024
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """The last event of an answer. Token counts are None where nobody tells."""

    finish_reason: Finish
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class ChatModel(Protocol):
    """The models of agents."""

    name: str

    @property
    def context_length(self) -> int | None:
        """None: it does not tell; it says so when there is too much (ContextOverflowError)."""

    async def ready(self) -> None:
        """Before the first question of a run."""

    def count(self, messages: Messages, tools: list[dict[str, Any]]) -> int:
        """Tokens of the prompt; an estimate where nobody can know. May take a while."""

    def ask(self, question: Question) -> AsyncGenerator[ReplyEvent | Ended, None]:
        """The answer as it comes; closing it stops the model."""


def template_messages(messages: Messages) -> list[Message]:
    """As chat templates expect them: text content, `developer` as `system`, arguments of calls as objects."""
    from llmasos.inference.calling import template_call

    found = []
    for given in messages:
        message = {key: value for key, value in given.items() if value is not None}
        message["role"] = "system" if message["role"] == "developer" else message["role"]
        message["content"] = text_of(message.get("content"))
        if message.get("tool_calls"):
            message["tool_calls"] = [template_call(dict(call)) for call in message["tool_calls"]]
        found.append(message)
    return found


def text_of(content: Any) -> str:
    """Of a message: a text, parts of one, or nothing. Raises InvalidInputError for images and the like."""
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise InvalidInputError(f"Content of type {kind!r} is not supported.", param="messages")
    return "\n".join(part["text"] for part in content)


class LocalChat:
    """An `LLM` as the model of agents. Calls that must be made, and forms, are held by a grammar."""

    def __init__(self, llm: TextModel) -> None:
        self.llm, self.name = llm, llm.name

    @property
    def context_length(self) -> int:
        return self.llm.context_length

    async def ready(self) -> None:
        self.llm.prompts.decoder_only("chat")

    def count(self, messages: Messages, tools: list[dict[str, Any]]) -> int:
        return len(self._prompt(Question(messages, tools))[1])

    def _prompt(self, question: Question) -> tuple[str, list[int], Any, Any]:
        from llmasos.inference.calling import Tools, prompt_with_tools
        from llmasos.text.reply import reply_form

        required = question.required and bool(question.tools)
        tools = Tools(question.tools, required=required, parallel=question.parallel)
        form = reply_form(self.llm.chat_template)
        prompt, form = prompt_with_tools(self.llm, template_messages(question.messages), tools, form, {})
        return prompt, self.llm.prompts.token_ids(prompt, add_special_tokens=False), tools, form

    def _prepared(self, question: Question) -> tuple[list[int], SamplingParams, ReplyParser]:
        from llmasos.inference.calling import form_of_reply, special_marks
        from llmasos.inference.request import StructuredOutput

        prompt, ids, tools, form = self._prompt(question)
        room = self.llm.context_length - len(ids)
        if room < 1:
            raise ContextOverflowError(len(ids), 1, self.llm.context_length)
        params = self.llm.params(max_tokens=min(question.max_tokens, room), **question.options)
        asked = None if question.form is None else StructuredOutput(json=dict(question.form))
        special = special_marks(self.llm.tokenizer, form.marks)
        grammar, reasons = form_of_reply(tools, form, asked, prompt, special)
        parser = ReplyParser(form, tools=tools.offered, prompt=prompt, reasoning=reasons)
        shown = tuple(special.values()) if tools.offered or reasons or form.channels else ()
        return ids, replace(params, structured=grammar, shown_token_ids=shown), parser

    async def ask(self, question: Question) -> AsyncGenerator[ReplyEvent | Ended, None]:
        ids, params, parser = await asyncio.to_thread(self._prepared, question)
        num_output, finish = 0, "stop"
        async with aclosing(self.llm.astream_complete(ids, params)) as chunks:
            async for chunk in chunks:
                num_output += len(chunk.token_ids)
                finish = chunk.finish_reason or finish
                for event in parser.push(chunk.text) if chunk.text else ():
                    yield event
        for event in parser.finish():
            yield event
        reason: Finish = "length" if finish == "length" else "tool_calls" if parser.num_calls else "stop"
        yield Ended(reason, len(ids), num_output)


class ApiChat:
    """A `RemoteLLM` as the model of agents. Where the API is Anthropic's, an answer in a form is the call of a
    function."""

    def __init__(self, llm: RemoteLLM) -> None:
        self.llm, self.name = llm, llm.name
        self.context_length: int | None = None
        self._is_known = False
        self._counts = llm.endpoint.provider.name not in PROVIDERS

    async def ready(self) -> None:
        """Servers for open models, ours too, tell how much a model's context holds."""
        if not self._is_known:
            self._is_known = True
            with suppress(LLMasOSError):
                async with self.llm.async_client() as client:
                    told = getattr(await client.model(self.llm.model), "context_length", None)
                self.context_length = told if isinstance(told, int) and told > 0 else None

    def count(self, messages: Messages, tools: list[dict[str, Any]]) -> int:
        """By the server, where it does it; one that does not is not asked again."""
        given = [dict(one) for one in messages]
        if self._counts:
            try:
                return self.llm.count_tokens(given, **({"tools": tools} if tools else {}))
            except LLMasOSError:
                self._counts = False
        return estimate(given, tools)

    def _fields(self, question: Question) -> dict[str, Any]:
        fields: dict[str, Any] = {"max_tokens": question.max_tokens, **question.options}
        tools = list(question.tools)
        if question.required and tools:
            fields["tool_choice"] = "required"
        if not question.parallel and tools:
            fields["parallel_tool_calls"] = False
        if question.form is not None and self._by_call:
            function = {"name": FINAL_ANSWER, "description": "Gives the answer.", "parameters": dict(question.form)}
            tools.append({"type": "function", "function": function})
            fields["tool_choice"] = "required"
        elif question.form is not None:
            form = {"name": "answer", "schema": dict(question.form)}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}
        return fields | ({"tools": tools} if tools else {})

    @property
    def _by_call(self) -> bool:
        return self.llm.endpoint.provider.protocol == "anthropic"

    async def ask(self, question: Question) -> AsyncGenerator[ReplyEvent | Ended, None]:
        reader = _ChunkReader(FINAL_ANSWER if question.form is not None and self._by_call else None)
        messages = [dict(one) for one in question.messages]
        async with self.llm.async_client() as client:
            more = {"stream_options": {"include_usage": True}, **self._fields(question)}
            async with aclosing(client.stream_chat(messages, model=self.llm.model, **more)) as chunks:
                async for chunk in chunks:
                    for event in reader.read(chunk):
                        yield event
        yield reader.ended()


class _ChunkReader:
    """Chunks of a streamed chat as events. A call of `answer` becomes the text."""

    def __init__(self, answer: str | None) -> None:
        self._answer = answer
        self._names: dict[int, str] = {}
        self._finish: str | None = None
        self._usage: Usage | None = None

    def read(self, chunk: ChatCompletionChunk) -> Iterator[ReplyEvent]:
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices:
            self._finish = choice.finish_reason or self._finish
            delta = choice.delta
            if delta.reasoning_content:
                yield ReasoningDelta(delta.reasoning_content)
            if delta.content:
                yield TextDelta(delta.content)
            for piece in delta.tool_calls or ():
                function = piece.function
                if piece.index not in self._names:
                    name = self._names[piece.index] = (function.name if function else None) or ""
                    if name != self._answer:
                        yield ToolCallStart(piece.index, piece.id or "", name)
                if function is not None and function.arguments:
                    is_answer = self._names[piece.index] == self._answer
                    text = function.arguments
                    yield TextDelta(text) if is_answer else ToolCallDelta(piece.index, text)

    def ended(self) -> Ended:
        calls = any(name != self._answer for name in self._names.values())
        reason: Finish = "length" if self._finish == "length" else "tool_calls" if calls else "stop"
        if self._usage is None:
            return Ended(reason)
        return Ended(reason, self._usage.prompt_tokens, self._usage.completion_tokens)


def estimate(*parts: Any) -> int:
    """Tokens of what is written as JSON, rather too many."""
    return sum(len(json.dumps(part, ensure_ascii=False).encode("utf-8", "replace")) for part in parts) // (
        _BYTES_PER_TOKEN
    )


class ScriptedModel:
    """A model whose answers are written down: for tests of agents, and to replay a run.

    An answer is a text, or a dict with `text`, `reasoning`, `calls` (each with `name`, `arguments` as JSON text or as
    an object, and maybe `id`), `finish_reason`, `prompt_tokens`, `output_tokens`, `error` (an exception that it raises)
    and `seconds` (that it takes). `asked` has the questions.
    """

    def __init__(
        self, answers: Sequence[Any], *, name: str = "scripted", context_length: int | None = None, piece: int = 8
    ) -> None:
        self.name, self.context_length = name, context_length
        self._answers = list(answers)
        self._piece = piece
        self.asked: list[Question] = []

    async def ready(self) -> None:
        pass

    def count(self, messages: Messages, tools: list[dict[str, Any]]) -> int:
        """Four characters are a token, and every message has four more."""
        texts = (text_of(one.get("content")) + json.dumps(one.get("tool_calls") or "") for one in messages)
        return sum(len(text) // 4 + 4 for text in texts)

    async def ask(self, question: Question) -> AsyncGenerator[ReplyEvent | Ended, None]:
        number = len(self.asked)
        self.asked.append(question)
        if number >= len(self._answers):
            raise InvalidInputError(f"The script of {self.name} has {len(self._answers)} answers; more were asked for.")
        given = self._answers[number]
        answer: dict[str, Any] = {"text": given} if isinstance(given, str) else dict(given)
        await asyncio.sleep(answer.get("seconds", 0))
        if "error" in answer:
            raise answer["error"]
        for kind, text in ((ReasoningDelta, answer.get("reasoning", "")), (TextDelta, answer.get("text", ""))):
            for start in range(0, len(text), self._piece):
                yield kind(text[start : start + self._piece])
        calls = answer.get("calls", ())
        for index, call in enumerate(calls):
            yield ToolCallStart(index, call.get("id", f"call_{number}_{index}"), call["name"])
            arguments = call.get("arguments", {})
            yield ToolCallDelta(index, arguments if isinstance(arguments, str) else json.dumps(arguments))
        finish: Finish = answer.get("finish_reason") or ("tool_calls" if calls else "stop")
        used = self.count(question.messages, question.tools)
        written = self.count([{"content": answer.get("text", ""), "tool_calls": list(calls)}], [])
        yield Ended(finish, answer.get("prompt_tokens", used), answer.get("output_tokens", written))


def chat_model(model: Any) -> ChatModel:
    """The model of an agent: an `LLM`, a `RemoteLLM`, a name of either, or something that is a `ChatModel` already."""
    if isinstance(model, str):
        from llmasos.tasks.model import loaded_model

        model = loaded_model(model)
    from llmasos.inference.remote import RemoteLLM
    from llmasos.inference.textmodel import TextModel

    if isinstance(model, RemoteLLM):
        return ApiChat(model)
    if isinstance(model, TextModel):
        return LocalChat(model)
    if not hasattr(model, "ask") or not hasattr(model, "count"):
        raise InvalidInputError(f"{model!r} is no model.", hint="Give an LLM or the name of one.", param="model")
    found: ChatModel = model
    return found
