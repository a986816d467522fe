"""A small run of `bench/api_fuzz.py`: a few hundred requests made from the server's own OpenAPI document."""

from pathlib import Path

import pytest
from access_world import LOOPBACK
from fake_llm import ObedientLLM

from llmasos.errors import OfflineError
from llmasos.serve.access.access import Access
from llmasos.serve.native import Pulls, worker
from llmasos.serve.server import create_app
from llmasos.store.database import Database

pytest.importorskip("schemathesis")

ALIKE = "translate|rewrite|write_code|sentiment|answer|keywords|embed|chat|rerank"
SLOW_TO_MAKE = rf"/(v2/rerank|rerank|score|v1/responses/input_tokens|tasks/({ALIKE}))$"
"""The same requests as others, or nearly; making a strategy for each costs more than to send what it draws."""


async def _offline(task: str, options: dict, on_progress=None) -> dict:
    if task == "machine":
        return {"machine": "test", "gpus": [], "torch": "2", "device": "cpu", "dtype": "float32", "cpu_cores": 1}
    raise OfflineError("Offline mode is on.")


def test_nothing_that_the_document_allows_or_forbids_breaks_the_server(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api_fuzzer import Fuzzer, Running

    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    monkeypatch.setattr(worker, "run", _offline)  # processes of their own cost seconds
    monkeypatch.setattr(Pulls.__init__, "__kwdefaults__", {"run": _offline})
    fake, ranker, database = ObedientLLM(), ObedientLLM("ranker"), Database.open()
    ranker.scores_pairs = True
    app = create_app({"fake": fake, "ranker": ranker}, access=Access(database, LOOPBACK))
    with Running(app) as running:
        fuzzer = Fuzzer(running, ["fake", "ranker"], number=4, exclude=SLOW_TO_MAKE)
        fuzzer.furnish()
        fuzzer.edges(4)
    database.close()
    tally = fuzzer.tally
    assert not tally.failures
    assert tally.num_requests > 250
    assert len(tally.operations) > 70
    assert len(tally.succeeded) > 35
    assert fake.num_running == 0
