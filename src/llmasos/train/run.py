"""A run from its options to what it makes: settle what nobody said, plan, train, export, show.

TrainConfig ── settle ──> method (model, tokenizer) ──> Batches ──> plan ──> Loop ──> export
                                                   RUN/config.yaml   run.json  checkpoints  model/ or adapter/
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from llmasos.data import Batch, Batches, Stats, Totals, parse_sources
from llmasos.devices import Placement, cpu_has_bf16, pick_dtype, place
from llmasos.errors import BusyError, FormatError, InvalidInputError, LLMasOSError, NotFoundError, StoreError
from llmasos.models.config import ModelConfig
from llmasos.settings import settings
from llmasos.store.adapters import adapters_folder
from llmasos.store.card import check_name, is_by
from llmasos.store.catalog import local_path, looks_like_model
from llmasos.store.library import Library
from llmasos.text import Tokenizer
from llmasos.train.config import MAY_CHANGE, TrainConfig
from llmasos.train.evaluate import Evaluator, evaluation_tokens
from llmasos.train.events import Evaluation, Listener
from llmasos.train.export import ADAPTER, MODEL, Exported, export_run
from llmasos.train.logs import listeners_for
from llmasos.train.logs.runs import EVALUATIONS, METRICS, REPORT, RUN
from llmasos.train.logs.trackers import check_tracker
from llmasos.train.loop import Loop, LoopOptions
from llmasos.train.lora import check_rank
from llmasos.train.marks import MARK, check_way, is_marked, written
from llmasos.train.memory import forget_peak
from llmasos.train.methods import METHODS, Method, method_of
from llmasos.train.methods.base import NextToken, lora_options
from llmasos.train.methods.pretrain import TOKENIZER
from llmasos.train.optim import OptimizerOptions
from llmasos.train.parallel import Ranks, Spreader, begins, explained, joined, regrouped, whole_shape
from llmasos.train.plan import Plan, plan
from llmasos.train.schedule import Schedule

T = TypeVar("T")
_log = logging.getLogger("llmasos")
CONFIG = "config.yaml"
_WRITTEN = ("checkpoints", "log.jsonl", RUN, METRICS, EVALUATIONS, REPORT)
"""By a run, beside what it makes."""
_OTHER = "or give another folder with --output"
MOST_LENGTH = 2048
"""Tokens of the longest sample where nothing is said."""
LEAST_STEPS = 100
"""A step gets fewer tokens rather than the run fewer steps than this."""
PARTS = 10
"""Checkpoints and evaluations of a run where nothing is said."""
OnProgress = Callable[[str, Totals], None]
"""Gets the file that is tokenised, and how far it is; of a teacher that answers, its name and `answers.Answered`."""


@dataclass(frozen=True)
class Result:
    name: str
    folder: Path
    """Of the run."""
    reason: str
    """Why it ended: see `events.Listener.ended`."""
    step: int
    evaluation: Evaluation | None
    """The last one."""
    exported: Exported | None
    """What was made of it; None of a run that was told to stop."""

    @property
    def installed(self) -> str | None:
        """The name in the library under which the result runs and serves."""
        return self.exported.installed if self.exported else None


@dataclass(frozen=True)
class Prepared:
    """A run before its first weight is loaded."""

    config: TrainConfig
    """Settled."""
    method: Method
    batches: Batches
    held_out: Batches | None
    stats: Stats
    steps: int
    accumulation: int
    device: torch.device
    dtype: torch.dtype
    plan: Plan

    @property
    def shape(self) -> ModelConfig:
        return self.method.shape


def runs_folder() -> Path:
    return settings().home / "runs"


def find_run(name: str | Path) -> Path:
    """The folder of a run, by its name or path. Raises NotFoundError."""
    for folder in (Path(name), runs_folder() / str(name)):
        if (folder / CONFIG).is_file():
            return folder.absolute()
    raise NotFoundError(f"There is no run {str(name)!r}.", hint="See `llmasos runs`.")


def reference(name: str, folder: Path) -> str:
    """What `find_run` takes for it."""
    return name if folder == (runs_folder() / name).absolute() else str(folder)


def resume(
    name: str | Path,
    *,
    listeners: Sequence[Listener] = (),
    on_progress: OnProgress | None = None,
    progress: bool = False,
    export: bool = True,
    **changes: Any,
) -> Result:
    """Go on with a run where its last checkpoint is. `changes`: options that do not change what is learnt, see
    MAY_CHANGE; the others as in `train`."""
    folder = find_run(name)
    config = TrainConfig.saved(folder / CONFIG, **changes, resume=True, output=folder)
    return train(config, listeners=listeners, on_progress=on_progress, progress=progress, export=export)


def train(
    config: TrainConfig,
    *,
    listeners: Sequence[Listener] = (),
    on_progress: OnProgress | None = None,
    progress: bool = False,
    export: bool = True,
    settle: Callable[[TrainConfig], TrainConfig] | None = None,
) -> Result:
    """Carry out a run. on_progress: is told how far the data are tokenised. progress: show the steps in the terminal.
    export: write what was learnt as a model or adapter, and install it if the options say so. settle: decides what is
    left to the data, on the first process, when the run's folder is this run's alone.

    Raises InvalidInputError, NotFoundError, FormatError for what is wrong in options and data, InsufficientMemoryError
    before anything is loaded, BusyError for a run that another process has, DivergedError, DiskFullError."""
    config = named(config)
    assert config.output is not None
    with _held(config) if begins() else nullcontext(), joined(config) as ranks, explained(ranks):
        tokenizer = config.output / TOKENIZER
        if ranks.is_first and is_marked(tokenizer, str(config.name)):
            with written(tokenizer):
                shutil.rmtree(tokenizer)  # of a run that never began, with other data
        prepared = _prepare_together(config, ranks, on_progress, settle or (lambda asked: asked))
        if ranks.is_first:
            with written(config.output / CONFIG):
                prepared.config.save(config.output / CONFIG)
                (tokenizer / MARK).unlink(missing_ok=True)
        reason, step, evaluation = _carry_out(prepared, regrouped(prepared.config), listeners, progress=progress)
        is_over = export and reason != "stopped" and ranks.is_first
        exported = export_run(config.output, install=prepared.config.install) if is_over else None
        return Result(str(config.name), config.output, reason, step, evaluation, exported)


def _prepare_together(
    config: TrainConfig, ranks: Ranks, on_progress: OnProgress | None, settle: Callable[[TrainConfig], TrainConfig]
) -> Prepared:
    """The first rank settles, tokenises and plans; the others do as it did."""
    prepared = _tried(
        ranks, lambda: prepare(settle(config), on_progress=on_progress, ranks=ranks) if ranks.is_first else None
    )
    settled = ranks.told(prepared.config if prepared else None)
    found = _tried(ranks, lambda: prepared or prepare(settled, ranks=ranks))
    assert found is not None
    return found


def _built(prepared: Prepared, ranks: Ranks) -> tuple[NextToken, int]:
    """What learns, spread, and of how many weights."""
    assert prepared.config.optimizer is not None
    spreader = Spreader(ranks, prepared.dtype, prepared.config.optimizer)
    learner = prepared.method.build(prepared.device, spreader)
    return learner, sum(math.prod(whole_shape(p)) for p in learner.module.parameters() if p.requires_grad)


def _tried(ranks: Ranks, work: Callable[[], T]) -> T | None:
    """What is wrong on one rank is said by all."""
    found, problem = None, None
    try:
        found = work()
    except LLMasOSError as e:
        problem = e
    ranks.check(problem)
    return found


def named(config: TrainConfig) -> TrainConfig:
    """With a name and a folder. Raises InvalidInputError for a run that is there already and should not go on, or
    should with other options; for a folder or a name in the library that holds what is not the run's."""
    config = _from_anywhere(checked(config))
    stem = Path(str(config.model or config.distillation.teacher or f"d{config.depth or ''}")).name.split(":")[-1]
    name = check_name(config.name or (config.output.resolve().name if config.output else f"{stem}-{config.method}"))
    folder = (config.output or runs_folder() / name).absolute()
    config = config.model_copy(update={"name": name, "output": folder})
    with written(folder, _OTHER):
        is_there = (folder / CONFIG).exists()
        if is_there and not config.resume:
            raise InvalidInputError(
                f"There is a run {name!r} in {folder}.",
                hint=f"Go on with it: llmasos train resume {reference(name, folder)}; or give another --name.",
                param="name",
            )
        if is_there:
            config = _as_begun(config, TrainConfig.saved(folder / CONFIG))
        _check_ways(config, folder, is_there=is_there)
    return config


