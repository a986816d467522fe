"""What is asked of a model, as its engine wants it: texts and messages -> token ids, options -> SamplingParams, all
checked against the model. No torch: the model may live in another process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmasos.errors import ContextOverflowError, InvalidInputError, UnsupportedError
from llmasos.inference.request import SamplingParams

if TYPE_CHECKING:
    from llmasos.models.config import ModelConfig
    from llmasos.text import Tokenizer

Messages = list[dict[str, Any]]
Prompt = str | Sequence[int]
Encoded = tuple[str, tuple[int, ...]]
"""A prompt's text and token ids."""

DEFAULT_MAX_TOKENS = 256
_SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "seed")


class Described(Protocol):
    """What must be known of a model to speak with it. A LoadedModel has it, and so has what its process sends."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def generation(self) -> Mapping[str, Any]: ...
    @property
    def pooling(self) -> Mapping[str, Any]: ...


class Prompts:
    """`max_model_len`: tokens that prompt and answer may have together, if less than the model's context."""

    def __init__(self, name: str, model: Described, max_model_len: int | None) -> None:
        self.name, self.model = name, model
        self.context_length = min(model.config.context_length, max_model_len or (1 << 62))

    @property
    def tokenizer(self) -> Tokenizer:
        if self.model.tokenizer is None:
            raise UnsupportedError(f"{self.name} has no tokenizer files.", hint="Give token ids instead of text.")
        return self.model.tokenizer

    # options

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

    def params_for(
        self, jobs: Sequence[Encoded], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        """One SamplingParams for each job."""
        if params is None:
            params = self.params()
        if isinstance(params, SamplingParams):
            return [params] * len(jobs)
        if len(params) != len(jobs):
            raise InvalidInputError(f"There are {len(jobs)} prompts and {len(params)} SamplingParams.", param="params")
        return list(params)

    # checks

    def decoder_only(self, what: str) -> None:
        """Raises UnsupportedError where the model is an encoder."""
        config = self.model.config
        if config.is_encoder:
            raise UnsupportedError(
                f"{self.name} makes embeddings and does not write text: it is an encoder ({config.architecture}) and "
                f"can't {what}.",
                hint="Use it with embed, fill_mask or classify (`llmasos task embed`, /v1/embeddings); `llmasos search "
                "chat` lists models that write.",
            )

    def check(self, params: SamplingParams) -> None:
        """Raises InvalidInputError or UnsupportedError for what this model can't do."""
        size = self.model.config.vocab_size
        for name, named in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for i in named:
                if not 0 <= i < size:
                    raise InvalidInputError(
                        f"{name} names the token id {i}; {self.name}'s ids end at {size - 1}.", param=name
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

    def check_stream(self, params: SamplingParams) -> None:
        self.decoder_only("stream text")
        if params.num_beams > 1:
            raise UnsupportedError("Beam search can't stream.", hint="Use generate or complete.", param="num_beams")
        if params.prompt_logprobs is not None:
            raise UnsupportedError("A stream has no prompt_logprobs.", hint="Use complete.", param="prompt_logprobs")

    # text -> ids

    def encode(self, prompt: Prompt) -> Encoded:
        if isinstance(prompt, str):
            text, ids = prompt, tuple(self.token_ids(prompt))
        else:
            ids = self.checked(prompt)
            text = self.decode(ids)
        if not ids:
            bos = self.model.tokenizer.bos_token_id if self.model.tokenizer else None
            if bos is None:
                raise InvalidInputError("The prompt is empty.", hint="Give at least one token.", param="prompt")
            ids = (bos,)
        return text, ids

    def checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Raises InvalidInputError for what is no token of the model's."""
        size = self.model.config.vocab_size
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size:
                raise InvalidInputError(
                    f"{i!r} is not a token id of {self.name}: they are 0 to {size - 1}.", param="prompt"
                )
        return tuple(ids)

    def encode_chat(self, messages: str | Messages, tools: list[Any] | None = None) -> Encoded:
        text = self.chat_prompt(messages, tools)
        # the template writes BOS itself
        return text, tuple(self.token_ids(text, add_special_tokens=False))

    def chat_prompt(
        self,
        messages: str | Messages,
        tools: list[Any] | None = None,
        *,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that the model's template makes of a conversation. Raises NoChatTemplateError; UnsupportedError for
        an encoder, and for tools that the template has no place for.

        `continue_final_message` ends it where the last message ends, for the model to go on; `variables` are further
        names for the template (enable_thinking, ...)."""
        self.decoder_only("chat")
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        options: dict[str, Any] = {
            "continue_final_message": continue_final_message,
            "add_generation_prompt": add_generation_prompt,
            **_free(variables or {}),
        }
        text = self.tokenizer.apply_chat_template(conversation, tools=tools, **options)
        if tools and text == self.tokenizer.apply_chat_template(conversation, **options):
            raise UnsupportedError(
                f"The chat template of {self.name} has no place for tools.",
                hint="Choose a model trained to use tools.",
                param="tools",
            )
        return text

    def token_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(text, str):
            raise InvalidInputError(f"{text!r} is not a text.", hint="Give a string, or token ids to complete().")
        return self._embedded(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _embedded(self, ids: list[int]) -> list[int]:
        if ids and (largest := max(ids)) >= self.model.config.vocab_size:  # tokens added after training
            raise InvalidInputError(
                f"The text holds the token {self.tokenizer.token(largest)!r} (id {largest}), for which {self.name} has "
                f"no embedding: its ids end at {self.model.config.vocab_size - 1}.",
                hint="Leave it out.",
                param="prompt",
            )
        return ids

    def whole(self, prompt: Prompt, *, truncate: bool = False) -> list[int]:
        """The ids of a text that is read as a whole, as embeddings are made. Raises ContextOverflowError, unless it may
        be cut."""
        ids = self.token_ids(prompt) if isinstance(prompt, str) else list(self.checked(prompt))
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

    def pair(self, a: str, b: str) -> tuple[list[int], list[int]]:
        """Two texts as one input, and which of the two each token is of. Raises ContextOverflowError."""
        ids, types = self.tokenizer.encode_pair(a, b)
        if len(ids) > self.context_length:
            raise ContextOverflowError(len(ids), 0, self.context_length)
        return self._embedded(ids), types

    def to_score(self, text: str, prompt: str) -> tuple[tuple[int, ...], int]:
        """The tokens, and the first of them that is scored."""
        ids = self.token_ids(prompt + text)
        # a token that begins in the prompt and ends in the text is scored, one that closes the prompt alone is not
        start = max(1, _num_common(ids, self.token_ids(prompt)) if prompt else 0)
        if len(ids) > self.context_length:
            raise ContextOverflowError(len(ids), 0, self.context_length)
        if start >= len(ids):
            raise InvalidInputError(f"{text!r} has no token to score.", hint="Give a longer text, or a prompt.")
        return tuple(ids), start

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.tokenizer.decode(list(ids)) if self.model.tokenizer else ""


def resolve_max_tokens(num_prompt: int, params: SamplingParams, context_length: int) -> int:
    """New tokens that a request may make. Raises ContextOverflowError with the counts; nothing is cut silently."""
    room = context_length - num_prompt
    wanted = params.max_tokens
    if wanted is None:
        wanted = max(1, min(DEFAULT_MAX_TOKENS, room))
    if wanted > room:
        raise ContextOverflowError(num_prompt, wanted, context_length)
    return wanted


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A text or the ids of one, or several of them -> a list."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # a text or token ids: one prompt
    return list(prompts)  # type: ignore[arg-type]  # several: each a prompt


def as_texts(given: str | list[str]) -> list[str]:
    """A text, or several -> a list. Raises InvalidInputError for anything else."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or any(not isinstance(text, str) for text in given):
        raise InvalidInputError(f"{given!r} is not a text or a list of texts.", hint="complete() takes token ids.")
    return list(given)


def request_options(options: dict[str, Any]) -> dict[str, Any]:
    """Takes what belongs to the request, not to the sampling, out of keyword options."""
    return {name: options.pop(name) for name in ("adapter", "priority", "cache_salt") if name in options}


def _free(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises InvalidInputError for what is no variable of a template but says which one is taken, and how."""
    taken = ("messages", "tools", "documents", "template", "add_generation_prompt", "continue_final_message")
    if clash := [name for name in variables if name in taken]:
        raise InvalidInputError(f"{clash[0]!r} is no variable of a chat template.", param="chat_template_kwargs")
    return variables


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
