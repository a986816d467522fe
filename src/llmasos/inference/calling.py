"""Tool calls of any chat model: what its prompt says of the tools, the form of its reply, and how that is read.

A template that has a place for tools gets them there, and the reply is in the form that the model was trained on; for
any other the tools are listed in the system message, and calls are written as Hermes does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llmasos.errors import UnsupportedError
from llmasos.inference import reply_grammar
from llmasos.inference.request import StructuredOutput
from llmasos.text.reply import HERMES, ReplyForm
from llmasos.text.template import free_variables

Message = dict[str, Any]

_INSTRUCTION = """You can call functions. These are the functions, one per line:
<tools>
{tools}
</tools>
To call a function, write its name and arguments as JSON, like this:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
What it gives is told to you between <tool_response> and </tool_response>."""
"""For templates without a place for tools."""


@dataclass(frozen=True)
class Tools:
    """The tools that this reply may use. `required`: it must use one."""

    offered: list[dict[str, Any]]
    required: bool = False
    parallel: bool = True

    @property
    def strict(self) -> bool:
        return any(tool["function"].get("strict") for tool in self.offered)


class Templated(Protocol):
    """What is asked of a model here."""

    @property
    def chat_template(self) -> str | None: ...
    def chat_prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> str: ...


class Marks(Protocol):
    """What is asked of its tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    def id(self, token: str) -> int | None: ...


def prompt_with_tools(
    model: Templated, messages: list[Message], tools: Tools, form: ReplyForm, options: Mapping[str, Any]
) -> tuple[str, ReplyForm]:
    """The prompt, and how its reply is written. `messages` as templates take them; `options` of `chat_prompt`."""
    if not tools.offered:
        if model.chat_template and not takes_tools(model.chat_template):
            messages = _as_text(messages)
        return model.chat_prompt(messages, None, **options), form
    try:
        return model.chat_prompt(messages, tools.offered, **options), form
    except UnsupportedError as e:
        if e.param != "tools":
            raise
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.offered)
    messages = _as_text(messages, _INSTRUCTION.format(tools=listed))
    return model.chat_prompt(messages, None, **options), replace(form, calls=HERMES, channels=False)


def takes_tools(template: str) -> bool:
    return not free_variables(template).isdisjoint(("tools", "functions", "custom_tools"))


def template_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call of an earlier reply as templates take it: with its arguments as an object."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except ValueError:
        return call  # text that the model wrote wrongly goes back to it as it was
    if isinstance(arguments, dict):
        return call | {"function": call["function"] | {"arguments": arguments}}
    return call


def _as_text(messages: Sequence[Message], instruction: str = "") -> list[Message]:
    """Calls and their results as text, for templates that know neither; `instruction` goes to the system message."""
    found: list[Message] = [{"role": "system", "content": instruction}] if instruction else []
    for at, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "tool":
            text = f"<tool_response>\n{content}\n</tool_response>"
            if at and messages[at - 1]["role"] == "tool":
                found[-1] = {**found[-1], "content": f"{found[-1]['content']}\n{text}"}
            else:
                found.append({"role": "user", "content": text})
        elif calls := message.get("tool_calls"):
            written = [_written(call["function"]) for call in calls]
            found.append(
                {
                    **{k: v for k, v in message.items() if k != "tool_calls"},
                    "content": "\n".join([content, *written] if content else written),
                }
            )
        elif message["role"] == "system" and instruction and len(found) == 1:
            found[0] = {**message, "content": f"{content}\n\n{instruction}"}
        else:
            found.append(message)
    return found


def _written(call: Mapping[str, Any]) -> str:
    arguments = call["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(call["name"], ensure_ascii=False)}, "arguments": {text}}}\n</tool_call>'


def special_marks(tokenizer: Marks, marks: Iterable[str]) -> dict[str, int]:
    """Those of `marks` that are special tokens, which a text leaves out unless it is told otherwise."""
    found = {mark: tokenizer.id(mark) for mark in marks}
    return {mark: id for mark, id in found.items() if id is not None and id in tokenizer.special_ids}


def form_of_reply(
    tools: Tools, form: ReplyForm, asked: StructuredOutput | None, prompt: str, special: Mapping[str, int]
) -> tuple[StructuredOutput | None, bool]:
    """What the whole reply must look like, and whether it may reason first. `asked`: the form of a text."""
    reasons = form.reasoning is not None
    must = tools.required or (bool(tools.offered) and (tools.strict or not tools.parallel or asked is not None))
    if asked is None and not must:
        return None, reasons
    if asked is not None and asked.grammar is not None and not tools.offered:
        return asked, False  # two grammars don't join: the reply is this one and nothing else
    calls = None
    if tools.offered and (must or asked is not None):
        layout = form.calls.layout(tools.offered)
        begin = layout.begin or getattr(layout.calls[0][0], "text", "")
        mark = next((mark for mark in form.calls.begins if begin.startswith(mark)), "")
        calls = reply_grammar.Calls(layout, mark, required=tools.required, parallel=tools.parallel, strict=tools.strict)
    reasoning = None
    if form.reasoning is not None and not prompt.rstrip().endswith(form.reasoning[1]):
        begun = prompt.rstrip().endswith(form.reasoning[0])
        reasoning = reply_grammar.Reasoning(*form.reasoning, begun=begun)
    return reply_grammar.reply_grammar(calls=calls, form=asked, reasoning=reasoning, special=special), reasons
