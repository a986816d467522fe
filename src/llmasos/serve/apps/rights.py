"""What an application may ask models: the ones that its manifest names, and those that meet what it requires. And who
may use an application."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from llmasos.client.types import Model
from llmasos.errors import LLMasOSError
from llmasos.serve.access.errors import ForbiddenError
from llmasos.serve.caller import Caller
from llmasos.serve.models import Models
from llmasos.store.packages.manifest import Manifest, ModelNeed


def may_use(caller: Caller, name: str) -> bool:
    try:
        caller.check_app(name)
    except ForbiddenError:
        return False
    return True


async def rights_of(manifest: Manifest, models: Models, home: Path) -> dict[str, Any]:
    """Of a key's fields, those that the manifest decides: `models`, patterns of names. A knowledge base is searched
    with the model that it was made with."""
    names: list[str] = []
    needs = [manifest.models[name] for name in manifest.permissions.models]
    names += [need for need in needs if isinstance(need, str)]
    asked = [need for need in needs if isinstance(need, ModelNeed)]
    if asked:
        from llmasos.serve.openai.models import describe  # whose routes lead to applications

        await models.look(facts=True)
        for name in models.names:
            try:
                found = describe(models, name)
            except LLMasOSError:  # it went meanwhile
                continue
            if any(meets(found, need) for need in asked):
                names.append(name)
    for base in manifest.permissions.knowledge:
        names += await asyncio.to_thread(_encoder_of, base)
    return {"models": [_literal(name) for name in dict.fromkeys(names)], "apps": []}


def meets(model: Model, need: ModelNeed) -> bool:
    """What is not known of the model is not held against it."""
    can = model.capabilities
    if need.min_context is not None and model.context_length is not None and model.context_length < need.min_context:
        return False
    if can is None:
        return True
    has = {"tools": can.tools, "embed": can.embeddings}
    return all(has[one] for one in need.capabilities)


def _encoder_of(base: str) -> list[str]:
    from llmasos.apps.knowledge import KnowledgeBase
    from llmasos.apps.knowledge.base import folder_named

    try:
        found = KnowledgeBase.open(folder_named(base), create=False).model
    except LLMasOSError:
        return []
    return [found] if found else []


def _literal(name: str) -> str:
    """A pattern that matches this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