def _from_anywhere(config: TrainConfig) -> TrainConfig:
    """With whole paths: who goes on with the run may do so in another folder, where other files have these names."""
    updates: dict[str, Any] = {name: _whole_model(getattr(config, name)) for name in ("model", "tokenizer")}
    updates |= {name: _whole_data(getattr(config, name)) for name in ("data", "validation_data")}
    teacher = _whole_model(config.distillation.teacher)
    updates["distillation"] = config.distillation.model_copy(update={"teacher": teacher})
    return config.model_copy(update={name: value for name, value in updates.items() if value != getattr(config, name)})


def _whole_model(name: str | None) -> str | None:
    is_path = name is not None and not Library().has(name) and looks_like_model(local_path(name))
    return str(local_path(str(name)).absolute()) if is_path else name


def _whole_data(words: tuple[str, ...]) -> tuple[str, ...]:
    whole = []
    for source in parse_sources(words) if words else ():
        path = local_path(source.ref)
        ref = str(path.absolute() if path.exists() else source.ref)
        whole.append(ref if source.weight is None else f"{ref}={source.weight}")
    return tuple(whole)


def _check_ways(config: TrainConfig, folder: Path, *, is_there: bool) -> None:
    """Nobody trains for hours to be told then that something is in the way of the result. Raises InvalidInputError,
    StoreError."""
    assert config.name is not None
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(f"{folder} is a file.", hint="Give a folder with --output.", param="output")
    is_scratch = config.method == "pretrain" and not (config.model or config.tokenizer)
    for name in (MODEL, ADAPTER, *(() if is_there else (*_WRITTEN, *([TOKENIZER] if is_scratch else ())))):
        check_way(folder / name, config.name)
    for taken in (Library().root / config.name, adapters_folder() / config.name) if config.install else ():
        if taken.exists() and not is_by(taken, str(folder)):
            raise StoreError(
                f"The library has {config.name!r} already, and it is not of this run.",
                hint=f"Choose another --name, or `llmasos rm {config.name}` first, or give --no-install.",
            )


