"""TextModel: what text-in, text-out means for one model, wherever its engine runs; `LLM` and `HostedLLM` are two.

Text in, new text out: `generate`, `chat`, `stream`. Full results: `complete`, `complete_chat`, `stream_complete`.
Numbers: `embed`, `score`, `score_pairs`, `fill_mask`, `classify`. All but the last two have an asynchronous twin with
an `a` in front, whose cancellation stops the model at its next token. No torch here.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, overload

from llmasos.client import leaving
from llmasos.errors import UnsupportedError
from llmasos.inference.answer import Answer, Loop
from llmasos.inference.prompts import (
    Described,
    Encoded,
    Messages,
    Prompt,
    Prompts,
    as_prompts,
    as_texts,
    request_options,
    resolve_max_tokens,
)
from llmasos.inference.request import Chunk, Completion, RequestOutput, SamplingParams
from llmasos.inference.state import Request

if TYPE_CHECKING:
    from llmasos.inference.config import EngineConfig
    from llmasos.text import Tokenizer


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


class TextModel(ABC):
    """The text side of one model. Calls from any thread or event loop run at once and share the engine's passes."""

    takes_functions = True
    """Requests may bring functions (logits processors), which only this process can call."""

    def __init__(self, name: str, model: Described, config: EngineConfig, loop: Loop) -> None:
        self.name, self.engine_config = name, config
        self.prompts = Prompts(name, model, config.max_model_len)
        self._loop: Loop = loop

    # facts

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.prompts.context_length

    @property
    def is_encoder(self) -> bool:
        return self.prompts.model.config.is_encoder

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompts.tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The model's usual chat template, in Jinja; None for one that was not trained to chat."""
        tokenizer = self.prompts.model.tokenizer
        return None if tokenizer is None else tokenizer.chat_template

    @property
    def matryoshka(self) -> bool | tuple[int, ...]:
        """To which lengths embeddings may be cut: the model's config says `matryoshka_dimensions`, or that it
        `is_matryoshka` (vLLM's words), else to none (False). True: to any."""
        extra = self.prompts.model.config.extra
        return tuple(extra.get("matryoshka_dimensions") or ()) or extra.get("is_matryoshka") is True

    def __repr__(self) -> str:
        architecture = self.prompts.model.config.architecture
        return f"{type(self).__name__}({self.name!r}, {architecture}, context_length={self.context_length})"

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

        `options` are the fields of SamplingParams, and adapter, priority and cache_salt (see `complete`).
        `max_length` counts prompt + new tokens, `max_tokens` new ones.
        Without sampling options the model's own defaults (generation_config.json) hold, else greedy. Of `n` or
        `num_beams` results the first is returned; `complete` returns all.
        """
        request = request_options(options)
        jobs = [self.prompts.encode(p) for p in as_texts(prompt)]
        params = [self.params(len(ids), max_length=max_length, **options) for _, ids in jobs]
        outputs = self._complete(jobs, params, **request)
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
        request = request_options(options)
        job = self.prompts.encode_chat(messages, tools)
        params = self.params(len(job[1]), max_length=max_length, **options)
        return self._complete([job], [params], **request)[0].text

    def stream(self, prompt: str | Messages, **options: Any) -> Iterator[Chunk]:
        """The new text as it comes: a string is continued, a list of messages is answered. Close it to stop early."""
        max_length, request = options.pop("max_length", None), request_options(options)
        job = self.prompts.encode(prompt) if isinstance(prompt, str) else self.prompts.encode_chat(prompt)
        return self._stream(job, self.params(len(job[1]), max_length=max_length, **options), **request)

    def params(self, num_prompt: int = 0, *, max_length: int | None = None, **options: Any) -> SamplingParams:
        """SamplingParams from keyword options over this model's defaults."""
        return self.prompts.params(num_prompt, max_length=max_length, **options)

    # full results

    def complete(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
        **request: Any,
    ) -> list[RequestOutput]:
        """Complete prompts given as text or token ids. One SamplingParams for all, or one each.

        `cancelled` is asked every few milliseconds; once true, what there is comes back with finish_reason "abort".
        `request`: `adapter`, the name of a loaded LoRA adapter; `priority`, smaller is sooner; `cache_salt`, requests
        with different salts share no cached prefixes.
        """
        jobs = [self.prompts.encode(p) for p in as_prompts(prompts)]
        return self._complete(jobs, self.prompts.params_for(jobs, params), cancelled, **request)

    def complete_chat(
        self,
        messages: str | Messages,
        params: SamplingParams | None = None,
        *,
        tools: list[Any] | None = None,
        cancelled: Callable[[], bool] | None = None,
        **request: Any,
    ) -> RequestOutput:
        """Answer a conversation; `tools` (JSON schemas or typed functions) go to the model's template."""
        job = self.prompts.encode_chat(messages, tools)
        return self._complete([job], self.prompts.params_for([job], params), cancelled, **request)[0]

    def stream_complete(self, prompt: Prompt, params: SamplingParams | None = None, **request: Any) -> Iterator[Chunk]:
        """Chunks of all n completions, interleaved. Beam search can't stream: UnsupportedError."""
        return self._stream(self.prompts.encode(prompt), params or self.params(), **request)

    def chat_prompt(self, messages: str | Messages, tools: list[Any] | None = None, **options: Any) -> str:
        """The text that the model's template makes of a conversation; `options`: of Prompts.chat_prompt. Raises
        NoChatTemplateError; UnsupportedError for tools that the template has no place for."""
        return self.prompts.chat_prompt(messages, tools, **options)

    # numbers

    @overload
    def embed(
        self, texts: str, *, pooling: str | None = None, normalize: bool = True, truncate: bool = False
    ) -> list[float]: ...
    @overload
    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
    ) -> Any: ...
    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
    ) -> Any:
        """Embeddings as lists of floats: one for a text (a string, or its token ids), one each for a
        list of texts.

        `pooling`: mean, cls, last or max; default: what the model's folder says, else mean (encoders), last token
        (decoders). `normalize` gives unit length. A text beyond the context is an error with the counts; `truncate`
        cuts it where the model's makers do (sentence-transformers' max_seq_length), else at the context.
        """
        many = as_prompts(texts)
        ids = [self.prompts.whole(text, truncate=truncate) for text in many]
        vectors = self._embed(ids, pooling, normalize)
        return vectors[0] if len(many) == 1 and many[0] is texts else vectors

    @overload
    def score(self, texts: str, *, prompt: str = "") -> Score: ...
    @overload
    def score(self, texts: list[str], *, prompt: str = "") -> list[Score]: ...
    def score(self, texts: str | list[str], *, prompt: str = "") -> Score | list[Score]:
        """Log-likelihood of each text, after `prompt` where one is given. The first token of a text without prompt and
        without BOS token has nothing to be predicted from and is not scored."""
        self.prompts.decoder_only("score text")
        wanted = [self.prompts.to_score(text, prompt) for text in as_texts(texts)]
        params = SamplingParams(max_tokens=0, temperature=0.0)
        answers = [self._answer(ids, params, score_from=start) for ids, start in wanted]
        scores = []
        try:
            for (ids, start), answer in zip(wanted, answers, strict=True):
                answer.wait()
                found = [answer.prompt_logprobs[i] for i in range(start, len(ids))]
                logprobs = tuple(raw.logprob for raw, _ in found)
                scores.append(Score(tuple(ids[start:]), logprobs, all(best for _, best in found)))
        finally:
            for answer in answers:  # one has failed: nobody waits for the others
                answer.cancel()
        return scores[0] if isinstance(texts, str) else scores

    def fill_mask(self, text: str, *, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """For each mask token in the text, the `top_k` likeliest words with their probabilities."""
        ids = self.prompts.whole(text)
        return [
            [(self.prompts.decode([i]).strip(), p) for i, p in zip(words, shares, strict=True)]
            for words, shares in self._fill_mask(ids, top_k)
        ]

    def classify(self, texts: str | list[str]) -> dict[str, float] | list[dict[str, float]]:
        """Probability of each label, for models with a classification head: of one label among all, or of each by
        itself where the config says `multi_label_classification` or there is only one. A `regression` model gives its
        scores as they are."""
        shares = self._classify([self.prompts.whole(text) for text in as_texts(texts)], None)
        config = self.prompts.model.config
        labels = config.labels or tuple(f"LABEL_{i}" for i in range(config.num_labels))
        results = [dict(zip(labels, row, strict=True)) for row in shares]
        return results[0] if isinstance(texts, str) else results

    def score_pairs(self, query: str, texts: Sequence[str]) -> list[float]:
        """How well each text answers a query, between 0 and 1, by a cross-encoder: a classification head of one label.
        Raises UnsupportedError for a model without one, ContextOverflowError for a text that is too long."""
        ids, types = self._pairs(query, texts)
        return [row[0] for row in self._classify(ids, types)]

    def _pairs(self, query: str, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Query and text as one input each, and which of the two each token is of."""
        if self.prompts.model.config.num_labels != 1:
            raise UnsupportedError(
                f"{self.name} has no head that scores pairs of texts.",
                hint="Use a cross-encoder (reranker) model, or embeddings.",
                param="model",
            )
        pairs = [self.prompts.pair(query, text) for text in texts]
        return [ids for ids, _ in pairs], [types for _, types in pairs]

    # asynchronous twins

    async def agenerate(
        self, prompt: str | list[str], *, max_length: int | None = None, echo: bool = False, **options: Any
    ) -> str | list[str]:
        request = request_options(options)
        jobs = [self.prompts.encode(p) for p in as_texts(prompt)]
        params = [self.params(len(ids), max_length=max_length, **options) for _, ids in jobs]
        outputs = await self._acomplete(jobs, params, **request)
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
        request = request_options(options)
        job = self.prompts.encode_chat(messages, tools)
        params = self.params(len(job[1]), max_length=max_length, **options)
        return (await self._acomplete([job], [params], **request))[0].text

    async def acomplete(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **request: Any,
    ) -> list[RequestOutput]:
        jobs = [self.prompts.encode(p) for p in as_prompts(prompts)]
        return await self._acomplete(jobs, self.prompts.params_for(jobs, params), **request)

    async def acomplete_chat(
        self,
        messages: str | Messages,
        params: SamplingParams | None = None,
        *,
        tools: list[Any] | None = None,
        **request: Any,
    ) -> RequestOutput:
        job = self.prompts.encode_chat(messages, tools)
        return (await self._acomplete([job], self.prompts.params_for([job], params), **request))[0]

    # no generators of their own: one more around another costs as much per token as all else here

    def astream(self, prompt: str | Messages, **options: Any) -> AsyncGenerator[Chunk, None]:
        max_length, request = options.pop("max_length", None), request_options(options)
        job = self.prompts.encode(prompt) if isinstance(prompt, str) else self.prompts.encode_chat(prompt)
        return self._astream(job, self.params(len(job[1]), max_length=max_length, **options), **request)

    def astream_complete(
        self, prompt: Prompt, params: SamplingParams | None = None, **request: Any
    ) -> AsyncGenerator[Chunk, None]:
        return self._astream(self.prompts.encode(prompt), params or self.params(), **request)

    async def aembed(self, texts: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """As `embed`: a vector for one text, a list of them for several."""
        return await asyncio.to_thread(lambda: self.embed(texts, **options))

    async def ascore(self, texts: str | list[str], *, prompt: str = "") -> Score | list[Score]:
        return await asyncio.to_thread(self.score, texts, prompt=prompt)

    async def ascore_pairs(self, query: str, texts: Sequence[str]) -> list[float]:
        return await asyncio.to_thread(self.score_pairs, query, texts)

    # the engine's side

    @abstractmethod
    def _embed(self, ids: list[list[int]], pooling: str | None, normalize: bool) -> list[list[float]]: ...

    @abstractmethod
    def _fill_mask(self, ids: list[int], top_k: int) -> list[tuple[list[int], list[float]]]:
        """For each mask: the likeliest tokens and their probabilities."""

    @abstractmethod
    def _classify(self, ids: list[list[int]], types: list[list[int]] | None) -> list[list[float]]:
        """One number per text and label. `types`: which text of a pair each token is of."""

    # inside

    def _answer(
        self,
        ids: tuple[int, ...],
        params: SamplingParams,
        *,
        stream: bool = False,
        home: asyncio.AbstractEventLoop | None = None,
        score_from: int | None = None,
        **request: Any,
    ) -> Answer:
        """Give the engine a request. Raises ContextOverflowError and InvalidInputError before it is queued."""
        self.prompts.decoder_only("generate text")
        self.prompts.check(params)
        if params.logits_processors and not self.takes_functions:
            raise UnsupportedError(
                "A function of yours can't change the logits of a model that runs in another process.",
                hint="Load it here, with LLM and tensor_parallel_size=1, or use logit_bias.",
                param="logits_processors",
            )
        if score_from is None and params.prompt_logprobs is not None:
            score_from = 1
        max_tokens = resolve_max_tokens(len(ids), params, self.context_length)
        work = Request(ids, params, max_tokens, score_from=score_from, **request)
        return Answer(self._loop, work, self.prompts.model.tokenizer, stream=stream, home=home)

    def _complete(
        self,
        jobs: list[Encoded],
        params: list[SamplingParams],
        cancelled: Callable[[], bool] | None = None,
        **request: Any,
    ) -> list[RequestOutput]:
        answers: list[Answer] = []
        try:
            for (_, ids), p in zip(jobs, params, strict=True):
                answers.append(self._answer(ids, p, **request))
            with leaving.ending(partial(_cancel, answers)):
                return [
                    self._result(job, p, answer, answer.wait(cancelled))
                    for job, p, answer in zip(jobs, params, answers, strict=True)
                ]
        finally:
            for answer in answers:
                answer.cancel()

    async def _acomplete(
        self, jobs: list[Encoded], params: list[SamplingParams], **request: Any
    ) -> list[RequestOutput]:
        answers: list[Answer] = []
        home = asyncio.get_running_loop()
        try:
            for (_, ids), p in zip(jobs, params, strict=True):
                answers.append(self._answer(ids, p, home=home, **request))
            return [
                self._result(job, p, answer, await answer.await_all())
                for job, p, answer in zip(jobs, params, answers, strict=True)
            ]
        finally:
            for answer in answers:
                answer.cancel()

    def _stream(self, job: Encoded, params: SamplingParams, **request: Any) -> Iterator[Chunk]:
        self.prompts.check_stream(params)
        return leaving.heeding(self._answer(job[1], params, stream=True, **request).__iter__())

    def _astream(self, job: Encoded, params: SamplingParams, **request: Any) -> AsyncGenerator[Chunk, None]:
        self.prompts.check_stream(params)
        return aiter(self._answer(job[1], params, stream=True, **request))

    def _result(self, job: Encoded, params: SamplingParams, answer: Answer, chunks: list[Chunk]) -> RequestOutput:
        completions = tuple(
            self._from_beams(params, answer)
            if answer.beams
            else _from_chunks(params, chunks, params.logprobs is not None)
        )
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            found = answer.prompt_logprobs
            prompt_logprobs = (None, *(answer.named(found[i][0]) for i in sorted(found)))
        return RequestOutput(job[0], job[1], completions, answer.metrics(), prompt_logprobs)

    def _from_beams(self, params: SamplingParams, answer: Answer) -> Iterator[Completion]:
        for i, beam in enumerate(answer.beams[: params.n]):
            yield Completion(
                index=i,
                text=self.prompts.decode(beam.ids),
                token_ids=beam.ids,
                finish_reason="stop" if beam.ended else "length",
                score=beam.score(params.length_penalty),
            )


def _from_chunks(params: SamplingParams, chunks: list[Chunk], logprobs: bool) -> Iterator[Completion]:
    for index in range(params.n):
        own = [c for c in chunks if c.index == index]
        last = own[-1]
        assert last.finish_reason is not None
        yield Completion(
            index=index,
            text="".join(c.text for c in own),
            token_ids=tuple(i for c in own for i in c.token_ids),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            logprobs=tuple(p for c in own for p in c.logprobs) if logprobs else None,
        )


def _cancel(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.cancel()
