"""Models that are forgotten while others still want them, and loads that are told to stop before they have begun."""

import asyncio
from contextlib import suppress

import pytest
from fake_processes import World, idle, until

from llmasos.errors import BusyError, ModelCrashedError, NotFoundError


async def ask(host, name):
    async with host.lease(name) as llm:
        return await llm.acomplete([[1]])


def status(host, name):
    return next(one for one in host.status() if one.name == name)


async def test_a_request_that_comes_while_a_model_is_forgotten_is_answered() -> None:
    world = World(100, a=60)
    host = world.host()
    await ask(host, "a")
    removing = asyncio.ensure_future(host.remove("a"))
    await asyncio.sleep(0)
    assert world.process("a").pid and not removing.done()
    asked = asyncio.ensure_future(ask(host, "a"))
    with pytest.raises(BusyError):
        await removing
    assert await asyncio.wait_for(asked, 5) == ["abc"]
    await host.remove("a")
    assert host.names == [] and not world.alive
    with pytest.raises(NotFoundError):
        await host.remove("a")
    await host.close()


async def test_two_may_forget_the_same_model() -> None:
    world = World(100, a=10)
    host = world.host()
    await ask(host, "a")
    await asyncio.gather(host.remove("a"), host.remove("a"))
    assert host.names == []
    await host.close()


async def test_a_request_whose_process_died_is_not_left_in_the_line_of_a_forgotten_model() -> None:
    world = World(100, a=10)
    host = world.host()
    async with host.lease("a") as llm:
        process = world.process("a")
        process.llm.gate.clear()
        process.end()
        await until(lambda: not host.loaded())
        await host.remove("a")
        with pytest.raises(ModelCrashedError):
            await asyncio.wait_for(llm.acomplete([[1]]), 5)
    await host.close()


async def test_a_load_that_is_told_to_stop_before_it_began_gives_its_memory_back() -> None:
    world = World(100, a=60, b=60)
    world.gates["a"] = asyncio.Event()
    host = world.host()
    asked = asyncio.ensure_future(ask(host, "a"))
    await until(lambda: bool(status(host, "a").replicas))
    assert not world.loading["a"]
    await host.unload("a", force=True)
    with suppress(Exception):
        await asked
    await idle()
    assert status(host, "a").state == "absent"
    assert await asyncio.wait_for(ask(host, "b"), 5) == ["abc"]
    await host.close()
