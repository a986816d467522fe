"""Models, jobs and the log in the console by hand, in a browser: how long models stay, a training job with its curve,
the log as it is written."""

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fake_llm import FakeLLM
from served import served
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmasos.client.types.jobs import Job
from llmasos.client.types.native import ModelStatus
from llmasos.serve.access.access import Access
from llmasos.serve.access.policy import Policy
from llmasos.serve.server import create_app
from llmasos.store import import_model
from llmasos.store.database import Database
from tiny import write_tiny_model

JS = Path(__file__).parents[2] / "js"
NODE = shutil.which("node")


class Residents:
    """One model that is in memory, or not."""

    def __init__(self) -> None:
        self.state = ModelStatus(name="mouse", reference="mouse", state="absent", keep_alive=300)

    def status(self) -> list[ModelStatus]:
        return [self.state.model_copy()]

    async def load(self, name: str, *, pin: bool | None) -> None:
        self.state.state = "ready"

    async def unload(self, name: str, *, force: bool) -> None:
        self.state.state, self.state.why_evicted = "absent", "unloaded by hand"

    async def pin(self, name: str, pinned: bool) -> None:
        self.state.pinned = pinned

    async def keep(self, name: str, seconds: float) -> None:
        self.state.keep_alive = None if seconds == float("inf") else seconds

    async def removed(self, name: str) -> None: ...


class Training:
    """A job of four steps, of which the rest comes when somebody has looked; then it can be cancelled."""

    ID = "ftjob-1"

    def __init__(self) -> None:
        self.state, self.looks = "running", 0

    def job(self) -> dict[str, Any]:
        now = datetime.now(UTC)
        words = {"name": "ft:mouse::1", "message": "2/4, loss 2.5", "progress": 0.5, "can_pause": True}
        return Job(id=self.ID, kind="fine_tuning", state=self.state, created=now, updated=now, **words).model_dump(
            mode="json"
        )

    def jobs(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.job()]})

    def cancel(self, request: Request) -> Response:
        self.state = "cancelled"
        return JSONResponse(self.job())

    def events(self, request: Request) -> Response:
        assert request.query_params["stream"] == "true"
        found: list[dict[str, Any]] = [{"type": "message", "message": "Training has started: 4 steps", "level": "info"}]
        for step, loss in ((1, 3.25), (2, 2.5), (3, 2.125)):
            data = {"step": step, "total_steps": 4, "train_loss": loss, "learning_rate": 2e-4, "trained_tokens": 9}
            found.append({"type": "metrics", "message": "", "level": "info", "data": data})
        found.append({"type": "metrics", "message": "", "level": "info", "data": {"step": 3, "valid_loss": 2.25}})
        lines = [json.dumps({"id": str(i), "created_at": 1, **one}) for i, one in enumerate(found)]
        return Response("".join(f"data: {line}\n\n" for line in lines), media_type="text/event-stream")

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/llmasos/v1/jobs", self.jobs),
            Route(f"/llmasos/v1/jobs/{self.ID}/cancel", self.cancel, methods=["POST"]),
            Route(f"/v1/fine_tuning/jobs/{self.ID}/events", self.events),
        ]


@pytest.fixture
def walk(tmp_path: Path, home: Path) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Goes through a part of the walk and returns what it saw; skips where there is no browser."""
    if NODE is None:
        pytest.skip("node is not installed")
    out = Path(os.environ.get("LLMASOS_SCREENSHOTS") or tmp_path / "out")
    out.mkdir(exist_ok=True)
    (out / "next.go").unlink(missing_ok=True)
    import_model(write_tiny_model(tmp_path / "m"), name="mouse")
    residents, training = Residents(), Training()

    def go(part: str) -> dict[str, Any]:
        command = [str(NODE), "tests/rooms.browser.js", url, str(out), part]
        with subprocess.Popen(command, cwd=JS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as browser:
            while browser.poll() is None and not (out / "next.go").exists():
                time.sleep(0.02)
            logging.getLogger("llmasos").warning("the second line")
            said, errors = browser.communicate(timeout=280)
        assert browser.returncode == 0, errors
        told = json.loads(said)
        if "missing" in told:
            pytest.skip(told["missing"])
        assert told["serious"] == {}, "what axe-core finds"
        assert told["errors"] + told["elsewhere"] == [], json.dumps([told["errors"], told["elsewhere"]])
        assert told["wide"] == [], "nothing is wider than a small phone"
        return told | {"status": residents.state, "training": training.state}

    with Database.open(f"sqlite:///{tmp_path / 'access.db'}") as database:
        whole = create_app({"fake": FakeLLM()}, access=Access(database, Policy()), residents=residents)
        whole.router.routes[:0] = training.routes
        with served(whole) as url:
            logging.getLogger("llmasos").warning("the first line")
            yield go


@pytest.mark.timeout(300)
def test_how_long_a_model_stays_is_set_by_hand(walk: Callable[[str], dict[str, Any]]) -> None:
    told = walk("models")
    assert told["choices"][0] == "no time: after each request" and len(told["choices"]) == 7
    assert told["kept"] == "1800" and told["ever"] == "-1" and told["status"].keep_alive is None
    assert told["pinned"] == "true" and told["status"].state == "absent" and told["why"] == "unloaded by hand"


@pytest.mark.timeout(300)
def test_a_training_job_shows_its_loss_and_can_be_cancelled(walk: Callable[[str], dict[str, Any]]) -> None:
    told = walk("training")
    assert told["curve"] == "Loss: Training loss 2.125, Validation loss 2.25" and told["drawn"]
    assert told["facts"]["Step"] == "3 of 4" and told["facts"]["Validation loss"] == "2.25"
    assert told["training"] == "cancelled"


@pytest.mark.timeout(300)
def test_the_log_is_followed_held_and_filtered(walk: Callable[[str], dict[str, Any]]) -> None:
    told = walk("logs")
    assert told["held"] == 0 and told["resumed"] == 1, "what came while it was held is there afterwards"
    assert told["filtered"] == 1
