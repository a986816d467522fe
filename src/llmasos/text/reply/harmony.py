"""Harmony, the format of gpt-oss: a reply is a row of messages, each with a header that names channel and recipient.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{...}<|call|>

`analysis` is reasoning, a message to `functions.name` a call, everything else text. Source: OpenAI's description of
the format (cookbook, "harmony response format").
"""

from __future__ import annotations

import re

from llmasos.text.reply.calls import CallForm, Calls, Tools, named
from llmasos.text.reply.layout import CallLayout, Literal, Schema, function_of, parameters_of
from llmasos.text.reply.source import Malformed, Reading, Source

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
_RECIPIENT = re.compile(r"\bto=functions\.([\w.:/-]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


class HarmonyCalls(CallForm):
    tokens = (CHANNEL, MESSAGE, *ENDS, "<|constrain|>")

    def read(self, source: Source, calls: Calls, begin: str) -> Reading[None]:
        raise NotImplementedError("messages are read one by one")

    def layout(self, tools: Tools) -> CallLayout:
        calls = []
        for tool in tools:
            head = f"{CHANNEL}commentary to=functions.{function_of(tool)['name']} <|constrain|>json{MESSAGE}"
            calls.append((Literal(head), Schema(parameters_of(tool))))
        return CallLayout("", tuple(calls), f"<|end|>{START}assistant", "")


def header(source: Source) -> Reading[tuple[str, str]]:
    """The channel and the function (or nothing) of the message that begins here. Raises Malformed."""
    text, _ = yield from source.until(MESSAGE)
    channel, recipient = _CHANNEL.search(text), _RECIPIENT.search(text)
    if channel is None:
        raise Malformed
    return channel[1], named(recipient[1]) if recipient else ""
