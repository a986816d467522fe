"""The tokenizer inside a GGUF file: `tokenizer.ggml.*` metadata -> a `tokenizers` backend.

Keys and their meaning: docs/gguf.md of ggml and llama.cpp's src/llama-vocab.cpp, whose test vectors this reproduces.
Four models: `gpt2` (byte-level BPE; `tokenizer.ggml.pre` names the words' pattern), `gemma4` (BPE on plain UTF-8),
`llama` and `t5` (SentencePiece BPE and unigram), `bert` (WordPiece).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from llmasos.errors import FormatError
from llmasos.text.pretokenizers import PRE_BY_ARCHITECTURE, PRE_TOKENIZERS, PreTokenizer
from llmasos.text.sentencepiece import SPACE, PieceType, Vocabulary, added_tokens, build_backend

_T = TypeVar("_T")
_Number = TypeVar("_Number", int, float)
_PREFIX = "tokenizer.ggml."
_MODELS = ("gpt2", "gemma4", "llama", "t5", "bert")

_ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # the format's own spelling
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
_DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
    "bert": {"unk": 100, "cls": 101, "sep": 102, "mask": 103, "pad": 0},
}

# Files seldom carry eot/eom ids; control tokens with these texts end a turn in every model that has them.
_END_TEXTS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
)


@dataclass(frozen=True)
class GGUFVocabulary:
    """`special`: role (bos, eos, ...) -> id; `eos_ids`: every id that ends generation."""

    backend: Backend
    special: dict[str, int]
    eos_ids: frozenset[int]
    chat_templates: dict[str, str]


def read_vocabulary(metadata: Mapping[str, Any]) -> GGUFVocabulary:
    """Build the tokenizer that a GGUF file's metadata describes.

    Raises FormatError if there is none, if its model or pre-tokenizer is unknown, or if its arrays contradict each
    other.
    """
    reader = _Metadata(metadata)
    model = reader.text("model")
    if model not in _MODELS:
        known = ", ".join(_MODELS)
        raise FormatError(f"The GGUF file's tokenizer is of the unknown model {model!r}.", hint=f"Known: {known}.")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(reader.strings("tokens"))]
    if len(set(tokens)) != len(tokens):
        double, _ = Counter(tokens).most_common(1)[0]
        raise FormatError(f"The GGUF file's vocabulary has the token {double!r} more than once.")
    types = reader.numbers("token_type", int, len(tokens)) or [int(PieceType.NORMAL)] * len(tokens)
    special = dict(_DEFAULT_IDS.get(model, {}))
    special.update({role: id for role, key in _ID_KEYS.items() if (id := reader.get(key, int)) is not None})
    special = {role: id for role, id in special.items() if 0 <= id < len(tokens)}
    build = {
        "gpt2": _byte_level,
        "gemma4": _plain_bpe,
        "llama": _sentencepiece,
        "t5": _sentencepiece,
        "bert": _word_piece,
    }
    backend = build[model](reader, tokens, types, special)
    backend.add_tokens(_added(reader, model, tokens, types))
    return GGUFVocabulary(
        backend=backend,
        special=special,
        eos_ids=_end_ids(reader, tokens, types, special),
        chat_templates=gguf_chat_templates(metadata),
    )


def _byte_level(reader: _Metadata, tokens: list[str], types: list[int], special: dict[str, int]) -> Backend:
    pre = _pre_tokenizer(reader)
    backend = Backend(_bpe(reader, tokens, ignore_merges=pre.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=reader.flag("add_space_prefix", False), use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    add_bos, add_eos = reader.flag("add_bos_token", pre.bos), reader.flag("add_eos_token", False)
    _frame(backend, tokens, special, bos=add_bos, eos=add_eos, sep=reader.flag("add_sep_token", pre.sep))
    return backend


def _pre_tokenizer(reader: _Metadata) -> PreTokenizer:
    name = reader.get("pre", str)
    if not name:
        name = PRE_BY_ARCHITECTURE.get(str(reader.metadata.get("general.architecture")), "")
    if not name:
        warnings.warn(
            "This GGUF file does not say which pre-tokenizer it needs (tokenizer.ggml.pre); a general one is used, so "
            "tokens may differ from the original model's. Converting the model again corrects this.",
            stacklevel=2,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise FormatError(
            f"The GGUF file names the unknown pre-tokenizer {name!r}; its text would be cut into the wrong tokens.",
            hint=f"Known: {', '.join(sorted(PRE_TOKENIZERS))}.",
        )
    return PRE_TOKENIZERS[name]


def _plain_bpe(reader: _Metadata, tokens: list[str], types: list[int], special: dict[str, int]) -> Backend:
    unk = tokens[special["unk"]] if "unk" in special else None
    backend = Backend(_bpe(reader, tokens, unk_token=unk, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    # merges never cross a line end, and shorter words are faster
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    # files of this model exist that deny the BOS it was trained with; llama.cpp adds it regardless
    _frame(backend, tokens, special, bos=True, eos=reader.flag("add_eos_token", False))
    return backend


def _sentencepiece(reader: _Metadata, tokens: list[str], types: list[int], special: dict[str, int]) -> Backend:
    unigram = reader.text("model") == "t5"
    scores = reader.numbers("scores", float, len(tokens))
    if scores is None:
        raise FormatError("The GGUF file has a SentencePiece vocabulary without tokenizer.ggml.scores.")
    charsmap = reader.metadata.get(_PREFIX + "precompiled_charsmap")
    backend = build_backend(
        Vocabulary(
            pieces=tokens,
            scores=scores,
            types=types,
            unigram=unigram,
            unk_id=special.get("unk"),
            charsmap=b"" if charsmap is None else bytes(int(b) & 0xFF for b in charsmap),
            add_space_prefix=reader.flag("add_space_prefix", True),
            remove_extra_whitespaces=reader.flag("remove_extra_whitespaces", False),
        )
    )
    bos, eos = reader.flag("add_bos_token", not unigram), reader.flag("add_eos_token", unigram)
    _frame(backend, tokens, special, bos=bos, eos=eos, sep=reader.flag("add_sep_token", unigram and bos and eos))
    return backend


def _word_piece(reader: _Metadata, tokens: list[str], types: list[int], special: dict[str, int]) -> Backend:
    # the file marks words' beginnings, WordPiece their continuations
    vocabulary: dict[str, int] = {}
    for id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != PieceType.CONTROL:
            token = token[1:] if token.startswith(SPACE) else f"##{token}"
        vocabulary[token] = id
    missing = [role for role in ("unk", "cls", "sep") if role not in special]
    if missing or len(vocabulary) != len(tokens):
        raise FormatError(f"The GGUF file's WordPiece vocabulary has no {', '.join(missing) or 'unique tokens'}.")
    lowercase = reader.flag("normalizer.lowercase", True)
    names = {id: token for token, id in vocabulary.items()}
    backend = word_piece_backend(
        vocabulary,
        unk=names[special["unk"]],
        cls=(names[special["cls"]], special["cls"]),
        sep=(names[special["sep"]], special["sep"]),
        lowercase=lowercase,
        strip_accents=reader.flag("normalizer.strip_accents", lowercase),
    )
    tokens[:] = [names[id] for id in range(len(tokens))]
    return backend


def word_piece_backend(
    vocabulary: dict[str, int],
    *,
    unk: str,
    cls: tuple[str, int],
    sep: tuple[str, int],
    lowercase: bool,
    strip_accents: bool | None = None,
    chinese: bool = True,
) -> Backend:
    """BERT's tokenizer over a WordPiece vocabulary whose continuations begin with `##`."""
    backend = Backend(models.WordPiece(vocabulary, unk_token=unk, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=strip_accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece("##", cleanup=True)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls[0]}:0 $A:0 {sep[0]}:0",
        pair=f"{cls[0]}:0 $A:0 {sep[0]}:0 $B:1 {sep[0]}:1",
        special_tokens=[cls, sep],
    )
    return backend


