"""A whole server from its options: database, keys, models in processes, telemetry, logs, and a stop in order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import math
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.apps.hosting import Stop, listen, run, url_of
from llmasos.client.http import is_loopback
from llmasos.client.providers import is_remote
from llmasos.errors import InvalidInputError, LLMasOSError, ServerError, UnsupportedError
from llmasos.serve import systemd
from llmasos.serve.access.open import open_access
from llmasos.serve.config import ModelOptions, ServeConfig
from llmasos.serve.health import Readiness
from llmasos.serve.log import logging_to
from llmasos.serve.server import assemble, create_app

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llmasos.inference.host.host import Host
    from llmasos.inference.host.process import ModelSpec
    from llmasos.inference.llm import LLM
    from llmasos.serve.backing import Hosted

_log = logging.getLogger("llmasos")

Load = Callable[[str], "LLM"]
OnReady = Callable[[str], None]
_M_ARENA_MAX = -8
"""Of glibc's mallopt(3)."""


def serve(
    models: Sequence[str] | Mapping[str, str] = (),
    *,
    load: Load | None = None,
    on_ready: OnReady | None = None,
    **options: Any,
) -> None:
    """Serve `models` (references, or served name to reference) until SIGINT or SIGTERM: see `serve_config`.

    `options` are the fields of ServeConfig. Without models every installed one is served, and loaded when it is first
    asked for.
    """
    if isinstance(models, Mapping):
        tables: dict[str, Any] = {name: {"reference": reference} for name, reference in models.items()}
        options["model"] = {**tables, **options.get("model", {})}
    serve_config(ServeConfig.of(models=list(models), **options), load=load, on_ready=on_ready)


def serve_config(config: ServeConfig, *, load: Load | None = None, on_ready: OnReady | None = None) -> None:
    """Run a server until it is told to stop.

    The address is taken before anything is loaded. Each model runs in a process of its own; with `load`, which turns a
    reference into a model, they are loaded into this one. `on_ready` gets the base URL, e.g.
    `http://127.0.0.1:8000/v1`, when the models that were named are loaded. Raises ServerError when the address can't be
    had or when keys are required and there is none, and the error of a named model that can't be loaded.
    """
    named = named_models(config)
    _share_memory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(format=config.log_format, level=config.log_level))
        access = stack.enter_context(
            open_access(
                config.database,
                config.host,
                require_key=config.require_key,
                insecure=config.insecure,
                origins=config.cors_origins,
            )
        )
        listener = stack.enter_context(systemd.activated_socket() or listen(config.host, config.port))
        url = url_of(*listener.getsockname()[:2]) + "/v1"
        service = _Service(config, named, lambda: on_ready(url) if on_ready else None)
        options: dict[str, Any] = {
            "readiness": service.readiness,
            "loopback_only": is_loopback(config.host),
            "max_body_bytes": config.max_body,
            "max_upload_bytes": config.max_upload,
            "max_stored_bytes": config.max_stored,
            "enable_lora_loading": config.enable_lora_loading,
            "access": access,
            "telemetry": _telemetry(config),
            "around": service.alive,
        }
        app = service.in_process(load, stack, options) if load else service.hosted(options)
        run(
            app,
            listener,
            grace=math.ceil(config.drain),
            ready=lambda: None,
            stopping=service.told_to_stop,
            stop=service.stop,
            lifespan="on",
        )
    if service.failure is not None:
        raise service.failure


