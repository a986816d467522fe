"""What a chat request asks of a model: its prompt, the form of the reply, and how that is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from llmasos.client.types import AllowedToolsChoice, ChatCompletionRequest, NamedToolChoice
from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.inference.calling import Tools, form_of_reply, prompt_with_tools, special_marks
from llmasos.inference.request import SamplingParams
from llmasos.serve import prepare
from llmasos.serve.served import ServedModel
from llmasos.text.reply import ReplyForm, ReplyParser, reply_form
from llmasos.text.template import free_variables


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
    special = special_marks(model.tokenizer, form.marks)
    grammar, reasons = form_of_reply(tools, form, params.structured, prompt, special)
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
    return prompt_with_tools(model, messages, tools, form, options)


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
