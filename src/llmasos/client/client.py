"""The Python SDK: one blocking and one asyncio client for LLMasOS and any OpenAI-compatible server.

Answers are the models of `llmasos.client.types`. Errors are `ProviderError` and its kinds (the server said no),
`NetworkError` (no answer), `OfflineError` (not asked), `ToolLoopError`; all are `LLMasOSError`s. Loads no torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from llmasos.client.http import AsyncHttp, Http, Target
from llmasos.client.join import ChatJoiner
from llmasos.client.providers.anthropic import AnthropicWire
from llmasos.client.providers.openai import OpenAIWire, completion_reader, parsed
from llmasos.client.providers.table import Endpoint, own_server
from llmasos.client.sse import Event
from llmasos.client.types import (
    ChatCompletion,
    ChatCompletionChunk,
    EmbeddingList,
    Model,
    ModelList,
    Reranking,
    ScoreList,
    TextCompletion,
    Tokens,
    TokensText,
)
from llmasos.errors import UnsupportedError

if TYPE_CHECKING:
    from llmasos.client.access import AccessControl, AsyncAccessControl
    from llmasos.client.agents import Agents, AsyncAgents
    from llmasos.client.files import AsyncBatches, AsyncFiles, Batches, Files
    from llmasos.client.finetuning import AsyncFineTuning, FineTuning
    from llmasos.client.jobs import AsyncJobs, Jobs
    from llmasos.client.knowledge import AsyncKnowledge, Knowledge
    from llmasos.client.native import AsyncNative, Native
    from llmasos.client.packages import AsyncPackages, Packages
    from llmasos.client.responses import AsyncConversations, AsyncResponses, Conversations, Responses
    from llmasos.client.tasks import AsyncTasks, Tasks
    from llmasos.client.tools import Tool, ToolRun

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
Messages = str | Sequence[Mapping[str, Any]]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
OnChunk = Callable[[ChatCompletionChunk], object]
T = TypeVar("T", bound=BaseModel)


class StreamReader(Protocol):
    done: bool

    def read(self, event: Event) -> list[ChatCompletionChunk]: ...


class Wire(Protocol):
    """One protocol's translation to and from chat completions. It does no I/O."""

    completions_path: str
    embeddings_path: str
    models_path: str

    def headers(self, key: str) -> dict[str, str]: ...
    def fields(self, body: Mapping[str, Any]) -> dict[str, Any]: ...
    def chat_call(self, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]: ...
    def chat_reply(self, data: Any) -> ChatCompletion: ...
    def stream_reader(self, body: Mapping[str, Any]) -> StreamReader: ...


