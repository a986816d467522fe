"""Structured output: from a JSON Schema, regular expression, choice or grammar to the tokens that may come next.

llguidance keeps a parser per completion and writes a bit mask over the vocabulary: bit i of a row of int32 words says
whether token i may follow (word i // 32, least significant bit first). Bits behind the tokenizer's vocabulary, which
pad a model's, are 0. Where the grammar leaves one text only, so does the mask leave one token only: the one that the
tokenizer itself would write. That makes jump-ahead (`forced_tokens`) exact: it gives the tokens that the masks would
have let through one by one.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from llmasos.errors import InvalidInputError, LLMasOSError, UnsupportedError
from llmasos.inference.reply_grammar import JSON_LAYOUT
from llmasos.inference.request import StructuredOutput

if TYPE_CHECKING:
    from llmasos.text import Tokenizer

MAX_COMPILED = 64
"""Grammars that are kept ready."""
_LIMITS = LLParserLimits(verbose_errors=False)


def num_words(vocab_size: int) -> int:
    """int32 words of a mask row."""
    return (vocab_size + 31) // 32


class Matcher:
    """Where one completion stands in its grammar. `error` is set once something went wrong inside (a limit, a token
    that was not allowed); masks then allow the end only."""

    def __init__(self, state: LLMatcher, eos_token_ids: frozenset[int]) -> None:
        self._state, self._eos = state, eos_token_ids

    def copy(self) -> Matcher:
        """An independent matcher at the same place."""
        return Matcher(self._state.deep_copy(), self._eos)

    @property
    def error(self) -> LLMasOSError | None:
        if not self._state.is_error():
            return None
        return InvalidInputError(f"The structured output failed: {_reason(self._state)}.", param="structured")

    @property
    def may_stop(self) -> bool:
        """What there is fits the grammar: an end token is allowed."""
        return self._state.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Nothing but an end token can follow, or one was accepted."""
        return self._state.is_stopped()

    def fill_masks(self, rows: NDArray[np.int32], drafts: Sequence[int] = ()) -> None:
        """Write masks to `rows` [1 + len(drafts), num_words(vocab_size)], contiguous: of the next token, and behind
        each draft. Rows behind a draft that is not allowed stay as they are. The place does not change."""
        assert rows.dtype == np.int32 and rows.flags["C_CONTIGUOUS"] and len(rows) > len(drafts)
        allowed = list(drafts[: self.num_accepted(drafts)])
        for row, token in zip(rows, [*allowed, None], strict=False):
            self._state.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            if token is not None:
                self._state.consume_token(token)
        self.rollback(len(allowed))

    def accept(self, token: int) -> bool:
        """Go on by one token. True: nothing can follow (`is_finished`), also after a token that was not allowed, which
        leaves an `error`."""
        self._state.consume_token(token)
        return self._state.is_stopped()

    def forced_tokens(self, max_tokens: int | None = None) -> list[int]:
        """The tokens that must come now, at most `max_tokens`, and go on by them; empty where there is a choice. Never
        an end token."""
        tokens = self._state.compute_ff_tokens()[:max_tokens]
        if not tokens or self._eos & set(tokens) or self._state.validate_tokens(tokens) < len(tokens):
            return []
        self._state.consume_tokens(tokens)
        return tokens

    def num_accepted(self, drafts: Sequence[int]) -> int:
        """How many of `drafts` may follow one another from here, an end token included; the place does not change."""
        return self._state.validate_tokens(list(drafts)) if drafts else 0

    def rollback(self, num_tokens: int) -> None:
        """Take back the last accepted (or forced) tokens."""
        if num_tokens and not self._state.rollback(num_tokens):
            raise AssertionError(f"the matcher can't take back {num_tokens} tokens")


Fill = tuple[Matcher, int, Sequence[int]]
"""A matcher, its row of the bit mask, and drafts: the mask behind each goes to the rows that follow."""


