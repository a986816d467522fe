"""All routes of the HTTP server in one ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from llmasos import __version__
from llmasos.serve import adapters as adapter_routes
from llmasos.serve import anthropic, console, health, native, ollama, openapi, problems
from llmasos.serve.access.install import install as install_access
from llmasos.serve.apps import shelf
from llmasos.serve.apps.jobs import AppJobs
from llmasos.serve.apps.routes import create_router as app_routes
from llmasos.serve.apps.supervisor import Supervisor
from llmasos.serve.apps.turns import AppModels
from llmasos.serve.aside import Aside
from llmasos.serve.background import Background
from llmasos.serve.files.store import MAX_STORED_BYTES
from llmasos.serve.finetuning.room import FineTuning
from llmasos.serve.finetuning.routes import create_router as fine_tuning_routes
from llmasos.serve.gate import Gate
from llmasos.serve.health import Readiness
from llmasos.serve.inflight import Requests, Watch
from llmasos.serve.jobs.room import Jobs
from llmasos.serve.jobs.tasks import Pipelines, TaskBatches
from llmasos.serve.log import Journal, log_access
from llmasos.serve.models import Models
from llmasos.serve.native import Agents, InProcess, Machine, Pulls, Residents, Uploads
from llmasos.serve.openai import create_router as create_openai_router
from llmasos.serve.served import ServedModel
from llmasos.serve.storage import Storage

if TYPE_CHECKING:
    from llmasos.inference.llm import LLM
    from llmasos.serve.access.access import Access
    from llmasos.serve.telemetry import Telemetry
    from llmasos.store.database import Database

MAX_BODY_BYTES = 32 * 2**20
MAX_UPLOAD_BYTES = 100 * 2**30
DATABASE_SECONDS = 5.0
"""After which a database counts as not reachable."""


def create_app(
    llms: Mapping[str, LLM] | LLM | Mapping[str, ServedModel] | ServedModel,
    *,
    aliases: Mapping[str, str] | None = None,
    max_waiting: int = 256,
    **options: Any,
) -> FastAPI:
    """An ASGI application that serves `llms` under their names.

    `aliases` maps further names, which are accepted and not listed, to served ones. A model with `max_waiting`
    completions in flight beyond those that it runs at once answers 503. Adapters of the models are served under their
    names. The models stay the caller's: nothing closes them. `options` are those of `assemble`.
    """
    named: Mapping[str, Any] = llms if isinstance(llms, Mapping) else {llms.name: llms}
    models = Models(named, aliases, max_waiting=max_waiting)
    return assemble(models, **options)


def assemble(
    models: Models,
    *,
    residents: Residents | None = None,
    machine: Machine | None = None,
    readiness: Readiness | None = None,
    loopback_only: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
    max_stored_bytes: int = MAX_STORED_BYTES,
    enable_lora_loading: bool = False,
    database: Database | None = None,
    access: Access | None = None,
    telemetry: Telemetry | None = None,
    around: Callable[[], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """All routes around `models`.

    `loopback_only` refuses requests with a Host header from elsewhere; `max_upload_bytes` is for one uploaded file,
    `max_stored_bytes` for all of a key's; `enable_lora_loading` lets clients load adapters, from any path that they
    name. `database` stays the caller's; without one, the home's is opened when something is to be kept. `access` says
    who may do what; without it everybody may do everything. It and `telemetry` are closed with the application.
    `residents` decides what is loaded (default: the models are the program's). `around` is entered before the first
    request and left after the last one.
    """
    residents = residents or InProcess(models)
    storage = Storage(access.database if access and not database else database)
    background = Background(models, storage, access, max_stored_bytes=max_stored_bytes)
    requests, journal, readiness = Requests(), Journal(), readiness or Readiness()
    if access is not None or database is not None:
        readiness.checks["database"] = partial(_unreachable, storage)
    apps = Supervisor(access, models) if access is not None else None  # an application is known by its key
    jobs = Jobs(storage)
    if apps is not None:
        jobs.sources.append(AppJobs(apps))
        models.apps = AppModels(apps)
    pulls = Pulls(jobs)
    of_tasks = (jobs, models, Aside(access), background.files)
    fine_tuning = FineTuning(jobs, models, background.files)
    agents = Agents(models, storage)
    requests.on_end.append(log_access)
    if telemetry is not None:
        telemetry.watch(requests)
        agents.on_end.append(telemetry.record_run)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(journal.attached())
            stack.push_async_callback(storage.close)
            if access is not None:
                stack.push_async_callback(access.close)
            if telemetry is not None:
                stack.push_async_callback(asyncio.to_thread, telemetry.close)
            if around is not None:
                await stack.enter_async_context(around())
            stack.push_async_callback(background.stop)
            await background.start()
            stack.push_async_callback(jobs.close)
            await jobs.start()
            stack.push_async_callback(agents.close)
            await agents.start()
            if apps is not None:
                stack.push_async_callback(apps.close)
                apps.server = app
                await apps.start()
            yield
            readiness.stopping.set()

    app = FastAPI(
        title="LLMasOS",
        version=__version__,
        description="Language models over OpenAI's, Anthropic's and Ollama's APIs, and LLMasOS's own.",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    problems.install(app)
    if access is not None:
        install_access(app, access)
    app.add_middleware(
        Gate, max_body_bytes=max_body_bytes, max_upload_bytes=max_upload_bytes, loopback_only=loopback_only
    )
    app.add_middleware(Watch, requests=requests)
    app.include_router(anthropic.create_router(models))  # before OpenAI's: /v1/models is both
    app.include_router(create_openai_router(models, apps))
    background.include(app)
    app.include_router(fine_tuning_routes(fine_tuning, readiness.stopping))
    app.include_router(adapter_routes.create_router(models, enabled=enable_lora_loading))
    app.include_router(ollama.create_router(models, residents, pulls))
    app.include_router(health.create_router(models, readiness))
    app.include_router(console.create_router())
    app.include_router(
        native.create_router(
            models,
            residents_=residents,
            jobs=jobs,
            batches=TaskBatches(*of_tasks),
            pipelines=Pipelines(*of_tasks),
            pulls_=pulls,
            uploads_=Uploads(max_bytes=max_upload_bytes),
            requests_=requests,
            agents_=agents,
            journal=journal,
            machine=machine or Machine(),
            readiness=readiness,
        )
    )
    if apps is not None:
        app.include_router(app_routes(apps, readiness.stopping))
        app.include_router(shelf.create_router(apps.apps))
    openapi.install(app)
    return app


async def _unreachable(storage: Storage) -> str | None:
    """Why the database does not answer, None if it does. Raises StoreError that says so itself."""
    from sqlalchemy import text

    try:
        asking = storage.run(lambda session: session.execute(text("SELECT 1")).scalar(), read_only=True)
        await asyncio.wait_for(asking, DATABASE_SECONDS)
    except TimeoutError:
        return f"it did not answer within {DATABASE_SECONDS:g} s"
    return None
