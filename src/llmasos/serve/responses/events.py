"""What a response is made of, as it comes: a turn's events become OpenAI's typed events, and the response grows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from llmasos.client.types.response_events import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartEvent,
    EventLogprob,
    EventTopLogprob,
    OutputItemEvent,
    OutputTextDelta,
    OutputTextDone,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseStateEvent,
    SummaryPartEvent,
    SummaryTextDelta,
    SummaryTextDone,
)
from llmasos.client.types.response_items import (
    FunctionToolCall,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseLogprob,
    SummaryText,
)
from llmasos.client.types.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    Response,
    ResponseError,
    ResponseUsage,
)
from llmasos.inference.request import TokenLogprob
from llmasos.serve import render
from llmasos.serve.responses.request import new_id, sealed
from llmasos.serve.served import ServedTokenizer
from llmasos.serve.turn import TurnDelta, TurnEnd, TurnUsage
from llmasos.text.reply import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart

Events = Iterator[BaseModel]


class Writer:
    """Grows `response` and says so. `numbers` counts the events, from 0.

    `as_summary`: reasoning is given as its own summary, which is where clients that ask for one look for it.
    `with_sealed`: reasoning has `encrypted_content` as well.
    """

    def __init__(
        self, response: Response, numbers: Iterator[int], *, as_summary: bool = False, with_sealed: bool = False
    ) -> None:
        self.response = response
        self._numbers = numbers
        self._as_summary, self._with_sealed = as_summary, with_sealed
        self._item: OutputMessage | FunctionToolCall | ReasoningItem | None = None
        self._pending: list[ResponseLogprob] = []

    def queued(self) -> Events:
        """The first events of a response that waits for its turn."""
        yield self._state("response.created")
        yield self._state("response.queued")

    def started(self) -> Events:
        if self.response.status != "queued":
            yield self._state("response.created")
        self.response.status = "in_progress"
        yield self._state("response.in_progress")

    def add(self, delta: TurnDelta, tokenizer: ServedTokenizer) -> Events:
        match delta.event:
            case TextDelta(text):
                if delta.logprobs and self.response.top_logprobs is not None:
                    self._pending += _logprobs(tokenizer, delta.logprobs)
                if text:
                    if not isinstance(self._item, OutputMessage):
                        yield from self._open_message()
                    yield from self._write_text(text)
            case ReasoningDelta(text) if text:
                if not isinstance(self._item, ReasoningItem):
                    yield from self._open_reasoning()
                yield from self._write_reasoning(text)
            case ToolCallStart(_, id, name):
                yield from self._open(
                    FunctionToolCall(id=new_id("fc"), call_id=id, name=name, arguments="", status="in_progress")
                )
            case ToolCallDelta(_, arguments) if arguments:
                assert isinstance(self._item, FunctionToolCall)
                self._item.arguments += arguments
                yield ArgumentsDelta(**self._place(), delta=arguments, sequence_number=next(self._numbers))

    def end(self, end: TurnEnd) -> Events:
        cut = end.finish_reason == "length"
        if self._item is None and not self.response.output:
            yield from self._open_message()
        yield from self._close("incomplete" if cut else "completed")
        self.response.status = "incomplete" if cut else "completed"
        if cut:
            self.response.incomplete_details = IncompleteDetails(reason="max_output_tokens")

    def finished(self, usage: TurnUsage) -> Events:
        self.response.usage = ResponseUsage(
            input_tokens=usage.num_prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.num_cached_tokens),
            output_tokens=usage.num_output_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.num_reasoning_tokens),
            total_tokens=usage.num_prompt_tokens + usage.num_output_tokens,
        )
        self.response.completed_at = int(time.time())
        yield self._state(f"response.{self.response.status}")

    def failed(self, code: str, message: str) -> Events:
        yield from self._close("incomplete")
        self.response.status = "failed"
        self.response.error = ResponseError(code=code, message=message)
        yield self._state("response.failed")

    def cancelled(self) -> Events:
        """OpenAI has no event of this name: the stream just ends."""
        yield from self._close("incomplete")
        self.response.status = "cancelled"

    def _state(self, type: Any) -> ResponseStateEvent:
        as_it_is = self.response.model_copy(update={"output": [*self.response.output]})
        return ResponseStateEvent(type=type, response=as_it_is, sequence_number=next(self._numbers))

    def _open(self, item: OutputMessage | FunctionToolCall | ReasoningItem) -> Events:
        yield from self._close("completed")
        self._item = item
        self.response.output.append(item)
        yield OutputItemEvent(
            type="response.output_item.added",
            output_index=len(self.response.output) - 1,
            item=item.model_copy(),
            sequence_number=next(self._numbers),
        )

    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item.id, "output_index": len(self.response.output) - 1}

    def _part(self, kind: str, part: OutputText | ReasoningText) -> ContentPartEvent:
        fields: dict[str, Any] = {"type": f"response.content_part.{kind}", "part": part, "content_index": 0}
        return ContentPartEvent(**fields, **self._place(), sequence_number=next(self._numbers))

    def _open_message(self) -> Events:
        item = OutputMessage(id=new_id("msg"), status="in_progress", content=[])
        yield from self._open(item)
        item.content = [OutputText(text="", logprobs=[])]
        yield self._part("added", OutputText(text="", logprobs=[]))

    def _write_text(self, text: str) -> Events:
        assert isinstance(self._item, OutputMessage)
        part = self._item.content[0]
        part.text += text
        logprobs, self._pending = self._pending, []
        assert part.logprobs is not None
        part.logprobs += logprobs
        yield OutputTextDelta(
            **self._place(),
            content_index=0,
            delta=text,
            logprobs=_without_bytes(logprobs),
            sequence_number=next(self._numbers),
        )

    def _open_reasoning(self) -> Events:
        item = ReasoningItem(id=new_id("rs"), summary=[], status="in_progress")
        yield from self._open(item)
        if self._as_summary:
            item.summary = [SummaryText(text="")]
            yield self._summary_part("added", item)
        else:
            item.content = [ReasoningText(text="")]
            yield self._part("added", ReasoningText(text=""))

    def _summary_part(self, kind: str, item: ReasoningItem) -> SummaryPartEvent:
        fields: dict[str, Any] = {
            "type": f"response.reasoning_summary_part.{kind}",
            "part": item.summary[0].model_copy(),
        }
        return SummaryPartEvent(**fields, **self._place(), summary_index=0, sequence_number=next(self._numbers))

    def _write_reasoning(self, text: str) -> Events:
        assert isinstance(self._item, ReasoningItem)
        if self._as_summary:
            self._item.summary[0].text += text
            yield SummaryTextDelta(**self._place(), summary_index=0, delta=text, sequence_number=next(self._numbers))
        else:
            assert self._item.content is not None
            self._item.content[0].text += text
            yield ReasoningTextDelta(**self._place(), content_index=0, delta=text, sequence_number=next(self._numbers))

    def _close(self, status: Any) -> Events:
        item = self._item
        if item is None:
            return
        item.status = status
        match item:
            case OutputMessage():
                part = item.content[0]
                assert part.logprobs is not None
                part.logprobs += self._pending
                self._pending = []
                yield OutputTextDone(
                    **self._place(),
                    content_index=0,
                    text=part.text,
                    logprobs=_without_bytes(part.logprobs),
                    sequence_number=next(self._numbers),
                )
                yield self._part("done", part)
            case ReasoningItem():
                yield from self._close_reasoning(item)
            case FunctionToolCall():
                yield ArgumentsDone(
                    **self._place(), name=item.name, arguments=item.arguments, sequence_number=next(self._numbers)
                )
        place = self._place()["output_index"]
        yield OutputItemEvent(
            type="response.output_item.done", output_index=place, item=item, sequence_number=next(self._numbers)
        )
        self._item = None

    def _close_reasoning(self, item: ReasoningItem) -> Events:
        text = item.summary[0].text if self._as_summary else item.content[0].text if item.content else ""
        if self._as_summary:
            yield SummaryTextDone(**self._place(), summary_index=0, text=text, sequence_number=next(self._numbers))
            yield self._summary_part("done", item)
        else:
            yield ReasoningTextDone(**self._place(), content_index=0, text=text, sequence_number=next(self._numbers))
            yield self._part("done", ReasoningText(text=text))
        if self._with_sealed:
            item.encrypted_content = sealed(text)


def _logprobs(tokenizer: ServedTokenizer, positions: Sequence[TokenLogprob]) -> list[ResponseLogprob]:
    content = render.chat_logprobs(tokenizer, positions).content or ()
    return [ResponseLogprob.model_validate(one.model_dump()) for one in content]


def _without_bytes(logprobs: Sequence[ResponseLogprob]) -> list[EventLogprob]:
    return [
        EventLogprob(
            token=one.token,
            logprob=one.logprob,
            top_logprobs=[EventTopLogprob(token=top.token, logprob=top.logprob) for top in one.top_logprobs],
        )
        for one in logprobs
    ]


def sse(event: BaseModel) -> str:
    """As the stream carries it. `event:` repeats the type, which some clients read instead."""
    kind: str = event.type  # type: ignore[attr-defined]  # every event has one
    return f"event: {kind}\ndata: {event.model_dump_json()}\n\n"