def _as_begun(config: TrainConfig, before: TrainConfig) -> TrainConfig:
    """The run's options, where nothing else was said now."""
    updates: dict[str, Any] = {}
    for field in TrainConfig.model_fields:
        now, then = getattr(config, field), getattr(before, field)
        if now == then:
            continue
        if field in MAY_CHANGE:
            if field not in config.model_fields_set:
                updates[field] = then
        elif field not in config.model_fields_set or now is None:
            updates[field] = then
        else:
            raise InvalidInputError(
                f"The run {config.name!r} was begun with {field}={then!r}, and this is {now!r}.",
                hint="Go on with what it was begun with, or begin another run with --name.",
                param=field,
            )
    if "steps" not in updates and config.steps != before.steps:
        updates["epochs"] = None  # the last word: epochs of before, said or not, do not end what steps go on with
    return config.model_copy(update=updates)


def checked(config: TrainConfig) -> TrainConfig:
    """What can be known to be wrong before anything is read is said; a template that is a file is its text: the run
    keeps it. All that read options begin here. Raises InvalidInputError, UnsupportedError, NotFoundError,
    FormatError."""
    if not config.data:
        raise InvalidInputError("No data is named.", hint=f"llmasos train {config.method} --data FILE", param="data")
    for name in config.trackers:
        check_tracker(name)
    return config.model_copy(update={"template": _template_text(config.template)})


def _template_text(template: str | None) -> str | None:
    if template is None or "{{" in template or "{%" in template or not template.endswith((".jinja", ".j2", ".txt")):
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as e:
        raise NotFoundError(f"There is no chat template {template}.", hint="Name a file with Jinja.") from e
    except UnicodeDecodeError as e:
        raise FormatError(f"{template} is not UTF-8 text.", hint="Name a file with Jinja.") from e


