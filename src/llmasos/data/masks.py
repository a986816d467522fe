"""Tokens of an example, and which of them are trained: all of a text, the assistant's turns of a chat with the token
that ends each.

Where a chat template has `{% generation %}` marks, they tell what the assistant wrote. Elsewhere the template tells by
what it makes of the conversation up to a turn, once as a prompt and once with the turn. Some templates write an
earlier turn otherwise than the last one (they leave its reasoning out): such a conversation becomes several samples,
each as the model will see it when it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from llmasos.data.schemas import Example, Message, RowError
from llmasos.errors import UnsupportedError
from llmasos.text import Tokenizer
from llmasos.text.template import GENERATION

Span = tuple[int, int]
_MARKS = ("\ue0f1⟦generation\ue0f2", "\ue0f2generation⟧\ue0f1")
_HINT = "Put {% generation %} ... {% endgeneration %} around the assistant's turn in the template, with its end token."


@dataclass(frozen=True)
class Sample:
    """tokens int32 [n]; trained bool [n]: whether the token is one that the model learns to say."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]


class Masker:
    """Examples -> samples, with one tokenizer and one chat template (a name or Jinja; left out, the tokenizer's)."""

    def __init__(self, tokenizer: Tokenizer, *, template: str | None = None) -> None:
        # a backend of its own without a post-processor: that of some models moves the offsets of spaces
        backend = Backend.from_str(tokenizer.backend.to_str())
        self.begin = backend.encode("").ids[:1]
        """What the model puts before a text, if anything: [CLS] and [SEP] of an encoder, too."""
        if self.begin and self.begin[0] != tokenizer.bos_token_id:
            self.begin = []
        backend.post_processor = None
        self.backend = backend
        self.tokenizer, self.template = tokenizer, template
        self.ends = tokenizer.eos_token_ids | tokenizer.special_ids - set(self.begin)
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def __call__(self, example: Example) -> list[Sample]:
        """Of a chat usually one; none of a text without tokens.

        Raises RowError for a chat of which nothing could be trained, NoChatTemplateError, UnsupportedError for an
        example that is neither text nor chat.
        """
        if example.kind == "text":
            return self._text(example)
        if example.kind != "chat":
            raise UnsupportedError(
                f"This is {example.kind} data, and only texts and chats can be trained on as they are.",
                hint="If its messages are what should be learnt, say so: --schema messages or --schema completion.",
                param="data",
            )
        if example.is_plain and self.template is None and not self.tokenizer.chat_templates:
            prompt, completion = (message["content"] for message in example.messages)
            return [self._sample(prompt + completion, [(len(prompt), len(prompt) + len(completion))], whole=True)]
        return [self._sample(text, spans) for text, spans in self._rendered(example)]

    def _text(self, example: Example) -> list[Sample]:
        ids = self._encode(example.text).ids
        ids = self.begin * example.begins + ids + self.end * example.ends
        tokens = np.array(ids, np.int32)
        return [Sample(tokens, np.ones(len(ids), np.bool_))] if len(ids) > len(self.begin) + len(self.end) else []

    def _encode(self, text: str) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise RowError("has half a character", "text", ascii(text[e.start : e.start + 1])) from None
        return self.backend.encode(text, add_special_tokens=False)

    def _sample(self, text: str, spans: Sequence[Span], *, whole: bool = False) -> Sample:
        """`whole`: without a template, so that what begins and ends a text must be put around it."""
        encoding = self._encode(text)
        tokens = np.array(encoding.ids, np.int32)
        trained = np.zeros(len(tokens), np.bool_)
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        for start, stop in spans:
            inside = np.flatnonzero((ends > start) & (begins < stop))
            if not len(inside):
                raise RowError("has a turn of which no token is left", "assistant", text[start:stop])
            first, last = int(inside[0]), int(inside[-1])
            trained[first : self._end_of_turn(tokens, first, last) + 1] = True
        if whole:
            around = [self.begin, self.end]
            tokens = np.concatenate([np.array(around[0], np.int32), tokens, np.array(around[1], np.int32)])
            trained = np.concatenate([np.zeros(len(around[0]), np.bool_), trained, np.ones(len(around[1]), np.bool_)])
        elif self.ends and not any(int(token) in self.ends for token in tokens[trained]):
            raise RowError(
                "has no end token after the assistant's turn, so the model would never learn to stop",
                "chat template",
                text[spans[-1][0] : spans[-1][1] + 20],
                hint="Use a template that ends a turn with one of: "
                + ", ".join(sorted(self.tokenizer.token(id) for id in self.tokenizer.eos_token_ids)) + ".",
            )  # fmt: skip
        return Sample(tokens, trained)

    def _end_of_turn(self, tokens: NDArray[np.int32], first: int, last: int) -> int:
        """The last token of a turn: its end token, also where marks leave that out. A line's end that templates write
        behind it is not the model's."""
        stops = self.tokenizer.eos_token_ids
        if last + 1 < len(tokens) and int(tokens[last]) not in self.ends and int(tokens[last + 1]) in stops:
            return last + 1
        for at in range(last, first, -1):
            if int(tokens[at]) in self.ends:
                return at
            if self.tokenizer.token_bytes(int(tokens[at])).strip():
                break
        return last

    # --- what the assistant wrote

    def _rendered(self, example: Example) -> list[tuple[str, list[Span]]]:
        """Texts, each with the spans of characters that are trained."""
        source = self.tokenizer._template(self.template, bool(example.tools))
        if "endgeneration" in source:
            return [self._marked(example)]
        return self._compared(example)

    def _render(self, messages: Sequence[Message], example: Example, **more: Any) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=example.tools, template=self.template, **{"add_generation_prompt": False, **more}
        )

    def _marked(self, example: Example) -> tuple[str, list[Span]]:
        pieces = self._render(example.messages, example, **{GENERATION: _MARKS}).split(_MARKS[0])
        text, spans = pieces[0], []
        for piece in pieces[1:]:
            written, mark, rest = piece.partition(_MARKS[1])
            if not mark:
                raise RowError("has marks of its own in a message", "messages")
            if written:
                spans.append((len(text), len(text) + len(written)))
            text += written + rest
        if not spans:
            raise RowError("marks nothing of this chat with {% generation %}", "chat template", hint=_HINT)
        return text, spans

    def _compared(self, example: Example) -> list[tuple[str, list[Span]]]:
        messages = example.messages
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        found: list[tuple[str, list[Span]]] = []
        for at in turns:
            text, span = self._turn_of(messages, at, example)
            # what was trained before is seen again as it was: one sample holds both
            if found and text.startswith(found[-1][0][: found[-1][1][-1][1]].rstrip()):
                found[-1] = (text, [*found[-1][1], span])
            else:
                found.append((text, [span]))
        return found

    def _turn_of(self, messages: Sequence[Message], at: int, example: Example) -> tuple[str, Span]:
        text = self._render(messages[: at + 1], example)
        if at:
            prompt = self._render(messages[:at], example, add_generation_prompt=True)
        else:  # there is no prompt without a message: what two answers have in common is before them
            pair = [self._render([{"role": "assistant", "content": word}], example) for word in "ab"]
            prompt = pair[0][: _common(*pair)]
        start = _common(prompt, text)
        written = text[start:]
        content = messages[at].get("content")
        for call in messages[at].get("tool_calls") or ():
            name = call.get("function", call).get("name") if isinstance(call.get("function", call), dict) else None
            if not isinstance(name, str) or name not in written:
                raise RowError(
                    "leaves the assistant's tool calls out",
                    "chat template",
                    call,
                    hint="Use a template with a place for tool calls, or leave such rows out.",
                )
        if isinstance(content, str):
            said = content.strip()
            complete = start == len(prompt) or said[:16] in written
            if not complete or said[-16:] not in written:
                raise RowError(
                    "does not write this turn behind its prompt, so it is not known what is the assistant's",
                    "chat template",
                    written or content,
                    hint=_HINT,
                )
        if not written.strip():
            raise RowError("leaves the assistant's turn out", "chat template", content, hint=_HINT)
        return text, (start, start + self._stop_in(written, content))

    def _stop_in(self, written: str, content: Any) -> int:
        """Where the turn ends: behind its first end token. Some templates end a conversation with one more."""
        behind = 0
        if isinstance(content, str) and (said := content.strip()):
            whole = written.find(said)  # a template may have changed its beginning, hardly its end
            behind = whole + len(said) if whole >= 0 else max(written.rfind(said[-16:]), 0)
        stops = [self.tokenizer.token(id) for id in self.tokenizer.eos_token_ids]
        found = [(at, -len(stop)) for stop in stops if (at := written.find(stop, behind)) >= 0]
        at, length = min(found, default=(len(written), 0))
        return at - length


def _common(a: str, b: str) -> int:
    """Length of what both begin with."""
    if b.startswith(a):
        return len(a)
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def portable(tokenizer: Tokenizer) -> Tokenizer:
    """One that can be sent to another process."""
    clone = copy(tokenizer)
    clone.__dict__.pop("_detokenizer", None)
    return clone
