"""The tokenizer: text <-> token ids, and messages -> prompt, whatever file it came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llmasos.errors import InvalidInputError, NoChatTemplateError
from llmasos.text import template as chat
from llmasos.text.detokenize import Detokenizer, StreamDecoder

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
LONG = 4096
"""Characters. Longer texts are cut by the backend's function for several, which alone lets other threads of Python run
meanwhile: a text of 10 MB takes seconds."""


class Tokenizer:
    """`backend` does the cutting; this adds what a model's files say about its special tokens, ends and chat format.

    special: role (one of ROLES) -> token id. eos_token_ids: every id that ends generation. chat_templates: by name,
    the usual one is "default". config: further keys of tokenizer_config.json, kept for `save_pretrained`.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special: Mapping[str, int] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        backend.no_truncation()  # some files carry a length limit; cutting a prompt silently is never right
        backend.no_padding()
        self.backend = backend
        self._special = dict(special or {})
        self.eos_token_ids = frozenset(eos_token_ids) | ({self._special["eos"]} if "eos" in self._special else set())
        self.chat_templates = dict(chat_templates or {})
        self.config = dict(config or {})
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)

    def __repr__(self) -> str:
        kind = type(self.backend.model).__name__
        return f"Tokenizer({kind}, vocab_size={self.vocab_size}, chat_template={self.chat_template is not None})"

    @property
    def bos_token_id(self) -> int | None:
        return self._special.get("bos")

    @property
    def eos_token_id(self) -> int | None:
        """The usual end token; `eos_token_ids` has all of them."""
        return self._special.get("eos", min(self.eos_token_ids, default=None))

    @property
    def unk_token_id(self) -> int | None:
        return self._special.get("unk")

    @property
    def sep_token_id(self) -> int | None:
        return self._special.get("sep")

    @property
    def pad_token_id(self) -> int | None:
        return self._special.get("pad")

    @property
    def cls_token_id(self) -> int | None:
        return self._special.get("cls")

    @property
    def mask_token_id(self) -> int | None:
        return self._special.get("mask")

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... -> the token's text, as chat templates and tokenizer_config.json name them."""
        return {f"{role}_token": self.token(self._special[role]) for role in ROLES if role in self._special}

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        return Detokenizer(self.backend, self.special_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written out in the text become their ids; `add_special_tokens` puts the
        model's own (BOS, CLS ...) around it. A prompt from `apply_chat_template` already has them: encode it without.
        """
        text = _text(text)
        if len(text) < LONG:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        else:
            [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_pair(self, a: str, b: str) -> tuple[list[int], list[int]]:
        """Two texts as one input: ids and token type ids (0 for the first text, 1 for the second, as BERT has them)."""
        encoding = self.backend.encode(_text(a), _text(b))
        return encoding.ids, encoding.type_ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids outside the vocabulary stand for nothing, bytes that are not UTF-8 for U+FFFD."""
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        pieces = [stream.push(id) for id in ids]
        return "".join(pieces) + stream.flush()

    def stream(self, *, skip_special_tokens: bool = True, shown: Iterable[int] = ()) -> StreamDecoder:
        """A decoder for one text that grows id by id. `shown`: special tokens that are not skipped."""
        return StreamDecoder(self._detokenizer, skip_special_tokens=skip_special_tokens, shown=shown)

    def token(self, id: int) -> str:
        """The token as the vocabulary writes it, e.g. `Ġhello`."""
        token = self.backend.id_to_token(id) if 0 <= id < 1 << 32 else None
        if token is None:
            raise InvalidInputError(f"There is no token {id}; this vocabulary has {self.vocab_size}.", param="id")
        return token

    def token_bytes(self, id: int) -> bytes:
        """The bytes that the token adds inside a text; may be part of a character."""
        self.token(id)
        return self._detokenizer.piece(id, first=False) or b""

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it."""
        return self.backend.token_to_id(token)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for `messages`.

        `tools`: JSON schemas, or Python functions with type hints and a docstring. `template`: the name of one of
        `chat_templates`, or a Jinja template; left out, "tool_use" is taken when there are tools and the model has
        it, else "default". `continue_final_message`: end where the last message ends. `extra`: variables for the
        template.

        Raises NoChatTemplateError if the model has none, InvalidInputError with the index of a malformed message or
        the template's own words.
        """
        return chat.render(
            self._template(template, bool(tools)),
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **extra},
        )

    def _template(self, wanted: str | None, with_tools: bool) -> str:
        named = self.chat_templates
        if wanted is not None:
            if wanted in named:
                return named[wanted]
            if "{{" in wanted or "{%" in wanted:
                return wanted
            known = ", ".join(sorted(named)) or "none"
            raise InvalidInputError(
                f"This model has no chat template {wanted!r}.", hint=f"It has: {known}.", param="template"
            )
        if with_tools and "tool_use" in named:
            return named["tool_use"]
        if "default" in named:
            return named["default"]
        if named:
            raise NoChatTemplateError(
                "This model has several chat templates and none of them is the default.",
                hint=f"Name one with template=: {', '.join(sorted(named))}.",
            )
        raise NoChatTemplateError(
            "This model has no chat template: it was trained to continue text, not to chat.",
            hint="Use generate with a plain prompt, choose an instruct model, or pass a Jinja template with template=.",
        )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates to `folder`.

        transformers' AutoTokenizer loads that folder and gives the same ids. Where generation can end in several ways
        and the folder has no generation_config.json, one is written with the end ids.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {**self.config, **self.special_tokens}
        # the post-processor in tokenizer.json already says which tokens are put around a text
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        _write(folder / "tokenizer_config.json", config)
        _write(folder / "special_tokens_map.json", self.special_tokens)
        for name, source in self.chat_templates.items():
            path = folder / "chat_template.jinja"
            if name != "default":
                path = folder / "additional_chat_templates" / f"{name}.jinja"
                path.parent.mkdir(exist_ok=True)
            path.write_text(source, encoding="utf-8")
        generation = folder / "generation_config.json"
        if len(self.eos_token_ids) > 1 and not generation.exists():
            _write(generation, {"eos_token_id": [self.eos_token_id, *sorted(self.eos_token_ids - {self.eos_token_id})]})


def add_special(backend: Backend, names: Mapping[str, str]) -> dict[str, int]:
    """Make the tokens of `names` (role -> text) special tokens of `backend`; role -> id. New ones are appended."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for token in dict.fromkeys(names.values()):
        if token not in special:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return {role: id for role, token in names.items() if (id := backend.token_to_id(token)) is not None}


def _text(text: str) -> str:
    if not isinstance(text, str):
        raise InvalidInputError(f"Text expected, not {type(text).__name__}.", param="text")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidInputError(
            f"The text has half a character ({text[e.start]!a}) at position {e.start}.",
            hint="Decode the text with the right encoding first.",
            param="text",
        ) from None
    return text


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