def _bpe(reader: _Metadata, tokens: list[str], **options: Any) -> models.BPE:
    merges = []
    for merge in reader.strings("merges"):
        at = merge.find(" ", 1)  # a token may itself begin with a space
        if at < 0:
            raise FormatError(f"The GGUF file's BPE merge {merge!r} is not two tokens with a space between.")
        merges.append((merge[:at], merge[at + 1 :]))
    try:
        return models.BPE({token: id for id, token in enumerate(tokens)}, merges, **options)
    except Exception as e:  # the library raises bare Exception
        raise FormatError(f"The GGUF file's BPE merges and vocabulary contradict each other: {e}.") from e


def _frame(
    backend: Backend, tokens: list[str], special: dict[str, int], *, bos: bool, eos: bool, sep: bool = False
) -> None:
    """Put BOS and EOS around a text; around a pair too, with `</s></s>` between its parts where `sep` (as RoBERTa)."""
    wanted = [role for role, on in (("bos", bos), ("eos", eos or sep)) if on]
    if absent := [role for role in wanted if role not in special]:
        raise FormatError(f"The GGUF file asks for a {absent[0]} token around text and does not say which it is.")
    names = {role: tokens[special[role]] for role in wanted}
    frame(backend, bos=names.get("bos"), eos=names.get("eos"), double_sep=sep)


