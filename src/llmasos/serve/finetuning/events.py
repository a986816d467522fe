"""The events of a job: lines of its run's events.jsonl, written by the run's process and, between them, by the server.
A line has its number in the file as its identity, so pages and followers can go on behind one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llmasos.client.types.finetuning import CheckpointMetrics, FineTuningCheckpoint, FineTuningEvent
from llmasos.errors import InvalidInputError
from llmasos.store.transfer import disk_errors

FILE = "events.jsonl"
_LOSS = "{:.4g}"


def note(folder: Path, message: str, level: Literal["info", "warn", "error"] = "info") -> None:
    """What the server tells. Blocking. Raises DiskFullError, StoreError."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"type": "message", "at": time.time(), "level": level, "message": message}) + "\n")


def read(folder: Path, behind: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and content of the lines behind one. A line that a killed process has not finished is left out,
    and has its number. Blocking."""
    try:
        with (folder / FILE).open("rb") as file:
            for number, line in enumerate(file, 1):
                if number > behind and line.endswith(b"\n"):
                    try:
                        yield number, json.loads(line)
                    except ValueError:
                        continue
    except FileNotFoundError:
        return


def event_id(job: str, number: int) -> str:
    return f"ftevent-{job.removeprefix('ftjob-')}-{number}"


def number_of(job: str, id: str) -> int:
    """Of the event with this id. Raises InvalidInputError."""
    before, _, number = id.rpartition("-")
    if before != event_id(job, 0).rpartition("-")[0] or not (number.isascii() and number.isdigit()):
        raise InvalidInputError(f"There is no event {id[:200]!r} of {job}.", param="after")
    return int(number[:18])


def without_folder(text: str, folder: Path) -> str:
    """Clients know their files by name, not where the server keeps them."""
    return text.replace(f"{folder}{os.sep}", "")


def shown(job: str, number: int, raw: dict[str, Any], folder: Path) -> FineTuningEvent:
    """`folder`: where the job's files are."""
    level, message, data = _said(raw)
    return FineTuningEvent(
        id=event_id(job, number),
        created_at=int(raw["at"]),
        level=level,
        message=without_folder(message, folder),
        type="metrics" if raw["type"] in ("step", "evaluation") else "message",
        data=data,
    )


def _said(raw: dict[str, Any]) -> tuple[Any, str, dict[str, Any] | None]:
    """Level, words and numbers."""
    step, steps = raw.get("step"), raw.get("steps")
    match raw["type"]:
        case "settled":
            epochs, rate = raw["num_epochs"], raw["lr"]
            read = f"{epochs:g} epochs" if epochs else "as many steps as were asked for"
            return "info", f"Files are valid: {raw['num_samples']:,} samples, {read}, learning rate {rate:g}", None
        case "began":
            how = f"Going on from step {step} of {steps}" if step else f"Training has started: {steps} steps"
            return "info", how, {"step": step, "total_steps": steps}
        case "step":
            words = f"Step {step}/{steps}: training loss={_number(raw['loss'])}"
            data = {
                "step": step,
                "total_steps": steps,
                "train_loss": raw["loss"],
                "learning_rate": raw["lr"],
                "gradient_norm": raw["gradient_norm"],
                "trained_tokens": raw["trained_tokens"],
                "seconds": raw["seconds"],
            }
            if raw["skipped"]:
                return "warn", f"{words}, left out: {raw['skipped']}", data
            return "info", words, data
        case "evaluation":
            data = {"step": step, "valid_loss": raw["loss"], "bits_per_byte": raw["bits_per_byte"]}
            return "info", f"Step {step}: validation loss={_number(raw['loss'])}", data
        case "checkpoint":
            model = f" as {raw['model']}" if raw["model"] else ""
            return "info", f"Checkpoint of step {step} saved{model}", {"step": step}
        case "result":
            return "info", f"New fine-tuned model created: {raw['model']}", {"step": step}
        case "stopped":
            return "warn", f"Stopped after step {step}; what is done is saved", {"step": step}
        case "error":
            return "error", " ".join(part for part in (raw["message"], raw["hint"]) if part), None
        case _:
            return raw.get("level", "info"), str(raw.get("message", raw["type"])), None


def _number(value: float | None) -> str:
    return "no number" if value is None else _LOSS.format(value)


def checkpoints(job: str, folder: Path, model: str, *, adapters: set[str], is_done: bool) -> list[FineTuningCheckpoint]:
    """Those that are there still, the latest first. `adapters`: the served names of installed ones. Blocking."""
    found: dict[int, FineTuningCheckpoint] = {}
    last = 0
    for _, raw in read(folder):
        if raw["type"] == "result":
            last = raw["step"]
        if raw["type"] == "checkpoint":
            found[raw["step"]] = _checkpoint(job, model, raw)
    kept = []
    for step, one in sorted(found.items(), reverse=True):
        if is_done and step == last:
            kept.append(one.model_copy(update={"fine_tuned_model_checkpoint": model}))
        elif (served := one.fine_tuned_model_checkpoint in adapters) or _is_whole(folder, step):
            kept.append(one.model_copy(update={"served": served}))
    return kept


def _is_whole(folder: Path, step: int) -> bool:
    return any(one.name.isdecimal() and int(one.name) == step for one in (folder / "checkpoints").glob("[0-9]*"))


def _checkpoint(job: str, model: str, raw: dict[str, Any]) -> FineTuningCheckpoint:
    step = raw["step"]
    return FineTuningCheckpoint(
        id=f"ftckpt-{job.removeprefix('ftjob-')}-{step}",
        created_at=int(raw["at"]),
        fine_tuned_model_checkpoint=raw["model"] or f"{model}:ckpt-step-{step}",
        fine_tuning_job_id=job,
        metrics=CheckpointMetrics(
            step=step, train_loss=raw["train_loss"], valid_loss=raw["valid_loss"], full_valid_loss=raw["valid_loss"]
        ),
        step_number=step,
    )


def table(folder: Path) -> str:
    """The metrics of all steps as CSV, as OpenAI's result files are. A step that was run again has the later ones.
    Blocking."""
    rows: dict[int, dict[str, Any]] = {}
    for _, raw in read(folder):
        if raw["type"] in ("step", "evaluation"):
            name = "train_loss" if raw["type"] == "step" else "valid_loss"
            rows.setdefault(raw["step"], {})[name] = raw["loss"]
    lines = ["step,train_loss,valid_loss"]
    for step, row in sorted(rows.items()):
        cells = (row.get("train_loss"), row.get("valid_loss"))
        lines.append(",".join([str(step), *("" if cell is None else repr(cell) for cell in cells)]))
    return "\n".join(lines) + "\n"
