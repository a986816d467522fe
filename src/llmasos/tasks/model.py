"""What a task needs of a model, and models that have it: one in this process, one behind an API.

The server has a third (`llmasos.serve.native.tasks`). Everything is asynchronous inside; `run_sync` is the way in from
ordinary code.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from llmasos.client.providers import PROVIDERS
from llmasos.errors import InvalidInputError, LLMasOSError, NotFoundError, ProviderError, UnsupportedError

if TYPE_CHECKING:
    from llmasos.inference.remote import RemoteLLM
    from llmasos.inference.textmodel import TextModel

T = TypeVar("T")
Messages = Sequence[Mapping[str, str]]

API_CONTEXT = 8192
"""Tokens that a model behind an API is taken to hold: it does not tell, and hardly any holds less."""
COUNTED, WORTH_ASKING = 1024, 16
"""Texts whose tokens are remembered, and from how many estimated ones a server is asked for the number."""
_FORM = "answer"


@dataclass(frozen=True)
class Reply:
    """`is_cut`: the limit of tokens ended it."""

    text: str
    is_cut: bool = False


class Model(Protocol):
    """The models of tasks. Token counts are exact, or too high where nobody can know."""

    name: str
    enforces: bool
    """Its answers can be nothing but what a schema lets, whatever the schema."""

    @property
    def context_length(self) -> int: ...

    def count(self, messages: Messages) -> int:
        """Tokens of a conversation, with those around it that ask for an answer. May take a while, as `count_text`."""

    def count_text(self, text: str) -> int: ...

    async def ask(self, messages: Messages, schema: Mapping[str, Any] | None, *, max_tokens: int) -> Reply:
        """An answer that follows the JSON Schema, where there is one, up to where it is cut. Raises
        ContextOverflowError."""

    async def likelihood(self, messages: Messages, reply: str) -> float | None:
        """How likely the model would answer so (natural logarithm); None from a model that does not tell."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Those of a classification head; empty for a model that has none."""

    async def classify(self, text: str) -> dict[str, float]:
        """Probability by label; only where there are `labels`."""

    async def embed(self, texts: Sequence[str]) -> list[list[float]]: ...

    async def score_pairs(self, query: str, texts: Sequence[str]) -> list[float] | None:
        """How well each text answers the query, by a cross-encoder; None from another model."""


class LocalModel:
    """An `LLM` as the model of tasks."""

    enforces = True

    def __init__(self, llm: TextModel) -> None:
        self.llm, self.name = llm, llm.name

    @property
    def context_length(self) -> int:
        return self.llm.context_length

    def count(self, messages: Messages) -> int:
        text = self.llm.chat_prompt([dict(one) for one in messages])
        return len(self.llm.tokenizer.encode(text, add_special_tokens=False))

    def count_text(self, text: str) -> int:
        return len(self.llm.tokenizer.encode(text, add_special_tokens=False))

    async def ask(self, messages: Messages, schema: Mapping[str, Any] | None, *, max_tokens: int) -> Reply:
        from llmasos.inference import StructuredOutput

        form = None if schema is None else StructuredOutput(json=dict(schema))
        params = self.llm.params(max_tokens=max_tokens, temperature=0.0, structured=form)
        output = (await self.llm.acomplete_chat([dict(one) for one in messages], params)).outputs[0]
        return Reply(output.text, output.finish_reason == "length")

    async def likelihood(self, messages: Messages, reply: str) -> float | None:
        prompt = self.llm.chat_prompt([dict(one) for one in messages])
        tokenizer = self.llm.tokenizer
        asked = tokenizer.encode(prompt, add_special_tokens=False)
        ids = [*asked, *tokenizer.encode(reply, add_special_tokens=False)]
        params = self.llm.params(max_tokens=0, temperature=0.0, prompt_logprobs=0)
        [output] = await self.llm.acomplete([ids], params)
        return sum(one.logprob for one in (output.prompt_logprobs or ())[len(asked) :] if one is not None)

    @property
    def labels(self) -> tuple[str, ...]:
        config = self.llm.prompts.model.config
        return config.labels or tuple(f"LABEL_{i}" for i in range(config.num_labels))

    async def classify(self, text: str) -> dict[str, float]:
        found = await asyncio.to_thread(self.llm.classify, text)
        assert isinstance(found, dict)
        return found

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        found: list[list[float]] = await self.llm.aembed(list(texts))
        return found

    async def score_pairs(self, query: str, texts: Sequence[str]) -> list[float] | None:
        if self.llm.prompts.model.config.num_labels != 1:
            return None
        return await self.llm.ascore_pairs(query, texts)


def _estimate(text: str) -> int:
    return (len(text.encode("utf-8", "replace")) + 1) // 2


