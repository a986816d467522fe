"""From a run to what others load: a Hugging Face folder, a PEFT adapter, or an adapter folded into its model.

    RUN/checkpoints/000200 ──> RUN/model/    config.json  model*.safetensors  tokenizer, template, generation config
                           └─> RUN/adapter/  adapter_config.json  adapter_model.safetensors  tokenizer, template
                                   └─ linked into the library with a card that tells where it comes from

Only what was trained is read from the checkpoint, and an adapter needs no weights of its model: exporting one takes
milliseconds. A folder appears under its name when all of it is on the disk.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from llmasos import __version__
from llmasos.data import parse_sources
from llmasos.data.readers import open_dataset
from llmasos.errors import FormatError, InvalidInputError, LLMasOSError, NotFoundError
from llmasos.formats import sync
from llmasos.models.decoder import Decoder
from llmasos.models.load import LoadedModel, read_json
from llmasos.models.weights import tie
from llmasos.store import Card, Library, ensure
from llmasos.store.adapters import install_adapter
from llmasos.store.card import DataHash, Lineage
from llmasos.store.library import discard
from llmasos.store.trained import install_model
from llmasos.text import Tokenizer
from llmasos.train.checkpoint import Checkpoints, read_weights
from llmasos.train.config import TrainConfig
from llmasos.train.lora import add_lora, merge_lora, save_adapter
from llmasos.train.marks import check_way, mark, written
from llmasos.train.methods import Method, method_of
from llmasos.train.methods.base import lora_options

MODEL, ADAPTER = "model", "adapter"
"""Folders of a run."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

DType = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Exported:
    """`model`, `adapter`: the folders that were written. `installed`: the name in the library under which the result
    is served; None: it was not put there."""

    step: int
    dtype: str
    model: Path | None
    adapter: Path | None
    installed: str | None

    @property
    def folder(self) -> Path:
        """What serves."""
        found = self.model or self.adapter
        assert found is not None
        return found


def export_run(
    folder: Path,
    *,
    step: int | None = None,
    dtype: DType | None = None,
    merge: bool | None = None,
    install: bool | None = None,
    name: str | None = None,
    serves_as: str | None = None,
    output: Path | None = None,
) -> Exported:
    """Export the run in `folder`, as it was at `step` (default: the latest checkpoint).

    `dtype`: of a whole model; default: float32 if the run computed in it by option, else bfloat16. `merge`: fold an
    adapter into its model; default: the run's option, and always where no engine could serve the adapter beside its
    model (DoRA, a chat template of the run's own). `install`: into the library, under `name` (default: the run's).
    `serves_as`: see `Card`. `output`: where `model` and `adapter` are written; default: the run's folder.

    Raises NotFoundError for a run or step that there is not, InvalidInputError for a folder in the way that is not of
    this run, FormatError for a damaged checkpoint, StoreError for a name that is taken, DiskFullError."""
    run = Run.open(folder, step)
    config = run.config
    is_full = config.tuning == "full"
    if merge and is_full:
        raise InvalidInputError(
            "merge has no effect: all weights were trained, and there is no adapter.",
            hint="Leave it out.",
            param="merge",
        )
    merge = run.must_merge or (config.merge if merge is None else merge)
    if dtype is not None and not (is_full or merge):
        raise InvalidInputError(
            f"dtype={dtype!r} has no effect: an adapter is written as it was trained.",
            hint="Leave it out, or write a whole model with merge.",
            param="dtype",
        )
    dtype = _dtype(dtype, config)
    output = output or folder
    own = config.name or folder.name
    for one in [*([] if is_full else [ADAPTER]), *([MODEL] if is_full or merge else [])]:
        check_way(output / one, own)
    model = adapter = None
    if not is_full:
        tuned = run.with_adapter()
        with _whole(output / ADAPTER, own) as staged:
            save(tuned, staged)
        adapter = output / ADAPTER
    if adapter is None or merge:
        merged = run.merged(DTYPES[dtype])
        with _whole(output / MODEL, own) as staged:
            merged.save_pretrained(staged)
        model = output / MODEL
    made = Exported(run.step, dtype, model, adapter, None)
    if not (config.install if install is None else install):
        return made
    card = run.card(name or own, serves_as)
    if model is not None:
        install_model(model, card)
    else:
        install_adapter(made.folder, card)
    return replace(made, installed=serves_as or card.name)


