"""Log lines: text for people, JSON for machines, the latest ones kept."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.serve.inflight import InFlight, noting
from llmasos.serve.log import Journal, JsonFormatter, TextFormatter, logging_to

log = logging.getLogger("llmasos.test_log")


def record(message: str, level: int = logging.INFO, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("llmasos.x", level, "file", 1, message, (), None)
    made.fields = fields
    return made


def test_json_is_one_object_a_line_with_its_fields() -> None:
    stream = io.StringIO()
    with logging_to(stream, format="json", level="debug"):
        log.info("hello\nworld %s", "ü", extra={"fields": {"n": 1}})
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("it failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {"level": "info", "logger": "llmasos.test_log", "message": "hello\nworld ü", "n": 1}
    assert second["level"] == "error" and "ValueError: why" in second["exception"]


def test_the_level_decides_what_is_written_and_everything_is_as_before_afterwards() -> None:
    stream, logger = io.StringIO(), logging.getLogger("llmasos")
    before = (logger.level, list(logger.handlers), logger.propagate)
    with logging_to(stream, level="warning"):
        log.info("quiet")
        log.warning("loud")
    log.warning("after")
    assert "loud" in stream.getvalue() and "quiet" not in stream.getvalue() and "after" not in stream.getvalue()
    assert (logger.level, list(logger.handlers), logger.propagate) == before


@given(st.text())
def test_what_a_client_sends_is_one_line_of_text_and_harmless_to_a_terminal(text: str) -> None:
    for line in (TextFormatter().format(record(text)), JsonFormatter().format(record(text, value=text))):
        assert "\n" not in line and "\r" not in line and "\x1b" not in line


def test_a_line_knows_its_request() -> None:
    scope = {"type": "http", "method": "GET", "path": "/", "state": {"request_id": "one"}}
    with noting(InFlight(scope, None)):
        assert json.loads(JsonFormatter().format(record("x")))["request_id"] == "one"
        assert TextFormatter().format(record("x")).endswith("x [one]")
    assert "request_id" not in json.loads(JsonFormatter().format(record("x")))


def test_only_the_latest_lines_are_kept() -> None:
    journal = Journal(size=3)
    for i in range(5):
        journal.emit(record(str(i), logging.ERROR if i % 2 else logging.INFO))
    assert [line.message for line in journal.lines()] == ["2", "3", "4"]
    assert [line.message for line in journal.lines(level="warning")] == ["3"]
    assert [line.message for line in journal.lines(limit=1)] == ["4"]


async def test_followers_hear_lines_of_other_threads_and_one_that_lags_does_not_hold_them_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmasos.serve.log.QUEUED_LINES", 10)
    journal = Journal()
    journal.emit(record("past"))
    quick, slow = journal.follow(limit=1), journal.follow(limit=1)
    assert (await anext(quick)).message == (await anext(slow)).message == "past"
    heard: list[str] = []

    async def listen() -> None:
        async for line in quick:
            heard.append(line.message)
            if line.message == "last":
                return

    listening = asyncio.create_task(listen())
    waiting = asyncio.create_task(anext(slow))
    await asyncio.sleep(0)

    def work() -> None:
        for i in range(50):
            journal.emit(record(str(i)))

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        await asyncio.to_thread(thread.join)
    journal.emit(record("last"))
    await asyncio.wait_for(listening, 10)
    assert heard[-1] == "last" and (await waiting).message == "0"
    await quick.aclose()
    await slow.aclose()
    assert journal._followers == {}
