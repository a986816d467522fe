"""A run as a process of its own: `python -m llmasos.train.process CONFIG.yaml [--with-parent]`.

CONFIG.yaml holds the options of a run (`TrainConfig`), its `output` among them, and may have a section `job` with what
only a job has (`JobOptions`). Begun again after any end, it goes on from the last checkpoint. What happens is told in
JSON, one object a line, on standard output and in RUN/events.jsonl:

    {"type": "settled",    steps, num_samples, num_epochs, batch_size, lr}
    {"type": "began",      step, steps}                          step: done already, of a run that goes on
    {"type": "step",       step, steps, loss, lr, gradient_norm, num_trained, trained_tokens, seconds, skipped}
    {"type": "evaluation", step, loss, bits_per_byte}
    {"type": "checkpoint", step, train_loss, valid_loss, model}  model: an adapter that serves from now on, or null
    {"type": "result",     reason, step, trained_tokens, model}
    {"type": "stopped",    step}                                 told to stop: it was saved
    {"type": "message",    level, message}                       what else there is to know
    {"type": "error",      kinds, message, hint, fields}         see `errors.error_of`

each with `at`, in seconds since 1970. SIGTERM saves and stops. `--with-parent`: so does the end of standard input, so
that it never outlives who began it. Exit codes: 0 done, 75 stopped, else the error's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmasos.data import Batches, Totals
from llmasos.errors import BusyError, InvalidInputError, LLMasOSError, error_facts
from llmasos.formats.yaml import read_yaml
from llmasos.store.adapters import installed_adapters, remove_adapter
from llmasos.train.answers import Answered
from llmasos.train.config import LIKE, TrainConfig
from llmasos.train.events import Evaluation, Listener, StepReport
from llmasos.train.export import Run, export_run
from llmasos.train.methods import METHODS, method_of
from llmasos.train.run import CONFIG, MOST_LENGTH, Result, checked, resume, train

EVENTS = "events.jsonl"
CHECKPOINT = "-ckpt-step-"
"""Between a run's name and a step in the name of a checkpoint's adapter."""
STOPPED = 75
"""sysexits' EX_TEMPFAIL: try again later."""
LOCK_SECONDS = 120.0
"""How long the process before this one may take to save and end."""
MOST_STEPS_TOLD = 2000
"""Longer runs tell of every n-th step."""
SERVED_CHECKPOINTS = 3
"""The latest adapters that can be asked before the run is over."""
FEWEST_SEEN, MOST_SEEN, MOST_EPOCHS = 100, 25_000, 25
"""Samples that "auto" wants to be read in all: 3 epochs, but more of few samples, and fewer of many."""


