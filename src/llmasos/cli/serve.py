"""`llmasos serve`: models behind HTTP. Its flags are the options of ServeConfig and the engine's."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from typing import Any

from llmasos.cli.engine import take_engine
from llmasos.cli.messages import t
from llmasos.cli.render import say
from llmasos.serve.config import ServeConfig, flags

PULLED_BY = (sys.executable, "-m", "llmasos", "pull")


def serve(*models: str, config: str | None = None, **server: Any) -> int:
    """Returns after Ctrl-C or SIGTERM."""
    engine = take_engine(server)
    typed = {flag.field: server[flag.name] for flag in flags() if flag.name in server}
    if models:
        typed["models"] = models
    options = ServeConfig.read(typed, path=config)
    options = replace(options, engine={**options.engine, **engine})
    from llmasos.serve.service import named_models, serve_config

    named = named_models(options)
    for model in named.values():
        if code := _fetch(model.reference):
            return code

    def ready(url: str) -> None:
        names = ", ".join([*named, *options.adapters])
        say(t("serve.ready", models=names, url=url) if named else t("serve.ready_all", url=url))
        say(t("serve.console", url=f"{url.removesuffix('/v1')}/console/"))
        # what is here now stays: looking through it again would hold up every stream, and the stop by seconds
        gc.freeze()

    serve_config(options, on_ready=ready)
    return 0


def _fetch(reference: str) -> int:
    """Pull a model that is not here, in a process of its own: what pulls loads torch, and this one serves for weeks."""
    from llmasos.cli.fetch import needs_fetching

    if not needs_fetching(reference):
        return 0
    return subprocess.run([*PULLED_BY, reference]).returncode
