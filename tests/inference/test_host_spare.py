"""Processes that have told what a model takes and wait for one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from hosting import family, spec_of, until

from llmasos.errors import NotFoundError
from llmasos.inference.host import spare
from llmasos.inference.host.forecast import Forecast
from llmasos.inference.host.process import ModelProcess


async def test_the_process_that_told_what_a_model_takes_loads_it(tiny_model: Path, tmp_path: Path) -> None:
    found = await asyncio.gather(
        spare.run_forecast({"reference": str(tiny_model), "device": "cpu"}),
        spare.run_forecast({"reference": str(tmp_path / "none")}),
        return_exceptions=True,
    )
    assert isinstance(found[0], Forecast) and found[0].num_context == 256
    assert isinstance(found[1], NotFoundError) and "none" in found[1].message
    [(waiting, _)] = spare._waiting.items()
    assert spare.memory() > 50e6
    process = await ModelProcess.start(spec_of(tiny_model))
    assert process.pid == waiting.process.pid and not spare._waiting and spare.memory() == 0
    assert process.load_seconds > 0 and len(await process.llm.agenerate("The", max_tokens=4)) > 0
    await process.stop(1)
    assert not family(process.pid)


def sleeper() -> spare.Spare:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return spare.Spare(subprocess.Popen([sys.executable, "-c", "input()"], **pipes))  # type: ignore[call-overload]


def test_a_process_that_nobody_needs_soon_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare, "SPARE_S", 0.01)
    spare._keep(one := sleeper())
    until(lambda: one.process.returncode is not None)
    assert spare.take() is None


def test_a_process_that_has_died_while_it_waited_is_not_taken() -> None:
    dead, alive = sleeper(), sleeper()
    spare._keep(alive)
    spare._keep(dead)
    dead.process.kill()
    dead.process.wait()
    assert spare.take() is alive
    spare._keep(alive)
    spare.end_all()
    assert spare.take() is None and alive.process.returncode is not None


async def test_a_forecast_that_is_cancelled_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    one = sleeper()
    monkeypatch.setattr(spare, "start", lambda name: one.process)
    monkeypatch.setattr(spare, "tell", lambda process, message: None)
    task = asyncio.create_task(spare.run_forecast({"reference": str(tiny_model)}))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(until, lambda: one.process.returncode is not None)