class _Calls:
    """What both clients share: everything but the I/O."""

    def __init__(self, base_url: str | Endpoint, api_key: str | None, timeout: float, max_retries: int) -> None:
        endpoint = base_url if isinstance(base_url, Endpoint) else own_server(base_url, api_key=api_key)
        self.provider = endpoint.provider
        self._wire: Wire = (AnthropicWire if self.provider.protocol == "anthropic" else OpenAIWire)(self.provider)
        self._target = Target(
            base_url=self.provider.base_url,
            label=self.provider.name,
            headers=self._wire.headers(endpoint.key),
            key_variable=self.provider.key_variable,
            timeout=timeout,
            max_retries=max_retries,
        )

    def _chat(self, messages: Messages, model: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return self._wire.chat_call({"model": model, "messages": _turns(messages), **_given(fields)})

    def _completion(self, prompt: Any, model: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        body = self._wire.fields({"model": model, "prompt": prompt, **_given(fields)})
        return self._path("completions"), body

    def _embedding(self, texts: Any, model: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return self._path("embeddings"), {"model": model, "input": texts, **_given(fields)}

    def _tokenize(self, input: str | Sequence[Mapping[str, Any]], model: str, fields: Mapping[str, Any]) -> Any:
        given = {"prompt": input} if isinstance(input, str) else {"messages": [dict(m) for m in input]}
        return "/tokenize", {"model": model, **given, **_given(fields)}

    @cached_property
    def _root(self) -> Target:
        """What stands beside `/v1` on servers for open models."""
        return replace(self._target, base_url=self._target.base_url.rstrip("/").removesuffix("/v1"))

    def _path(self, door: str) -> str:
        path: str = getattr(self._wire, f"{door}_path")
        if not path:
            raise UnsupportedError(f"{self.provider.name}'s API has no {door}.")
        return path

    def _parsed(self, model: type[T], data: Any) -> T:
        return parsed(model, data, self.provider.name)


def _turns(messages: Messages) -> list[dict[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if v is not None}


class Client(_Calls):
    """Blocking client. `base_url` usually ends in `/v1`, or is an `Endpoint` of `llmasos.client.providers.parse`. The
    key defaults to LLMASOS_API_KEY; times are seconds.

    Keyword arguments of `chat`, `complete` and `embed` are the fields of the request bodies in `llmasos.client.types`.
    Answers 408, 409, 429 and 5xx are asked again up to `max_retries` times, after the pause that the server names or
    an exponential one. Works as a context manager and from several threads.
    """

    def __init__(
        self,
        base_url: str | Endpoint = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries)
        self._http = Http(self._target, transport)

    def models(self) -> list[Model]:
        return self._parsed(ModelList, self._http.json("GET", self._wire.models_path)).data

    def model(self, name: str) -> Model:
        return self._parsed(Model, self._http.json("GET", f"{self._wire.models_path}/{quote(name, safe='')}"))

    def chat(self, messages: Messages, *, model: str, **fields: Any) -> ChatCompletion:
        return self._wire.chat_reply(self._http.json("POST", *self._chat(messages, model, fields)))

    def stream_chat(
        self, messages: Messages, *, model: str, **fields: Any
    ) -> Generator[ChatCompletionChunk, None, None]:
        """Closing the iterator ends the request. Raises NetworkError if the stream breaks off."""
        call = self._chat(messages, model, {**fields, "stream": True})
        yield from self._http.stream(self._wire.stream_reader(call[1]), "POST", *call)

    def complete(self, prompt: Prompts, *, model: str, **fields: Any) -> TextCompletion:
        return self._parsed(TextCompletion, self._http.json("POST", *self._completion(prompt, model, fields)))

    def stream_complete(self, prompt: Prompts, *, model: str, **fields: Any) -> Generator[TextCompletion, None, None]:
        call = self._completion(prompt, model, {**fields, "stream": True})
        yield from self._http.stream(completion_reader(call[1], self.provider.name), "POST", *call)

    def embed(self, texts: str | Sequence[str], *, model: str, **fields: Any) -> EmbeddingList:
        return self._parsed(EmbeddingList, self._http.json("POST", *self._embedding(texts, model, fields)))

    def rerank(self, query: str, documents: Sequence[str], *, model: str, **fields: Any) -> Reranking:
        """The documents in the order of how well they answer the query."""
        body = {"model": model, "query": query, "documents": list(documents), **_given(fields)}
        return self._parsed(Reranking, self._http.json("POST", "/rerank", body))

    def score(
        self, text_1: str | Sequence[str], text_2: str | Sequence[str], *, model: str, **fields: Any
    ) -> ScoreList:
        """How well pairs of texts fit: one text with several, or two lists of the same length."""
        body = {"model": model, "text_1": text_1, "text_2": text_2, **_given(fields)}
        return self._parsed(ScoreList, self._http.json("POST", "/score", body))

    def tokenize(self, input: str | Sequence[Mapping[str, Any]], *, model: str, **fields: Any) -> Tokens:
        """Token ids of a text, or of messages as the model's template writes them."""
        call = self._tokenize(input, model, fields)
        return self._parsed(Tokens, self._http.at(self._root).json("POST", *call))

    def detokenize(self, tokens: Sequence[int], *, model: str) -> str:
        body = {"model": model, "tokens": list(tokens)}
        return self._parsed(TokensText, self._http.at(self._root).json("POST", "/detokenize", body)).prompt

    def count_tokens(self, input: str | Sequence[Mapping[str, Any]], *, model: str, **fields: Any) -> int:
        """How many tokens `tokenize` would give."""
        return self.tokenize(input, model=model, **fields).count

    def run_tools(
        self,
        messages: Messages,
        *,
        model: str,
        tools: Sequence[Tool | Callable[..., Any]],
        max_steps: int = 10,
        on_chunk: OnChunk | None = None,
        **fields: Any,
    ) -> ToolRun:
        """Let the model call `tools`, typed functions or `Tool`s, until it answers. Calls of one answer run at once, in
        threads. With `on_chunk` answers are streamed to it. Unknown tools and wrong arguments are told to the model.

        Raises ToolLimitError after `max_steps` answers and ToolError when a tool raises.
        """
        from llmasos.client.tools import ToolLoop

        loop = ToolLoop(_turns(messages), tools, max_steps)
        while True:
            completion = self._answer(loop.messages, model, {**fields, "tools": loop.definitions}, on_chunk)
            if not (calls := loop.calls(completion)):
                return loop.done(completion)
            loop.run(calls)

    def _answer(
        self, messages: Messages, model: str, fields: Mapping[str, Any], on_chunk: OnChunk | None
    ) -> ChatCompletion:
        if on_chunk is None:
            return self.chat(messages, model=model, **fields)
        joiner = ChatJoiner()
        for chunk in self.stream_chat(messages, model=model, **fields):
            joiner.add(chunk)
            on_chunk(chunk)
        return joiner.whole()

    @cached_property
    def responses(self) -> Responses:
        """Answers that the server keeps."""
        from llmasos.client.responses import Responses

        return Responses(self._http)

    @cached_property
    def conversations(self) -> Conversations:
        """What responses can go on from and add to."""
        from llmasos.client.responses import Conversations

        return Conversations(self._http)

    @cached_property
    def files(self) -> Files:
        """Files on the server, for batches and fine-tuning."""
        from llmasos.client.files import Files

        return Files(self._http)

    @cached_property
    def batches(self) -> Batches:
        """Many requests in one file, answered when there is room."""
        from llmasos.client.files import Batches

        return Batches(self._http)

    @cached_property
    def fine_tuning(self) -> FineTuning:
        """Models trained on uploaded files."""
        from llmasos.client.finetuning import FineTuning

        return FineTuning(self._http)

    @cached_property
    def access(self) -> AccessControl:
        """LLMasOS's keys, usage and audit log."""
        from llmasos.client.access import AccessControl
        from llmasos.client.native import native_target

        return AccessControl(self._http.at(native_target(self._target)))

    @cached_property
    def agents(self) -> Agents:
        """Models of the server that call tools until they have an answer."""
        from llmasos.client.agents import Agents
        from llmasos.client.native import native_target

        return Agents(self._http.at(native_target(self._target)))

    @cached_property
    def native(self) -> Native:
        """LLMasOS's own API: what the server does with its models."""
        from llmasos.client.native import Native, native_target

        return Native(self._http.at(native_target(self._target)))

    @cached_property
    def jobs(self) -> Jobs:
        """Work of the server that goes on without its request."""
        from llmasos.client.jobs import Jobs
        from llmasos.client.native import native_target

        return Jobs(self._http.at(native_target(self._target)))

    @cached_property
    def knowledge(self) -> Knowledge:
        """Documents in, passages and answers out."""
        from llmasos.client.knowledge import Knowledge
        from llmasos.client.native import native_target

        return Knowledge(self._http.at(native_target(self._target)))

    @cached_property
    def packages(self) -> Packages:
        """The server's index of packages."""
        from llmasos.client.native import native_target
        from llmasos.client.packages import Packages

        return Packages(self._http.at(native_target(self._target)))

    @cached_property
    def tasks(self) -> Tasks:
        """Summarise, translate, classify ..., also over many inputs."""
        from llmasos.client.native import native_target
        from llmasos.client.tasks import Tasks

        return Tasks(self._http.at(native_target(self._target)))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncClient(_Calls):
    """The same for asyncio; belongs to one event loop. Cancelling a call ends the request."""

    def __init__(
        self,
        base_url: str | Endpoint = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries)
        self._http = AsyncHttp(self._target, transport)

    async def models(self) -> list[Model]:
        return self._parsed(ModelList, await self._http.json("GET", self._wire.models_path)).data

    async def model(self, name: str) -> Model:
        return self._parsed(Model, await self._http.json("GET", f"{self._wire.models_path}/{quote(name, safe='')}"))

    async def chat(self, messages: Messages, *, model: str, **fields: Any) -> ChatCompletion:
        return self._wire.chat_reply(await self._http.json("POST", *self._chat(messages, model, fields)))

    async def stream_chat(
        self, messages: Messages, *, model: str, **fields: Any
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        call = self._chat(messages, model, {**fields, "stream": True})
        async with aclosing(self._http.stream(self._wire.stream_reader(call[1]), "POST", *call)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def complete(self, prompt: Prompts, *, model: str, **fields: Any) -> TextCompletion:
        return self._parsed(TextCompletion, await self._http.json("POST", *self._completion(prompt, model, fields)))

    async def stream_complete(
        self, prompt: Prompts, *, model: str, **fields: Any
    ) -> AsyncGenerator[TextCompletion, None]:
        call = self._completion(prompt, model, {**fields, "stream": True})
        async with aclosing(self._http.stream(completion_reader(call[1], self.provider.name), "POST", *call)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def embed(self, texts: str | Sequence[str], *, model: str, **fields: Any) -> EmbeddingList:
        return self._parsed(EmbeddingList, await self._http.json("POST", *self._embedding(texts, model, fields)))

    async def rerank(self, query: str, documents: Sequence[str], *, model: str, **fields: Any) -> Reranking:
        body = {"model": model, "query": query, "documents": list(documents), **_given(fields)}
        return self._parsed(Reranking, await self._http.json("POST", "/rerank", body))

    async def score(
        self, text_1: str | Sequence[str], text_2: str | Sequence[str], *, model: str, **fields: Any
    ) -> ScoreList:
        body = {"model": model, "text_1": text_1, "text_2": text_2, **_given(fields)}
        return self._parsed(ScoreList, await self._http.json("POST", "/score", body))

    async def tokenize(self, input: str | Sequence[Mapping[str, Any]], *, model: str, **fields: Any) -> Tokens:
        call = self._tokenize(input, model, fields)
        return self._parsed(Tokens, await self._http.at(self._root).json("POST", *call))

    async def detokenize(self, tokens: Sequence[int], *, model: str) -> str:
        body = {"model": model, "tokens": list(tokens)}
        return self._parsed(TokensText, await self._http.at(self._root).json("POST", "/detokenize", body)).prompt

    async def count_tokens(self, input: str | Sequence[Mapping[str, Any]], *, model: str, **fields: Any) -> int:
        return (await self.tokenize(input, model=model, **fields)).count

    async def run_tools(
        self,
        messages: Messages,
        *,
        model: str,
        tools: Sequence[Tool | Callable[..., Any]],
        max_steps: int = 10,
        on_chunk: OnChunk | None = None,
        **fields: Any,
    ) -> ToolRun:
        """Coroutine functions run in this event loop, plain ones in threads."""
        from llmasos.client.tools import ToolLoop

        loop = ToolLoop(_turns(messages), tools, max_steps)
        while True:
            completion = await self._answer(loop.messages, model, {**fields, "tools": loop.definitions}, on_chunk)
            if not (calls := loop.calls(completion)):
                return loop.done(completion)
            await loop.arun(calls)

    async def _answer(
        self, messages: Messages, model: str, fields: Mapping[str, Any], on_chunk: OnChunk | None
    ) -> ChatCompletion:
        if on_chunk is None:
            return await self.chat(messages, model=model, **fields)
        joiner = ChatJoiner()
        async with aclosing(self.stream_chat(messages, model=model, **fields)) as chunks:
            async for chunk in chunks:
                joiner.add(chunk)
                on_chunk(chunk)
        return joiner.whole()

    @cached_property
    def responses(self) -> AsyncResponses:
        from llmasos.client.responses import AsyncResponses

        return AsyncResponses(self._http)

    @cached_property
    def conversations(self) -> AsyncConversations:
        from llmasos.client.responses import AsyncConversations

        return AsyncConversations(self._http)

    @cached_property
    def files(self) -> AsyncFiles:
        from llmasos.client.files import AsyncFiles

        return AsyncFiles(self._http)

    @cached_property
    def batches(self) -> AsyncBatches:
        from llmasos.client.files import AsyncBatches

        return AsyncBatches(self._http)

    @cached_property
    def fine_tuning(self) -> AsyncFineTuning:
        from llmasos.client.finetuning import AsyncFineTuning

        return AsyncFineTuning(self._http)

    @cached_property
    def access(self) -> AsyncAccessControl:
        from llmasos.client.access import AsyncAccessControl
        from llmasos.client.native import native_target

        return AsyncAccessControl(self._http.at(native_target(self._target)))

    @cached_property
    def agents(self) -> AsyncAgents:
        from llmasos.client.agents import AsyncAgents
        from llmasos.client.native import native_target

        return AsyncAgents(self._http.at(native_target(self._target)))

    @cached_property
    def native(self) -> AsyncNative:
        from llmasos.client.native import AsyncNative, native_target

        return AsyncNative(self._http.at(native_target(self._target)))

    @cached_property
    def jobs(self) -> AsyncJobs:
        """Work of the server that goes on without its request."""
        from llmasos.client.jobs import AsyncJobs
        from llmasos.client.native import native_target

        return AsyncJobs(self._http.at(native_target(self._target)))

    @cached_property
    def knowledge(self) -> AsyncKnowledge:
        """Documents in, passages and answers out."""
        from llmasos.client.knowledge import AsyncKnowledge
        from llmasos.client.native import native_target

        return AsyncKnowledge(self._http.at(native_target(self._target)))

    @cached_property
    def packages(self) -> AsyncPackages:
        """The server's index of packages."""
        from llmasos.client.native import native_target
        from llmasos.client.packages import AsyncPackages

        return AsyncPackages(self._http.at(native_target(self._target)))

    @cached_property
    def tasks(self) -> AsyncTasks:
        """Summarise, translate, classify ..., also over many inputs."""
        from llmasos.client.native import native_target
        from llmasos.client.tasks import AsyncTasks

        return AsyncTasks(self._http.at(native_target(self._target)))

    async def close(self) -> None:
        await self._http.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