def frame(backend: Backend, *, bos: str | None, eos: str | None, double_sep: bool = False) -> None:
    """Make `backend` put these tokens before and after a text; both must be in its vocabulary."""
    before, after = ([bos] if bos else []), ([eos] if eos else [])

    def part(name: str, start: list[str], kind: int) -> list[str]:
        return [f"{token}:{kind}" for token in [*start, name, *after]]

    single = part("$A", before, 0)
    second = part("$B", after, 0) if double_sep else part("$B", before, 1)
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + second,
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(before + after)],
    )


def _added(reader: _Metadata, model: str, tokens: list[str], types: list[int]) -> list[AddedToken]:
    rstrip: frozenset[str] = frozenset()
    if model == "llama" and reader.metadata.get("general.architecture") == "phi3":
        # Phi-3's own tokenizer swallows white space after its turn marks; the format has no field for that
        kept = {"<unk>", "<s>", "<|endoftext|>"}
        marks = (PieceType.CONTROL, PieceType.USER_DEFINED)
        rstrip = frozenset(t for t, kind in zip(tokens, types, strict=True) if kind in marks and t not in kept)
    return added_tokens(tokens, types, rstrip=rstrip)


def _end_ids(reader: _Metadata, tokens: list[str], types: list[int], special: dict[str, int]) -> frozenset[int]:
    ends = {id for key in ("eot_token_id", "eom_token_id") if (id := reader.get(key, int)) is not None}
    if "eos" in special:
        ends.add(special["eos"])
    ids = {token: id for id, token in enumerate(tokens)}
    found = {text for text in _END_TEXTS if text in ids and types[ids[text]] == PieceType.CONTROL}
    if {"<|return|>", "<|call|>"} <= found:
        found.discard("<|end|>")  # closes one message of several there, not the turn
    return frozenset(id for id in ends | {ids[text] for text in found} if 0 <= id < len(tokens))


def gguf_chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template."
    templates = {key[len(prefix) :]: str(metadata[key]) for key in metadata if key.startswith(prefix)}
    if default := metadata.get("tokenizer.chat_template"):
        templates["default"] = str(default)
    return templates


class _Metadata:
    """Checked access to `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def get(self, key: str, kind: type[_T]) -> _T | None:
        value = self.metadata.get(_PREFIX + key)
        if value is None:
            return None
        try:
            return kind(value)  # type: ignore[call-arg]  # int, float or str
        except (TypeError, ValueError):
            raise FormatError(f"The GGUF file's {_PREFIX}{key} is {value!r}, not of type {kind.__name__}.") from None

    def text(self, key: str) -> str:
        value = self.get(key, str)
        if not value:
            raise FormatError(
                f"The GGUF file has no {_PREFIX}{key}, so it carries no tokenizer.",
                hint="Load the tokenizer.json of the original model instead.",
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, bool)
        return default if value is None else value

    def strings(self, key: str) -> Sequence[str]:
        values = self.metadata.get(_PREFIX + key)
        if values is None or isinstance(values, str) or not all(isinstance(v, str) for v in values):
            raise FormatError(f"The GGUF file's {_PREFIX}{key} is missing or no list of texts.")
        return list(values)

    def numbers(self, key: str, kind: type[_Number], count: int) -> list[_Number] | None:
        """`count` numbers, or None if the key is absent; a longer list is cut, as padding."""
        values = self.metadata.get(_PREFIX + key)
        if values is None:
            return None
        try:
            numbers = [kind(v) for v in (values.tolist() if hasattr(values, "tolist") else values)]
        except (TypeError, ValueError):
            raise FormatError(f"The GGUF file's {_PREFIX}{key} holds something that is no number.") from None
        if len(numbers) < count:
            raise FormatError(f"The GGUF file's {_PREFIX}{key} has {len(numbers)} entries for {count} tokens.")
        return numbers[:count]