def plan_run(config: TrainConfig, *, on_progress: OnProgress | None = None) -> Plan:
    """What a run would take, without beginning it: its data are read and tokenised, no weights are loaded.

    Raises InsufficientMemoryError for one that does not fit, and what `train` raises for wrong options and data."""
    with _rehearsed(config, on_progress) as prepared:
        return prepared.plan


def first_batch(config: TrainConfig, *, on_progress: OnProgress | None = None) -> tuple[Batch, Tokenizer]:
    """What a run of these options would read first, and by which tokenizer; raises as `plan_run`."""
    with _rehearsed(config, on_progress, timed=False) as prepared:
        prepared.batches.prefetch = 0
        return next(iter(prepared.batches)), prepared.method.tokenizer


@contextmanager
def _rehearsed(config: TrainConfig, on_progress: OnProgress | None, *, timed: bool = True) -> Iterator[Prepared]:
    with tempfile.TemporaryDirectory() as scratch:
        config = checked(config).model_copy(update={"output": Path(scratch)})
        yield prepare(config, on_progress=on_progress, timed=timed)


def _placed(config: TrainConfig, *, is_first: bool) -> Placement:
    """Where and in what training computes. Gradients below float16's least would be lost, and it has no bfloat16 in
    its place on older GPUs: float32."""
    found = place(config.device, config.dtype)
    if is_first and found.device.type == "cpu" and found.dtype == torch.bfloat16 and not cpu_has_bf16():
        _log.warning("This CPU has no bfloat16 units: training in bfloat16 is many times slower here than in float32.")
    if found.dtype != torch.float16:
        return found
    native = pick_dtype("auto", found.device)
    dtype = torch.float32 if native == torch.float16 else native
    if is_first:
        name = str(dtype).removeprefix("torch.")
        _log.warning("Training computes in %s: float16 loses small gradients.", name)
    return replace(found, dtype=dtype)


