"""Which form the replies of a model have, read from its chat template.

The template writes past calls and reasoning as the model wrote them, so its text names the marks. Sources: the
templates themselves, as their makers publish them. What is not known: templates that name no mark; their models are
taken to call with JSON at the start of the reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from llmasos.text.reply.calls import CallForm
from llmasos.text.reply.json_calls import JsonCalls, LlamaCalls, MistralCalls
from llmasos.text.reply.named_calls import NamedCalls
from llmasos.text.reply.pythonic import PythonicCalls
from llmasos.text.reply.xml_calls import TaggedCalls, XmlCalls


@dataclass(frozen=True)
class ReplyForm:
    """`reasoning`: what begins and what ends it, for models that reason before they answer. `calls`: how they call
    tools. `channels`: every part of a reply names its channel (harmony), which stands for both."""

    reasoning: tuple[str, str] | None
    calls: CallForm
    channels: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that a tokenizer may have as special tokens and that must be readable in the output."""
        return (*(self.reasoning or ()), *self.calls.marks)


HERMES = JsonCalls({"<tool_call>": "</tool_call>"}, space="\n")
_LFM = PythonicCalls("<|tool_call_start|>", "<|tool_call_end|>")
_BARE = JsonCalls({}, at_start="{[")
_DSML = "｜DSML｜"

_REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    ("◁think▷", "◁/think▷"),
)
# the first whose texts all stand in the template; the more particular before the more general
_CALLS: tuple[tuple[tuple[str, ...], CallForm], ...] = (
    (
        (_DSML, "invoke"),
        XmlCalls(
            (
                (f"<{_DSML}function_calls>", f"</{_DSML}function_calls>"),
                (f"<{_DSML}tool_calls>", f"</{_DSML}tool_calls>"),
            ),
            call=(f'<{_DSML}invoke name="', '">', f"</{_DSML}invoke>"),
            argument=(f'<{_DSML}parameter name="', '"', f"</{_DSML}parameter>"),
            typed=True,
        ),
    ),
    (
        ("<｜tool▁call▁begin｜>", "```json"),
        NamedCalls(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ),
    ),
    (
        ("<｜tool▁call▁begin｜>",),
        NamedCalls(
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ),
    ),
    (
        ("<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
        NamedCalls(
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            numbered=True,
        ),
    ),
    (
        ("<minimax:tool_call>", "<invoke name="),
        XmlCalls(
            (("<minimax:tool_call>", "</minimax:tool_call>"),),
            call=('<invoke name="', '">', "</invoke>"),
            argument=('<parameter name="', '">', "</parameter>"),
        ),
    ),
    (
        ("<seed:tool_call>", "<function="),
        XmlCalls(
            (("<seed:tool_call>", "</seed:tool_call>"),),
            call=("<function=", ">", "</function>"),
            argument=("<parameter=", ">", "</parameter>"),
        ),
    ),
    (
        ("<function=", "<parameter="),
        XmlCalls(
            (("<tool_call>", "</tool_call>"),),
            call=("<function=", ">", "</function>"),
            argument=("<parameter=", ">", "</parameter>"),
            lines=True,
        ),
    ),
    (("<arg_key>", "<arg_value>"), TaggedCalls()),
    (("[TOOL_CALLS]", "[ARGS]"), MistralCalls(named=True)),
    (("[TOOL_CALLS]",), MistralCalls(named=False)),
    (
        ("<|START_ACTION|>", "tool_name"),
        JsonCalls({"<|START_ACTION|>": "<|END_ACTION|>"}, listed=True, name="tool_name", arguments="parameters"),
    ),
    (("<TOOLCALL>",), JsonCalls({"<TOOLCALL>": "</TOOLCALL>"}, listed=True)),
    (("<|tool_call_start|>",), _LFM),
    (("<|tool_response_start|>",), _LFM),  # LFM2 shows what tools gave, and no calls
    (("<|tool_list_start|>",), _LFM),
    (("<|python_start|>",), PythonicCalls("<|python_start|>", "<|python_end|>")),
    (("<|tool_call|>",), JsonCalls({"<|tool_call|>": "<|/tool_call|>"}, listed=True)),
    (("<|tool_calls|>",), JsonCalls({"<|tool_calls|>": "<|/tool_calls|>", "functools": ""}, listed=True)),
    (("functools",), JsonCalls({"functools": ""}, listed=True)),
    (("<|function_call|>",), JsonCalls({"<|function_call|>": ""})),
    (("<tool_calls>",), JsonCalls({"<tool_calls>": "</tool_calls>"}, listed=True)),
    (("<tool_call>",), HERMES),
    (("xml_tools",), HERMES),  # SmolLM3 shows no calls
    (("<function=",), NamedCalls("<function=", ">", "</function>")),
    (("<|python_tag|>",), LlamaCalls()),
    (("<|start_header_id|>", '"parameters"'), LlamaCalls()),
    (("[func_name1(",), PythonicCalls()),
)


@lru_cache(maxsize=64)
def reply_form(template: str | None) -> ReplyForm:
    """The form that a chat template's text speaks of."""
    text = template or ""
    if "<|channel|>" in text and "<|message|>" in text:
        from llmasos.text.reply.harmony import HarmonyCalls

        return ReplyForm(None, HarmonyCalls(), channels=True)
    reasoning = next((pair for pair in _REASONING if pair[0] in text or pair[1] in text), None)
    calls = next((form for texts, form in _CALLS if all(one in text for one in texts)), _BARE)
    return ReplyForm(reasoning, calls)