@dataclass(frozen=True)
class Run:
    """A run at one of its checkpoints, read from the disk."""

    folder: Path
    config: TrainConfig
    method: Method
    checkpoint: Path
    step: int

    @classmethod
    def open(cls, folder: Path, step: int | None = None) -> Run:
        """Raises NotFoundError, FormatError."""
        file = folder / "config.yaml"
        if not file.is_file():
            raise NotFoundError(f"{folder} is no run: it has no config.yaml.", hint="See `llmasos runs`.")
        config = TrainConfig.saved(file, output=folder)
        steps = checkpoints_of(folder)
        if not steps:
            raise NotFoundError(
                f"The run {config.name!r} has no checkpoint yet.",
                hint=f"One is made every {config.save_every or 0} steps, and when it is stopped.",
            )
        step = max(steps) if step is None else step
        if step not in steps:
            raise NotFoundError(
                f"The run {config.name!r} has no checkpoint of step {step}.",
                hint=f"It has: {', '.join(map(str, sorted(steps)))}.",
            )
        return cls(folder, config, method_of(config), steps[step], step)

    @property
    def must_merge(self) -> bool:
        """No engine serves this adapter beside its model as it was trained."""
        config = self.config
        return config.tuning != "full" and (config.lora.dora or config.template is not None or config.model is None)

    def weights(self) -> Mapping[str, Tensor]:
        """What was trained, by its names in the trained module. Raises FormatError."""
        try:
            return read_weights(self.checkpoint)
        except LLMasOSError:
            raise
        except Exception as e:  # safetensors, pickles and collectives have errors of their own
            raise FormatError(
                f"The checkpoint {self.checkpoint} can't be read: {e}.",
                hint="Export an earlier one with --step, or go on with the run to make another.",
            ) from e

    def tokenizer(self) -> Tokenizer:
        """With the chat template that the run was trained with."""
        tokenizer, template = self.method.tokenizer, self.config.template
        if template is None:
            return tokenizer
        tokenizer.chat_templates["default"] = tokenizer.chat_templates.get(template, template)
        return tokenizer

    def base(self) -> Path | None:
        """What was trained on; None: from scratch."""
        return ensure(self.config.model) if self.config.model else None

    def with_adapter(self) -> LoadedModel:
        """The adapter as it was trained, beside layers without weights."""
        model = self._skeleton()
        add_lora(model, lora_options(self.config))
        self._fill(model.module)
        return model

    def merged(self, dtype: torch.dtype) -> LoadedModel:
        """The whole trained model on the CPU, plain layers, its weights rounded to `dtype`."""
        if self.config.tuning == "full":
            model = self._skeleton()
            self._fill(model.module, dtype)
            tie(model.config, model.module, None)
        else:
            # rounding of QLoRA's frozen weights was a way to train, not a part of the model
            plain = method_of(self.config.model_copy(update={"tuning": "lora"}))
            model = plain.weights(torch.device("cpu"), dtype)
            model.tokenizer = self.tokenizer()
            self._fill(model.module)
            merge_lora(model)
        model.module.requires_grad_(False).eval()
        return model

    def _skeleton(self) -> LoadedModel:
        """The model without weights."""
        with torch.device("meta"):
            module = Decoder(self.method.shape)
        base = self.base()
        generation = base / "generation_config.json" if base is not None else None
        return LoadedModel(
            module.requires_grad_(self.config.tuning == "full"),
            self.method.shape,
            self.tokenizer(),
            base or self.folder / MODEL,
            read_json(generation) if generation is not None and generation.is_file() else {},
        )

    def _fill(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Put the trained weights in the place of the module's. Raises FormatError where they are others."""
        weights = dict(self.weights())
        own = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if weights.keys() != own.keys() or any(weights[n].shape != own[n].shape for n in own):
            raise FormatError(
                f"{self.checkpoint} holds other weights than its config.yaml tells of.",
                hint="Restore the run's folder as the run has written it.",
            )
        for name, parameter in own.items():
            owner, _, leaf = name.rpartition(".")
            made = nn.Parameter(weights.pop(name).to(dtype or parameter.dtype), requires_grad=False)
            module.get_submodule(owner)._parameters[leaf] = made

    def card(self, name: str, serves_as: str | None = None) -> Card:
        config, base = self.config, self._base_name()
        lineage = Lineage(
            run=str(self.folder),
            method=config.method,
            tuning=config.tuning or "full",
            base=base,
            step=self.step,
            data=list(_hashes(config)),
            version=__version__,
        )
        return Card(name=name, base=base, serves_as=serves_as, lineage=lineage, licence=self._licence())

    def _base_name(self) -> str | None:
        """The model as the library calls it, or the path of one elsewhere."""
        base = self.base()
        if base is None:
            return None
        folder, root = base if base.is_dir() else base.parent, Library().root
        return folder.name if folder.parent == root else str(base)

    def _licence(self) -> str | None:
        """The base's: what was made of it is under the same."""
        try:
            return Library().get(self._base_name() or "").licence
        except LLMasOSError:
            return None


def save(model: LoadedModel, folder: Path) -> None:
    """The adapter of a model, with its tokenizer and template."""
    save_adapter(model, folder)
    assert model.tokenizer is not None
    model.tokenizer.save_pretrained(folder)


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """The whole checkpoints of a run, by step."""
    found = Checkpoints(folder / "checkpoints").folder
    if not found.is_dir():
        return {}
    return {int(one.name): one for one in found.iterdir() if one.name.isdecimal() and one.is_dir()}


def _dtype(wanted: str | None, config: TrainConfig) -> DType:
    if wanted is None:
        return "float32" if config.dtype == "float32" else "bfloat16"
    if wanted not in DTYPES:
        raise InvalidInputError(f"dtype={wanted!r} can't be exported.", hint=f"Use {', '.join(DTYPES)}.", param="dtype")
    return wanted  # type: ignore[return-value]


def _hashes(config: TrainConfig) -> Iterator[DataHash]:
    """Of the data that is still there."""
    for source in parse_sources(config.data):
        try:
            for file in open_dataset(source.ref, columns=config.columns):
                yield DataHash(ref=file.name, digest=file.digest())
        except (LLMasOSError, OSError):
            yield DataHash(ref=str(source.ref), digest="")


@contextmanager
def _whole(folder: Path, run: str) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block ends well, and is marked as the
    run's."""
    staged = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.tmp")
    with written(folder, "`llmasos train export` then does it from the checkpoint"):
        staged.mkdir(parents=True)
        try:
            yield staged
            mark(staged, run)
            for file in staged.rglob("*"):
                if file.is_file():
                    sync(file)
            discard(folder)
            os.replace(staged, folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
