"""Fine-tuning as jobs of the server: one at a time, each a process of its own, paused and gone on with at checkpoints.

<home>/jobs/ID/     what the process is told: job.yaml, the uploaded files under other names; its words
<home>/runs/NAME/   the run: checkpoints, events, what it makes; it stays when the job is forgotten
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from llmasos.client.types.finetuning import (
    FineTuningCheckpointList,
    FineTuningError,
    FineTuningEvent,
    FineTuningEventList,
    FineTuningJob,
    FineTuningJobList,
    FineTuningMethod,
    FineTuningRequest,
    Hyperparameters,
    Supervised,
)
from llmasos.data.readers import open_dataset
from llmasos.data.schemas import schema_of
from llmasos.errors import FormatError, InvalidInputError, LLMasOSError, UnsupportedError
from llmasos.serve.caller import Caller
from llmasos.serve.files.store import FileNotFoundHereError, Files, new_file_id, row_of
from llmasos.serve.finetuning import child, events, options
from llmasos.serve.installed import facts_of
from llmasos.serve.jobs.room import ACTIVE, JobNotFoundError, Jobs, Kept, Kind, Work
from llmasos.serve.models import ModelNotFoundError, Models
from llmasos.store.adapters import find_adapter, installed_adapters
from llmasos.store.library import Library
from llmasos.store.transfer import disk_errors

POLL_SECONDS = 0.5
"""Followers of events look this often."""
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".jsonl.gz", ".jsonl.zst")
_TRAINABLE = ("chat", "text")
_STATUSES = {"queued": "queued", "running": "running", "paused": "paused", "done": "succeeded"}


class FineTuningNotFoundError(JobNotFoundError):
    param = "fine_tuning_job_id"

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.message = f"There is no fine-tuning job {id!r}."
        self.hint = "GET /v1/fine_tuning/jobs lists them."


class FineTuning(Kind):
    """The fine-tuning jobs among the server's."""

    name = "fine_tuning"
    scope = "manage"
    at_once = 1

    def __init__(self, jobs: Jobs, models: Models, files: Files) -> None:
        self._jobs, self._models, self._files = jobs, models, files
        jobs.add(self)

    # what clients ask

    async def create(self, caller: Caller, body: FineTuningRequest) -> FineTuningJob:
        """Raises InvalidInputError that names the field, UnsupportedError, ModelNotFoundError, DiskFullError."""
        suffix = options.check_suffix(body.suffix)
        hyperparameters = options.hyperparameters_of(body)
        asked = options.options_of(body, hyperparameters)
        own, base, reference = await self._base(body.model, caller)
        await asyncio.to_thread(_check_installed, asked)
        id = f"ftjob-{secrets.token_hex(12)}"
        served, run = options.names_of(base, suffix, secrets.token_hex(4))
        folder = self._folder(id)
        try:
            training = await self._file(caller, body.training_file, "training_file", folder, asked)
            validation = None
            if body.validation_file is not None:
                validation = await self._file(caller, body.validation_file, "validation_file", folder, asked)
            config = asked | {
                "model": reference,
                "data": [str(training)],
                "name": run,
                "output": str(self._run_folder(run)),
            }
            if validation is not None:
                config["validation_data"] = [str(validation)]
            config["job"] = options.job_options(hyperparameters, served)
            await asyncio.to_thread(_write, folder / "job.yaml", config)
            spec = {
                "model": body.model,
                "base": own,
                "run": run,
                "training_file": body.training_file,
                "validation_file": body.validation_file,
                "hyperparameters": hyperparameters.model_dump(),
                "seed": body.seed or 0,
                "suffix": suffix,
                "metadata": body.metadata,
                "llmasos": body.llmasos or {},
                "result_id": new_file_id(),
            }
            await asyncio.to_thread(events.note, self._run_folder(run), f"Created fine-tuning job: {id}")
            work = await self._jobs.make(self.name, served, spec, caller, id=id)
        except BaseException:
            for made in (folder, self._run_folder(run)):
                shutil.rmtree(made, ignore_errors=True)
            raise
        return self._wire(self._jobs.go_on(work).job)

    async def get(self, caller: Caller, id: str) -> FineTuningJob:
        return self._wire(await self._kept(caller, id))

    async def list(self, caller: Caller, after: str | None, limit: int, metadata: dict[str, str]) -> FineTuningJobList:
        """The latest first; of those with these labels."""
        found = [self._wire(job) for job in await self._jobs.kept(caller, self.name)]
        if after is not None:
            places = [i for i, job in enumerate(found) if job.id == after]
            if not places:
                raise InvalidInputError(f"There is no fine-tuning job {after!r}.", param="after")
            found = found[places[0] + 1 :]
        found = [job for job in found if metadata.items() <= (job.metadata or {}).items()]
        return FineTuningJobList(data=found[:limit], has_more=len(found) > limit)

    async def act(self, caller: Caller, id: str, action: str) -> FineTuningJob:
        """Raises BusyError for what can't be done now."""
        job = await self._kept(caller, id)
        work = await self._jobs.find(id, self.name)
        does = {"cancel": self._jobs.cancel, "pause": self._jobs.pause, "resume": self._jobs.resume}[action]
        before = job.state
        done = (await does(work)).job
        said = {"cancel": "cancelled", "pause": "paused", "resume": "resumed"}[action]
        if done.state != before:
            await asyncio.to_thread(events.note, self._run_of(done), f"Fine-tuning job {said}")
        return self._wire(done)

    async def events(self, caller: Caller, id: str, after: str | None, limit: int) -> FineTuningEventList:
        """The latest first."""
        job = await self._kept(caller, id)
        below = None if after is None else events.number_of(id, after)

        def look() -> FineTuningEventList:
            found = [one for one in events.read(self._run_of(job)) if below is None or one[0] < below]
            page = found[::-1][:limit]
            return FineTuningEventList(
                data=[events.shown(id, *one, self._folder(id)) for one in page], has_more=len(found) > limit
            )

        return await asyncio.to_thread(look)

    async def follow(self, caller: Caller, id: str) -> AsyncGenerator[FineTuningEvent, None]:
        """All events, the oldest first, as they come, until nothing more happens to the job by itself."""
        job = await self._kept(caller, id)
        behind = 0
        while True:
            job = await self._kept(caller, id)
            for number, raw in await asyncio.to_thread(list, events.read(self._run_of(job), behind)):
                behind = number
                yield events.shown(id, number, raw, self._folder(id))
            if job.state not in ACTIVE:
                return
            await asyncio.sleep(POLL_SECONDS)

    async def checkpoints(self, caller: Caller, id: str, after: str | None, limit: int) -> FineTuningCheckpointList:
        """The latest first."""
        job = await self._kept(caller, id)

        def look() -> FineTuningCheckpointList:
            adapters = {one.name for one in installed_adapters()}
            found = events.checkpoints(id, self._run_of(job), job.name, adapters=adapters, is_done=job.state == "done")
            if after is not None:
                places = [i for i, one in enumerate(found) if one.id == after]
                if not places:
                    raise InvalidInputError(f"There is no checkpoint {after!r} of {id}.", param="after")
                found = found[places[0] + 1 :]
            page = found[:limit]
            first, last = (page[0].id, page[-1].id) if page else (None, None)
            return FineTuningCheckpointList(data=page, first_id=first, last_id=last, has_more=len(found) > limit)

        return await asyncio.to_thread(look)

    # what a job does

    async def run(self, work: Work) -> Any:
        folder = self._folder(work.job.id)
        work.change(details={**work.job.details, "began": False})
        try:
            made = await child.run(folder / "job.yaml", folder / "log.txt", lambda event: _progress(work, event))
        except LLMasOSError as e:
            e.message = events.without_folder(e.message, folder)
            raise
        await self._adopt(made["model"], work.job.spec["base"])
        files = await self._publish(work.job)
        return {"model": made["model"], "trained_tokens": made["trained_tokens"], "result_files": files}

    async def give_up(self, job: Kept) -> Any:
        return None

    async def clear(self, job: Kept, *, is_forgotten: bool) -> None:
        await asyncio.to_thread(shutil.rmtree, self._folder(job.id), ignore_errors=True)

    async def _adopt(self, name: str, base: str) -> None:
        """A program's own model gets its adapter now; a host's models get theirs when they are asked for."""
        adapter = await asyncio.to_thread(find_adapter, name)
        await self._models.look(name)
        if adapter is not None and name not in self._models.names:
            await self._models.backing.load_adapter(base, name, str(adapter.path))

    async def _publish(self, job: Kept) -> Sequence[str]:
        """The metrics become a file of the key; again without effect."""
        id, path = job.spec["result_id"], self._files.path(job.spec["result_id"])

        def write() -> None:
            temporary = path.with_name(f".{path.name}.tmp")
            with disk_errors(path):
                temporary.write_text(events.table(self._run_of(job)), encoding="utf-8")
                os.replace(temporary, path)

        def add(session: Session) -> None:
            try:
                row_of(session, id, job.key_id)
            except FileNotFoundHereError:
                name = "step_metrics.csv"
                self._files.add(session, id, job.key_id, filename=name, purpose="fine-tune-results")

        await asyncio.to_thread(write)
        await self._jobs.storage.run(add)
        return [id]

    # what there is

    def _folder(self, id: str) -> Path:
        return self._jobs.storage.home / "jobs" / id

    def _run_folder(self, name: str) -> Path:
        return self._jobs.storage.home / "runs" / name

    def _run_of(self, job: Kept) -> Path:
        return self._run_folder(job.spec["run"])

    async def _kept(self, caller: Caller, id: str) -> Kept:
        try:
            return await self._jobs.kept_one(caller, id, self.name)
        except JobNotFoundError:
            raise FineTuningNotFoundError(id) from None

    async def _base(self, name: str, caller: Caller) -> tuple[str, str, str]:
        """The model's served name, that which goes into its child's, and what a run takes for it."""
        await self._models.look(name)
        own, adapter = self._models.check(name, caller)
        if adapter is not None:
            raise UnsupportedError(
                f"{name} is an adapter of {own}, and training goes on from whole models.",
                hint=f'Train {own}, or make a whole model with "llmasos": {{"merge": true}} first.',
                param="model",
            )

        def look() -> tuple[str, str, bool]:
            library = Library()
            if library.has(own):
                folder = library.folder(own).name
                return folder, folder, facts_of(folder).is_encoder
            reference = self._models.backing.reference(own)
            if not Path(reference).exists() and not library.has(reference):
                raise ModelNotFoundError(
                    f"{name} has no files on the server to train.", hint="llmasos pull NAME installs a model."
                )
            return own, reference, facts_of(reference).is_encoder

        found, reference, is_encoder = await asyncio.to_thread(look)
        if is_encoder:
            raise UnsupportedError(f"{name} is an encoder; models that generate text can be trained.", param="model")
        return own, found, reference

    async def _file(self, caller: Caller, id: str, field: str, folder: Path, asked: dict[str, Any]) -> Path:
        """An uploaded file under a name that says what it is; its first row was looked at."""
        try:
            file, source = await self._files.content(caller, id)
        except FileNotFoundHereError as e:
            raise InvalidInputError(e.message, hint=e.hint, param=field) from e
        if file.purpose != "fine-tune":
            raise InvalidInputError(
                f"{id} was uploaded for {file.purpose!r}.", hint="Upload it with purpose fine-tune.", param=field
            )
        suffix = next(
            (one for one in sorted(_SUFFIXES, key=len, reverse=True) if file.filename.endswith(one)), ".jsonl"
        )
        path = folder / f"{field}{suffix}"

        def take() -> None:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, path)
                except OSError:
                    shutil.copyfile(source, path)
            try:
                [found] = open_dataset(path, columns=asked.get("columns"))
                kind = schema_of(found, asked.get("schema")).kind
            except (FormatError, InvalidInputError) as e:
                message = e.message.replace(str(path), file.filename)
                raise InvalidInputError(message, hint=e.hint, param=field) from e
            if kind not in _TRAINABLE:
                raise UnsupportedError(
                    f"{file.filename} holds {kind} data, for which there is no method yet.",
                    hint="Send conversations (messages), or pairs of prompt and completion.",
                    param=field,
                )

        await asyncio.to_thread(take)
        return path

    def _wire(self, job: Kept) -> FineTuningJob:
        spec, details, result = job.spec, job.details, job.result or {}
        hyperparameters = Hyperparameters(**spec["hyperparameters"] | details.get("hyperparameters", {}))
        is_over = job.state in ("done", "failed", "cancelled")
        left = details.get("seconds_left") if job.state == "running" else None
        error = None
        if job.state == "failed" and job.error:
            message = " ".join(part for part in (job.error["message"], job.error.get("hint")) if part)
            error = FineTuningError(code=job.error["code"], message=message, param=job.error.get("param"))
        status: Any = _STATUSES.get(job.state, job.state)
        if status == "running" and not details.get("began"):
            status = "validating_files"
        return FineTuningJob(
            id=job.id,
            created_at=int(job.created.timestamp()),
            error=error,
            fine_tuned_model=result.get("model"),
            finished_at=int(job.updated.timestamp()) if is_over else None,
            hyperparameters=hyperparameters,
            model=spec["model"],
            result_files=result.get("result_files", []),
            seed=spec["seed"],
            status=status,
            trained_tokens=result.get("trained_tokens"),
            training_file=spec["training_file"],
            validation_file=spec["validation_file"],
            estimated_finish=None if left is None else int(job.updated.timestamp() + left),
            metadata=spec["metadata"],
            method=FineTuningMethod(supervised=Supervised(hyperparameters=hyperparameters)),
            suffix=spec["suffix"],
            llmasos={
                **spec["llmasos"],
                "run": spec["run"],
                **{k: details[k] for k in ("step", "steps") if k in details},
            },
        )


