"""What is asked of a model and what comes back: pure values, no torch.

Names are vLLM's and Hugging Face's. Counts say `num_`; token ids are plain ints.
"""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from llmasos.errors import InvalidInputError, UnsupportedError

FinishReason = Literal["stop", "length", "abort"]
LogitsProcessor = Callable[[list[int], Any], Any]
"""(tokens of the output so far, float32 logits [V]) -> logits [V]; after penalties, before a grammar's mask."""


@dataclass(frozen=True)
class StructuredOutput:
    """What the whole output must look like: exactly one of these (names as in vLLM). Raises InvalidInputError.

    That a schema, expression or grammar can be enforced is only known when it is compiled: `constrain.GrammarCompiler`.
    """

    json: Mapping[str, Any] | str | bool | None = None
    """A JSON Schema, as an object or as JSON text; kept as text. True or {}: any JSON object. Output has its properties
    in the schema's order and is one line; the schema's key "x-guidance" changes that (llguidance's options)."""
    regex: str | None = None
    """A regular expression (syntax of Rust's regex crate, without look-around) that the whole output matches."""
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    """A context-free grammar, in Lark's notation (as llguidance reads it) or in llama.cpp's GBNF."""
    json_object: bool | None = None
    """True: any JSON object."""

    def __post_init__(self) -> None:
        if self.json_object not in (None, True):
            raise InvalidInputError(f"json_object={self.json_object!r} asks for nothing.", param="structured")
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise InvalidInputError(
                f"Structured output names {' and '.join(given) or 'no form'}.",
                hint="Give exactly one of json, regex, choice, grammar, json_object.",
                param="structured",
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            if isinstance(self.choice, str) or not isinstance(self.choice, Iterable):
                raise InvalidInputError(f"choice={self.choice!r} is not a list of texts.", param="structured")
            object.__setattr__(self, "choice", tuple(self.choice))
        for name, texts in (("regex", [self.regex]), ("grammar", [self.grammar]), ("choice", self.choice or [None])):
            if getattr(self, name) is not None and not all(isinstance(t, str) and t for t in texts):
                raise InvalidInputError(f"{name}={getattr(self, name)!r} has no text.", param="structured")


def _schema_text(schema: Any) -> str:
    try:
        value = jsonlib.loads(schema) if isinstance(schema, str) else schema
        if value is not True and not isinstance(value, Mapping):
            raise ValueError("a schema is an object, or true")
        text = jsonlib.dumps(dict(value) if isinstance(value, Mapping) else value, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as e:
        raise InvalidInputError(
            f"json={schema!r} is no JSON Schema: {e}.", hint='Such as {"type": "object"}.', param="structured"
        ) from None
    return '{"type": "object"}' if text in ("true", "{}") else text


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. `temperature=0` is greedy, as is any below 1e-5. Raises InvalidInputError that names the
    field."""

    n: int = 1
    max_tokens: int | None = None
    """New tokens at most. None: 256, or what the context still holds if that is less."""
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    """Divides (or multiplies, if negative) the logits of tokens seen in prompt or output (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens seen in the output (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logits of tokens seen in the output (OpenAI's definition)."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    """Keep the stop string in the text."""
    ignore_eos: bool = False
    shown_token_ids: tuple[int, ...] = ()
    """Special tokens that are written out in the text; all others are left out of it."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    logits_processors: tuple[LogitsProcessor, ...] = ()
    """The caller's own changes to the logits, in order. Each waits for the token before: steps no longer overlap."""
    logprobs: int | None = None
    """Return log-probabilities (of the model's raw logits) for the chosen token and this many alternatives."""
    prompt_logprobs: int | None = None
    structured: StructuredOutput | None = None
    """Tokens that lead away from this form are never chosen. Ends as soon as nothing more can follow."""
    num_beams: int = 1
    length_penalty: float = 1.0
    """Beam scores are divided by length ** length_penalty."""
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "shown_token_ids", "logits_processors"):
            given = getattr(self, name) or ()
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise InvalidInputError(f"{name}={given!r} is not a list.", param=name)
            object.__setattr__(self, name, tuple(given))
        for name, low, high in _LIMITS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            whole = _KINDS[name] is int
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else (int, float))
                or not low <= value <= high
            ):
                bound = f"between {low:g} and {high:g}" if math.isfinite(high) else f"of at least {low:g}"
                kind = "a whole number" if whole else "a number"
                raise InvalidInputError(f"{name}={value!r} is not {kind} {bound}.", param=name)
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise InvalidInputError(f"stop={list(self.stop)!r} must hold non-empty strings.", param="stop")
        if not all(callable(p) for p in self.logits_processors):
            raise InvalidInputError(
                f"logits_processors={self.logits_processors!r} must hold functions.", param="logits_processors"
            )
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise InvalidInputError(f"seed={self.seed!r} is not a whole number.", param="seed")
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidInputError(
                f"logit_bias={self.logit_bias!r} is not a mapping of token ids to numbers.", param="logit_bias"
            )
        named = {"stop_token_ids": self.stop_token_ids, "logit_bias": self.logit_bias}
        for name, ids in (*named.items(), ("shown_token_ids", self.shown_token_ids)):
            if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
                raise InvalidInputError(f"{name}={ids!r} must name token ids, which are whole numbers.", param=name)
        for bias in self.logit_bias.values():  # -inf forbids a token; nan and +inf leave no probabilities
            if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not bias < math.inf:
                raise InvalidInputError(f"logit_bias holds {bias!r}, not a number below infinity.", param="logit_bias")
        for name in ("include_stop", "ignore_eos", "early_stopping"):
            if not isinstance(value := getattr(self, name), bool):  # Hugging Face's early_stopping="never" is no True
                raise InvalidInputError(f"{name}={value!r} is neither True nor False.", param=name)
        for name, usual in (("length_penalty", 1.0), ("early_stopping", False)):
            if self.num_beams == 1 and getattr(self, name) != usual:
                raise InvalidInputError(f"{name} needs num_beams of at least 2.", param=name)
        if self.num_beams > 1 and self.n > self.num_beams:
            raise InvalidInputError(f"n={self.n} is more than num_beams={self.num_beams}.", param="n")
        if self.structured is not None:
            self._check_structured()

    def _check_structured(self) -> None:
        if not isinstance(self.structured, StructuredOutput):
            raise InvalidInputError(f"structured={self.structured!r} is no StructuredOutput.", param="structured")
        for name, clash in (("ignore_eos", self.ignore_eos), ("num_beams", self.num_beams > 1)):
            if clash:
                raise UnsupportedError(
                    f"structured can't be combined with {name}={getattr(self, name)!r}.",
                    hint=f"Leave out {name}.",
                    param=name,
                )

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5 or self.top_k == 1  # logits over less than that leave float32

    @classmethod
    def of(cls, **options: Any) -> SamplingParams:
        """From keyword arguments; an unknown name is an InvalidInputError that lists the known ones."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise InvalidInputError(
                f"{unknown[0]!r} is not a sampling parameter.",
                hint=f"Known: {', '.join(sorted(known))}.",
                param=unknown[0],
            )
        return cls(**options)


_LIMITS: tuple[tuple[str, float, float], ...] = (
    ("n", 1, 128),
    ("max_tokens", 0, math.inf),
    ("temperature", 0, 100),
    ("top_k", 0, math.inf),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("typical_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("logprobs", 0, 100),
    ("prompt_logprobs", 0, 100),
    ("num_beams", 1, 64),
    ("length_penalty", -10, 10),
)
_OPTIONAL = {"max_tokens", "logprobs", "prompt_logprobs"}
_KINDS = {
    name: int if name in {"n", "max_tokens", "top_k", "logprobs", "prompt_logprobs", "num_beams"} else float
    for name, _, _ in _LIMITS
}


@dataclass(frozen=True)
class TokenLogprob:
    """One position: the token, its log-probability, and the most likely alternatives (best first, the token itself
    included where it belongs to them)."""

    token_id: int
    token: str
    """The text that the token adds; half a character shows as U+FFFD."""
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of one streamed completion. `text` never ends inside a character; the last chunk of an index has
    `finish_reason`."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or token id that ended it; None for end-of-sequence or length."""
    metrics: RequestMetrics | None = None
    """Of the whole request; on its last chunk."""


@dataclass(frozen=True)
class Completion:
    """One finished completion of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None
    """Beam search: sum of log-probabilities over length ** length_penalty."""


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds of wall time."""

    time_to_first_token: float
    decode_seconds: float
    num_output_tokens: int
    queue_seconds: float = 0.0
    """Before the first pass with this request began; part of time_to_first_token."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already."""

    @property
    def time_per_output_token(self) -> float:
        """Seconds between two tokens after the first."""
        return self.decode_seconds / max(1, self.num_output_tokens - 1)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first over the time after the first."""
        return max(0, self.num_output_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class RequestOutput:
    """The answer to one prompt: `outputs` holds n completions."""

    prompt: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    metrics: RequestMetrics
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def num_output_tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.outputs)
