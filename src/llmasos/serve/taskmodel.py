"""Served models as those of tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from llmasos.client.types import ChatCompletionRequest, ChatMessage, ResponseFormat
from llmasos.client.types.openai import JsonSchemaFormat
from llmasos.errors import UnsupportedError
from llmasos.inference.request import SamplingParams
from llmasos.serve import prepare
from llmasos.serve.conversation import chat_prompt_ids
from llmasos.serve.models import Served
from llmasos.serve.turn import TurnDelta, TurnEnd, turn, whole_turn
from llmasos.tasks.model import Messages, Reply
from llmasos.text.reply import TextDelta


class ServedTaskModel:
    """A model of the server as that of tasks: each question is admitted, counted and measured like a chat request."""

    enforces = True
    labels: tuple[str, ...] = ()

    def __init__(self, served: Served, name: str) -> None:
        self.served, self.name = served, name

    @property
    def context_length(self) -> int:
        return self.served.model.context_length

    def count(self, messages: Messages) -> int:
        return len(chat_prompt_ids(self.served.model, self._request(messages)))

    def count_text(self, text: str) -> int:
        return len(self.served.model.tokenizer.encode(prepare.unicode(text, "text"), add_special_tokens=False))

    async def ask(
        self,
        messages: Messages,
        schema: Mapping[str, Any] | None,
        *,
        max_tokens: int,
        on_text: Callable[[str], object] | None = None,
    ) -> Reply:
        """`on_text` is called with each piece of the answer as it comes."""
        prepare.check_generates(self.served.model)
        form = None
        if schema is not None:
            asked = JsonSchemaFormat.model_validate({"schema": dict(schema)})
            form = ResponseFormat(type="json_schema", json_schema=asked)
        request = self._request(messages, max_tokens=max_tokens, temperature=0.0, response_format=form)
        if on_text is not None:
            return await self._told(request, on_text)
        [reply], _ = await whole_turn(self.served, request)
        return Reply(reply.text, reply.finish_reason == "length")

    async def _told(self, request: ChatCompletionRequest, on_text: Callable[[str], object]) -> Reply:
        text, is_cut = "", False
        async with aclosing(turn(self.served, request)) as events:
            async for event in events:
                if isinstance(event, TurnDelta) and isinstance(event.event, TextDelta):
                    text += event.event.text
                    on_text(event.event.text)
                elif isinstance(event, TurnEnd):
                    is_cut = event.finish_reason == "length"
        return Reply(text, is_cut)

    async def likelihood(self, messages: Messages, reply: str) -> float | None:
        prepare.check_generates(self.served.model)
        asked, ids = await asyncio.to_thread(self._ids, messages, reply)
        [output] = await self.served.complete(
            [asked + ids], SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
        )
        return sum(one.logprob for one in (output.prompt_logprobs or ())[len(asked) :] if one is not None)

    def _ids(self, messages: Messages, reply: str) -> tuple[list[int], list[int]]:
        tokenizer = self.served.model.tokenizer
        asked = chat_prompt_ids(self.served.model, self._request(messages))
        return asked, tokenizer.encode(prepare.unicode(reply, "text"), add_special_tokens=False)

    async def classify(self, text: str) -> dict[str, float]:
        raise UnsupportedError("A server's models have no classification heads.", param="model")

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return await self.served.embed([prepare.unicode(text, "texts") for text in texts])

    async def score_pairs(self, query: str, texts: Sequence[str]) -> list[float] | None:
        given = [prepare.unicode(text, "texts") for text in (query, *texts)]
        try:
            return await self.served.score_pairs(given[0], given[1:])
        except UnsupportedError as e:
            if e.param != "model" or self.served.adapter is not None:
                raise
            return None

    def _request(self, messages: Messages, **more: Any) -> ChatCompletionRequest:
        turns = [ChatMessage.model_validate(dict(one)) for one in messages]
        return ChatCompletionRequest(model=self.name, messages=turns, **more)
