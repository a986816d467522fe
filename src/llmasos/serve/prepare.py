"""From requests on the wire to what a model takes: token ids and SamplingParams. Refuses by name what can't be done."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from llmasos.client.types import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    EmbeddingRequest,
    RefusalPart,
    SamplingRequest,
    StructuredOutputs,
    TextPart,
)
from llmasos.errors import ContextOverflowError, InvalidInputError, UnsupportedError
from llmasos.inference.calling import template_call
from llmasos.inference.request import SamplingParams, StructuredOutput
from llmasos.serve.served import ServedModel

MAX_STOPS = 16
MAX_INPUTS = 2048
"""Inputs of one embeddings request (OpenAI's limit), and prompts of one completions request."""
_BEGINNING = 16
"""Characters per token of the context; hardly any text has so many."""
_COMPLETION_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MIDDLE_MARKS = (  # prefix, suffix, middle: Qwen2.5-Coder, StarCoder and Granite, Code Llama, DeepSeek-Coder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
_SAMPLING = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
_EXTENSIONS = ("top_k", "min_p", "typical_p", "repetition_penalty", "ignore_eos")
_BEAMS = ("num_beams", "length_penalty", "early_stopping")


def template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as chat templates expect it: text content, `developer` as `system`, tool arguments as an object."""
    entry = message.model_dump(exclude_none=True, include={"name", "tool_call_id", "reasoning_content", "reasoning"})
    entry["role"] = "system" if message.role == "developer" else message.role
    entry["content"] = _content(message, index)
    if message.tool_calls:
        entry["tool_calls"] = [template_call(call.model_dump()) for call in message.tool_calls]
    elif message.content is None and message.role != "assistant":
        raise InvalidInputError(f"Message {index} ({message.role}) has no content.", param=f"messages.{index}.content")
    return entry


def _content(message: ChatMessage, index: int) -> str:
    if not isinstance(message.content, list):
        return message.content or message.refusal or ""
    texts = []
    for i, part in enumerate(message.content):
        if isinstance(part, RefusalPart) and message.role == "assistant":
            texts.append(part.refusal)
            continue
        if not isinstance(part, TextPart):
            where = f"messages.{index}.content.{i}"
            raise UnsupportedError(f"Content of type {part.type!r} is not supported yet.", param=where)
        texts.append(part.text)
    return "\n".join(texts)


def chat_params(
    model: ServedModel, request: ChatCompletionRequest, num_prompt_tokens: int, *, fit: bool = False
) -> SamplingParams:
    """`fit`: where max_tokens is more than the context still holds, what it holds counts; else that is an error."""
    if request.top_logprobs and not request.logprobs:
        raise InvalidInputError("top_logprobs needs logprobs: true.", param="top_logprobs")
    asked = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(asked) > 1:
        raise InvalidInputError("max_tokens and max_completion_tokens differ; send one.", param="max_tokens")
    room = model.context_length - num_prompt_tokens
    if (fit or not asked) and room < 1:
        raise ContextOverflowError(num_prompt_tokens, 1, model.context_length)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    more: dict[str, Any] = {}
    if (form := _response_format(request)) is not None:
        if request.structured_outputs is not None:
            raise InvalidInputError(
                "response_format and structured_outputs were both given; send one.", param="response_format"
            )
        more["structured"] = form
    max_tokens = asked.pop() if asked else None
    if max_tokens is None or (fit and max_tokens > room):
        max_tokens = room
    return _params(model, request, max_tokens=max_tokens, logprobs=logprobs, **more)


def _response_format(request: ChatCompletionRequest) -> StructuredOutput | None:
    asked = request.response_format
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return StructuredOutput(json_object=True)
    if asked.json_schema is None:
        raise InvalidInputError("response_format of type 'json_schema' has no json_schema.", param="response_format")
    return _form("response_format", json=asked.json_schema.json_schema)


def _structured(asked: StructuredOutputs) -> StructuredOutput:
    return _form(
        "structured_outputs",
        json=asked.json_schema,
        regex=asked.regex,
        choice=None if asked.choice is None else tuple(asked.choice),
        grammar=asked.grammar,
        json_object=asked.json_object,
    )


def _form(param: str, **fields: Any) -> StructuredOutput:
    with form_called(param):
        form = StructuredOutput(**fields)
    for text in (form.json, form.regex, form.grammar, *(form.choice or ())):
        if isinstance(text, str):
            unicode(text, param)
    return form


@contextmanager
def form_called(param: str) -> Iterator[None]:
    """Errors about what the engine calls `structured` name the field that asked for it; what it was made of, which may
    be a grammar of ours, stays out of them."""
    try:
        yield
    except InvalidInputError as e:
        if e.param != "structured":
            raise
        _, enforced, reason = e.message.partition("can't be enforced")
        reason, listing, _ = reason.partition("\n   1 | ")
        message = f"The form of the output {enforced}{reason}{'.' if listing else ''}" if enforced else e.message
        raise InvalidInputError(message, hint=e.hint, param=param) from None


@asynccontextmanager
async def fields_called(names: Mapping[str, str]) -> AsyncIterator[None]:
    """Errors that name a field of a chat request, name it as the protocol does that the request came in."""
    try:
        yield
    except InvalidInputError as e:
        e.param = names.get(e.param or "", e.param)
        raise


def request_options(request: SamplingRequest) -> dict[str, Any]:
    """What concerns the request and not its sampling."""
    return {name: value for name in ("priority", "cache_salt") if (value := getattr(request, name)) is not None}


def completion_prompts(model: ServedModel, request: CompletionRequest) -> list[list[int]]:
    """The prompts as tokens. Blocking."""
    check_generates(model)
    given = batch(request.prompt, "prompt")
    if len(given) > MAX_INPUTS:
        raise InvalidInputError(f"prompt holds {len(given)} entries; at most {MAX_INPUTS} are allowed.", param="prompt")
    prompts = [
        encode_prompt(model, prompt, "prompt") if isinstance(prompt, str) else _prompt_ids(model, prompt)
        for prompt in given
    ]
    if not request.suffix:
        return prompts
    if request.echo and request.logprobs is not None:
        raise UnsupportedError("suffix can't be combined with echo and logprobs.", param="suffix")
    before, between, behind = _middle_marks(model)
    suffix = model.tokenizer.encode(unicode(request.suffix, "suffix"), add_special_tokens=False)
    begin = model.tokenizer.encode("")  # the token that begins a text, for models that have one
    own = [ids[len(begin) :] if ids[: len(begin)] == begin else ids for ids in prompts]
    return [[*begin, before, *ids, between, *suffix, behind] for ids in own]


def _middle_marks(model: ServedModel) -> tuple[int, int, int]:
    """The tokens before a prefix, between it and a suffix, and before what is to be written. Raises UnsupportedError
    for a model without."""
    for marks in _MIDDLE_MARKS:
        ids = [id for mark in marks if (id := model.tokenizer.id(mark)) is not None]
        if len(ids) == 3:
            return ids[0], ids[1], ids[2]
    raise UnsupportedError(
        f"{model.name} has no tokens to fill in the middle of a text with.", hint="Leave out suffix.", param="suffix"
    )


def completion_params(model: ServedModel, request: CompletionRequest) -> SamplingParams:
    echo_logprobs = request.logprobs if request.echo else None
    logprobs, more = request.logprobs, {}
    if (best_of := request.best_of) is not None and best_of != (n := request.n or 1):
        if best_of < n:
            raise InvalidInputError(f"best_of is {best_of}, less than n ({n}).", param="best_of")
        if request.stream or (request.num_beams or 1) > 1:
            reason = "streamed" if request.stream else "combined with num_beams"
            raise UnsupportedError(f"best_of can't be {reason}.", hint="Leave one of them out.", param="best_of")
        logprobs, more = logprobs or 0, {"n": best_of}
    if echo_logprobs is not None and request.stream:
        raise UnsupportedError(
            "echo together with logprobs can't be streamed.", hint="Set stream: false.", param="echo"
        )
    max_tokens = _COMPLETION_DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    return _params(model, request, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=echo_logprobs, **more)


def embedding_inputs(model: ServedModel, request: EmbeddingRequest) -> list[list[int]]:
    """The inputs as tokens. Blocking."""
    inputs = batch(request.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise InvalidInputError(f"input holds {len(inputs)} entries; at most {MAX_INPUTS} are allowed.", param="input")
    if not all(inputs):
        raise InvalidInputError("input holds an empty entry.", param="input")
    return [_ids(model, entry, "input") for entry in inputs]


def encode_prompt(model: ServedModel, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
    """Blocking. A text that is far too long is refused by its beginning: to count 10 MB takes seconds.

    Raises ContextOverflowError.
    """
    text = unicode(text, param)
    beginning = text[: model.context_length * _BEGINNING]
    if len(beginning) < len(text):
        num = len(model.tokenizer.encode(beginning, add_special_tokens=False))
        if num > model.context_length + 1:  # the last token may be another in the whole text
            raise ContextOverflowError(num - 1, 0, model.context_length, at_least=True)
    return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _prompt_ids(model: ServedModel, ids: list[int]) -> list[int]:
    if len(ids) > model.context_length:
        raise ContextOverflowError(len(ids), 0, model.context_length)
    check_ids(model, ids, "prompt")
    return ids


def batch(value: str | list[str] | list[int] | list[list[int]], param: str) -> Sequence[str | list[int]]:
    """One entry or several, as a list of entries. Raises InvalidInputError when there is none."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidInputError(f"{param} is empty.", param=param)
    if isinstance(value[0], int):
        return [[int(i) for i in value]]
    return value


def _ids(model: ServedModel, entry: str | list[int], param: str) -> list[int]:
    if isinstance(entry, str):
        ids = model.tokenizer.encode(unicode(entry, param))
    else:
        ids = entry
        check_ids(model, ids, param)
    return ids


def _params(model: ServedModel, request: SamplingRequest, **more: Any) -> SamplingParams:
    options: dict[str, Any] = {k: v for k in _SAMPLING + _EXTENSIONS + _BEAMS if (v := getattr(request, k)) is not None}
    if request.stream and (request.num_beams or 1) > 1:
        raise UnsupportedError("Beam search can't be streamed.", hint="Set stream: false.", param="num_beams")
    if request.stream_options is not None and not request.stream:
        raise InvalidInputError("stream_options needs stream: true.", param="stream_options")
    if request.stop:
        options["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
        if len(options["stop"]) > MAX_STOPS:
            raise InvalidInputError(f"stop holds more than {MAX_STOPS} strings.", param="stop")
        for text in options["stop"]:
            unicode(text, "stop")
    if request.stop_token_ids:
        check_ids(model, request.stop_token_ids, "stop_token_ids")
        options["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.structured_outputs is not None:
        options["structured"] = _structured(request.structured_outputs)
    if request.logit_bias:
        options["logit_bias"] = _logit_bias(model, request.logit_bias)
    # The model's own defaults (generation_config.json) where it has some, else OpenAI's temperature of 1.
    defaults = model.params(num_beams=request.num_beams or 1)
    return replace(defaults, **{"temperature": defaults.temperature or 1.0, **options, **more})


def _logit_bias(model: ServedModel, bias: Mapping[str, float]) -> dict[int, float]:
    result = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InvalidInputError(f"logit_bias has the key {key!r}, which is no token id.", param="logit_bias")
        if not -100 <= value <= 100:
            raise InvalidInputError(
                f"logit_bias of token {key} is {value}, not between -100 and 100.", param="logit_bias"
            )
        result[int(key)] = float(value)
    check_ids(model, list(result), "logit_bias")
    return result


def check_ids(model: ServedModel, ids: Sequence[int], param: str) -> None:
    size = model.tokenizer.vocab_size
    if bad := [i for i in ids if not 0 <= i < size]:
        raise InvalidInputError(f"{param}: {bad[0]} is no token id of {model.name}, which has {size}.", param=param)


def check_generates(model: ServedModel) -> None:
    if model.is_encoder:
        raise UnsupportedError(
            f"{model.name} makes embeddings and does not write text.",
            hint="Use it with /v1/embeddings; GET /v1/models tells which models write (capabilities.chat), and "
            "`llmasos search chat` which can be had.",
            param="model",
        )


def unicode(text: str, param: str) -> str:
    """Refuses half surrogate pairs, which JSON can carry and a tokeniser can't."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InvalidInputError(f"{param} holds {e.object[e.start]!r}, which is not Unicode text.", param=param) from e
    return text
