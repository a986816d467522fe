"""SentencePiece vocabularies -> `tokenizers` backends, and a reader for `tokenizer.model` files.

A vocabulary is a list of pieces (text, score, type), as in SentencePiece's ModelProto and in GGUF's
`tokenizer.ggml.*` arrays. Two models use it: BPE (always merge the neighbours whose union has the best score) and
unigram (the split with the best sum of scores). Layout of the file: sentencepiece_model.proto of
google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llmasos.errors import FormatError

SPACE = "\u2581"  # the visible stand-in for a space inside pieces


class PieceType(IntEnum):
    """Same numbers in SentencePiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Vocabulary:
    """Everything that decides how a SentencePiece model cuts text. `pieces`, `scores`, `types` have equal lengths."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    unigram: bool
    unk_id: int | None = None
    charsmap: bytes = b""  # SentencePiece's precompiled normalisation table
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False
    special_ids: dict[str, int] = field(default_factory=dict)  # bos, eos, pad: only filled by read_model


def build_backend(vocabulary: Vocabulary) -> Backend:
    """A backend without special tokens and post-processor. Raises FormatError if the vocabulary contradicts itself."""
    byte_fallback = PieceType.BYTE in vocabulary.types
    try:
        backend = Backend(_model(vocabulary, byte_fallback))
    except FormatError:
        raise
    except Exception as e:  # the library raises bare Exception
        raise FormatError(f"The SentencePiece vocabulary is not consistent: {e}.") from e
    steps: list[normalizers.Normalizer] = []
    if vocabulary.charsmap:
        try:
            steps.append(normalizers.Precompiled(vocabulary.charsmap))
        except Exception as e:
            raise FormatError(f"The normalisation table of the SentencePiece vocabulary is damaged: {e}.") from e
    if vocabulary.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.add_space_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    if vocabulary.unigram and not any(SPACE in piece[1:] for piece in vocabulary.pieces):
        # no piece spans two words, so words can be split (and cached) one by one
        backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    decoding: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    return backend


def added_tokens(
    pieces: Sequence[str], types: Sequence[int], *, rstrip: frozenset[str] = frozenset()
) -> list[AddedToken]:
    """Pieces that are cut out of the text before the model sees it: control and unknown (special), user-defined
    (not).
    """
    special = (PieceType.CONTROL, PieceType.UNKNOWN)
    return [
        AddedToken(piece, special=kind in special, normalized=False, rstrip=piece in rstrip)
        for piece, kind in zip(pieces, types, strict=True)
        if kind in special or kind == PieceType.USER_DEFINED
    ]


def _model(vocabulary: Vocabulary, byte_fallback: bool) -> models.Model:
    pieces, scores, types = vocabulary.pieces, vocabulary.scores, vocabulary.types
    if vocabulary.unk_id is not None and not 0 <= vocabulary.unk_id < len(pieces):
        raise FormatError(f"The unknown token has id {vocabulary.unk_id}, the vocabulary {len(pieces)} tokens.")
    if vocabulary.unigram:
        # a user-defined piece always wins over its parts; 0 is above every log-probability
        worth = [0.0 if t == PieceType.USER_DEFINED else s for s, t in zip(scores, types, strict=True)]
        return models.Unigram(list(zip(pieces, worth, strict=True)), vocabulary.unk_id, byte_fallback)
    ids = {piece: i for i, piece in enumerate(pieces)}
    unk = None if vocabulary.unk_id is None else pieces[vocabulary.unk_id]
    return models.BPE(
        ids, merges_by_score(pieces, scores, types), unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback
    )


def merges_by_score(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Merge rules equal to merging by score: the better the union, the earlier; the longer left part first among
    equals.
    """
    mergeable = {
        piece: score
        for piece, score, kind in zip(pieces, scores, types, strict=True)
        if kind in (PieceType.NORMAL, PieceType.UNUSED)
    }
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in mergeable.items():
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in mergeable and (right := piece[cut:]) in mergeable:
                found.append((-score, -cut, len(found), left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


# --- tokenizer.model -------------------------------------------------------------------------------------------------


def read_model(path: Path) -> Vocabulary:
    """Read a SentencePiece model file. Raises FormatError if it is not one."""
    data = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                pieces.append(_bytes(piece.get(1, b"")).decode("utf-8"))
                scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
                types.append(_int(piece.get(3, 1)))
            elif number == 2 and isinstance(value, bytes):
                trainer = {n: v for n, v in _fields(value) if isinstance(v, int)}
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
    except (ValueError, struct.error, IndexError) as e:
        raise FormatError(f"{path} is not a SentencePiece model: {e}.") from e
    if not pieces:
        raise FormatError(f"{path} is not a SentencePiece model: it has no pieces.")
    kind = trainer.get(3, 1)  # 1 unigram, 2 BPE, 3 word, 4 char
    if kind not in (1, 2):
        raise FormatError(f"{path} is a SentencePiece model of type {kind}; only unigram (1) and BPE (2) are known.")
    return Vocabulary(
        pieces=pieces,
        scores=scores,
        types=types,
        unigram=kind == 1,
        unk_id=trainer.get(40, 0),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_space_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        special_ids={
            role: i
            for role, number, default in (("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))
            if 0 <= (i := _signed(trainer.get(number, default))) < len(pieces)
        },
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs of one protobuf message; fixed-size and nested values stay bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(data)}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number longer than 64 bits at byte {at}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text was expected")
    return value


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number was expected")
    return value
