"""Models made of models, without training: adapters folded in, averages, and what others have learnt added up.

    linear            Σ wᵢ xᵢ / Σ wᵢ                                             (model soups, arXiv:2203.05482)
    slerp             two models along the arc between them, tensor by tensor
    task_arithmetic   base + Σ wᵢ (xᵢ - base)                                    (arXiv:2212.04089)
    ties              the same with the `density` largest changes of each, those against the majority's sign left out,
                      and the rest averaged                                      (arXiv:2306.01708)

Weights are read, merged in float32 and written one tensor after the other: models larger than the memory can be merged.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from llmasos import __version__
from llmasos.errors import InvalidInputError, LLMasOSError, UnsupportedError
from llmasos.formats.safetensors import stream_safetensors
from llmasos.models.config import ModelConfig
from llmasos.models.encoder import pooling_defaults, pooling_files
from llmasos.models.families import config_to_hf, family_of
from llmasos.models.families.mapping import to_hf
from llmasos.models.load import LoadedModel, WeightReader, check_expressible, read_json, write_atomically
from llmasos.models.lora import CONFIG, Adapter, part_rows, read_adapter
from llmasos.settings import settings
from llmasos.store import Card, Library, ensure
from llmasos.store.adapters import find_adapter
from llmasos.store.card import Lineage
from llmasos.store.library import discard
from llmasos.store.trained import check_free, install_model
from llmasos.store.transfer import disk_errors
from llmasos.text import Tokenizer, load_tokenizer
from llmasos.train.marks import check_way, mark

Method = Literal["linear", "slerp", "task_arithmetic", "ties"]
DENSITY = 0.2
"""Of "ties" where nothing is said: what its authors found."""
MERGE = "merge"
"""Stands in the folders that were made here."""
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ON_ONE_LINE = 0.9995
"""Cosine from which an arc is no different from its chord."""


@dataclass(frozen=True)
class Merged:
    path: Path
    """The Hugging Face folder."""
    installed: str | None
    """The name in the library."""


def merge(
    models: Sequence[str | Path],
    *,
    method: Method = "linear",
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    density: float | None = None,
    dtype: str = "auto",
    name: str | None = None,
    output: Path | str | None = None,
) -> Merged:
    """One model of several; of a model and its adapters; or of an adapter and the model that it was made for.

    models: in the library, folders, references; all but the first may be adapters, which are folded in then. weights:
    one each (of the adapters: how strongly they act); default: equal shares, and 1 for adapters and what is added to
    `base`. base: what the models of "task_arithmetic" and "ties" were trained from. density: the share of changes that
    "ties" keeps. dtype: auto (the first model's), bfloat16, float16, float32. name: in the library; output: a folder
    instead of it, or as well. The tokenizer is that of the first model with a chat template.

    Raises InvalidInputError, NotFoundError; UnsupportedError for models that differ in more than their weights."""
    target = Path(output) if output is not None else None
    if name is None and target is None:
        raise InvalidInputError(
            "The merged model has no name.", hint="Give --name NAME, or --output FOLDER.", param="name"
        )
    if target is not None:
        check_way(target, MERGE)
    if method not in get_args(Method):
        raise InvalidInputError(
            f"method={method!r} is not known.", hint=f"Use {', '.join(get_args(Method))}.", param="method"
        )
    paths, adapters = _sorted_out(models, method)
    shares = _checked(weights, len(adapters) or len(paths), method, has_adapters=bool(adapters))
    card = None if name is None else _card(name, "adapters" if adapters else method, models, shares, base)
    if card is not None:
        check_free(card)
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(WeightReader(path))) for path in paths]
        start = None if base is None else stack.enter_context(closing(WeightReader(ensure(base))))
        _check_base(method, start, density)
        tokenizers = [load_tokenizer(reader.path) for reader in readers]
        _check_alike([*readers, *([start] if start else [])], tokenizers)
        if adapters:
            made = _folded(readers[0], adapters, shares)
        else:
            made = _combined(readers, start, _recipe(method, shares, DENSITY if density is None else density))
        chosen = next((at for at, one in enumerate(tokenizers) if one.chat_template), 0)
        with _folder(target) as folder:
            _write(folder, readers[0], made, dtype)
            tokenizers[chosen].save_pretrained(folder)
            _copy_generation(readers[chosen].path, folder)
            path = target or folder
            if target is not None:
                _replace(folder, target)
            if card is not None:
                path = install_model(path, card)
    return Merged(path, name)


# --- what is asked for


def _sorted_out(models: Sequence[str | Path], method: str) -> tuple[list[Path], list[Path]]:
    """Models and adapters. An adapter alone brings its model."""
    if not models:
        raise InvalidInputError("No model is named.", hint="llmasos train merge A B --name NAME", param="models")
    adapters = [(ref, folder) for ref in models if (folder := _adapter(ref)) is not None]
    others = [ref for ref in models if _adapter(ref) is None]
    if not adapters:
        if len(models) < 2:
            raise InvalidInputError(f"{models[0]} alone is merged already.", hint="Name two models.", param="models")
        return [ensure(ref) for ref in others], []
    if method != "linear":
        raise InvalidInputError(
            f"{adapters[0][0]} is an adapter, which is folded in, and {method} is for models.",
            hint="Leave out --method, or merge whole models.",
            param="method",
        )
    if not others:
        others = [_base_of(adapters[0][0], adapters[0][1])]
    if len(others) > 1 or (len(models) > 1 and _adapter(models[0]) is not None and others[0] in models):
        raise InvalidInputError(
            f"Adapters are folded into one model, and {len(others)} are named, or it does not come first.",
            hint="llmasos train merge MODEL ADAPTER ... --name NAME",
            param="models",
        )
    return [ensure(others[0])], [folder for _, folder in adapters]


def _adapter(ref: str | Path) -> Path | None:
    if (Path(ref) / CONFIG).is_file():
        return Path(ref)
    found = find_adapter(str(ref))
    return found.path if found is not None else None


def _base_of(ref: str | Path, folder: Path) -> str:
    installed = find_adapter(str(ref))
    base = installed.base if installed is not None else read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InvalidInputError(
            f"The adapter {ref} does not say which model it belongs to.",
            hint="llmasos train merge MODEL ADAPTER --name NAME",
            param="models",
        )
    return base


def _checked(weights: Sequence[float] | None, num: int, method: Method, *, has_adapters: bool) -> list[float]:
    if method == "slerp" and not has_adapters and num != 2:
        raise InvalidInputError(
            f"slerp is between two models, and {num} are named.", hint="Use linear for more.", param="method"
        )
    if weights is None:
        is_added = has_adapters or method in ("task_arithmetic", "ties")
        return [1.0 if is_added else 1 / num] * num
    if len(weights) != num:
        what = "adapters" if has_adapters else "models"
        raise InvalidInputError(f"{len(weights)} weights are given for {num} {what}.", param="weights")
    is_average = not has_adapters and method in ("linear", "slerp")
    if not all(math.isfinite(w) for w in weights) or (is_average and (sum(weights) <= 0 or min(weights) < 0)):
        raise InvalidInputError(
            f"The weights {', '.join(map(str, weights))} are no shares.",
            hint="Use numbers from 0, e.g. 0.7,0.3.",
            param="weights",
        )
    return [w / sum(weights) for w in weights] if is_average else list(weights)


def _check_base(method: Method, base: WeightReader | None, density: float | None) -> None:
    needs = method in ("task_arithmetic", "ties")
    if needs != (base is not None):
        raise InvalidInputError(
            f"{method} needs the model that the others were trained from."
            if needs
            else "Only task_arithmetic and ties have a base.",
            hint="Give --base MODEL." if needs else "Leave it out, or choose one of these methods.",
            param="base",
        )
    if density is not None and method != "ties":
        raise InvalidInputError(
            f"density={density} has no effect: only ties has one.",
            hint="Leave it out, or use method=ties.",
            param="density",
        )
    if density is not None and not 0 < density <= 1:
        raise InvalidInputError(f"density={density} is no share above 0.", hint="Use e.g. 0.2.", param="density")


def _check_alike(readers: Sequence[WeightReader], tokenizers: Sequence[Tokenizer]) -> None:
    first = readers[0]
    for other in readers[1:]:
        if names := _differences(first.config, other.config):
            shown = ", ".join(f"{n} ({_shown(first.config, n)}, {_shown(other.config, n)})" for n in names[:4])
            raise UnsupportedError(
                f"{first.path.name} and {other.path.name} are models of different kinds: {shown}.",
                hint="Only models that differ in nothing but their weights can be merged.",
            )
    vocabulary = tokenizers[0].backend.get_vocab(with_added_tokens=True)
    for reader, tokenizer in zip(readers[1:], tokenizers[1:], strict=False):
        if tokenizer.backend.get_vocab(with_added_tokens=True) != vocabulary:
            raise UnsupportedError(
                f"{first.path.name} and {reader.path.name} have different vocabularies.",
                hint="Merge models that were trained from the same one.",
            )


def _shown(config: ModelConfig, name: str) -> str:
    return str(getattr(config, name))[:40]


def _differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields that change arithmetic or shapes. The layout of GGUF and the length of the context may differ."""
    free = ("context_length", "rope_interleaved")
    return [f.name for f in fields(a) if f.compare and f.name not in free and not _same(a, b, f.name)]


def _same(a: ModelConfig, b: ModelConfig, name: str) -> bool:
    x, y = getattr(a, name), getattr(b, name)
    if isinstance(x, float) and isinstance(y, float):  # GGUF keeps single precision
        return math.isclose(x, y, rel_tol=1e-5)
    return bool(x == y)


# --- arithmetic


Recipe = Callable[[Iterator[Tensor], Tensor | None], Tensor]
"""One tensor of each model, read one after the other, and the base's -> the merged one."""


def _recipe(method: Method, weights: Sequence[float], density: float) -> Recipe:
    if method == "slerp":
        return lambda tensors, base: slerp(next(tensors), next(tensors), weights[1])
    if method == "ties":
        return lambda tensors, base: ties(_given(base), [x - _given(base) for x in tensors], weights, density)
    if method == "task_arithmetic":
        return lambda tensors, base: _sum(_given(base), (x - _given(base) for x in tensors), weights)
    return lambda tensors, base: _sum(None, tensors, weights)


def _given(base: Tensor | None) -> Tensor:
    assert base is not None
    return base


def _sum(start: Tensor | None, tensors: Iterator[Tensor], weights: Sequence[float]) -> Tensor:
    total = start.clone() if start is not None else None
    for x, weight in zip(tensors, weights, strict=True):
        total = x * weight if total is None else total.add_(x, alpha=weight)
    assert total is not None
    return total


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a (t = 0) to b (t = 1) along the arc that their directions span; along the chord where they have none, or
    the same."""
    norms = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    cosine = float((a.flatten() @ b.flatten()) / (norms[0] * norms[1])) if min(norms) > 0 else 1.0
    if abs(cosine) > _ON_ONE_LINE:
        return a.lerp(b, t)
    angle = math.acos(cosine)
    return a * (math.sin((1 - t) * angle) / math.sin(angle)) + b * (math.sin(t * angle) / math.sin(angle))


def ties(base: Tensor, changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """base + the weighted mean, element by element, of the trimmed changes that have the sign of their weighted sum."""
    trimmed = [_trimmed(change, density) * weight for change, weight in zip(changes, weights, strict=True)]
    sign = torch.stack(trimmed).sum(0).sign()
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for change, weight in zip(trimmed, weights, strict=True):
        agrees = (change.sign() == sign) & (change != 0)
        total += torch.where(agrees, change, 0.0)
        count += agrees * abs(weight)
    return base + total / count.clamp_min(1e-12)


def _trimmed(change: Tensor, density: float) -> Tensor:
    """The largest ones by size; the others become zero."""
    num = max(1, round(density * change.numel()))
    if num >= change.numel():
        return change
    least = change.abs().flatten().kthvalue(change.numel() - num + 1).values
    return torch.where(change.abs() >= least, change, 0.0)


def _combined(
    readers: Sequence[WeightReader], base: WeightReader | None, recipe: Recipe
) -> Iterator[tuple[str, Tensor]]:
    """Merged tensors under Hugging Face's names. All are split before they are merged: files differ in layout."""
    for name in readers[0].names:
        start = None if base is None else dict(_split(base, name, base.read(name)))
        parts = [_split(reader, name, reader.read(name)) for reader in readers]
        for theirs in list(parts[0]):
            yield theirs, recipe((part.pop(theirs) for part in parts), None if start is None else start[theirs])


def _split(reader: WeightReader, name: str, tensor: Tensor) -> dict[str, Tensor]:
    return dict(to_hf(family_of(reader.config), reader.config, {name: tensor}))


def _folded(reader: WeightReader, adapters: Sequence[Path], weights: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    model = LoadedModel(reader.module, reader.config, None, reader.path)
    read = [read_adapter(folder, model) for folder in adapters]
    return _with_adapters(reader, model, read, weights)


def _with_adapters(
    reader: WeightReader, model: LoadedModel, adapters: Sequence[Adapter], weights: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    for name in reader.names:
        tensor = reader.read(name)
        layer, _, leaf = name.rpartition(".")
        for adapter, weight in zip(adapters, weights, strict=True):
            if leaf == "weight" and (lora := adapter.layers.get(layer)) is not None:
                tensor = tensor.clone()  # a mapped file's
                for part, rows in enumerate(part_rows(model, layer, len(tensor))[1]):
                    tensor[rows] += weight * (lora.b[rows] @ lora.a[part])
        yield from _split(reader, name, tensor).items()


# --- the result


def _write(folder: Path, reader: WeightReader, tensors: Iterator[tuple[str, Tensor]], dtype: str) -> None:
    check_expressible(reader.config)
    kind = _dtype(dtype, reader)
    names = set(reader.names)
    state = {n: p.to(kind) for n, p in reader.module.named_parameters() if n in names}
    like = dict(to_hf(family_of(reader.config), reader.config, state))
    stream_safetensors(like, tensors, folder)
    config = config_to_hf(reader.config) | {"dtype": str(kind).removeprefix("torch.")}
    write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    if reader.config.is_encoder:
        for name, content in pooling_files(pooling_defaults(reader.path), reader.config.hidden_size).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_atomically(folder / name, json.dumps(content, indent=2) + "\n")


def _dtype(wanted: str, reader: WeightReader) -> torch.dtype:
    if wanted == "auto":
        stored = Counter(info.dtype for info in reader.checkpoint.tensors.values() if len(info.shape) > 1)
        return _STORED.get(stored.most_common(1)[0][0], torch.bfloat16)
    known = {str(kind).removeprefix("torch."): kind for kind in _STORED.values()}
    if wanted not in known:
        raise InvalidInputError(
            f"dtype={wanted!r} can't be written.", hint=f"Use auto, {', '.join(known)}.", param="dtype"
        )
    return known[wanted]


def _copy_generation(path: Path, folder: Path) -> None:
    file = path / "generation_config.json"
    if path.is_dir() and file.is_file():
        write_atomically(folder / file.name, file.read_text(encoding="utf-8"))


@contextmanager
def _folder(target: Path | None) -> Iterator[Path]:
    """To write into: beside `target`, or on the disk of the library, which links the files from there."""
    parent = target.absolute().parent if target is not None else settings().home / "cache"
    folder = parent / f".merge-{secrets.token_hex(4)}.tmp"
    with disk_errors(folder):
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, target: Path) -> None:
    """Move what was made into place, over what an earlier merge made, and over nothing else."""
    check_way(target, MERGE)
    mark(folder, MERGE)
    discard(target)
    os.replace(folder, target)


def _card(name: str, how: str, models: Sequence[str | Path], shares: Sequence[float], base: str | Path | None) -> Card:
    rounded = [f"{share:.4g}" for share in shares]
    if how == "adapters":
        rounded = ["", *rounded] if len(models) > len(shares) else rounded
    parts = " ".join(f"{model}={share}" if share else str(model) for model, share in zip(models, rounded, strict=True))
    made_of = f"merge {parts}" + (f" base={base}" if base else "")
    lineage = Lineage(
        run=made_of,
        method="merge",
        tuning=how,
        base=str(base or models[0]),
        step=0,
        version=__version__,
    )
    licences = {licence for model in models if (licence := _licence(str(model)))}
    return Card(name=name, source=made_of, lineage=lineage, licence=" AND ".join(sorted(licences)) or None)


def _licence(model: str) -> str | None:
    try:
        return Library().get(model).licence
    except LLMasOSError:
        return None
