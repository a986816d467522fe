"""Several servers on one database: each goes on with what is its own, and with that of no living neighbour."""

import asyncio
from pathlib import Path

import pytest
from fake_llm import FakeLLM

from llmasos.client.types.files import BatchRequest
from llmasos.client.types.responses import ResponseRequest
from llmasos.serve.background import Background
from llmasos.serve.caller import ANYONE
from llmasos.serve.files.form import TEMPORARY
from llmasos.serve.files.store import Files
from llmasos.serve.models import Models
from llmasos.serve.responses.service import Responses
from llmasos.serve.storage import Storage, place_of
from llmasos.store.database import Database

LINE = (
    b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "fake", "prompt": "hi", '
    b'"max_tokens": 2}}\n'
)
ASKED = ResponseRequest(model="fake", input="hi", background=True)


def responses(database: Database, home: Path, llm: FakeLLM) -> Responses:
    return Responses(Models({"fake": llm}), Storage(database, home))


async def over(service: Responses, id: str) -> str:
    for _ in range(1000):
        status = (await service.get(ANYONE, id)).status
        if status not in ("queued", "in_progress"):
            return status
        await asyncio.sleep(0.01)
    raise AssertionError(status)


async def held(database: Database, home: Path) -> tuple[Responses, FakeLLM, str]:
    """A server that works on a response for ever."""
    llm = FakeLLM(delay=3600)
    server = responses(database, home, llm)
    id = (await server.answer(ANYONE, ASKED)).id
    while not llm.num_running:
        await asyncio.sleep(0.001)
    return server, llm, id


def test_a_home_has_one_name_for_ever_and_another_home_another(tmp_path: Path) -> None:
    first = place_of(tmp_path / "a")
    assert first and place_of(tmp_path / "a") == first != place_of(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert place_of(tmp_path / "moved") == first


def test_a_server_is_alive_until_it_is_closed_or_dies(tmp_path: Path) -> None:
    first, second = Storage(home=tmp_path), Storage(home=tmp_path)
    assert first.living() == set()
    assert first.living() | second.living() == set()
    names = {first.server, second.server}
    assert len(names) == 2 and first.living() == second.living() == names
    assert second._life is not None
    second._life.release()  # what the system does when a process ends
    assert first.living() == {first.server}
    asyncio.run(first.close())
    assert Storage(home=tmp_path).living() == set()


async def test_a_background_response_stays_with_the_server_that_lives(database: Database, tmp_path: Path) -> None:
    server, _, id = await held(database, tmp_path)
    near, far = FakeLLM(), FakeLLM()
    beside, elsewhere = responses(database, tmp_path, near), responses(database, tmp_path / "other", far)
    await beside.take_up()
    await elsewhere.take_up()
    assert not beside._runs and not elsewhere._runs
    await server.stop()
    await server.storage.close()
    await elsewhere.take_up()
    await asyncio.gather(beside.take_up(), beside.take_up())
    assert await over(beside, id) == "completed"
    assert (len(near.prompts), len(far.prompts)) == (1, 0)


async def test_a_background_response_can_be_cancelled_at_any_server(database: Database, tmp_path: Path) -> None:
    server, _, id = await held(database, tmp_path)
    other = responses(database, tmp_path / "other", FakeLLM())
    assert (await other.cancel(ANYONE, id)).status == "cancelled"
    await server.stop()
    assert (await server.get(ANYONE, id)).status == (await other.cancel(ANYONE, id)).status == "cancelled"
    await server.storage.close()
    await other.take_up()
    assert not other._runs


async def test_the_answer_to_who_asks_is_the_response_as_it_was_accepted(database: Database, tmp_path: Path) -> None:
    server = responses(database, tmp_path, FakeLLM())
    accepted = await server.answer(ANYONE, ASKED)
    assert await over(server, accepted.id) == "completed"
    assert accepted.status == "queued" and accepted.output == []


async def test_of_two_that_start_after_a_crash_one_goes_on(database: Database, tmp_path: Path) -> None:
    server, _, id = await held(database, tmp_path)
    assert server.storage._life is not None
    server.storage._life.release()
    llms = [FakeLLM() for _ in range(3)]
    new = [responses(database, tmp_path, llm) for llm in llms]
    await asyncio.gather(*(one.take_up() for one in new))
    for one in new:
        assert await over(one, id) == "completed"
    assert sum(len(llm.prompts) for llm in llms) == 1
    await server.stop()


async def test_a_batch_is_answered_where_its_input_lies(database: Database, tmp_path: Path) -> None:
    llms = [FakeLLM(), FakeLLM()]
    homes = [tmp_path / "a", tmp_path / "b"]
    storages = [Storage(database, home) for home in homes]
    servers = [Background(Models({"fake": llm}), storage) for llm, storage in zip(llms, storages, strict=True)]
    source = storages[0].files / f"{TEMPORARY}x"
    source.parent.mkdir(parents=True)
    source.write_bytes(LINE)
    files = Files(storages[0])
    file = await files.keep(ANYONE, source, filename="x", purpose="batch")
    body = BatchRequest(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = await servers[1].batches.create(ANYONE, body)  # whoever it is that is asked
    await servers[1].start()
    await asyncio.sleep(0.05)
    assert (await servers[1].batches.get(ANYONE, batch.id)).status == "validating"
    await servers[0].start()
    for _ in range(1000):
        batch = await servers[1].batches.get(ANYONE, batch.id)
        if batch.status == "completed":
            break
        await asyncio.sleep(0.01)
    assert batch.output_file_id is not None
    assert b'"custom_id": "a"' in (await files.content(ANYONE, batch.output_file_id))[1].read_bytes()
    assert not llms[1].num_tokens
    with pytest.raises(Exception, match="at another server"):
        await servers[1].files.content(ANYONE, batch.output_file_id)
    for server in servers:
        await server.stop()
