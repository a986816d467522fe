"""What a run is told: one set of names for Python, YAML, the command line and jobs over HTTP.

Two are needed, `model` and `data`; whatever is None is worked out by the plan and written into the run's config.yaml.
What is said must have an effect: see `_EFFECTS`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from llmasos.errors import InvalidInputError
from llmasos.formats.yaml import read_yaml

Method = Literal["pretrain", "sft", "distill"]
MAY_CHANGE = frozenset(
    {
        *("steps", "max_minutes", "save_every", "evaluate_every", "keep", "prompts", "trackers", "install", "merge"),
        *("gpus", "parallel", "tensor_parallel_size", "device", "compile", "recompute", "max_memory"),
        *("resume", "name", "output"),
    }
)
"""What a run that goes on may be told anew."""
LIKE = "`model: smollm2`"
"""A line of a run's file."""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_sound(cls, value: Any, info: ValidationInfo) -> Any:
        """true is no 1, an empty text is none, and a group of nothing (`lora:` in YAML) is one."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("should be no switch")
        if value == "":
            raise ValueError("should not be empty")
        return {} if value is None and isinstance(kind, type) and issubclass(kind, _Group) else value


class Lora(_Group):
    """The adapter of tuning="lora" and "qlora" (arXiv:2106.09685), see `train.lora.LoraOptions`."""

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    """Names of Hugging Face modules (q_proj ...); empty: all linear layers of the blocks."""
    rslora: bool = False
    dora: bool = False


class Distillation(_Group):
    """Of method="distill"; `model` is the student then."""

    teacher: str | None = None
    """A model in the library, a folder, a reference."""
    keep_layers: int | tuple[int, ...] | None = None
    """Make the student of these layers of the teacher (a number: evenly spread), when `model` is None."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Of "jsd": 0 would be forward KL, 1 reverse KL (arXiv:2306.13649)."""
    temperature: float = Field(default=1.0, gt=0)
    weight: float = Field(default=0.5, ge=0, le=1)
    """Of the divergence; cross-entropy of the data has the rest."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Of 1 - cosine of the last hidden states, where both models are of one width."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """The share of steps whose answers the student writes itself (GKD, arXiv:2306.13649)."""
    sequence: bool = False
    """The teacher writes the answers, once, before training (sequence-level, arXiv:1606.07947)."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Of answers that are written for on_policy and sequence."""