def prepare(
    config: TrainConfig, *, on_progress: OnProgress | None = None, ranks: Ranks | None = None, timed: bool = True
) -> Prepared:
    """Settle every option, read the model's shape and tokenise the data. `config` is `named`. ranks: who reads what;
    default: a plan for as many as the options say. timed: the plan tells the time, too."""
    data_size = ranks.data_size if ranks else max(1, (config.gpus or 1) // config.tensor_parallel_size)
    if config.tensor_parallel_size > 1 and config.parallel == "auto":
        config = config.model_copy(update={"parallel": "ddp"})
    is_free = config.batch_tokens is None
    defaults = METHODS[config.method].defaults(config)
    config = config.model_copy(update={k: v for k, v in defaults.items() if getattr(config, k) is None})
    placement = _placed(config, is_first=ranks is None or ranks.is_first)
    method = method_of(config)
    method.on_progress = on_progress
    if config.has_adapter:
        check_rank(method.shape, lora_options(config))
    begins_now = not config.resume and (ranks is None or ranks.is_first)
    step = config.batch_tokens // data_size if config.batch_tokens and begins_now and not is_free else None
    longest = _longest(config, method.shape.context_length, step)
    epochs = config.epochs or (None if config.steps else 1.0)
    config = config.model_copy(update={"max_length": longest, "epochs": epochs})
    held_out = _held_out(config, method, on_progress)
    if held_out is None:
        config = config.model_copy(update={"validation": 0.0})
    stats = _batches(config, method, split="train").prepare(on_progress)
    planned = plan(
        _sized(config, stats, is_free=is_free),
        method.shape,
        stats,
        device=placement.device,
        dtype=placement.dtype,
        world_size=data_size,
        teacher=method.teacher_shape,
        timed=timed and (ranks is None or ranks.is_first),
    )
    config, accumulation = planned.config, planned.accumulation
    method.config = config
    batches = _batches(config, method, split="train")
    if held_out is not None:  # packed as the plan says: on all ranks, and when the run goes on, the same
        held_out = _batches(config, method, split="validation")
    for each in (batches, held_out) if ranks else ():
        if each is not None:
            each.rank, each.world_size = ranks.data_rank, ranks.data_size  # type: ignore[union-attr]
    steps = _steps(config, batches, accumulation)
    part = max(1, steps // PARTS)
    config = config.model_copy(
        update={
            "steps": steps,
            "save_every": part if config.save_every is None else config.save_every,
            "evaluate_every": part if config.evaluate_every is None else config.evaluate_every,
        }
    )
    method.config = config
    device = placement.device
    if ranks and ranks.world_size > 1 and device.type == "cuda":
        device = torch.device("cuda", ranks.local_rank)
    return Prepared(config, method, batches, held_out, stats, steps, accumulation, device, placement.dtype, planned)


def _longest(config: TrainConfig, context: int, step: int | None) -> int:
    """Tokens of the longest sample. step: those that one GPU reads in a step, if somebody said it. Raises
    InvalidInputError where samples, micro-batch and step do not fit into each other."""
    most = [n for n in (MOST_LENGTH, context, config.micro_batch_tokens, step) if n]
    longest, micro = config.max_length or max(2, min(most)), config.micro_batch_tokens
    if longest > context:
        raise InvalidInputError(
            f"max_length={longest:,}, and the model's context is {context:,} tokens.",
            hint=f"Use at most {context}.",
            param="max_length",
        )
    if micro and micro < longest:
        raise InvalidInputError(
            f"micro_batch_tokens={micro:,} cannot hold samples of max_length={longest:,} tokens.",
            hint=f"Use at least {longest}, or a smaller max_length.",
            param="micro_batch_tokens",
        )
    if step is not None and step < (micro or longest):
        inner = f"micro_batch_tokens={micro:,}" if micro else f"max_length={longest:,}"
        raise InvalidInputError(
            f"batch_tokens={config.batch_tokens:,} gives each GPU {step:,} tokens of a step, less than {inner}.",
            hint="Use a larger batch_tokens, or a smaller max_length and micro_batch_tokens.",
            param="batch_tokens",
        )
    return longest


def _batches(config: TrainConfig, method: Method, *, split: str) -> Batches:
    is_train = split == "train"
    if is_train or not config.validation_data:
        config = method.reading(config)
    data = config.data if is_train or not config.validation_data else config.validation_data
    share = 0.0 if config.validation_data else config.validation
    assert config.max_length is not None
    return Batches(
        list(data),
        method.tokenizer,
        max_length=config.max_length,
        batch_tokens=config.micro_batch_tokens,
        overlong=config.overlong,
        split="all" if not is_train and config.validation_data else split,  # type: ignore[arg-type]
        validation=share,
        seed=config.seed,
        shuffle=is_train,
        epochs=1 if not is_train else None if config.epochs is None else math.ceil(config.epochs),
        schema=config.schema_,
        columns=config.columns,
        template=config.template,
    )


def _held_out(config: TrainConfig, method: Method, on_progress: OnProgress | None) -> Batches | None:
    """None: no row is held out, because nobody wants it or the data are too few for the usual share."""
    if not (config.validation or config.validation_data):
        return None
    found = _batches(config, method, split="validation")
    try:
        found.prepare(on_progress)
    except FormatError:
        if config.validation_data or "validation" in config.model_fields_set:
            raise
        if config.evaluate_every and not config.prompts:
            rows = _batches(config, method, split="train").prepare(on_progress).num_samples
            raise _too_few(config, rows) from None
        return None
    return found


def _too_few(config: TrainConfig, rows: int) -> InvalidInputError:
    share = min(0.5, math.ceil(200 / rows) / 100)
    return InvalidInputError(
        f"evaluate_every={config.evaluate_every} has no effect: of {rows:,} rows, validation={config.validation} holds "
        f"out none. It needs about {math.ceil(1 / config.validation):,}.",
        hint=f"Give more rows, --validation {share} or --validation-data FILE, or leave evaluate_every out.",
        param="evaluate_every",
    )


def _sized(config: TrainConfig, stats: Stats, *, is_free: bool) -> TrainConfig:
    """With the tokens of a step."""
    assert config.max_length is not None and config.batch_tokens is not None
    batch = config.batch_tokens
    if is_free:
        wanted = config.steps or LEAST_STEPS
        batch = min(batch, max(config.max_length, round(stats.num_tokens * (config.epochs or 1) / wanted)))
    return config.model_copy(update={"batch_tokens": batch})


def _steps(config: TrainConfig, batches: Batches, accumulation: int) -> int:
    if config.steps:
        return config.steps
    assert config.epochs is not None
    per_epoch = batches.count() / math.ceil(config.epochs)
    return max(1, math.ceil(per_epoch * config.epochs / accumulation))


def _carry_out(
    prepared: Prepared, ranks: Ranks, listeners: Sequence[Listener], *, progress: bool
) -> tuple[str, int, Evaluation | None]:
    config, method = prepared.config, prepared.method
    assert config.output is not None
    torch.manual_seed(config.seed)
    forget_peak(prepared.device)  # data that were read are no part of what the plan tells
    built = _tried(ranks, lambda: _built(prepared, ranks))
    assert built is not None
    learner, num_trained = built
    seen = _Seen()
    watching: list[Listener] = []
    if ranks.is_first:
        watching = list(
            listeners_for(
                config,
                config.output,
                shape=prepared.shape,
                batches=prepared.batches,
                stats=prepared.stats,
                device=prepared.device,
                dtype=prepared.dtype,
                path=method.path if config.model is not None else None,
                num_trained=num_trained,
                world_size=ranks.world_size,
                plan=prepared.plan.as_dict(),
                progress=progress,
            )
        )
    loop = Loop(
        learner,
        prepared.batches,
        optimizer_options(config),
        Schedule(config.schedule, config.warmup, config.cooldown),
        LoopOptions(
            steps=prepared.steps,
            accumulation=prepared.accumulation,
            save_every=config.save_every or 0,
            evaluate_every=config.evaluate_every or 0,
            max_seconds=60 * config.max_minutes,
        ),
        config.output,
        prepared.device,
        [seen, *watching, *listeners],
        _evaluator(prepared, learner, ranks),
        ranks,
        config.keep,
    )
    had_steps = (config.output / "log.jsonl").exists()
    if config.resume and not loop.resume() and had_steps and ranks.is_first:
        _log.warning("The run %s has no checkpoint to go on from: it begins anew.", config.name)
    reason = loop.train()
    return reason, loop.step, seen.evaluation


def _evaluator(prepared: Prepared, learner: NextToken, ranks: Ranks) -> Evaluator | None:
    config = prepared.config
    if prepared.held_out is None and not config.prompts:
        return None
    assert config.batch_tokens is not None
    found = Evaluator(
        learner.trainee,
        prepared.held_out,
        prepared.method.tokenizer,
        prompts=config.prompts,
        chat=config.method != "pretrain",
        template=config.template,
        max_tokens=evaluation_tokens(prepared.steps, config.batch_tokens, config.evaluate_every or 0),
        total=ranks.total,
    )
    found.prompts = ranks.told(found.prompts)  # those of the held-out part are each rank's own
    return found


def optimizer_options(config: TrainConfig) -> OptimizerOptions:
    assert config.lr is not None and config.weight_decay is not None and config.optimizer is not None
    return OptimizerOptions(
        name=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_norm=config.max_norm,
    )


class _Seen(Listener):
    evaluation: Evaluation | None = None

    def evaluated(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation


@contextmanager
def _held(config: TrainConfig) -> Iterator[None]:
    """The run is this process's alone. One that never began leaves no folder behind, if there was none."""
    assert config.output is not None
    lock = FileLock(config.output / "lock", timeout=0)
    with written(config.output, _OTHER):
        is_new = not config.output.exists()
        config.output.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as e:
            raise BusyError(
                f"The run {config.name!r} goes on in another process.", hint="Wait for it, or give another --name."
            ) from e
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that somebody removed, a system that keeps open files
            if is_new and os.listdir(config.output) == [Path(lock.lock_file).name]:
                Path(lock.lock_file).unlink()
                config.output.rmdir()
        lock.release()
