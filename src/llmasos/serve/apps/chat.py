"""Applications that chat, among the models: `app/NAME`."""

from __future__ import annotations

import asyncio
from datetime import datetime

from fastapi import Request, Response

from llmasos.client.types import Model, ModelCapabilities
from llmasos.serve import inflight
from llmasos.serve.apps.proxy import forward
from llmasos.serve.apps.rights import may_use
from llmasos.serve.apps.supervisor import Supervisor
from llmasos.serve.caller import Caller
from llmasos.serve.models import ModelNotFoundError
from llmasos.store.packages import Installed

PREFIX = "app/"
PATH = "/v1/chat/completions"


def is_app(model: str) -> bool:
    return model.startswith(PREFIX)


async def app_models(apps: Supervisor, caller: Caller) -> list[Model]:
    """Those that the caller may use."""
    found = []
    for app in await asyncio.to_thread(apps.apps.list):
        name = f"{PREFIX}{app.name}"
        if app.manifest and may_use(caller, app.name) and caller.may_use(name) and (await apps.documents(app)).chats:
            found.append(_described(app))
    return found


async def app_model(apps: Supervisor, caller: Caller, model: str) -> Model:
    """Raises ModelNotFoundError, ForbiddenError."""
    return _described(await checked(apps, caller, model))


async def app_chat(apps: Supervisor, caller: Caller, model: str, request: Request) -> Response:
    """The application's own answer to the request as it came; what it asks of models counts as the application's.

    Raises ModelNotFoundError, ForbiddenError, and what `forward` raises."""
    app = await checked(apps, caller, model)
    inflight.asks(model)
    return await forward(apps, request, app.name, PATH, body=await request.body())


async def checked(apps: Supervisor, caller: Caller, model: str) -> Installed:
    """Raises ModelNotFoundError, ForbiddenError, and what `Supervisor.running` raises."""
    name = model.removeprefix(PREFIX)
    caller.check_model(model)
    caller.check_app(name)
    found = next((one for one in await asyncio.to_thread(apps.apps.list) if one.name == name and one.manifest), None)
    if found is None or not (await apps.learnt(found)).chats:
        why = "is not installed here" if found is None else "does not chat"
        raise ModelNotFoundError(f"The application {name[:80]!r} {why}.", hint="GET /v1/models lists those that do.")
    return found


def _described(app: Installed) -> Model:
    installed = datetime.fromisoformat(app.record.installed).timestamp() if app.record else 0.0
    can = ModelCapabilities(completion=False, chat=True, tools=False, reasoning=False, embeddings=False)
    return Model(
        id=f"{PREFIX}{app.name}",
        created=int(installed),
        owned_by=app.name,
        context_length=None,
        max_model_len=None,
        capabilities=can,
        parent=None,
    )