class TrainConfig(_Group):
    method: Method = "sft"
    model: str | None = None
    """To begin with: in the library, a folder, a reference. None: pretrain makes one of `depth`, distill of the
    teacher."""
    data: tuple[str, ...] = ()
    """Files, folders, hf: names, datasets in the library; each with =WEIGHT or none."""
    name: str | None = None
    """Of the run, and of what it makes in the library; default: model and method."""
    output: Path | None = None
    """Folder of the run; default: runs/NAME of the home."""

    # --- what is trained
    tuning: Literal["full", "lora", "qlora"] | None = None
    """Default: lora for sft, full for pretrain and distill."""
    lora: Lora = Lora()
    quantization: Literal["nf4", "int8", "int4"] = "nf4"
    """Of the frozen weights of tuning="qlora"."""
    depth: int | None = Field(default=None, ge=1, le=64)
    """Of pretrain: the one dial. Width, heads, batch, rate and tokens follow."""
    vocab_size: int = Field(default=32_768, ge=300)
    """Of the tokenizer that pretrain makes, where `tokenizer` is None."""
    tokenizer: str | None = None
    """Of pretrain: a model or folder whose tokenizer is used."""
    distillation: Distillation = Distillation()

    # --- data
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of the longest sample; default: the model's context, at most 2048 and what a step reads."""
    overlong: Literal["split", "refuse", "truncate", "drop"] | None = None
    validation: float = Field(default=0.02, ge=0, lt=1)
    """The share of rows held out, of which the loss is measured; 0: none."""
    validation_data: tuple[str, ...] = ()
    """Files of held-out rows instead."""
    schema_: str | None = Field(default=None, alias="schema")
    columns: dict[str, str] | tuple[str, ...] | None = None
    template: str | None = None
    """Path of a chat template (Jinja), or its text, instead of the tokenizer's."""
    seed: int = 0

    # --- steps
    epochs: float | None = Field(default=None, gt=0)
    """Default: 1, or what `steps` need."""
    steps: int | None = Field(default=None, ge=1)
    batch_tokens: int | None = Field(default=None, ge=2)
    """Tokens of one step of the optimizer, over all GPUs and micro-batches."""
    micro_batch_tokens: int | None = Field(default=None, ge=2)
    """Tokens that one GPU reads at once; default: the most that fit."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] | None = None
    """Default: adamw; muon for pretrain."""
    lr: float | None = Field(default=None, gt=0)
    """The highest; default by method and tuning: 2e-4 for adapters, 1e-5 for all weights, by depth for pretrain."""
    weight_decay: float | None = Field(default=None, ge=0)
    max_norm: float = Field(default=1.0, ge=0)
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup: float = Field(default=0.03, ge=0, le=1)
    cooldown: float = Field(default=0.2, ge=0, le=1)

    # --- machine
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the computation; weights that are trained are float32."""
    gpus: int | None = Field(default=None, ge=1)
    """Processes, one on each GPU (or CPU, with device="cpu"); default: 1, or what torchrun says."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)
    compile: bool | None = None
    """Default: on GPUs."""
    recompute: bool | None = None
    """Activation checkpointing; default: where the memory asks for it."""
    max_memory: float | None = Field(default=None, gt=0)
    """GiB of one device that may be used; default: what is free."""

    # --- keeping and seeing
    save_every: int | None = Field(default=None, ge=0)
    """Steps between checkpoints; default: a tenth of the run, 0: only at its end."""
    evaluate_every: int | None = Field(default=None, ge=0)
    """Steps between evaluations; default: a tenth of the run, 0: only before and after."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints."""
    resume: bool = False
    """Go on with the run of this name, if there is one."""
    max_minutes: float = Field(default=0.0, ge=0)
    """The run saves and ends then; 0: no limit."""
    prompts: tuple[str, ...] = ()
    """What the model is asked at every evaluation."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    install: bool = True
    """Put the result into the library, where it serves at once."""
    merge: bool = False
    """Export an adapter as a whole model, too."""

    @field_validator("data", "validation_data", "prompts", "trackers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        if self.tuning in ("lora", "qlora") and self.method == "pretrain" and not self.model:
            raise InvalidInputError(
                f"tuning={self.tuning} needs a model to begin with.",
                hint="Give model, or use tuning=full.",
                param="tuning",
            )
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise InvalidInputError(
                f"warmup={self.warmup} and cooldown={self.cooldown} are shares of one run, and more than all of it.",
                hint="Use shares whose sum is at most 1.",
                param="warmup",
            )
        said = _said(self)
        if info.context is not None:
            said = {name: value for name, value in said.items() if name.split(".")[0] in info.context["new"]}
        _check_effects(self, said)
        return self

    @property
    def has_adapter(self) -> bool:
        """An adapter is trained, and no other weights."""
        return self.method == "sft" if self.tuning is None else self.tuning != "full"

    @classmethod
    def of(cls, file: Path | str | None = None, **overrides: Any) -> TrainConfig:
        """From a YAML file and what overrides it; nested values may be given as `{"lora": {"r": 8}}` or "lora.r": 8.

        Raises NotFoundError, FormatError (the YAML), InvalidInputError (a value that is wrong or would be ignored, with
        its name)."""
        return cls._read(file, overrides)

    @classmethod
    def saved(cls, file: Path, **changes: Any) -> TrainConfig:
        """From the config.yaml of a run, where every option is said; of what is said anew alone an effect is asked."""
        return cls._read(file, changes, new={name.split(".")[0] for name in changes})

    @classmethod
    def _read(
        cls, file: Path | str | None, overrides: Mapping[str, Any], new: Collection[str] | None = None
    ) -> TrainConfig:
        values: dict[str, Any] = {}
        for given in (read_yaml(Path(file), like=LIKE, is_dotted=True) if file is not None else {}, overrides):
            for name, value in given.items():
                _put(values, str(name).split("."), value)
        try:
            return cls.model_validate(values, context=None if new is None else {"new": new})
        except ValidationError as e:
            raise _explained(e, values.get("method", "sft")) from e

    @classmethod
    def parsed(cls, text: str) -> TrainConfig:
        """From the JSON of options that were checked in another process."""
        return cls.model_validate_json(text, context={"new": ()})

    def save(self, path: Path) -> None:
        import yaml

        from llmasos.models.load import write_atomically

        write_atomically(path, yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False))


class _Effect(NamedTuple):
    option: str
    """Or a group of them."""
    is_there: Callable[[TrainConfig], bool]
    why_not: str
    instead: str = ""


def _is_scratch(config: TrainConfig) -> bool:
    return config.method == "pretrain" and not config.model


def _asks_teacher(config: TrainConfig) -> bool:
    own = config.distillation
    return bool(own.weight or own.hidden_weight or own.on_policy)


def _is_compared(config: TrainConfig) -> bool:
    return bool(config.distillation.weight or config.distillation.on_policy)


def _processes(config: TrainConfig) -> int:
    return config.gpus or int(os.environ.get("WORLD_SIZE", "1"))


_SCRATCH = "Use method=pretrain without a model"
_EFFECTS = (
    _Effect("distillation", lambda c: c.method == "distill", "only distill has a teacher", "Use method=distill"),
    _Effect("lora", lambda c: c.has_adapter, "tuning=full trains all weights, without an adapter", "Use tuning=lora"),
    _Effect("merge", lambda c: c.has_adapter, "tuning=full makes a whole model in any case"),
    _Effect("quantization", lambda c: c.tuning == "qlora", "only tuning=qlora quantises weights", "Use tuning=qlora"),
    _Effect("depth", _is_scratch, "only a model from scratch is made of as many layers as one says", _SCRATCH),
    _Effect("tokenizer", _is_scratch, "only a model from scratch has another tokenizer than its own", _SCRATCH),
    _Effect("vocab_size", _is_scratch, "only for a model from scratch a tokenizer is made", _SCRATCH),
    _Effect("vocab_size", lambda c: not c.tokenizer, "a tokenizer is named, and none is made", "Leave tokenizer out"),
    _Effect("cooldown", lambda c: c.schedule == "wsd", "only schedule=wsd has one", "Use schedule=wsd"),
    _Effect("validation", lambda c: not c.validation_data, "validation_data names what is held out"),
    _Effect(
        "evaluate_every",
        lambda c: bool(c.validation or c.validation_data or c.prompts),
        "nothing is held out and nothing is asked",
        "Give validation, validation_data or prompts",
    ),
    _Effect("keep", lambda c: c.save_every != 0, "save_every=0 makes one checkpoint, at the end", "Give save_every"),
    _Effect(
        "parallel",
        lambda c: c.parallel == "auto" or _processes(c) > 1,
        "one process has nobody to share the work with",
        "Say gpus=N, or begin with torchrun",
    ),
    _Effect("distillation.keep_layers", lambda c: not c.model, "the student is a model of its own", "Leave model out"),
    _Effect(
        "distillation.teacher",
        lambda c: _asks_teacher(c) or c.distillation.sequence or not c.model,
        "with weight, hidden_weight and on_policy 0 it is never asked",
        "Use a weight above 0, or sequence=true",
    ),
    _Effect("distillation.divergence", _is_compared, "weight and on_policy are 0", "Use a weight above 0"),
    _Effect("distillation.temperature", _is_compared, "weight and on_policy are 0", "Use a weight above 0"),
    _Effect(
        "distillation.beta",
        lambda c: c.distillation.divergence == "jsd" and _is_compared(c),
        "it is of the divergence jsd",
        "Use divergence=jsd",
    ),
    _Effect(
        "distillation.max_new_tokens",
        lambda c: bool(c.distillation.on_policy or c.distillation.sequence),
        "no answers are written",
        "Use on_policy or sequence",
    ),
)
"""When options have an effect that do not always have one."""


def _said(group: _Group) -> dict[str, Any]:
    """The options that somebody gave, by their whole names, and that ask for something: not None, 0, false or empty."""
    found: dict[str, Any] = {}
    for name in type(group).model_fields:
        value = getattr(group, name)
        if name not in group.model_fields_set:
            continue
        if isinstance(value, _Group):
            found |= {f"{name}.{inner}": each for inner, each in _said(value).items()}
        elif value:
            found[name] = value
    return found


def _check_effects(config: TrainConfig, said: Mapping[str, Any]) -> None:
    for effect in _EFFECTS:
        for name, value in said.items():
            if (name == effect.option or name.startswith(f"{effect.option}.")) and not effect.is_there(config):
                instead = f"{effect.instead}, or leave {name} out." if effect.instead else f"Leave {name} out."
                raise InvalidInputError(f"{name}={value!r} has no effect: {effect.why_not}.", hint=instead, param=name)


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    [first, *rest] = path
    if rest or isinstance(value, dict):
        if values.get(first) is None:
            values[first] = {}
        inner = values[first]
        if not isinstance(inner, dict):
            raise InvalidInputError(f"{first} is {inner!r} and holds no names.", param=first)
        for name, each in {".".join(rest): value}.items() if rest else value.items():
            _put(inner, name.split("."), each)
    else:
        values[first] = value


_OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "n_epochs": "epochs",
    "max_steps": "steps",
    "batch_size": "batch_tokens",
    "max_seq_length": "max_length",
    "output_dir": "output",
    "rank": "lora.r",
    "teacher": "distillation.teacher",
}
"""What other programs call them."""


def _explained(e: ValidationError, method: Any) -> InvalidInputError:
    import difflib

    errors = e.errors(include_url=False)
    page = f"`llmasos train {method if method in get_args(Method) else 'sft'} --help`"
    name, value = _option(errors[0]["loc"]), errors[0]["input"]
    if errors[0]["type"] == "extra_forbidden":
        groups: dict[str, type[_Group]] = {"lora": Lora, "distillation": Distillation}
        known = [*TrainConfig.model_fields, *(f"{g}.{inner}" for g, of in groups.items() for inner in of.model_fields)]
        near = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"{page} lists them all."
        return InvalidInputError(f"A run has no option {name!r}.", hint=hint, param=name)
    wrong = dict.fromkeys(_wrong(one["msg"]) for one in errors if _option(one["loc"]) == name)
    what = ", or ".join(wrong).replace(", or should", ", or")
    return InvalidInputError(f"{name}={value!r} {what}.", hint=f"{page} tells of it.", param=name)


def _option(place: tuple[int | str, ...]) -> str:
    """The option that a place in the values is of; behind its name pydantic has places in it and names of types."""
    return ".".join(map(str, place[: 2 if place[0] in ("lora", "distillation") else 1]))


def _wrong(message: str) -> str:
    plain = message.removeprefix("Value error, ").replace("Input should", "should")
    plain = re.sub("valid dictionary( or instance of .*)?", "group of names and values", plain)
    return plain.replace("valid tuple", "list").removesuffix(".")


def how_to_resume(name: str | None) -> str:
    """What to do about a run whose processes are gone."""
    return (
        f"Go on from the last checkpoint with `llmasos train resume {name or 'NAME'}`, on another number of GPUs "
        "if need be."
    )