class JobOptions(BaseModel):
    """Of OpenAI's fine-tuning jobs. `batch_size`: samples a step. `serves_as`: the served name of the result."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    batch_size: int | None = Field(default=None, ge=1)
    learning_rate_multiplier: float | None = Field(default=None, gt=0)
    serves_as: str | None = None


class Teller(Listener):
    """Writes events; keeps what later ones need of earlier ones."""

    def __init__(self, folder: Path, answers: IO[str]) -> None:
        self.folder, self._answers = folder, answers
        self.steps = 0
        self.trained_tokens = 0
        self.train_loss: float | None = None
        self.valid_loss: float | None = None

    def tell(self, type: str, **fields: Any) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        line = json.dumps({"type": type, "at": time.time(), **plain})
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / EVENTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, file=self._answers, flush=True)

    def prepared(self, name: str, totals: Totals) -> None:
        if isinstance(totals, Answered):
            self.tell("message", level="info", message=f"{name} has answered {totals.num_rows:,} prompts")

    def began(self, step: int, num_steps: int) -> None:
        self.steps = num_steps
        self.trained_tokens = _trained_before(self.folder / "log.jsonl", step)
        self.tell("began", step=step, steps=num_steps)

    def stepped(self, report: StepReport) -> None:
        self.trained_tokens += report.num_trained
        self.train_loss = report.loss
        every = max(1, self.steps // MOST_STEPS_TOLD)
        if report.step % every == 0 or report.step == self.steps or report.skipped:
            self.tell(
                "step",
                step=report.step,
                steps=self.steps,
                loss=report.loss,
                lr=report.rate,
                gradient_norm=report.gradient_norm,
                num_trained=report.num_trained,
                trained_tokens=self.trained_tokens,
                seconds=report.seconds,
                skipped=report.skipped,
            )

    def evaluated(self, evaluation: Evaluation) -> None:
        self.valid_loss = evaluation.loss
        self.tell("evaluation", step=evaluation.step, loss=evaluation.loss, bits_per_byte=evaluation.bits_per_byte)


class Checkpointed(Listener):
    """Serves the adapter of every checkpoint before the last, the latest few of them."""

    def __init__(self, teller: Teller, config: TrainConfig, serves_as: str | None) -> None:
        self._teller, self._config, self._serves_as = teller, config, serves_as

    def saved(self, step: int, path: Path) -> None:
        teller = self._teller
        model = None
        if step < teller.steps:
            try:
                model = self._serve(step)
            except Exception as e:  # nothing that training needs
                why = str(e)
                if not isinstance(e, LLMasOSError):
                    traceback.print_exc()
                    why = f"{type(e).__name__}: {e}"
                teller.tell("message", level="warn", message=f"The checkpoint of step {step} is not served: {why}")
        teller.tell("checkpoint", step=step, train_loss=teller.train_loss, valid_loss=teller.valid_loss, model=model)

    def _serve(self, step: int) -> str | None:
        folder = self._teller.folder
        run = Run.open(folder, step)
        if self._serves_as is None or self._config.tuning == "full" or run.must_merge or run.config.merge:
            return None
        name, served = f"{folder.name}{CHECKPOINT}{step}", f"{self._serves_as}:ckpt-step-{step}"
        output = folder / f".checkpoint-{step}"
        try:
            export_run(folder, step=step, install=True, name=name, serves_as=served, output=output)
        finally:
            shutil.rmtree(output, ignore_errors=True)
        for old in served_steps(folder)[:-SERVED_CHECKPOINTS]:
            remove_adapter(f"{folder.name}{CHECKPOINT}{old}")
        return served


def served_steps(folder: Path) -> list[int]:
    """Of which steps of a run adapters are served, beside its result."""
    names = [one.path.name for one in installed_adapters()]
    before = f"{folder.name}{CHECKPOINT}"
    return sorted(int(name.removeprefix(before)) for name in names if name.startswith(before))


def carry_out(config: TrainConfig, job: JobOptions, answers: IO[str]) -> int:
    """The run from its beginning, or from where it is, to what it makes; the exit code."""
    if config.output is None:
        raise InvalidInputError("The run has no output.", hint="Name its folder: output: /path.", param="output")
    teller = Teller(config.output, answers)
    try:
        result = _trained(config, job, teller)
    except LLMasOSError as e:
        teller.tell("error", **error_facts(e))
        return e.exit_code
    except BaseException as e:
        traceback.print_exc()
        failed = LLMasOSError(f"The run failed: {type(e).__name__}: {e}", hint="The log of the job has the details.")
        teller.tell("error", **error_facts(failed))
        return 1
    if result is None:
        return STOPPED
    return 0


def _trained(config: TrainConfig, job: JobOptions, teller: Teller) -> Result | None:
    """None: it was told to stop."""
    checkpointed = Checkpointed(teller, config, job.serves_as)
    result = _when_free(lambda: _run(config, job, teller, checkpointed))
    if result.reason == "stopped":
        teller.tell("stopped", step=result.step)
        return None
    made = export_run(result.folder, install=config.install, serves_as=job.serves_as)
    teller.tell(
        "result", reason=result.reason, step=result.step, trained_tokens=teller.trained_tokens, model=made.installed
    )
    return result


def _run(config: TrainConfig, job: JobOptions, teller: Teller, checkpointed: Listener) -> Result:
    assert config.output is not None
    listeners = [teller, checkpointed]
    if (config.output / CONFIG).is_file():
        return resume(config.output, listeners=listeners, on_progress=teller.prepared, export=False)

    def settled(config: TrainConfig) -> TrainConfig:
        config, facts = settle(config, job)
        teller.tell("settled", **facts)
        return config

    return train(config, listeners=listeners, on_progress=teller.prepared, export=False, settle=settled)


def settle(config: TrainConfig, job: JobOptions) -> tuple[TrainConfig, dict[str, Any]]:
    """What a job's options mean for this data: epochs of "auto", tokens of a batch of so many samples, the rate."""
    config = checked(config)
    method = method_of(config)
    defaults = METHODS[config.method].defaults(config)
    longest = min(config.max_length or MOST_LENGTH, method.shape.context_length)
    batches = Batches(
        list(config.data),
        method.tokenizer,
        max_length=longest,
        overlong=config.overlong,
        validation=0.0 if config.validation_data else config.validation,
        schema=config.schema_,
        columns=config.columns,
        template=config.template,
        seed=config.seed,
    )
    stats = batches.prepare()
    updates: dict[str, Any] = {}
    if config.epochs is None and config.steps is None:
        updates["epochs"] = float(epochs_for(stats.num_samples))
    mean = stats.num_tokens / stats.num_samples
    if job.batch_size is not None and config.batch_tokens is None:
        wanted = round(job.batch_size * mean)
        if wanted < longest:  # no micro-batch is smaller than the longest sample
            wanted = max(wanted, min(stats.longest, longest), 2)
            updates |= {"max_length": wanted, "micro_batch_tokens": wanted}
        updates["batch_tokens"] = wanted
    lr = config.lr if config.lr is not None else float(defaults["lr"]) * (job.learning_rate_multiplier or 1.0)
    updates["lr"] = lr
    config = config.model_copy(update=updates)
    config.model_fields_set.update(updates)
    tokens = config.batch_tokens or defaults.get("batch_tokens")
    return config, {
        "num_samples": stats.num_samples,
        "num_epochs": config.epochs,
        "batch_size": job.batch_size or (max(1, round(tokens / mean)) if tokens else None),
        "learning_rate_multiplier": lr / float(defaults["lr"]),
        "lr": lr,
    }


