"""TensorBoard, Weights & Biases and MLflow: the numbers of a run for those who look at them there. Each is an extra,
imported when it is asked for.

A run that goes on writes on: TensorBoard forgets what it has of later steps, MLflow and W&B are not told twice of steps
that they know (which come out the same).
"""

from __future__ import annotations

import importlib.util
import math
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmasos.errors import UnsupportedError
from llmasos.train.events import Evaluation, StepReport
from llmasos.train.logs.meter import Speed
from llmasos.train.logs.watch import Watcher

PROJECT = "llmasos"
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_AT_ONCE = 200
"""Numbers that MLflow gets in one request, of several steps."""
_LONGEST, _MOST_PARAMS = 500, 100
"""Characters of an option's value that MLflow keeps, and options that it takes at once."""


def check_tracker(name: str) -> None:
    """Raises UnsupportedError for one that is not installed."""
    if importlib.util.find_spec(MODULES[name]) is None:
        raise UnsupportedError(
            f"trackers={name} needs a package that is not installed.",
            hint=f"pip install 'llmasos[{name}]'",
            param="trackers",
        )


def tracker(name: str, folder: Path, facts: Mapping[str, Any]) -> Watcher:
    """facts: see `facts.run_facts`. Raises UnsupportedError."""
    check_tracker(name)
    made: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
    return made[name](folder, facts)


class Tracker(Watcher):
    """What they have in common: numbers by name."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.name = str(facts.get("name") or folder.name)

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        raise NotImplementedError

    def metered(self, report: StepReport, speed: Speed) -> None:
        numbers = {
            "train/loss": report.loss,
            "train/gradient_norm": report.gradient_norm,
            "train/rate": report.rate,
            "train/num_tokens": report.num_tokens,
            "train/skipped": float(bool(report.skipped)),
            "speed/tokens_per_second": speed.tokens_per_second,
            "speed/memory_gib": speed.memory / 2**30,
        }
        numbers |= {} if speed.mfu is None else {"speed/mfu": speed.mfu}
        numbers |= {f"train/loss_{name}": value for name, value in (report.parts or {}).items()}
        self.put(report.step, numbers)

    def evaluated(self, evaluation: Evaluation) -> None:
        numbers = {"evaluation/loss": evaluation.loss}
        if evaluation.bits_per_byte is not None:
            numbers["evaluation/bits_per_byte"] = evaluation.bits_per_byte
        self.put(evaluation.step, numbers)


class TensorBoard(Tracker):
    """In RUN/tensorboard."""

    _writer: Any = None

    def began(self, step: int, num_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else 0)
        if not step:
            self._writer.add_text("config", _markdown(self.facts.get("config", {})))

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def evaluated(self, evaluation: Evaluation) -> None:
        super().evaluated(evaluation)
        for i, sample in enumerate(evaluation.samples):
            # four spaces: as it is, whatever marks it has
            text = "\n".join(f"    {line}" for line in f"{sample.prompt}\n→ {sample.text}".splitlines())
            self._writer.add_text(f"sample/{i}", text, evaluation.step)

    def saved(self, step: int, path: Path) -> None:
        self._writer.flush()

    def ended(self, step: int, reason: str) -> None:
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Tracker):
    """Files in RUN/wandb; project, entity and WANDB_MODE=offline as W&B's own variables say. The run's id is kept in
    RUN/wandb.txt, so that it goes on as the same run."""

    _run: Any = None

    def began(self, step: int, num_steps: int) -> None:
        import wandb

        kept = self.folder / "wandb.txt"
        if not kept.exists():
            kept.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=wandb.Settings().project or PROJECT,
            name=self.name,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(self.folder),
            config=dict(self.facts),
            settings=wandb.Settings(console="off"),  # the progress line is no log
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._last = int(self._run.summary.get("step", -1)) if self._run.resumed else -1

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        if step > self._last:
            self._run.log({"step": step, **numbers})

    def evaluated(self, evaluation: Evaluation) -> None:
        import wandb

        super().evaluated(evaluation)
        if evaluation.samples:
            rows = [[evaluation.step, one.prompt, one.text] for one in evaluation.samples]
            table = wandb.Table(columns=["step", "prompt", "answer"], data=rows)
            self._run.log({"step": evaluation.step, "samples": table})

    def ended(self, step: int, reason: str) -> None:
        self._run.summary["reason"] = reason
        self._run.finish(exit_code=0 if reason in ("finished", "stopped", "data", "time") else 1)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1)


class MLflow(Tracker):
    """Where MLFLOW_TRACKING_URI says, else in RUN/mlflow.db. The run's id is kept in RUN/mlflow.txt."""

    _client: Any = None
    _waiting: list[Any]

    def began(self, step: int, num_steps: int) -> None:
        import mlflow
        from mlflow.entities import Param

        self._waiting = []
        if not mlflow.is_tracking_uri_set():
            uri = f"sqlite:///{(self.folder / 'mlflow.db').absolute()}"
        else:
            uri = mlflow.get_tracking_uri()
        self._client = mlflow.MlflowClient(uri)
        self._last: dict[str, int] = {}
        kept = self.folder / "mlflow.txt"
        if kept.exists():
            self._id = kept.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
            for name in self._client.get_run(self._id).data.metrics:
                self._last[name] = max(point.step for point in self._client.get_metric_history(self._id, name))
            return
        found = self._client.get_experiment_by_name(PROJECT)
        # those of a database of its own lie beside it, not in the working folder
        place = (self.folder / "mlflow").absolute().as_uri() if uri.endswith("/mlflow.db") else None
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT, place)
        self._id = self._client.create_run(experiment, run_name=self.name).info.run_id
        kept.write_text(self._id)
        options = [Param(k, str(v)[:_LONGEST]) for k, v in _flat(self.facts.get("config", {})).items()]
        for begin in range(0, len(options), _MOST_PARAMS):
            self._client.log_batch(self._id, params=options[begin : begin + _MOST_PARAMS])

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {k: v for k, v in numbers.items() if step > self._last.get(k, -1) and math.isfinite(v)}
        self._waiting += [Metric(k, float(v), now, step) for k, v in new.items()]
        if len(self._waiting) >= _AT_ONCE:
            self._send()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for begin in range(0, len(waiting), _AT_ONCE):
            self._client.log_batch(self._id, metrics=waiting[begin : begin + _AT_ONCE])

    def saved(self, step: int, path: Path) -> None:
        self._send()

    def evaluated(self, evaluation: Evaluation) -> None:
        super().evaluated(evaluation)
        self._send()
        if evaluation.samples:
            text = "\n\n".join(f"{one.prompt}\n→ {one.text}" for one in evaluation.samples)
            self._client.log_text(self._id, text, f"samples/{evaluation.step:06d}.txt")

    def ended(self, step: int, reason: str) -> None:
        self._send()
        good = reason in ("finished", "data", "time")
        self._client.set_terminated(self._id, "FINISHED" if good else "KILLED" if reason == "stopped" else "FAILED")

    def close(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._id, "FAILED")


def _markdown(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | `{value}` |" for name, value in _flat(values).items()]
    return "\n".join(["| option | value |", "|---|---|", *rows])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out
