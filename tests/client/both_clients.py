"""What tests of both clients share: one test, written once, asks a blocking and an asyncio client."""

import inspect

from llmasos.client import AsyncClient, Client

KINDS = {"sync": Client, "async": AsyncClient}


async def got(value):
    """What a call of either client gives."""
    return await value if inspect.isawaitable(value) else value


async def items(stream):
    """All that a stream of either client yields."""
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)
