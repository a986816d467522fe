"""From the text of a reply, in pieces, to events.

What is sure is given out at once; what may become a mark waits for the text that decides. Text in which a call breaks
off before its arguments begin is text; a call whose arguments have begun stands, and they are handed on as the model
wrote them. White space on both sides of reasoning and of calls belongs to the format and is left out.
"""

from __future__ import annotations

from collections.abc import Callable

from llmasos.text.reply import harmony
from llmasos.text.reply.calls import Calls, Tools
from llmasos.text.reply.events import ReasoningDelta, ReplyEvent, TextDelta, ToolCallDelta
from llmasos.text.reply.forms import ReplyForm
from llmasos.text.reply.source import Malformed, Reading, Source


class ReplyParser:
    """One reply. `tools` (OpenAI's objects): without them no calls are looked for. `prompt`: what the model answers;
    where the template ends it with the beginning of reasoning, the reply starts in the middle of it.

    `new_id` makes the ids of calls; default: random ones that the model's template takes.
    """

    def __init__(
        self,
        form: ReplyForm,
        *,
        tools: Tools = (),
        prompt: str = "",
        reasoning: bool = True,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._form, self._tools = form, tools
        self._source = Source()
        self._events: list[ReplyEvent] = []
        self._calls = Calls(tools, self._emit, new_id or form.calls.new_id)
        self.is_reasoning = bool(reasoning and form.reasoning and prompt.rstrip().endswith(form.reasoning[0]))
        self._reasons = reasoning and form.reasoning is not None
        self._is_plain = False
        self._reading: Reading[None] | None = None
        if form.channels:
            self._reading = self._channels()
        elif self._reasons or tools:
            self._reading = self._reply()
        self._is_plain = self._reading is None

    @property
    def num_calls(self) -> int:
        return self._calls.count

    def push(self, text: str) -> list[ReplyEvent]:
        """The events that are sure now. Neighbours of one kind are joined."""
        if self._is_plain:
            return [TextDelta(text)] if text else []
        self._source.add(text)
        return self._read()

    def finish(self) -> list[ReplyEvent]:
        """The rest: no more text will come."""
        if self._is_plain:
            return []
        self._source.is_over = True
        return self._read()

    def _read(self) -> list[ReplyEvent]:
        assert self._reading is not None
        if next(self._reading, self) is self:  # the generator is done: what is left is text
            self._is_plain = True
            self._emit_text(self._source.text[self._source.at :])
            self._source.at = len(self._source.text)
        else:
            self._source.forget()
        events, self._events = self._events, []
        return events

    def _emit(self, event: ReplyEvent) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(event, ToolCallDelta) and isinstance(last, ToolCallDelta) and last.index == event.index:
            self._events[-1] = ToolCallDelta(event.index, last.arguments + event.arguments)
        elif isinstance(event, TextDelta) and isinstance(last, TextDelta):
            self._events[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            self._events[-1] = ReasoningDelta(last.text + event.text)
        else:
            self._events.append(event)

    def _emit_text(self, text: str) -> None:
        if text:
            self._emit(TextDelta(text))

    def _emit_reasoning(self, text: str) -> None:
        self._emit(ReasoningDelta(text))

    def _reply(self) -> Reading[None]:
        if self._reasons:
            yield from self._reasoning()
        if not self._tools:
            return
        source, form = self._source, self._form.calls
        if form.at_start:
            start = source.at
            if ((yield from source.skip_space()) or "-") in form.at_start:
                yield from self._try_calls(start, "")
            elif not self._calls.count:
                source.at = start
        while begin := (yield from source.pass_until(form.begins, self._emit_text, trim=True)):
            yield from self._try_calls(source.gap, begin)

    def _reasoning(self) -> Reading[None]:
        assert self._form.reasoning is not None
        begin, end = self._form.reasoning
        source = self._source
        if not self.is_reasoning:
            start = source.at
            yield from source.skip_space()
            if not (yield from source.take(begin)):
                source.at = start
                return
            self.is_reasoning = True
        yield from source.skip_space()
        yield from source.take(begin)  # written again, though the prompt had it
        yield from source.skip_space()
        yield from source.pass_until((end,), self._emit_reasoning, trim=True)
        self.is_reasoning = False
        yield from source.skip_space()

    def _try_calls(self, start: int, begin: str) -> Reading[None]:
        """Read calls; text from `start` on, or behind the last call that was complete, if they are none."""
        source, calls = self._source, self._calls
        calls.read_to = start
        try:
            yield from self._form.calls.read(source, calls, begin)
        except Malformed:
            self._emit_text(source.text[calls.read_to : source.at])
            if calls.read_to == start:
                return
        yield from source.skip_space()

    def _channels(self) -> Reading[None]:
        """Harmony's messages."""
        source = self._source
        while True:
            start = source.at
            yield from source.skip_space()
            if not (yield from source.peek()):
                return
            try:
                channel, function = yield from harmony.header(source)
            except Malformed:
                source.at = start
                end = yield from source.pass_until(harmony.ENDS, self._emit_text)
            else:
                sink = self._sink(channel, function)
                self.is_reasoning = channel == "analysis" and not function
                end = yield from source.pass_until(harmony.ENDS, sink)
                self.is_reasoning = False
            if not end:
                return
            yield from source.take(harmony.START)
            yield from source.take("assistant")

    def _sink(self, channel: str, function: str) -> Callable[[str], None]:
        if function and self._tools:
            self._calls.begin(function)
            return self._calls.add
        return self._emit_reasoning if channel == "analysis" and not function else self._emit_text
