"""The HTTP server: `create_app` makes an ASGI application of loaded models, `serve` loads models and runs it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from llmasos import __version__
from llmasos.apps.hosting import listen, run, url_of
from llmasos.client.http import is_loopback
from llmasos.client.providers import is_remote
from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.serve import adapters as adapter_routes
from llmasos.serve import anthropic, health, native, ollama, openapi, problems
from llmasos.serve.access.install import install as install_access
from llmasos.serve.background import Background
from llmasos.serve.gate import Gate
from llmasos.serve.health import Readiness
from llmasos.serve.inflight import Requests, Watch
from llmasos.serve.log import Journal, log_access
from llmasos.serve.models import Models, ServedModel
from llmasos.serve.native import InProcess, Machine, Pulls, Residents, Uploads
from llmasos.serve.openai import create_router as create_openai_router
from llmasos.serve.storage import Storage

if TYPE_CHECKING:
    from llmasos.inference.llm import LLM
    from llmasos.serve.access.access import Access
    from llmasos.serve.telemetry import Telemetry
    from llmasos.store.database import Database

MAX_BODY_BYTES = 32 * 2**20
MAX_UPLOAD_BYTES = 100 * 2**30
SHUTDOWN_SECONDS = 10
"""What is still running this long after the signal to stop is cancelled."""


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
    enable_lora_loading: bool = False,
    database: Database | None = None,
    access: Access | None = None,
    telemetry: Telemetry | None = None,
    around: Callable[[], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """All routes around `models`.

    `loopback_only` refuses requests with a Host header from elsewhere; `max_upload_bytes` is for uploaded files;
    `enable_lora_loading` lets clients load adapters, from any path that they name. `database` stays the caller's;
    without one, the home's is opened when something is to be kept. `access` says who may do what; without it everybody
    may do everything. It and `telemetry` are closed with the application. `residents` decides what is loaded (default:
    the models are the program's). `around` is entered before the first request and left after the last one.
    """
    residents = residents or InProcess(models)
    storage = Storage(access.database if access and not database else database)
    background = Background(models, storage, access)
    requests, journal, readiness = Requests(), Journal(), readiness or Readiness()
    pulls = Pulls(storage)
    requests.on_end.append(log_access)
    if telemetry is not None:
        telemetry.watch(requests)

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
            stack.push_async_callback(pulls.close)
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
    app.include_router(create_openai_router(models))
    background.include(app)
    app.include_router(adapter_routes.create_router(models, enabled=enable_lora_loading))
    app.include_router(ollama.create_router(models, residents))
    app.include_router(health.create_router(models, readiness))
    app.include_router(
        native.create_router(
            residents_=residents,
            pulls_=pulls,
            uploads_=Uploads(max_bytes=max_upload_bytes),
            requests_=requests,
            journal=journal,
            machine=machine or Machine(),
            readiness=readiness,
        )
    )
    openapi.install(app)
    return app


def serve(
    models: Sequence[str] | Mapping[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    insecure: bool = False,
    require_key: bool = False,
    cors_origins: Sequence[str] = (),
    database: str = "",
    adapters: Mapping[str, str | Path] | None = None,
    load: Callable[[str], LLM] | None = None,
    on_ready: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Load `models` (references, or served name to reference) and serve them until SIGINT or SIGTERM.

    The address is taken before anything is loaded; port 0 picks a free one. `on_ready` gets the base URL, e.g.
    `http://127.0.0.1:8000/v1`. `adapters` of the one model are served under their names. `load` turns a reference into
    a model (default: LLM.from_pretrained); `options` go to `create_app`. Keys, usage and what clients leave here are
    kept in `database` (a URL; by default as `Database.open` has it). Keys are required with `require_key`, and where
    `host` is not loopback, unless `insecure`; `cors_origins`: pages that may ask from a browser. Raises ServerError
    when the address can't be had, or when keys are required and there is none.
    """
    from llmasos.serve.access.open import open_access

    if not models:
        raise InvalidInputError("No model to serve was named.", hint="llmasos serve smollm2-135m-instruct")
    if adapters and len(models) > 1:
        raise InvalidInputError("Adapters belong to one model, and several are served.", hint="Serve that one alone.")
    with contextlib.ExitStack() as stack:
        opened = open_access(database, host, require_key=require_key, insecure=insecure, origins=tuple(cors_origins))
        access = stack.enter_context(opened)
        listener = stack.enter_context(listen(host, port))
        llms, aliases = _load(models, load or _from_pretrained, stack)
        _load_adapters(llms, aliases, adapters or {})
        app = create_app(llms, aliases=aliases, loopback_only=is_loopback(host), access=access, **options)
        url = url_of(*listener.getsockname()[:2]) + "/v1"
        run(app, listener, grace=SHUTDOWN_SECONDS, ready=lambda: on_ready(url) if on_ready else None, lifespan="on")


def _from_pretrained(reference: str) -> LLM:
    from llmasos.inference.llm import LLM

    if is_remote(reference):
        raise UnsupportedError(f"{reference!r} is already behind an API; only local models are served.")
    llm = LLM.from_pretrained(reference)
    assert isinstance(llm, LLM)
    return llm


def _served_name(reference: str) -> str:
    """A path is served under the last part of it: clients need not know where files lie."""
    path = Path(reference)
    return path.name.removesuffix(".gguf") if path.exists() else reference


def _load(
    models: Sequence[str] | Mapping[str, str], load: Callable[[str], LLM], stack: contextlib.ExitStack
) -> tuple[dict[str, LLM], dict[str, str]]:
    """Models by served name, and the references that were typed as aliases. `stack` closes the models."""
    llms: dict[str, LLM] = {}
    aliases: dict[str, str] = {}
    names: Sequence[tuple[str | None, str]]
    names = list(models.items()) if isinstance(models, Mapping) else [(None, reference) for reference in models]
    for name, reference in names:
        llm = load(reference)
        stack.callback(llm.close)
        served = name or _served_name(reference)
        if served in llms:
            raise InvalidInputError(f"Two models would be served as {served!r}.", hint="Give each its own name.")
        llm.name = served  # errors name the model, and clients need not read where it lies
        llms[served] = llm
        aliases[reference] = served
    return llms, aliases


def _load_adapters(llms: Mapping[str, LLM], aliases: Mapping[str, str], adapters: Mapping[str, str | Path]) -> None:
    for name, path in adapters.items():
        if name in llms or name in aliases:
            raise InvalidInputError(f"{name!r} is the model's own name.", hint="Give the adapter another one.")
        for llm in llms.values():
            llm.load_adapter(name, path)
