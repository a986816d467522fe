"""What a chat request asks of a model: its prompt, the form of the reply, and how that is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmasos.client.types import AllowedToolsChoice, ChatCompletionRequest, NamedToolChoice
from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.inference import reply_grammar
from llmasos.inference.request import SamplingParams, StructuredOutput
from llmasos.serve import prepare
from llmasos.serve.served import ServedModel
from llmasos.text.reply import HERMES, ReplyForm, ReplyParser, reply_form
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


@dataclass(frozen=True)
class Conversation:
    """A chat request made ready: `ids` of the prompt and `params`."""

    prompt: str
    ids: list[int]
    params: SamplingParams
    form: ReplyForm
    tools: Tools
    reasons: bool

    @property
    def is_plain(self) -> bool:
        """The reply is text and nothing else: it needs no parser."""
        return not (self.tools.offered or self.reasons or self.form.channels)

    def parser(self) -> ReplyParser:
        return ReplyParser(self.form, tools=self.tools.offered, prompt=self.prompt, reasoning=self.reasons)


def prepare_conversation(model: ServedModel, request: ChatCompletionRequest, *, fit: bool = False) -> Conversation:
    """Blocking. `fit`: see `turn`. Raises errors that name the field."""
    tools, form = _tools(request), reply_form(model.chat_template)
    prompt, form = _prompt(model, request, tools, form)
    ids = prepare.encode_prompt(model, prompt, "messages", add_special_tokens=False)
    params = prepare.chat_params(model, request, len(ids), fit=fit)
    special = _special(model, form.marks)
    grammar, reasons = _grammar(tools, form, params.structured, prompt, special)
    shown = tuple(special.values()) if tools.offered or reasons or form.channels else ()
    return Conversation(prompt, ids, replace(params, structured=grammar, shown_token_ids=shown), form, tools, reasons)


def chat_prompt_ids(model: ServedModel, request: ChatCompletionRequest) -> list[int]:
    """The conversation through the model's template, as tokens. Blocking."""
    prompt, _ = _prompt(model, request, _tools(request), reply_form(model.chat_template))
    return model.tokenizer.encode(prepare.unicode(prompt, "messages"), add_special_tokens=False)


# tools


def _tools(request: ChatCompletionRequest) -> Tools:
    choice, parallel = request.tool_choice, request.parallel_tool_calls is not False
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    if not tools:
        if choice not in (None, "none"):
            raise InvalidInputError("tool_choice is given without tools.", param="tool_choice")
        return Tools([])
    prepare.unicode(json.dumps(tools, ensure_ascii=False), "tools")
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
        raise InvalidInputError(f"Two tools have the name {twice!r}.", param="tools")
    if choice == "none":
        return Tools([])
    if choice == "required":
        return Tools(tools, required=True, parallel=parallel)
    if isinstance(choice, NamedToolChoice):
        return Tools(_chosen(tools, [choice.function.name]), required=True, parallel=False)
    if isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        chosen = _chosen(tools, [tool.function.name for tool in allowed.tools])
        return Tools(chosen, required=allowed.mode == "required", parallel=parallel)
    return Tools(tools, parallel=parallel)


def _chosen(tools: list[dict[str, Any]], names: Iterable[str]) -> list[dict[str, Any]]:
    by_name = {tool["function"]["name"]: tool for tool in tools}
    for name in names:
        if name not in by_name:
            raise InvalidInputError(
                f"tool_choice names {name!r}, which is not among the tools.",
                hint=f"They are: {', '.join(by_name)}.",
                param="tool_choice",
            )
    return [by_name[name] for name in names]


# the prompt


def _prompt(model: ServedModel, request: ChatCompletionRequest, tools: Tools, form: ReplyForm) -> tuple[str, ReplyForm]:
    """The prompt, and how its reply is written: in the model's own form, or, where the template has no place for tools,
    in the form that the prompt then teaches."""
    prepare.check_generates(model)
    messages = [prepare.template_message(message, i) for i, message in enumerate(request.messages)]
    options: dict[str, Any] = {}
    if request.continue_final_message:
        options["continue_final_message"] = True
    if variables := _variables(model, request):
        options["variables"] = variables
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


def _as_text(messages: list[Message], instruction: str = "") -> list[Message]:
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


def _variables(model: ServedModel, request: ChatCompletionRequest) -> dict[str, Any]:
    """Variables for the template; `reasoning_effort` is one where the template knows it. Without any effort at all,
    those that switch reasoning off do as well."""
    variables: dict[str, Any] = dict(request.chat_template_kwargs or {})
    effort = request.reasoning_effort
    if effort is None:
        return variables
    known = free_variables(model.chat_template or "")
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort, **variables}
    switch = next((name for name in ("enable_thinking", "thinking") if name in known), None)
    if effort == "none" and switch is not None:
        return {switch: False, **variables}
    raise UnsupportedError(
        f"The chat template of {model.name} knows no reasoning_effort"
        + (f" but 'none' (it has {switch})." if switch else "."),
        hint="Leave it out.",
        param="reasoning_effort",
    )


# the form of the reply


def _special(model: ServedModel, marks: Iterable[str]) -> dict[str, int]:
    """Those of `marks` that are special tokens, which a text leaves out unless it is told otherwise."""
    tokenizer = model.tokenizer
    found = {mark: tokenizer.id(mark) for mark in marks}
    return {mark: id for mark, id in found.items() if id is not None and id in tokenizer.special_ids}


def _grammar(
    tools: Tools, form: ReplyForm, asked: StructuredOutput | None, prompt: str, special: Mapping[str, int]
) -> tuple[StructuredOutput | None, bool]:
    """What the whole reply must look like, and whether it may reason first."""
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
