"""Answers that models write for training, with the engine that serves: a student's own (on-policy distillation,
arXiv:2306.13649), and a teacher's to all prompts of the data (sequence-level distillation, arXiv:1606.07947).

    data ── rows' prompts ──> teacher ──> home/cache/answers/KEY.jsonl        all of them
                                          home/cache/answers/KEY.jsonl.part   while it writes; a kill loses one batch
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmasos.data import Example, Totals, open_dataset, parse_sources
from llmasos.data.readers import Columns
from llmasos.data.schemas import read, schema_of
from llmasos.errors import FormatError, InvalidInputError, UnsupportedError
from llmasos.inference.build import build_engine
from llmasos.inference.config import EngineConfig
from llmasos.inference.rank import page_needs, resolve
from llmasos.inference.request import SamplingParams
from llmasos.inference.state import Request
from llmasos.models.config import ModelConfig
from llmasos.models.decoder import Attention, Decoder
from llmasos.models.load import LoadedModel, load_model, write_atomically
from llmasos.models.weights import is_tied, tie
from llmasos.settings import settings
from llmasos.text import Tokenizer
from llmasos.train.flops import num_weights
from llmasos.train.lora import TrainedLora
from llmasos.train.lowbit import FrozenLinear

_log = logging.getLogger("llmasos")
BATCH = 64
"""Prompts that a teacher answers at a time."""
_VERSION = 1


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    """With the end token, where it ended."""
    is_whole: bool
    """False: it was cut at the most tokens."""


class Writer:
    """A model with an engine of its own, run in the caller's thread."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = model
        self.engine = build_engine(model, config)

    def write(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seed: int = 0
    ) -> list[Answer]:
        """Answers to prompts of token ids, each at most to the end of the context; the same ones for one seed."""
        context = self.model.config.context_length
        requests = []
        for at, prompt in enumerate(prompts):
            most = min(max_new_tokens, context - len(prompt))
            params = SamplingParams(temperature=temperature, seed=seed + at)
            requests.append(Request(tuple(prompt), params, max_tokens=most))
            self.engine.add(requests[-1])
        said: dict[Request, list[int]] = {request: [] for request in requests}
        whole: set[Request] = set()
        while self.engine.has_work:
            for output in self.engine.step():
                if output.error is not None:
                    raise output.error
                said[output.request] += output.token_ids
                if output.finish_reason == "stop":
                    whole.add(output.request)
        return [Answer(said[request], request in whole) for request in requests]


class Shadow:
    """A copy of a decoder under training, in the dtype that it computes in, that writes with the weights of now.

    room: tokens that prompts and answers of one call have together."""

    def __init__(self, model: LoadedModel, dtype: torch.dtype, *, max_length: int, room: int) -> None:
        self.trained: Decoder = model.module
        _check_whole(self.trained)
        device = self.trained.device
        with torch.device("meta"):
            copy = Decoder(model.config)
        for name, parameter in list(copy.named_parameters(remove_duplicate=False)):
            if not is_tied(model.config, name):
                owner, _, leaf = name.rpartition(".")
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                copy.get_submodule(owner)._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        tie(model.config, copy, None)
        copy.eval()
        self.copy = copy
        config = _shadow_config(model.config, device, dtype, max_length=max_length, room=room)
        self.writer = Writer(replace(model, module=copy), config)

    @torch.no_grad()
    def refresh(self) -> None:
        own = dict(self.copy.named_parameters(remove_duplicate=False))
        for name, tensor in plain_weights(self.trained):
            own[name].copy_(tensor)


