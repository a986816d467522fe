"""What a model's reply is made of, and how it is read out of the model's text as it comes.

`reply_form(template)` says how the models of a chat template write reasoning and tool calls; `ReplyParser` turns
their text, in pieces of any size, into events.
"""

from llmasos.text.reply.events import (
    ReasoningDelta,
    ReplyEvent,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from llmasos.text.reply.forms import HERMES, ReplyForm, reply_form
from llmasos.text.reply.parser import ReplyParser

__all__ = [
    "HERMES",
    "ReasoningDelta",
    "ReplyEvent",
    "ReplyForm",
    "ReplyParser",
    "TextDelta",
    "ToolCallDelta",
    "ToolCallStart",
    "reply_form",
]