class ApiModel:
    """A `RemoteLLM` as the model of tasks. Its tokens are counted by its server where that does it, else estimated from
    above; the form of answers is asked for as a
    `json_schema`, or as the call of a function where the API is Anthropic's. Servers for open models, ours too, tell
    the length of its context, and likelihoods. Blocking when it is made."""

    enforces = False

    def __init__(self, llm: RemoteLLM) -> None:
        self.llm, self.name = llm, llm.name
        self._is_open = self._counts = llm.endpoint.provider.name not in PROVIDERS
        self._counted = lru_cache(COUNTED)(llm.count_tokens)
        self.context_length = API_CONTEXT
        with suppress(LLMasOSError):
            self.context_length = llm.context_length
        self.labels: tuple[str, ...] = ()

    def count(self, messages: Messages) -> int:
        estimated = sum(_estimate(one["content"]) + 16 for one in messages)
        return self._count(estimated, lambda: self.llm.count_tokens([dict(one) for one in messages]))

    def count_text(self, text: str) -> int:
        estimated = _estimate(text)
        if estimated < WORTH_ASKING:
            return estimated
        return self._count(estimated, lambda: self._counted(text, add_special_tokens=False))

    def _count(self, estimated: int, ask: Callable[[], int]) -> int:
        """A server that does not tell it is not asked again: the estimate is safe, only too high."""
        if self._counts:
            try:
                return ask()
            except LLMasOSError:
                self._counts = False
        return estimated

    async def ask(self, messages: Messages, schema: Mapping[str, Any] | None, *, max_tokens: int) -> Reply:
        by_call = schema is not None and self.llm.endpoint.provider.protocol == "anthropic"
        more: dict[str, Any] = {}
        if by_call:
            function = {"name": _FORM, "description": "Gives the answer.", "parameters": dict(schema or {})}
            more["tools"] = [{"type": "function", "function": function}]
            more["tool_choice"] = {"type": "function", "function": {"name": _FORM}}
        elif schema is not None:
            form = {"name": _FORM, "schema": dict(schema)}
            more["response_format"] = {"type": "json_schema", "json_schema": form}
        given = [dict(one) for one in messages]
        async with self.llm.async_client() as client:
            answer = await client.chat(given, model=self.llm.model, max_tokens=max_tokens, temperature=0.0, **more)
        if not answer.choices:
            raise ProviderError(f"{self.name} sent an answer without choices.")
        choice = answer.choices[0]
        calls = choice.message.tool_calls
        text = calls[0].function.arguments if by_call and calls else choice.message.content
        return Reply(text or "", choice.finish_reason == "length")

    async def likelihood(self, messages: Messages, reply: str) -> float | None:
        if not self._is_open:
            return None
        name = self.llm.model
        try:
            async with self.llm.async_client() as client:
                asked = (await client.tokenize([dict(one) for one in messages], model=name)).tokens
                said = (await client.tokenize(reply, model=name, add_special_tokens=False)).tokens
                found = await client.complete([*asked, *said], model=name, max_tokens=0, echo=True, logprobs=0)
        except (NotFoundError, InvalidInputError, UnsupportedError):  # it knows no such request
            self._is_open = False
            return None
        told = found.choices[0].logprobs if found.choices else None
        values = told.token_logprobs[len(asked) :] if told is not None else []
        return sum(one for one in values if one is not None) if values else None

    async def classify(self, text: str) -> dict[str, float]:
        raise UnsupportedError(f"{self.name} has no classification head.", param="model")

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return await self.llm.aembed(list(texts))

    async def score_pairs(self, query: str, texts: Sequence[str]) -> list[float] | None:
        return None


def model_of(model: Any) -> Model:
    """The model of a task: an `LLM`, a `RemoteLLM`, a name of either, or something that is a `Model` already. Loads the
    model that is named; the last one stays in memory."""
    if isinstance(model, str):
        model = loaded_model(model)
    from llmasos.inference.remote import RemoteLLM
    from llmasos.inference.textmodel import TextModel

    if isinstance(model, RemoteLLM):
        return ApiModel(model)
    if isinstance(model, TextModel):
        return LocalModel(model)
    found: Model = model
    return found


def loaded_model(name: str) -> Any:
    """The LLM or RemoteLLM of this name; the last one stays in memory."""
    from llmasos.settings import settings

    return _named(name, str(settings().home))


@lru_cache(maxsize=1)
def _named(name: str, home: str) -> Any:
    """`home` belongs to the question: another one may have another model of this name."""
    from llmasos.model_zoo import get_model

    return get_model(name)


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, also where an event loop is running in this thread (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    found: list[T] = []
    failed: list[BaseException] = []

    def runs() -> None:
        try:
            found.append(asyncio.run(work))
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=runs)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def as_json(value: Any) -> str:
    """On one line, as constrained answers are written."""
    return json.dumps(value, ensure_ascii=False)
