"""The host with real processes: two models in memory for one, a kill -9, and what they take."""

import asyncio
import os
import random
import signal
from contextlib import asynccontextmanager

import pytest
from hosting import family, spec_of, until_async

from llmasos.errors import ModelCrashedError
from llmasos.inference.host.host import Host
from llmasos.inference.host.memory import Budgets
from llmasos.inference.request import SamplingParams
from tiny import write_tiny_model

SHORT = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(where / name, seed=i) for i, name in enumerate("abc")}


@asynccontextmanager
async def running(host):
    try:
        yield
        pids = [pid for one in host.status() for pid in one.pids]
    finally:
        await host.close()
    assert not any(family(pid) for pid in pids), "a process is left behind"


def status(host, name):
    return next(one for one in host.status() if one.name == name)


async def ask(host, name, params=SHORT):
    async with host.lease(name) as llm:
        [output] = await llm.acomplete([[5, 6, 7]], params)
        return output.outputs[0].token_ids


async def test_two_models_take_turns_in_memory_for_one_and_survive_a_kill(folders) -> None:
    engine = {"max_num_seqs": 4, "kv_cache_memory": 4 << 20}
    host = Host(budget=Budgets({"cpu": 400 << 20}))
    for name in "ab":
        host.add(spec_of(folders[name], name, engine=engine))
    async with running(host):
        first = await ask(host, "a")
        assert len(first) == 4 and status(host, "a").state == "ready"
        assert len(await ask(host, "b")) == 4
        assert status(host, "a").evictions == {"room": 1} and status(host, "a").why_evicted == "b needed the room"
        await until_async(lambda: status(host, "a").state == "absent")
        begun = asyncio.Event()

        async def stream() -> None:
            async with host.lease("b") as llm:
                async for _ in llm.astream_complete([5, 6, 7], LONG):
                    begun.set()

        in_flight = asyncio.ensure_future(stream())
        await begun.wait()
        os.kill(status(host, "b").pids[0], signal.SIGKILL)
        with pytest.raises(ModelCrashedError):
            await in_flight
        again = await ask(host, "b")  # waits for the new process
        assert again and status(host, "b").restarts == 1
        found = status(host, "b")
        held, measured = found.predicted_bytes["cpu"], found.measured_bytes["cpu"]
        assert abs(found.plan_error) <= 0.1 and measured <= 1.1 * held  # its second load
        assert await ask(host, "a") == first


@pytest.mark.slow
async def test_three_models_in_memory_for_two_answer_random_requests_while_processes_are_killed(folders) -> None:
    rng = random.Random(0)
    host = Host(budget=Budgets({"cpu": 700 << 20}), keep_alive=5.0)
    for name in "abc":
        host.add(spec_of(folders[name], name, engine={"max_num_seqs": 16, "kv_cache_memory": 8 << 20}))
    counts = {"answered": 0, "crashed": 0}

    async def request(name: str) -> None:
        try:
            await ask(host, name)
            counts["answered"] += 1
        except ModelCrashedError:
            counts["crashed"] += 1

    async with running(host):
        tasks = []
        for number in range(2000):
            tasks.append(asyncio.create_task(request(rng.choice("aaabbc"))))
            if number % 200 == 199 and (pids := [pid for one in host.status() for pid in one.pids]):
                os.kill(rng.choice(pids), signal.SIGKILL)
            await asyncio.sleep(0.1 * rng.random())
            assert sum(one.predicted_bytes["cpu"] for one in host.status() if one.replicas) <= 700 << 20
        await asyncio.gather(*tasks)
        assert sum(counts.values()) == 2000 and counts["answered"] > 1500
        assert all(one.busy == one.waiting == 0 and one.loads > 0 for one in host.status())
        assert sum(one.evictions.get("room", 0) for one in host.status()) > 3
        assert all(abs(one.plan_error) <= 0.1 for one in host.status() if one.loads > 1)
