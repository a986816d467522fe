"""Distillation: a student learns what a teacher would say next, everywhere in the data, instead of one word of it.

The student is a model of its own with the teacher's vocabulary, or made of some of the teacher's layers. It learns from
the data's texts, from its own answers (`on_policy`: at what it would really say, arXiv:2306.13649), or from answers
that the teacher wrote (`sequence`, arXiv:1606.07947).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmasos.errors import InvalidInputError
from llmasos.models.config import ModelConfig
from llmasos.models.load import load_model
from llmasos.store import ensure
from llmasos.text import load_tokenizer
from llmasos.train.answers import Prompts, Shadow, teacher_answers
from llmasos.train.config import Distillation, TrainConfig
from llmasos.train.divergence import Divergence, Scores, cosine_distance, linear_divergence
from llmasos.train.methods.base import Method, NextToken, decoder_config
from llmasos.train.model import Placed, Trainee
from llmasos.train.parallel.shard import Spreader
from llmasos.train.students import check_vocabulary, kept_layers, student_config


@dataclass
class Distiller(NextToken):
    """The student's loss: (1 - weight) cross-entropy + weight divergence + hidden_weight (1 - cosine), by token."""

    teacher: Trainee
    options: Distillation
    room: int
    """Tokens of prompts and answers that the student writes at a time."""
    seed: int = 0
    _drawn: int = 0
    """Micro-batches of the step."""
    _shadow: Shadow | None = None
    _parts: dict[str, Tensor] = field(default_factory=dict)

    def loss(self, batch: Placed) -> Tensor:
        options = self.options
        # of seed, step and place in it: all processes draw the same, also when the run has gone on
        draw = random.Random(f"{self.seed} {self.step} {self._drawn}")
        self._drawn += 1
        if draw.random() < options.on_policy:
            own = self.own_answers(batch, seed=draw.randrange(2**31))
            if len(own):  # it counts as many tokens as the batch whose prompts it has
                loss, _ = self._distance(own, weight=1.0)
                loss = loss * (len(batch) / len(own))
                self._add("on_policy", loss.detach())
                return loss
        loss, parts = self._distance(batch, weight=options.weight)
        for name, part in parts.items():
            self._add(name, part)
        return loss

    def parts(self) -> dict[str, Tensor]:
        """Of the same names in every step, in the same order: processes add them up."""
        names = ["cross_entropy", "divergence"]
        names += ["hidden"] if self.options.hidden_weight else []
        names += ["on_policy"] if self.options.on_policy else []
        found = {name: self._parts.get(name, torch.zeros(())) for name in names}
        self._parts, self._drawn = {}, 0
        return found

    def _add(self, name: str, part: Tensor) -> None:
        self._parts[name] = self._parts[name] + part if name in self._parts else part

    def _distance(self, batch: Placed, *, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what it consists of."""
        options, trainee = self.options, self.trainee
        casts = trainee.casts()
        hidden = trainee.hidden(batch, casts)[batch.rows]
        with torch.no_grad():
            their_casts = self.teacher.casts()
            expected = self.teacher.hidden(batch, their_casts)[batch.rows]
            teacher = Scores(*self.teacher.scored(expected, their_casts), **self.teacher.head(their_casts))
        student = Scores(*trainee.scored(hidden, casts), **trainee.head(casts))
        how = Divergence(options.divergence, options.beta, options.temperature, weight)
        loss, cross_entropy, divergence = linear_divergence(student, teacher, batch.labels, how)
        parts = {"cross_entropy": cross_entropy, "divergence": divergence}
        if options.hidden_weight:
            distance = cosine_distance(hidden, expected)
            parts["hidden"] = distance.detach()
            loss = loss + options.hidden_weight * distance
        return loss, parts

    def own_answers(self, batch: Placed, *, seed: int) -> Placed:
        """The batch with the student's answers, sampled, in the place of the data's last ones: as many as have room."""
        most = self.options.max_new_tokens
        prompts = prompts_of(batch, room=self.room, max_new_tokens=most, context=self.model.config.context_length)
        if not prompts:
            return _packed([], [], batch.tokens.device)
        if self._shadow is None:
            longest = self.room + most  # a prompt alone may be as long as a batch
            self._shadow = Shadow(self.model, self.trainee.dtype, max_length=longest, room=longest)
        self._shadow.refresh()
        answers = self._shadow.writer.write(prompts, max_new_tokens=most, temperature=1.0, seed=seed)
        return _packed(prompts, [answer.tokens for answer in answers], batch.tokens.device)


def prompts_of(batch: Placed, *, room: int, max_new_tokens: int, context: int) -> list[list[int]]:
    """Of each sequence, the tokens before the last ones that are trained without a gap; as many as fit with answers
    into `room` tokens, and one in any case."""
    tokens, rows = batch.tokens.tolist(), set(batch.rows.tolist())
    found: list[list[int]] = []
    begin = 0
    for length in batch.lengths:
        trained = [row for row in range(begin, begin + length) if row in rows]
        if trained:
            first = trained[-1]
            while first - 1 in rows and first > begin:
                first -= 1
            prompt = tokens[begin : first + 1]
            room -= len(prompt) + max_new_tokens
            if len(prompt) < context and (room >= 0 or not found):
                found.append(prompt)
        begin += length
    return found


def _packed(prompts: list[list[int]], answers: list[list[int]], device: torch.device) -> Placed:
    """Prompts with answers, of which each token is trained."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        read = prompt + answer[:-1]
        rows += range(len(tokens) + len(prompt) - 1, len(tokens) + len(read))
        tokens += read
        positions += range(len(read))
        labels += answer
        lengths.append(len(read))
    put = [torch.tensor(part, dtype=torch.int64).to(device) for part in (tokens, positions, rows, labels)]
    return Placed(put[0], put[1], put[2], put[3], lengths)


class Distill(Method):
    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        options = config.distillation
        if options.teacher is None:
            raise InvalidInputError(
                "Distillation needs a teacher.",
                hint="llmasos train distill --distillation.teacher MODEL --distillation.keep_layers 8 --data FILE",
                param="distillation.teacher",
            )
        if (config.model is None) == (options.keep_layers is None):
            raise InvalidInputError(
                "There is no student." if config.model is None else "The student is a model, or layers of the teacher.",
                hint="Give --model, or --distillation.keep_layers to make it of the teacher's layers.",
                param="model",
            )

    @classmethod
    def defaults(cls, config: TrainConfig) -> Mapping[str, Any]:
        is_full = config.tuning in (None, "full")
        rate = 2e-4 if not is_full or config.model is None else 1e-5  # what is left of a teacher has much to learn
        return {
            "tuning": "full",
            "lr": rate,
            "optimizer": "adamw",
            "weight_decay": 0.01 if is_full else 0.0,
            "batch_tokens": 16_384,
        }

    @cached_property
    def teacher_path(self) -> Path:
        return ensure(str(self.config.distillation.teacher))

    @cached_property
    def path(self) -> Path:
        return self.teacher_path if self.config.model is None else super().path

    @cached_property
    def layers(self) -> tuple[int, ...] | None:
        """Of the teacher, that the student begins with; None: it is a model of its own."""
        keep = self.config.distillation.keep_layers
        return None if keep is None else kept_layers(decoder_config(self.teacher_path).num_layers, keep)

    @cached_property
    def shape(self) -> ModelConfig:
        shape = super().shape
        return shape if self.layers is None else student_config(shape, self.layers)

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher is there during training; its answers alone (`sequence`) are plain data."""
        options = self.config.distillation
        return bool(options.weight or options.hidden_weight or options.on_policy)

    @property
    def teacher_shape(self) -> ModelConfig | None:
        return decoder_config(self.teacher_path) if self.asks_teacher else None

    def check(self) -> None:
        """Raises UnsupportedError, InvalidInputError for a teacher that the student cannot learn from."""
        if not self.asks_teacher:
            return
        teacher = decoder_config(self.teacher_path)
        if self.config.model is not None:
            check_vocabulary(self.tokenizer, load_tokenizer(self.teacher_path), teacher)
        if self.config.distillation.hidden_weight and teacher.hidden_size != self.shape.hidden_size:
            raise InvalidInputError(
                f"Hidden states have {self.shape.hidden_size} numbers in the student, {teacher.hidden_size} in the "
                "teacher: their directions cannot be compared.",
                hint="Leave out --distillation.hidden_weight.",
                param="distillation.hidden_weight",
            )

    def reading(self, config: TrainConfig) -> TrainConfig:
        """With the teacher's answers in the place of the data's, where `sequence` asks for them."""
        self.check()
        return config.model_copy(update=self._answered) if config.distillation.sequence else config

    @cached_property
    def _answered(self) -> dict[str, Any]:
        config = self.config
        written = teacher_answers(
            self.teacher_path,
            Prompts(config.data, config.schema_, config.columns, config.template),
            max_new_tokens=config.distillation.max_new_tokens,
            device=config.device,
            dtype=config.dtype,
            on_progress=self.on_progress,
        )
        return {"data": (str(written),), "schema_": None, "columns": None}

    def build(self, device: torch.device, spreader: Spreader) -> NextToken:
        self.check()
        dtype = spreader.dtype
        model = self.weights(device, dtype, spreader)
        if not self.asks_teacher:
            return NextToken(model, self.trainee(model, spreader))
        teacher = load_model(
            self.teacher_path,
            device=device,
            dtype=dtype,
            quantization="none",
            ready=lambda model, part: spreader.part(model.module, part),
        )
        asked = Trainee(teacher.module, dtype=dtype, compiled=self.is_compiled(device))
        spreader.prepare(asked)
        room = self.config.micro_batch_tokens or self.config.max_length or self.shape.context_length
        options = self.config.distillation
        return Distiller(model, self.trainee(model, spreader), asked, options, room, self.config.seed)