def epochs_for(num_samples: int) -> int:
    """How often so many samples are read where nobody says it."""
    if 3 * num_samples < FEWEST_SEEN:
        return min(MOST_EPOCHS, max(1, FEWEST_SEEN // num_samples))
    return max(1, min(3, MOST_SEEN // num_samples))


def _when_free(work: Any) -> Any:
    """The process before this one may still be saving."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return work()
        except BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def _trained_before(log: Path, step: int) -> int:
    """Trained tokens of the steps that are done already."""
    if not step or not log.is_file():
        return 0
    with log.open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines if line.endswith("}\n")]
    return sum(one["num_trained"] for one in found if one["step"] <= step)


def read_job(path: Path) -> tuple[TrainConfig, JobOptions]:
    """Raises NotFoundError, FormatError, InvalidInputError."""
    found = read_yaml(path, like=LIKE, is_dotted=True)
    job = found.pop("job", None) or {}
    try:
        options = JobOptions.model_validate(job)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        name = ".".join(str(part) for part in ("job", *error["loc"]))
        raise InvalidInputError(f"{name}: {error['msg']} (it is {error['input']!r}).", param=name) from e
    return TrainConfig.of(**found), options


def _end_with_the_parent() -> None:
    while os.read(0, 4096):  # sys.stdin has a lock, which a thread that waits would hold when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    words = [word for word in sys.argv[1:] if word != "--with-parent"]
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no event
    try:
        if len(words) != 1:
            raise InvalidInputError("One file is wanted.", hint="python -m llmasos.train.process CONFIG.yaml")
        config, job = read_job(Path(words[0]))
        if "--with-parent" in sys.argv[1:]:
            threading.Thread(target=_end_with_the_parent, daemon=True).start()
        return carry_out(config, job, answers)
    except LLMasOSError as e:
        print(json.dumps({"type": "error", "at": time.time(), **error_facts(e)}), file=answers, flush=True)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
