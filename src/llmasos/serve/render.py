"""From what a model gives back to the wire. Every field that is set is sent; every field that is not is left out."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel
from pydantic_core import to_json

from llmasos.client.types import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    EmbeddingUsage,
    PromptTokensDetails,
    TopLogprob,
    Usage,
)
from llmasos.errors import ServerError
from llmasos.inference.request import FinishReason, TokenLogprob
from llmasos.serve.served import ServedTokenizer

if TYPE_CHECKING:
    pass

_PIECE = 1024
"""Entries of a list."""


def dump(model: BaseModel) -> str:
    return model.model_dump_json(exclude_unset=True)


def body(model: BaseModel) -> bytes:
    """`dump` of an answer of any length, for a thread: a single call that writes 15 MB would hold the interpreter, and
    with it the event loop, until it is done; between these pieces others have their turn."""
    return b"".join(_pieces(model, 3))


def _pieces(value: Any, depth: int) -> Iterator[bytes]:
    """`depth`: so many models inside each other are taken apart."""
    if isinstance(value, BaseModel) and depth:
        opens = b"{"
        for name, item in value:
            if name in value.model_fields_set:
                yield opens + to_json(name) + b":"
                yield from _pieces(item, depth - 1)
                opens = b","
        yield b"{}" if opens == b"{" else b"}"
    elif isinstance(value, BaseModel):
        yield dump(value).encode()
    elif isinstance(value, list) and value:
        has_parts = isinstance(value[0], BaseModel | list)
        for start in range(0, len(value), 1 if has_parts else _PIECE):
            yield b"," if start else b"["
            if has_parts:
                yield from _pieces(value[start], depth)
            else:
                yield to_json(value[start : start + _PIECE], inf_nan_mode="null")[1:-1]
        yield b"]"
    else:
        yield to_json(value, inf_nan_mode="null")


def event(model: BaseModel) -> str:
    return f"data: {dump(model)}\n\n"


def finish(reason: FinishReason | None) -> Literal["stop", "length"] | None:
    """The wire has no word for an aborted answer, and one cut short must not look finished."""
    if reason == "abort":
        raise ServerError("The generation was stopped before it was complete.", hint="Try again.")
    return reason


def usage(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached_tokens),
    )


def embedding_usage(num_tokens: int) -> EmbeddingUsage:
    return EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)


def chat_logprobs(tokenizer: ServedTokenizer, positions: Iterable[TokenLogprob]) -> ChatLogprobs:
    def one(token_id: int, logprob: float) -> dict[str, object]:
        data = _bytes(tokenizer, token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    content = [
        ChatTokenLogprob.model_validate(
            one(p.token_id, p.logprob)
            | {"top_logprobs": [TopLogprob.model_validate(one(token_id, logprob)) for token_id, _, logprob in p.top]}
        )
        for p in positions
    ]
    return ChatLogprobs(content=content)


def completion_logprobs(
    tokenizer: ServedTokenizer, positions: Iterable[tuple[int, TokenLogprob | None]], offset: int = 0
) -> CompletionLogprobs:
    """`positions`: each token's id and its log-probabilities; none for the first token of an echoed prompt.

    `offset` is where the first token starts in the choice's text.
    """
    result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    tops: list[dict[str, float] | None] = []
    for token_id, position in positions:
        token = token_text(tokenizer, token_id)
        result.tokens.append(token)
        result.text_offset.append(offset)
        offset += len(token)
        result.token_logprobs.append(position.logprob if position else None)
        tops.append(_top(tokenizer, position) if position else None)
    result.top_logprobs = tops
    return result


def _top(tokenizer: ServedTokenizer, position: TokenLogprob) -> dict[str, float]:
    """Alternatives by their text, the chosen token always among them. Of two with one text the likelier counts."""
    top: dict[str, float] = {}
    for token_id, _, logprob in (*position.top, (position.token_id, "", position.logprob)):
        top.setdefault(token_text(tokenizer, token_id), logprob)
    return top


def token_text(tokenizer: ServedTokenizer, token_id: int) -> str:
    """What the token adds to a text, not how its vocabulary spells it (`Ġare`); U+FFFD for parts of a character."""
    return _bytes(tokenizer, token_id).decode("utf-8", "replace")


def _bytes(tokenizer: ServedTokenizer, token_id: int) -> bytes:
    """Nothing for the rows that pad a model's vocabulary."""
    return tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""


def embedding_base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
