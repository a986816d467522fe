"""What a run is told: one set of names for Python, YAML, the command line and jobs over HTTP.

Two are needed, `model` and `data`; whatever is None is worked out by the plan and written into the run's config.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmasos.errors import FormatError, InvalidInputError, NotFoundError

Method = Literal["pretrain", "sft", "distill"]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(_Group):
    """The adapter of tuning="lora" and "qlora" (arXiv:2106.09685), see `train.lora.LoraOptions`."""

    r: int = Field(default=16, ge=1)
    alpha: float = 32.0
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
    """Tokens of the longest sample; default: the model's context, at most 2048."""
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
    """Go on with the run of this name."""
    max_minutes: float = Field(default=0.0, ge=0)
    """The run saves and ends then; 0: no limit."""
    prompts: tuple[str, ...] = ()
    """What the model is asked at every evaluation."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    install: bool = True
    """Put the result into the library, where it serves at once."""
    merge: bool = False
    """Export an adapter as a whole model, too."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.method == "pretrain" and self.model and self.depth:
            raise ValueError("depth is for a model from scratch, and model for one to go on with: give one of them")
        if self.tuning in ("lora", "qlora") and self.method == "pretrain" and not self.model:
            raise ValueError(f"tuning={self.tuning} needs a model to begin with")
        if self.warmup + self.cooldown > 1:
            raise ValueError("warmup and cooldown are shares of one run: their sum is at most 1")
        return self

    @classmethod
    def of(cls, file: Path | str | None = None, **overrides: Any) -> TrainConfig:
        """From a YAML file and what overrides it; nested values may be given as `{"lora": {"r": 8}}` or "lora.r": 8.

        Raises NotFoundError, FormatError (the YAML), InvalidInputError (a value, with its name)."""
        values = _read(Path(file)) if file is not None else {}
        for name, value in overrides.items():
            _put(values, name.split("."), value)
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            raise _explained(e) from e

    def save(self, path: Path) -> None:
        import yaml

        from llmasos.models.load import write_atomically

        write_atomically(path, yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False))


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise NotFoundError(f"There is no file {path}.", hint="Name a YAML file of a run.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise FormatError(f"{path} is not valid YAML: {e}.", hint="Correct that line.") from e
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds no names and values.", hint="Write lines like `model: smollm2`.")
    return found


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    [first, *rest] = path
    if rest or isinstance(value, dict):
        inner = values.setdefault(first, {})
        if not isinstance(inner, dict):
            raise InvalidInputError(f"{first} is {inner!r} and holds no names.", param=first)
        for name, each in {".".join(rest): value}.items() if rest else value.items():
            _put(inner, name.split("."), each)
    else:
        values[first] = value


def _explained(e: ValidationError) -> InvalidInputError:
    import difflib

    error = e.errors(include_url=False)[0]
    name = ".".join(str(part) for part in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        known = [*TrainConfig.model_fields, *(f"lora.{n}" for n in Lora.model_fields)]
        known += [f"distillation.{n}" for n in Distillation.model_fields]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else "docs/en/training.md lists them all."
        return InvalidInputError(f"A run has no option {name!r}.", hint=hint, param=name)
    given = "" if error["type"] == "value_error" else f" (it is {error['input']!r})"
    what = error["msg"].removeprefix("Value error, ")
    return InvalidInputError(f"{name}: {what}{given}.", hint="docs/en/training.md tells of every option.", param=name)
