"""`RemoteLLM`: a model behind an API with the methods of `LLM`. Loads no torch.

What the API can't do is an UnsupportedError that names it; no parameter is dropped. Differences from a local model:
there are no token ids (`token_ids` is empty, `TokenLogprob.token_id` is -1), `max_tokens=None` leaves the limit to
the API, and where the API has only chat, a bare prompt is sent as one user message. Tool calls come back in
`RemoteCompletion.tool_calls`; in text they stand after the content as `<tool_call>{"name": ..., "arguments": ...}
</tool_call>`, the form in which most open models write them.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, overload

from llmasos.client import leaving
from llmasos.client.client import AsyncClient, Client
from llmasos.client.providers import PROVIDERS, Endpoint, is_remote, parse, shown
from llmasos.client.types import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    CompletionLogprobs,
    Embedding,
    EmbeddingList,
    TextCompletion,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from llmasos.errors import InvalidInputError, ProviderError, UnsupportedError
from llmasos.inference.config import EngineConfig
from llmasos.inference.request import (
    Chunk,
    Completion,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)

if TYPE_CHECKING:
    import httpx

__all__ = ["RemoteCompletion", "RemoteLLM", "is_remote"]

MAX_PARALLEL = 8
"""Requests at a time, where several prompts need one each."""

Message = Mapping[str, Any]
Prompts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
_FINISH: dict[str | None, FinishReason] = {"length": "length", "content_filter": "abort"}


@dataclass(frozen=True)
class RemoteCompletion(Completion):
    """A completion that may hold tool calls, as the API parsed them."""

    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""


class RemoteLLM:
    """A model behind an OpenAI-compatible or Anthropic API.

    `name` is `provider:model`, e.g. `openai:gpt-4.1`, or `http(s)://host/v1#model`; see `llmasos.client.providers`.
    The key comes from `<PROVIDER>_API_KEY` unless it is given. Times are seconds. Errors: ProviderError (the API said
    no), NetworkError, OfflineError, UnsupportedError.
    """

    is_encoder = False
    has_chat_template = True

    def __init__(
        self,
        name: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
        async_transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.name = shown(name)
        self.endpoint: Endpoint = parse(name, api_key=api_key)
        self.model = self.endpoint.model
        self._options: dict[str, Any] = {"timeout": timeout, "max_retries": max_retries}
        self._async_transport, self._has_transport = async_transport, transport is not None
        self._client = Client(self.endpoint, transport=transport, **self._options)

    @classmethod
    def from_pretrained(
        cls, name: str, *, device: str = "auto", dtype: str = "auto", quantization: str = "auto", **options: Any
    ) -> RemoteLLM:
        """`RemoteLLM(name, **options)`. Where and how the model is computed is the API's choice: UnsupportedError for
        any other `device`, `dtype` or `quantization` than "auto", and for engine options."""
        for param, value in {"device": device, "dtype": dtype, "quantization": quantization}.items():
            if value != "auto":
                raise UnsupportedError(
                    f"{name} is behind an API, which chooses its {param} itself; {param}={value!r} can't be granted.",
                    hint=f"Leave {param} out, or use a local model.",
                    param=param,
                )
        for option in fields(EngineConfig):
            if option.name in options:
                raise UnsupportedError(
                    f"{name} is behind an API, which runs its engine itself; {option.name} can't be granted.",
                    hint=f"Leave {option.name} out, or use a local model.",
                    param=option.name,
                )
        return cls(name, **options)

    # -- simple doors: text in, new text out

    @overload
    def generate(self, prompt: str, *, echo: bool = False, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], *, echo: bool = False, **options: Any) -> list[str]: ...
    def generate(self, prompt: str | list[str], *, echo: bool = False, **options: Any) -> str | list[str]:
        """New text for each prompt; `echo` puts the prompt before it. `options` are SamplingParams fields."""
        outputs = self._complete(_prompts(prompt), self._given(options))
        return _texts(prompt, outputs, echo)

    generate_text = generate

    def chat(self, messages: str | Sequence[Message], *, tools: Any = None, **options: Any) -> str:
        return self._chat(messages, self._given(options), tools).text

    def stream(self, prompt: str | Sequence[Message], **options: Any) -> Generator[Chunk, None, None]:
        """A text is continued, a conversation answered."""
        return leaving.heeding(self._stream(prompt, self._given(options)))

    @overload
    def embed(
        self, texts: str, *, pooling: str | None = None, normalize: bool | None = None, truncate: bool = False
    ) -> list[float]: ...
    @overload
    def embed(
        self, texts: list[str], *, pooling: str | None = None, normalize: bool | None = None, truncate: bool = False
    ) -> list[list[float]]: ...
    def embed(
        self,
        texts: str | list[str],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
    ) -> list[float] | list[list[float]]:
        """One vector per text, of length 1 unless `normalize` is False."""
        self._check_embeds(pooling, truncate)
        if self._may_leave():
            answer = leaving.run(lambda: self._aembed(_prompts(texts)))
        else:
            answer = self._client.embed(_prompts(texts), model=self.model, encoding_format="float")
        return _vectors(texts, answer.data, normalize is not False)

    # -- full results

    def complete(self, prompts: Prompts, params: SamplingParams | None = None) -> list[RequestOutput]:
        return self._complete(_prompts(prompts), self._fields(params))

    def complete_chat(
        self, messages: str | Sequence[Message], params: SamplingParams | None = None, *, tools: Any = None
    ) -> RequestOutput:
        return self._chat(messages, self._fields(params), tools)

    def stream_complete(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Generator[Chunk, None, None]:
        return leaving.heeding(self._stream(prompt if isinstance(prompt, str) else list(prompt), self._fields(params)))

    # -- the same for asyncio: cancelling ends the request

    @overload
    async def agenerate(self, prompt: str, *, echo: bool = False, **options: Any) -> str: ...
    @overload
    async def agenerate(self, prompt: list[str], *, echo: bool = False, **options: Any) -> list[str]: ...
    async def agenerate(self, prompt: str | list[str], *, echo: bool = False, **options: Any) -> str | list[str]:
        outputs = await self._acomplete(_prompts(prompt), self._given(options))
        return _texts(prompt, outputs, echo)

    agenerate_text = agenerate

    async def achat(self, messages: str | Sequence[Message], *, tools: Any = None, **options: Any) -> str:
        return (await self._achat(messages, self._given(options), tools)).text

    def astream(self, prompt: str | Sequence[Message], **options: Any) -> AsyncGenerator[Chunk, None]:
        return self._astream(prompt, self._given(options))

    @overload
    async def aembed(
        self, texts: str, *, pooling: str | None = None, normalize: bool | None = None, truncate: bool = False
    ) -> list[float]: ...
    @overload
    async def aembed(
        self, texts: list[str], *, pooling: str | None = None, normalize: bool | None = None, truncate: bool = False
    ) -> list[list[float]]: ...
    async def aembed(
        self,
        texts: str | list[str],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
    ) -> list[float] | list[list[float]]:
        self._check_embeds(pooling, truncate)
        answer = await self._aembed(_prompts(texts))
        return _vectors(texts, answer.data, normalize is not False)

    async def _aembed(self, texts: list[Any]) -> EmbeddingList:
        async with self.async_client() as client:
            return await client.embed(texts, model=self.model, encoding_format="float")

    async def acomplete(self, prompts: Prompts, params: SamplingParams | None = None) -> list[RequestOutput]:
        return await self._acomplete(_prompts(prompts), self._fields(params))

    async def acomplete_chat(
        self, messages: str | Sequence[Message], params: SamplingParams | None = None, *, tools: Any = None
    ) -> RequestOutput:
        return await self._achat(messages, self._fields(params), tools)

    def astream_complete(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> AsyncGenerator[Chunk, None]:
        return self._astream(prompt if isinstance(prompt, str) else list(prompt), self._fields(params))

    # -- what an API does not give

    def score(self, texts: Any, *, prompt: str = "") -> NoReturn:
        raise self._lacks("score", "log-likelihoods of a given text")

    async def ascore(self, texts: Any, *, prompt: str = "") -> NoReturn:
        self.score(texts, prompt=prompt)

    def score_pairs(self, query: str, texts: Any) -> NoReturn:
        raise self._lacks("score_pairs", "scores of pairs of texts")

    async def ascore_pairs(self, query: str, texts: Any) -> NoReturn:
        self.score_pairs(query, texts)

    def fill_mask(self, text: str, *, top_k: int = 5) -> NoReturn:
        raise self._lacks("fill_mask", "words for a mask")

    def classify(self, texts: Any) -> NoReturn:
        raise self._lacks("classify", "label probabilities")

    def load_adapter(self, name: str, path: Any = None) -> NoReturn:
        raise self._lacks("adapter", "a way to load adapters")

    def unload_adapter(self, name: str) -> NoReturn:
        raise self._lacks("adapter", "a way to unload adapters")

    def sleep(self) -> NoReturn:
        raise self._lacks("sleep", "a say over its memory")

    def wake_up(self) -> NoReturn:
        raise self._lacks("wake_up", "a say over its memory")

    def save_pretrained(self, folder: Any) -> NoReturn:
        raise self._lacks("save_pretrained", "its weights")

    def chat_prompt(self, messages: Any, tools: Any = None) -> NoReturn:
        raise self._lacks("chat_prompt", "the text its template makes of a conversation")

    @property
    def tokenizer(self) -> NoReturn:
        raise self._lacks("tokenizer", "its tokeniser")

    @cached_property
    def context_length(self) -> int:
        """Tokens of prompt and answer together; servers for open models tell it."""
        found = None
        if self.endpoint.provider.name not in PROVIDERS:
            told = self._client.model(self.model)
            found = told.context_length or told.max_model_len
        if found is None:
            raise self._lacks("context_length", "the length of its context")
        return found

    def count_tokens(self, text: str | Sequence[Message], **fields: Any) -> int:
        """Of a text, or of messages as the model's template writes them; servers for open models tell it. `fields`: as
        /tokenize has them, e.g. `tools`."""
        if self.endpoint.provider.name in PROVIDERS:
            raise self._lacks("count_tokens", "the number of a text's tokens")
        return self._client.count_tokens(text, model=self.model, **fields)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> RemoteLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteLLM({self.name!r})"

    # -- how it is done

    def _lacks(self, param: str, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name} is behind an API, which does not give {what}.", hint="Use a local model.", param=param
        )

    def _given(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Request fields of the options that were written down; the API's own defaults hold for the rest."""
        options = dict(options)
        if (max_length := options.pop("max_length", None)) is not None:
            raise UnsupportedError(
                f"{self.name} is behind an API, which does not count the prompt's tokens beforehand, "
                f"so max_length={max_length!r} can't be kept.",
                hint="Use max_tokens, which counts new tokens only.",
                param="max_length",
            )
        params = SamplingParams.of(**options)
        return self._wire_fields({name: getattr(params, name) for name in options})

    def _fields(self, params: SamplingParams | None = None) -> dict[str, Any]:
        """Request fields of everything that is not at its default, and of the temperature, whose default varies."""
        if params is None:
            return {}
        changed = {
            option.name: getattr(params, option.name)
            for option in fields(params)
            if getattr(params, option.name) != _default(option)
        }
        return self._wire_fields({"temperature": params.temperature} | changed)

    def _wire_fields(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        known = {f.name: _default(f) for f in fields(SamplingParams)}
        wanted = {k: v for k, v in chosen.items() if v is not None}
        for name, value in wanted.items():
            if name not in self.endpoint.provider.parameters and value != known[name]:
                raise UnsupportedError(
                    f"{self.endpoint.provider.name}'s API does not know {name!r} (asked for {name}={value!r}).",
                    hint=f"It knows: {', '.join(sorted(self.endpoint.provider.parameters))}.",
                    param=name,
                )
        sent = {k: v for k, v in wanted.items() if k in self.endpoint.provider.parameters and v not in ((), {})}
        if "logit_bias" in sent:
            sent["logit_bias"] = {str(k): v for k, v in sent["logit_bias"].items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in sent.items()}

    def _check_embeds(self, pooling: str | None, truncate: bool) -> None:
        if truncate:
            raise self._lacks("truncate", "a way to cut texts at its context")
        if pooling is not None:
            raise self._lacks("pooling", "a choice of pooling")
        if not self.endpoint.provider.embeddings:
            raise UnsupportedError(f"{self.endpoint.provider.name}'s API has no embeddings.", param="embed")

    def async_client(self) -> AsyncClient:
        """A fresh one per call: connections belong to an event loop, and a program may run several."""
        return AsyncClient(self.endpoint, transport=self._async_transport, **self._options)

    def _chat_call(self, messages: Any, request: Mapping[str, Any], tools: Any = None) -> dict[str, Any]:
        more = dict(request)
        if (logprobs := more.pop("logprobs", None)) is not None:
            more |= {"logprobs": True, "top_logprobs": logprobs}
        if tools:
            more["tools"] = list(tools)
        return {"messages": messages, "model": self.model, **more}

    def _prompt_call(self, prompt: Any, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"prompt": prompt, "model": self.model, **request}

    def _check_text(self, prompts: Iterable[Any]) -> None:
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise self._lacks("prompt", "a way to continue token ids")

    def _may_leave(self) -> bool:
        """Whether a call has to end when nobody waits for it any more: only the asynchronous one can."""
        return leaving.can_run() and (self._async_transport is not None or not self._has_transport)

    def _chat(self, messages: Any, request: Mapping[str, Any], tools: Any = None) -> RequestOutput:
        if self._may_leave():
            return leaving.run(lambda: self._achat(messages, request, tools))
        start = time.perf_counter()
        answer = self._client.chat(**self._chat_call(messages, request, tools))
        return _chat_output(messages, answer, time.perf_counter() - start)

    async def _achat(self, messages: Any, request: Mapping[str, Any], tools: Any = None) -> RequestOutput:
        start = time.perf_counter()
        async with self.async_client() as client:
            answer = await client.chat(**self._chat_call(messages, request, tools))
        return _chat_output(messages, answer, time.perf_counter() - start)

    def _complete(self, prompts: list[Any], request: Mapping[str, Any]) -> list[RequestOutput]:
        if self._may_leave():
            return leaving.run(lambda: self._acomplete(prompts, request))
        if self.endpoint.provider.completions:
            start = time.perf_counter()
            answer = self._client.complete(**self._prompt_call(prompts, request))
            return _text_outputs(prompts, request, answer, time.perf_counter() - start)
        self._check_text(prompts)
        with ThreadPoolExecutor(MAX_PARALLEL) as pool:
            return list(pool.map(lambda prompt: self._chat(prompt, request), prompts))

    async def _acomplete(self, prompts: list[Any], request: Mapping[str, Any]) -> list[RequestOutput]:
        if self.endpoint.provider.completions:
            start = time.perf_counter()
            async with self.async_client() as client:
                answer = await client.complete(**self._prompt_call(prompts, request))
            return _text_outputs(prompts, request, answer, time.perf_counter() - start)
        self._check_text(prompts)
        slots = asyncio.Semaphore(MAX_PARALLEL)

        async def one(prompt: str) -> RequestOutput:
            async with slots:
                return await self._achat(prompt, request)

        tasks = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _continues(self, prompt: Any) -> bool:
        """Is this raw text or token ids for an API that continues those, rather than a chat?"""
        is_ids = not isinstance(prompt, str) and all(isinstance(i, int) for i in prompt)
        if is_ids and not self.endpoint.provider.completions:
            self._check_text([prompt])
        return self.endpoint.provider.completions and (isinstance(prompt, str) or is_ids)

    def _stream(self, prompt: Any, request: Mapping[str, Any]) -> Generator[Chunk, None, None]:
        if self._continues(prompt):
            with closing(self._client.stream_complete(**self._prompt_call(prompt, request))) as texts:
                for text in texts:
                    yield from _text_chunks(text)
            return
        calls = _CallCollector()
        with closing(self._client.stream_chat(**self._chat_call(prompt, request))) as chunks:
            for chunk in chunks:
                yield from calls.chunks(chunk)

    async def _astream(self, prompt: Any, request: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        async with self.async_client() as client:
            if self._continues(prompt):
                async with aclosing(client.stream_complete(**self._prompt_call(prompt, request))) as texts:
                    async for text in texts:
                        for piece in _text_chunks(text):
                            yield piece
                return
            calls = _CallCollector()
            async with aclosing(client.stream_chat(**self._chat_call(prompt, request))) as chunks:
                async for chunk in chunks:
                    for piece in calls.chunks(chunk):
                        yield piece


class _CallCollector:
    """Turns streamed chat pieces into Chunks. Tool calls come in pieces, so their text follows when all are there."""

    def __init__(self) -> None:
        self._calls: dict[tuple[int, int], dict[str, str]] = {}

    def chunks(self, piece: ChatCompletionChunk) -> Iterable[Chunk]:
        for choice in piece.choices:
            for delta in choice.delta.tool_calls or ():
                self._add(choice.index, delta)
            text = choice.delta.content or ""
            if choice.finish_reason:
                ended = [call for (index, _), call in sorted(self._calls.items()) if index == choice.index]
                text += "".join(_call_text(call["name"], call["arguments"]) for call in ended)
            logprobs = _chat_logprobs(choice.logprobs) or ()
            if text or logprobs or choice.finish_reason:
                yield Chunk(choice.index, text, (), logprobs, _finish(choice.finish_reason), _stop_of(choice))

    def _add(self, index: int, delta: ToolCallDelta) -> None:
        call = self._calls.setdefault((index, delta.index), {"name": "", "arguments": ""})
        if delta.function:
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""


def _default(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def _prompts(prompts: Any) -> list[Any]:
    """One prompt or several, as a list. Raises InvalidInputError when there is none."""
    if isinstance(prompts, str):
        return [prompts]
    many = [prompt if isinstance(prompt, str | int) else list(prompt) for prompt in prompts]
    if not many:
        raise InvalidInputError("There is no prompt.", param="prompt")
    return [many] if isinstance(many[0], int) else many


def _texts(prompt: str | list[str], outputs: Sequence[RequestOutput], echo: bool) -> str | list[str]:
    texts = [(output.prompt if echo else "") + output.text for output in outputs]
    return texts[0] if isinstance(prompt, str) else texts


def _finish(reason: str | None) -> FinishReason | None:
    """An answer that the API's filter cut off counts as aborted; one that ends in tool calls ended by itself."""
    return _FINISH.get(reason, "stop") if reason else None


def _call_text(name: str, arguments: str) -> str:
    try:
        shown = json.loads(arguments)
    except ValueError:
        shown = arguments
    return f"<tool_call>{json.dumps({'name': name, 'arguments': shown}, ensure_ascii=False)}</tool_call>"


def _metrics(seconds: float, usage: Usage | None) -> RequestMetrics:
    """All tokens arrive at once, so the first took as long as the last."""
    if usage is None:
        return RequestMetrics(seconds, 0.0, 0)
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens if details else None) or 0
    return RequestMetrics(seconds, 0.0, usage.completion_tokens, num_cached_tokens=cached)


def _chat_output(messages: Any, answer: ChatCompletion, seconds: float) -> RequestOutput:
    """`prompt` is empty for a conversation: an API does not tell what its template makes of it."""
    outputs = []
    for choice in answer.choices:
        calls = tuple(choice.message.tool_calls or ())
        text = choice.message.content or ""
        text += "".join(_call_text(call.function.name, call.function.arguments) for call in calls)
        completion = RemoteCompletion(
            index=choice.index,
            text=text,
            token_ids=(),
            finish_reason=_finish(choice.finish_reason) or "stop",
            logprobs=_chat_logprobs(choice.logprobs),
            tool_calls=calls,
            reasoning=choice.message.reasoning_content or "",
        )
        outputs.append(completion)
    if not outputs:
        raise ProviderError(f"{answer.model} sent an answer without choices.")
    prompt = messages if isinstance(messages, str) else ""
    return RequestOutput(prompt, (), tuple(outputs), _metrics(seconds, answer.usage))


def _chat_logprobs(logprobs: ChatLogprobs | None) -> tuple[TokenLogprob, ...] | None:
    if logprobs is None or logprobs.content is None:
        return None
    return tuple(
        TokenLogprob(
            -1, position.token, position.logprob, tuple((-1, t.token, t.logprob) for t in position.top_logprobs)
        )
        for position in logprobs.content
    )


def _text_outputs(
    prompts: Sequence[Any], request: Mapping[str, Any], answer: TextCompletion, seconds: float
) -> list[RequestOutput]:
    n = request.get("n", 1)
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    if len(choices) != n * len(prompts):
        raise ProviderError(f"{answer.model} sent {len(choices)} completions; {n * len(prompts)} were asked for.")
    results = []
    for i, prompt in enumerate(prompts):
        outputs = tuple(
            Completion(
                j, choice.text, (), _finish(choice.finish_reason) or "stop", None, _text_logprobs(choice.logprobs)
            )
            for j, choice in enumerate(choices[i * n : (i + 1) * n])
        )
        is_text = isinstance(prompt, str)
        # The API counts the tokens of all prompts together.
        metrics = _metrics(seconds, answer.usage if len(prompts) == 1 else None)
        results.append(RequestOutput(prompt if is_text else "", () if is_text else tuple(prompt), outputs, metrics))
    return results


def _text_chunks(piece: TextCompletion) -> Iterable[Chunk]:
    for choice in piece.choices:
        logprobs = _text_logprobs(choice.logprobs) or ()
        if choice.text or logprobs or choice.finish_reason:
            yield Chunk(choice.index, choice.text, (), logprobs, _finish(choice.finish_reason), _stop_of(choice))


def _stop_of(choice: Any) -> str | int | None:
    """What ended it, where a server tells more than OpenAI's form."""
    found = getattr(choice, "stop_reason", None)
    return found if isinstance(found, str | int) else None


def _text_logprobs(logprobs: CompletionLogprobs | None) -> tuple[TokenLogprob, ...] | None:
    if logprobs is None:
        return None
    tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    return tuple(
        TokenLogprob(
            -1, token, value, tuple((-1, t, v) for t, v in sorted((top or {}).items(), key=lambda item: -item[1]))
        )
        for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=False)
        if value is not None
    )


def _vectors(texts: str | list[str], data: Sequence[Embedding], normalize: bool) -> list[float] | list[list[float]]:
    count = 1 if isinstance(texts, str) else len(texts)
    vectors = [one.embedding for one in sorted(data, key=lambda one: one.index)]
    found = [_unit(vector) if normalize else vector for vector in vectors if isinstance(vector, list)]
    if len(found) != count:
        raise ProviderError(f"The API sent {len(found)} usable embeddings for {count} texts.")
    return found[0] if isinstance(texts, str) else found


def _unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector] if length else vector