class GrammarCompiler:
    """Compiles for one tokenizer; keeps what it compiled. Thread-safe. The first use reads the vocabulary (about 0.2 s
    per 50,000 tokens). Raises UnsupportedError for a tokenizer without an end token: output could not end."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._eos = frozenset(i for i in tokenizer.eos_token_ids if i < vocab_size)
        if not self._eos:
            raise UnsupportedError(
                "Structured output needs a tokenizer with an end-of-sequence token; this one has none.",
                param="structured",
            )
        self._compiled: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        wrapper = _Vocabulary(self.tokenizer, self.vocab_size, self._eos)
        made = LLTokenizer(wrapper, eos_token=sorted(self._eos))  # type: ignore[arg-type]  # has what TokenizerWrapper has
        wrapper.greedy = made.greedy_tokenize
        return made

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def matcher(self, structured: StructuredOutput) -> Matcher:
        """A matcher at the start. Raises InvalidInputError with the value and llguidance's words for what can't be
        enforced."""
        with self._lock:
            state, vocabulary = self._compiled.get(structured), self._vocabulary
        if state is None:
            state = _compile(structured, vocabulary)  # may take a second: others need not wait
        with self._lock:
            self._compiled[structured] = state
            self._compiled.move_to_end(structured)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(state.deep_copy(), self._eos)

    def fill_masks(self, fills: Sequence[Fill], bitmask: NDArray[np.int32]) -> None:
        """`Matcher.fill_masks` for many completions, on several threads with the GIL released."""
        assert bitmask.dtype == np.int32 and bitmask.flags["C_CONTIGUOUS"]
        if len(fills) == 1:
            matcher, row, drafts = fills[0]
            matcher.fill_masks(bitmask[row:], drafts)
        elif fills:
            plain, drafted = [], []
            for matcher, row, drafts in fills:
                if allowed := drafts[: matcher.num_accepted(drafts)]:
                    drafted.append((matcher._state, row, list(allowed)))
                else:
                    plain.append((matcher._state, row))
            where = (bitmask.ctypes.data, 4 * bitmask.shape[1], bitmask.shape[0])
            if plain:
                self._executor.unsafe_compute_mask_ptr(plain, *where)
            if drafted:
                self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *where)


class _Vocabulary:
    """What llguidance asks of a tokenizer (its TokenizerWrapper): the bytes of every id, and how a text is cut."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: frozenset[int]) -> None:
        known = tokenizer.backend.id_to_token
        self.eos_token_id, self.bos_token_id = min(eos), tokenizer.bos_token_id
        pieces = (tokenizer.token_bytes(i) if known(i) is not None else b"" for i in range(vocab_size))
        # the byte FF is never part of a text, and llguidance marks special tokens by it
        self.tokens = [b"" if b"\xff" in piece else piece for piece in pieces]
        self._special = {i for i in tokenizer.special_ids | eos if i < vocab_size}
        self.special_token_ids = sorted(self._special)
        self._backend = tokenizer.backend
        # tokenizers that put a space before every text: cut behind a mark that never joins with what follows
        self._mark = "" if self._cut("a", "") is not None else "\x02"
        self.greedy: Callable[[str], list[int]]

    def __call__(self, text: str) -> list[int]:
        """`text` as the model's tokenizer cuts it in the middle of an output; greedily where that would change the text
        or find special tokens in it."""
        ids = self._cut(text, self._mark)
        return self.greedy(text) if ids is None else ids

    def _cut(self, text: str, mark: str) -> list[int] | None:
        lead = self._backend.encode(mark, add_special_tokens=False).ids if mark else []
        ids = self._backend.encode(mark + text, add_special_tokens=False).ids
        if ids[: len(lead)] != lead:
            return None
        ids = ids[len(lead) :]
        if any(i >= len(self.tokens) or i in self._special for i in ids):
            return None
        return ids if b"".join(self.tokens[i] for i in ids) == text.encode() else None


def _grammar(structured: StructuredOutput) -> str:
    """llguidance's own notation."""
    if structured.regex is not None:
        return LLMatcher.grammar_from_regex(structured.regex)
    if structured.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_literal, structured.choice)))
    if structured.grammar is not None:
        return LLMatcher.grammar_from_lark(any_to_lark(structured.grammar))
    schema = structured.json if isinstance(structured.json, str) else '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, defaults=JSON_LAYOUT)  # type: ignore[arg-type]  # a TypedDict


def _compile(structured: StructuredOutput, vocabulary: LLTokenizer) -> LLMatcher:
    try:
        grammar = _grammar(structured)
    except Exception as e:  # the converter raises all sorts
        raise _refused(structured, str(e)) from None
    state = LLMatcher(vocabulary, grammar, log_level=0, limits=_LIMITS)
    if state.is_error():
        raise _refused(structured, _reason(state))
    return state


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _reason(state: LLMatcher) -> str:
    return state.get_error().removesuffix("<non-verbose/>").strip().rstrip(".")


def _refused(structured: StructuredOutput, reason: str) -> InvalidInputError:
    name, value = next((k, v) for k, v in vars(structured).items() if v is not None)
    shown = value if len(str(value)) <= 200 else f"{str(value)[:200]} ..."
    return InvalidInputError(f"{name}={shown!r} can't be enforced: {reason}.", param="structured")