def _shadow_config(
    shape: ModelConfig, device: torch.device, dtype: torch.dtype, *, max_length: int, room: int
) -> EngineConfig:
    config = EngineConfig(
        max_model_len=min(max_length, shape.context_length),
        max_num_seqs=max(1, min(256, room // 2)),
        enable_prefix_caching=False,  # keys and values are of the weights of one moment
    )
    sizes = resolve(shape, config, device, dtype)
    _, needed, further = page_needs(sizes)
    return replace(config, kv_cache_memory=needed + further * -(-room // sizes.max_model_len))


def shadow_bytes(shape: ModelConfig, device: torch.device, dtype: torch.dtype, room: int) -> int:
    """That a Shadow takes whose calls have up to `room` tokens: weights, keys and values."""
    kept = _shadow_config(shape, device, dtype, max_length=room, room=room).kv_cache_memory
    assert isinstance(kept, int)
    return dtype.itemsize * num_weights(shape) + kept


def _check_whole(decoder: Decoder) -> None:
    """Raises UnsupportedError for a process that has a part of the weights only."""
    parts = any(isinstance(parameter, DTensor) for parameter in decoder.parameters())
    heads = {layer.num_heads for layer in decoder.modules() if isinstance(layer, Attention)}
    if parts or heads != {decoder.config.num_heads}:
        raise UnsupportedError(
            "A student whose weights are spread over processes cannot write its own answers.",
            hint="Use --parallel ddp, or leave out --distillation.on_policy.",
            param="distillation.on_policy",
        )


def plain_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The weights of the decoder that computes the same without adapters and low-bit layers, one after the other."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, TrainedLora | FrozenLinear):
            base = child.base if isinstance(child, TrainedLora) else child
            yield f"{path}.weight", child.merged() if isinstance(child, TrainedLora) else child.dequantize()
            if base.bias is not None:
                yield f"{path}.bias", base.bias
        else:
            yield from plain_weights(child, f"{path}.")
    yield from ((f"{prefix}{name}", parameter.detach()) for name, parameter in module.named_parameters(recurse=False))


# --- a teacher's answers to all prompts


@dataclass(frozen=True)
class Answered(Totals):
    """How far a teacher is: num_rows prompts."""


@dataclass(frozen=True)
class Prompts:
    """Where they come from: the rows of `data`, read as training reads them."""

    data: Sequence[str]
    schema: str | None = None
    columns: Columns = None
    template: str | None = None


def teacher_answers(
    path: Path,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    device: str | torch.device,
    dtype: str | torch.dtype,
    on_progress: Callable[[str, Totals], None] | None = None,
) -> Path:
    """A file of chats: the prompt of each row and what the model at `path` answers (greedily). Written once for the
    same model, data and options; one that was interrupted goes on. `on_progress` gets the model's name, and Answered.

    An answer is to what stands before the row's first one. Answers without an end in `max_new_tokens` are left out:
    they would teach to stop in the middle. Raises UnsupportedError for rows that are no chats, FormatError when no
    answer is left, and what reading the rows raises."""
    sources = parse_sources(prompts.data)
    if weighted := [source for source in sources if source.weight is not None]:
        raise InvalidInputError(
            f"The teacher answers every prompt once, and {weighted[0].ref} has a weight.",
            hint="Leave the weights out, or leave out --distillation.sequence.",
            param="data",
        )
    files = [file for source in sources for file in open_dataset(source.ref, columns=prompts.columns)]
    facts = {
        "version": _VERSION,
        "data": [file.digest() for file in files],
        "model": _fingerprint(path),
        "schema": prompts.schema,
        "columns": dict(columns) if isinstance(columns := prompts.columns, Mapping) else columns,
        "template": prompts.template,
        "max_new_tokens": max_new_tokens,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    final = settings().home / "cache" / "answers" / f"{key}.jsonl"
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_suffix(".lock")):
        if not final.exists():
            rows = (
                read(schema, fields, f"{file.name}:{line}")
                for file in files
                for schema in [schema_of(file, prompts.schema)]
                for line, fields in file.rows()
            )
            part = final.with_suffix(".jsonl.part")
            _write_part(part, path, rows, prompts.template, max_new_tokens, device, dtype, on_progress)
            _finish(part, final, max_new_tokens)
    return final


def _fingerprint(path: Path) -> list[list[Any]]:
    """Of a model's files: names, sizes and times."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    kinds = (".safetensors", ".gguf", ".json", ".jinja")
    weights = [file for file in found if file.suffix in kinds and file.name != "llmasos.json"]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]


def _write_part(
    part: Path,
    path: Path,
    rows: Iterator[Example],
    template: str | None,
    max_new_tokens: int,
    device: str | torch.device,
    dtype: str | torch.dtype,
    on_progress: Callable[[str, Totals], None] | None,
) -> None:
    """Every row gets a line, whether its answer is used or not: so their number is the place."""
    done = _whole_lines(part)
    model = load_model(path, device=device, dtype=dtype)
    if model.tokenizer is None or model.config.is_encoder:
        raise UnsupportedError(f"{path.name} writes no text.", hint="Take a decoder as the teacher.")
    writer = Writer(model, EngineConfig(max_num_seqs=BATCH))
    asked = itertools.islice(rows, done, None)
    while batch := list(itertools.islice(asked, BATCH)):
        heads = [_head(example) for example in batch]
        ids = [_ids(example, model.tokenizer, template) for example in heads]
        fits = [at for at, one in enumerate(ids) if one and len(one) < model.config.context_length]
        answers = writer.write([ids[at] for at in fits], max_new_tokens=max_new_tokens, temperature=0.0)
        found = dict(zip(fits, answers, strict=True))
        lines = [_line(example, found.get(at), model.tokenizer, template) for at, example in enumerate(heads)]
        with part.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        done += len(batch)
        if on_progress is not None:
            on_progress(path.name, Answered(num_rows=done))
    del writer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _whole_lines(part: Path) -> int:
    """How many there are; one that was not finished is removed."""
    if not part.exists():
        return 0
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(part, len(whole))
    return whole.count(b"\n")


def _head(example: Example) -> Example:
    """The row up to its first answer."""
    if example.kind != "chat":
        raise UnsupportedError(
            f"The teacher answers prompts, and this is {example.kind} data.",
            hint="Give chats or prompts with their completions, or leave out --distillation.sequence.",
            param="data",
        )
    first = next(at for at, message in enumerate(example.messages) if message["role"] == "assistant")
    return replace(example, messages=example.messages[:first])


def _is_plain(example: Example, tokenizer: Tokenizer, template: str | None) -> bool:
    """The prompt is read as it is, as `data.Masker` does."""
    return example.is_plain and template is None and not tokenizer.chat_templates


def _ids(example: Example, tokenizer: Tokenizer, template: str | None) -> list[int]:
    if _is_plain(example, tokenizer, template):
        return tokenizer.encode(example.messages[0]["content"])
    if not example.messages:  # the row begins with an answer
        return []
    text = tokenizer.apply_chat_template(
        example.messages, tools=example.tools, add_generation_prompt=True, template=template
    )
    return tokenizer.encode(text, add_special_tokens=False)


def _line(example: Example, answer: Answer | None, tokenizer: Tokenizer, template: str | None) -> dict[str, Any]:
    if answer is None:
        return {"left_out": "prompt"}
    text = tokenizer.decode(id for id in answer.tokens if id not in tokenizer.eos_token_ids)
    if not answer.is_whole or not text.strip():
        return {"left_out": "empty" if answer.is_whole else "length"}
    if _is_plain(example, tokenizer, template):
        return {"prompt": example.messages[0]["content"], "completion": text}
    messages = [*example.messages, {"role": "assistant", "content": text.strip()}]
    return {"messages": messages, **({"tools": example.tools} if example.tools else {})}


def _finish(part: Path, final: Path, max_new_tokens: int) -> None:
    # not splitlines: answers hold Unicode's line separators, which JSON leaves as they are
    lines = part.read_text(encoding="utf-8").split("\n")[:-1] if part.exists() else []
    kept = [line for line in lines if not line.startswith('{"left_out"')]
    if not kept:
        raise FormatError(
            f"The teacher gave no whole answer to any of {len(lines):,} prompts in {max_new_tokens} tokens.",
            hint="Raise --distillation.max_new_tokens, or take a teacher that answers.",
        )
    if len(kept) < len(lines):
        _log.warning("The teacher's answers to %d of %d prompts are used; others have no end.", len(kept), len(lines))
    write_atomically(final, "".join(f"{line}\n" for line in kept))
    part.unlink()
