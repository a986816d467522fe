"""Students: smaller models that begin as some of the layers of a larger one (DistilBERT's way, arXiv:1910.01108)."""

from __future__ import annotations

from collections.abc import Sequence

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.models.config import ModelConfig
from llmasos.models.load import check_expressible, some_layers
from llmasos.text import Tokenizer

NAME = "distillation.keep_layers"


def kept_layers(num_layers: int, keep: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers of the layers that a student has, from 0. A number spreads them evenly, the first and the last included.

    Raises InvalidInputError."""
    if isinstance(keep, int):
        if not 1 <= keep <= num_layers:
            raise InvalidInputError(
                f"{keep} layers cannot be kept of {num_layers}.", hint=f"Use 1 to {num_layers}.", param=NAME
            )
        return tuple(round(i * (num_layers - 1) / max(1, keep - 1)) for i in range(keep))
    layers = tuple(keep)
    if not layers or any(not 0 <= layer < num_layers for layer in layers):
        raise InvalidInputError(
            f"keep_layers={list(layers)} are not all layers of a model that has {num_layers}.",
            hint=f"Name some of 0 to {num_layers - 1}, or how many to keep.",
            param=NAME,
        )
    if list(layers) != sorted(set(layers)):
        raise InvalidInputError(
            f"keep_layers={list(layers)} are not in their order, each once.", hint="Write e.g. 0,2,4.", param=NAME
        )
    return layers


def student_config(teacher: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The teacher's config with these of its layers. Raises UnsupportedError where a config.json of its class cannot
    say which layers differ (a fixed pattern of windows), so that the student could not be saved, or where a layer's
    number is part of what it computes."""
    try:
        config = some_layers(teacher, layers)
    except UnsupportedError as e:
        raise UnsupportedError(e.message, hint=e.hint, param=NAME) from e
    try:
        check_expressible(config)
    except UnsupportedError as e:
        hint = "Keep other layers, so that their kinds take turns as in the teacher."
        raise UnsupportedError(e.message, hint=hint, param=NAME) from e
    return config


def check_vocabulary(student: Tokenizer, teacher: Tokenizer, config: ModelConfig) -> None:
    """Every token of the student is the same one to the teacher, whose config is given.

    Raises UnsupportedError with the first that is not."""
    theirs = teacher.backend.get_vocab(with_added_tokens=True)
    different = sorted(
        (id, token)
        for token, id in student.backend.get_vocab(with_added_tokens=True).items()
        if theirs.get(token) != id
    )
    if not different and student.vocab_size <= config.vocab_size:
        return
    if different:
        id, token = different[0]
        other = teacher.token(id) if id < teacher.vocab_size else None
        what = (
            f"token {id} is {token!r} to the student and {'nothing' if other is None else repr(other)} to the teacher"
        )
    else:
        what = f"the teacher knows {config.vocab_size:,} tokens, and the student's tokenizer has {student.vocab_size:,}"
    raise UnsupportedError(
        f"Teacher and student have different vocabularies: {what} ({len(different):,} differ).",
        hint="Take one of the student's family, or only its answers: --distillation.sequence --distillation.weight 0.",
        param="distillation.teacher",
    )