def _share_memory() -> None:
    """Threads allocate from two common arenas. glibc would give each its own and keep in it what a long request left:
    85 MiB more after a few dozen bodies of 10 MB."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def named_models(config: ServeConfig) -> dict[str, ModelOptions]:
    """The models to load at the start, by the names that they are served under.

    Raises InvalidInputError for two of one name, UnsupportedError for one that is behind an API already.
    """
    found: dict[str, ModelOptions] = {}
    for reference in config.models:
        options = config.options_of(reference)
        if is_remote(options.reference):
            raise UnsupportedError(
                f"{options.reference!r} is already behind an API; only local models are served.",
                hint="`llmasos ls` shows local models.",
            )
        name = reference if reference in config.model else _served_name(reference)
        if name in found:
            raise InvalidInputError(f"Two models would be served as {name!r}.", hint="Give each its own name.")
        found[name] = options
    if config.adapters and len(found) != 1:
        raise InvalidInputError(
            "Adapters belong to one model, and several are served.",
            hint="Serve that one alone, or write them into its [model.NAME] table of serve.toml.",
        )
    for name, options in found.items():
        if name in options.adapters:
            raise InvalidInputError(f"{name!r} is the model's own name.", hint="Give the adapter another one.")
    return found


def _served_name(reference: str) -> str:
    """A path is served under the last part of it: clients need not know where files lie."""
    path = Path(reference)
    return path.name.removesuffix(".gguf") if path.exists() else reference


def _telemetry(config: ServeConfig) -> Any:
    if not config.telemetry:
        return None
    from llmasos.serve.telemetry import Telemetry

    return Telemetry.to(config.telemetry)


class _Service:
    """One server from its start to its stop."""

    def __init__(self, config: ServeConfig, named: Mapping[str, ModelOptions], on_ready: Callable[[], None]) -> None:
        self.config, self.named, self._on_ready = config, named, on_ready
        self.readiness, self.stop = Readiness(), Stop()
        self.failure: LLMasOSError | None = None
        self._host: Host | None = None
        self._backing: Hosted | None = None
        self._loading = False
        self.readiness.checks["models"] = self._missing

    def in_process(self, load: Load, stack: contextlib.ExitStack, options: dict[str, Any]) -> FastAPI:
        """The models are loaded here, now, and closed by `stack`."""
        if not self.named:
            raise InvalidInputError("No model to serve was named.", hint="llmasos serve smollm2-135m-instruct")
        llms: dict[str, LLM] = {}
        for name, model in self.named.items():
            llm = llms[name] = load(model.reference)
            stack.callback(llm.close)
            llm.name = name  # errors name the model, and clients need not read where it lies
            for adapter, path in model.adapters.items():
                llm.load_adapter(adapter, path)
        return create_app(llms, aliases=self._aliases(), max_waiting=self.config.max_waiting, **options)

    def hosted(self, options: dict[str, Any]) -> FastAPI:
        """The models live in processes of a host."""
        from llmasos.inference.host.host import Host
        from llmasos.inference.host.memory import Budgets
        from llmasos.serve.backing import Hosted
        from llmasos.serve.models import Models
        from llmasos.serve.native import InHost, Machine

        budget = Budgets.detect()
        budget.limits.update(self.config.memory)
        self._host = host = Host(budget=budget, max_waiting=self.config.max_waiting)
        for name in {**self.named, **self.config.model}:
            model = self.named.get(name) or self.config.options_of(name)
            host.add(spec_of(name, model), **_terms(model))
        self._backing = backing = Hosted(host, installed=None if self.named else self._installed)
        models = Models(backing, self._aliases(), max_waiting=self.config.max_waiting)
        return assemble(
            models,
            residents=InHost(backing, lambda name: self._install(backing, name)),
            machine=Machine(budgets=lambda: budget.limits, free=budget.free),
            **options,
        )

    def _aliases(self) -> dict[str, str]:
        """What was typed, where it is not the name."""
        return {
            reference: name for reference, name in zip(self.config.models, self.named, strict=True) if reference != name
        }

    def _installed(self, name: str, path: Path) -> tuple[ModelSpec, Mapping[str, Any]]:
        model = replace(self.config.options_of(name), reference=str(path))
        return spec_of(name, model), _terms(model)

    async def _install(self, backing: Hosted, name: str) -> str | None:
        """Serve a model of the library that was not named at the start."""
        from llmasos.serve.installed import find_installed

        if (found := await asyncio.to_thread(find_installed, name)) is None:
            return None
        spec, terms = self._installed(found.name, found.path)
        backing.add(spec, **terms)
        return found.name

    @contextlib.asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """What runs beside the requests."""
        self._loading = True
        tasks = [asyncio.create_task(systemd.sign_of_life()), asyncio.create_task(self._begin())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._host is not None:
                await self._host.close()

    async def _begin(self) -> None:
        """Load what was named, then say that the server is ready; if that fails, stop it."""
        try:
            if self._backing is not None:
                await self._backing.look()  # errors name what there is
            if self._host is not None:
                systemd.notify(f"STATUS=loading {', '.join(self.named)}" if self.named else "STATUS=ready")
                await asyncio.gather(*(self._host.load(name) for name in self.named))
        except Exception as e:  # nobody waits for this task: a server that never becomes ready must say why
            if not isinstance(e, LLMasOSError):
                _log.exception("The models that were named could not be loaded.")
            self.failure = e if isinstance(e, LLMasOSError) else ServerError(f"{type(e).__name__}: {e}")
            self.stop()
            return
        self._loading = False
        systemd.notify("READY=1\nSTATUS=ready")
        self._on_ready()

    async def _missing(self) -> str | None:
        if self._loading:
            return f"loading {', '.join(self.named)}"
        if self._host is None:
            return None
        failed = [one.name for one in self._host.status() if one.name in self.named and one.state == "failed"]
        return f"failed: {', '.join(failed)}" if failed else None

    def told_to_stop(self) -> None:
        systemd.notify("STOPPING=1")
        self.readiness.stopping.set()


def spec_of(name: str, model: ModelOptions) -> ModelSpec:
    from llmasos.inference.host.process import ModelSpec

    return ModelSpec(
        name=name,
        reference=model.reference,
        device=model.device or "auto",
        dtype=model.dtype or "auto",
        quantization=model.quantization or "auto",
        engine=dict(model.engine),
        adapters=dict(model.adapters),
    )


def _terms(model: ModelOptions) -> dict[str, Any]:
    """Options of `Host.add`."""
    return {"replicas": model.replicas or 1, "keep_alive": model.keep_alive, "pinned": model.pin}