def _progress(work: Work, event: dict[str, Any]) -> None:
    details = dict(work.job.details)
    match event["type"]:
        case "settled":
            names = ("num_epochs", "batch_size", "learning_rate_multiplier")
            found = {name.replace("num_epochs", "n_epochs"): event[name] for name in names if event[name] is not None}
            if float(found.get("n_epochs", 0.5)).is_integer():
                found["n_epochs"] = int(found["n_epochs"])
            work.change(details=details | {"hyperparameters": found})
        case "began":
            steps = {"step": event["step"], "steps": event["steps"]}
            work.change(progress=event["step"] / event["steps"], details=details | steps | {"began": True})
        case "step":
            left = (event["steps"] - event["step"]) * event["seconds"]
            steps = {"step": event["step"], "steps": event["steps"], "seconds_left": left}
            loss = "" if event["loss"] is None else f", loss {event['loss']:.4g}"
            work.change(
                progress=event["step"] / event["steps"],
                message=f"{event['step']}/{event['steps']}{loss}",
                details=details | steps,
            )


def _check_installed(asked: dict[str, Any]) -> None:
    """A run would fetch what it lacks; a client learns at once that a name is wrong. Blocking."""
    library = Library()
    for option, name in options.other_models(asked).items():
        if not library.has(name):
            raise InvalidInputError(
                f"llmasos.{option}={name!r} is not installed on the server.",
                hint="Name an installed model; llmasos ls lists them, and llmasos pull NAME installs one.",
                param=f"llmasos.{option}",
            )


def _write(path: Path, config: dict[str, Any]) -> None:
    import yaml

    temporary = path.with_suffix(".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(temporary, path)
