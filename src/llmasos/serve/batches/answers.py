"""One line of a batch through the same code as an HTTP request: bodies, functions and errors are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from llmasos.client.types import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, WireRequest
from llmasos.client.types.responses import Response, ResponseRequest
from llmasos.errors import LLMasOSError, UnsupportedError
from llmasos.serve import render
from llmasos.serve.aside import Aside
from llmasos.serve.caller import Caller
from llmasos.serve.models import Models
from llmasos.serve.openai import chat, completions, embeddings
from llmasos.serve.problems import problem_of, unexpected, validation_problem
from llmasos.serve.responses.service import Responses
from llmasos.serve.shapes import OPENAI, Problem

PRIORITY = 1_000_000
"""Added to the lines' own in the scheduler, where smaller is sooner: requests of people who wait go before."""

Work = Callable[[Caller, Any], Awaitable[BaseModel]]


class TryLaterError(Exception):
    """The line could not be answered now. `crashed`: because its model's process ended, perhaps by it."""

    def __init__(self, seconds: float, *, crashed: bool, answer: Answer) -> None:
        super().__init__(seconds)
        self.seconds, self.crashed, self.answer = seconds, crashed, answer


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


class Answers:
    def __init__(self, models: Models, responses: Responses, aside: Aside) -> None:
        self._aside = aside
        self._work: Mapping[str, tuple[type[WireRequest], Work]] = {
            "/v1/chat/completions": (ChatCompletionRequest, lambda caller, body: chat.answer(models, caller, body)),
            "/v1/completions": (CompletionRequest, lambda caller, body: completions.answer(models, caller, body)),
            "/v1/embeddings": (EmbeddingRequest, lambda caller, body: embeddings.embed(models, caller, body)),
            "/v1/responses": (ResponseRequest, responses.answer),
        }

    async def answer(self, endpoint: str, given: Mapping[str, Any], caller: Caller, request_id: str) -> Answer:
        """What an HTTP request with this body would get. Raises TryLaterError."""
        model, work = self._work[endpoint]
        try:
            body = model.model_validate(given)
            for name in ("stream", "background"):
                if getattr(body, name, None):
                    raise UnsupportedError(f"{name}: true is not for batches.", hint="Leave it out.", param=name)
            if hasattr(body, "priority"):
                body = body.model_copy(update={"priority": max(body.priority or 0, 0) + PRIORITY})
            async with self._aside.request(caller, endpoint, request_id):
                found = await work(caller, body)
            # what these endpoints send over HTTP: chat and the like leave out what is not set
            write = _whole if isinstance(found, Response) else render.body
            return Answer(200, await asyncio.to_thread(write, found))
        except ValidationError as e:
            return _failed(**validation_problem(e.errors()))
        except LLMasOSError as e:
            problem = problem_of(e)
            failed = _failed(**problem)
            if (seconds := getattr(e, "retry_after", None)) is not None:
                crashed = problem["code"] == "model_crashed"
                raise TryLaterError(float(seconds), crashed=crashed, answer=failed) from e
            return failed
        except Exception:
            return _failed(**unexpected(request_id))


def _whole(response: BaseModel) -> bytes:
    return response.model_dump_json().encode("utf-8")


def _failed(status: int, message: str, *, param: str | None = None, code: str | None = None, **_: Any) -> Answer:
    printable = message.encode("utf-8", "replace").decode("utf-8")
    body = OPENAI.body(Problem(status, printable, param, code))
    return Answer(status, body.model_dump_json(exclude_unset=True).encode("utf-8"))
