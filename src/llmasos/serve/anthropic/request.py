"""From Anthropic's messages to the chat request that every wire format becomes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from llmasos.client.types import (
    ChatCompletionRequest,
    ChatMessage,
    FunctionCall,
    FunctionDefinition,
    MediaPart,
    TextPart,
    Tool,
    ToolCall,
)
from llmasos.client.types.anthropic import (
    AnthropicMessageParam,
    AnthropicTool,
    BlockParam,
    ContentSource,
    CountTokensRequest,
    DocumentBlockParam,
    MessagesRequest,
    OtherBlock,
    ResultBlockParam,
    TextBlockParam,
    TextSource,
    ThinkingAdaptive,
    ThinkingBetweenTools,
    ThinkingBlockParam,
    ThinkingDisabled,
    ThinkingEnabled,
    ToolChoiceTool,
    ToolResultBlockParam,
    ToolUseBlockParam,
)
from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.serve.served import ServedModel
from llmasos.serve.thinking import effort_variables, thinking_variables

Content = str | list[TextPart | MediaPart]
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
    """What can be said without the model. Raises InvalidInputError and UnsupportedError that name the field."""
    messages = [] if body.system is None else [_message("system", _system(body.system))]
    messages += _messages(body.messages)
    fields: dict[str, Any] = {"model": body.model, "messages": messages, **_tools(body)}
    if body.messages[-1].role == "assistant":
        if messages[-1].tool_calls:
            where = f"messages.{len(body.messages) - 1}.content"
            raise InvalidInputError("The last message calls tools, and their results are missing.", param=where)
        fields["continue_final_message"] = True
    if body.output_config and body.output_config.format:
        schema = {"schema": body.output_config.format.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesRequest):
        fields |= {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "stream")}
        fields["max_completion_tokens"] = body.max_tokens
        fields["stop"] = body.stop_sequences or None
        fields["user"] = body.metadata.user_id if body.metadata else None
    return ChatCompletionRequest.model_validate(fields)


def apply_thinking(body: CountTokensRequest, request: ChatCompletionRequest, model: ServedModel) -> list[str]:
    """Tell the model's template what was asked of it. Returns warnings: wishes that have no effect on this model.

    Raises UnsupportedError for thinking that must or must not be, and can't.
    """
    variables, warnings = {}, []
    match body.thinking:
        case ThinkingEnabled(budget_tokens=budget):
            if isinstance(body, MessagesRequest) and budget >= body.max_tokens:
                raise InvalidInputError(
                    f"thinking.budget_tokens is {budget}, and max_tokens, which holds it, {body.max_tokens}.",
                    param="thinking.budget_tokens",
                )
            variables = thinking_variables(model, True, param="thinking")
            warnings.append("thinking.budget_tokens has no effect: thinking is bounded by max_tokens.")
        case ThinkingDisabled():
            variables = thinking_variables(model, False, param="thinking")
        case ThinkingBetweenTools():
            raise UnsupportedError(
                "thinking of type 'between_tools' is not supported.", hint="Use enabled or adaptive.", param="thinking"
            )
        case ThinkingAdaptive() | None:
            pass  # as the template has it
    if body.output_config and (effort := body.output_config.effort):
        found = effort_variables(model, effort)
        variables |= found
        if not found:
            warnings.append(f"output_config.effort has no effect: the chat template of {model.name} knows none.")
    if variables:
        request.chat_template_kwargs = variables
    return warnings


def hides_thinking(body: MessagesRequest) -> bool:
    thinking = body.thinking
    return isinstance(thinking, ThinkingEnabled | ThinkingAdaptive) and thinking.display == "omitted"


def _system(system: str | list[TextBlockParam]) -> Content:
    return system if isinstance(system, str) else _content([block.text for block in system])


def _tools(body: CountTokensRequest) -> dict[str, Any]:
    choice = body.tool_choice
    if not body.tools:
        if choice is not None and choice.type in ("any", "tool"):
            raise InvalidInputError("tool_choice is given without tools.", param="tool_choice")
        return {}
    fields: dict[str, Any] = {"tools": [_tool(tool) for tool in body.tools], "tool_choice": "auto"}
    if isinstance(choice, ToolChoiceTool):
        if choice.name not in (names := [tool.name for tool in body.tools]):
            raise InvalidInputError(
                f"tool_choice names {choice.name!r}, which is none of the tools.",
                hint=f"Given: {', '.join(names)}.",
                param="tool_choice.name",
            )
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice is not None:
        fields["tool_choice"] = _CHOICES[choice.type]
    if getattr(choice, "disable_parallel_tool_use", None):
        fields["parallel_tool_calls"] = False
    return fields


def _tool(tool: AnthropicTool) -> Tool:
    definition = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=definition)


def _messages(messages: Sequence[AnthropicMessageParam]) -> list[ChatMessage]:
    """Turns of one role that follow each other count as one."""
    result: list[ChatMessage] = []
    called: dict[str, str] = {}  # names of tools by the ids of their calls
    numbered = [(i, message) for i, message in enumerate(messages)]
    for role, turns in groupby(numbered, key=lambda one: one[1].role):
        blocks = [
            (f"messages.{i}.content.{j}", block)
            for i, message in turns
            for j, block in enumerate(_blocks(message.content))
        ]
        if role == "assistant":
            result.append(_assistant(blocks, called))
        elif role == "system":
            result.append(_message("system", _content([_text(*block) for block in blocks])))
        else:
            result += _user(blocks, called)
    return result


def _blocks(content: str | list[BlockParam]) -> list[BlockParam]:
    return [TextBlockParam(type="text", text=content, citations=None)] if isinstance(content, str) else content


def _assistant(blocks: Iterable[tuple[str, BlockParam]], called: dict[str, str]) -> ChatMessage:
    text, thinking, calls = "", [], []
    for where, block in blocks:
        match block:
            case ThinkingBlockParam():
                thinking.append(block.thinking)
            case ToolUseBlockParam():
                called[block.id] = block.name
                arguments = json.dumps(block.input, ensure_ascii=False)
                calls.append(ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments)))
            case _:
                text += _text(where, block)
    return _message("assistant", text, reasoning_content="\n".join(thinking) or None, tool_calls=calls or None)


def _user(blocks: Iterable[tuple[str, BlockParam]], called: dict[str, str]) -> list[ChatMessage]:
    """Results of tools are messages of their own; what stands between them is the user's."""
    result: list[ChatMessage] = []
    texts: list[str] = []
    for where, block in blocks:
        if isinstance(block, ToolResultBlockParam):
            if texts:
                result.append(_message("user", _content(texts)))
                texts = []
            result.append(_tool_result(where, block, called))
        else:
            texts.append(_text(where, block))
    return [*result, _message("user", _content(texts))] if texts or not result else result


def _tool_result(where: str, block: ToolResultBlockParam, called: dict[str, str]) -> ChatMessage:
    if (name := called.get(block.tool_use_id)) is None:
        raise InvalidInputError(
            f"{where} is the result of {block.tool_use_id!r}, and no earlier message has a tool_use of that id.",
            param=f"{where}.tool_use_id",
        )
    if isinstance(block.content, str):
        content: Content = block.content
    else:
        content = _content([_text(f"{where}.content.{i}", part) for i, part in enumerate(block.content or ())])
    if block.is_error:  # templates have no other place for it
        content = f"Error: {content}" if isinstance(content, str) else [TextPart(type="text", text="Error:"), *content]
    return _message("tool", content, tool_call_id=block.tool_use_id, name=name)


def _message(role: str, content: Content, **fields: Any) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content, **fields})


def _content(texts: Sequence[str]) -> Content:
    return "".join(texts) if len(texts) < 2 else [TextPart(type="text", text=text) for text in texts]


def _text(where: str, block: BlockParam | ResultBlockParam) -> str:
    if isinstance(block, TextBlockParam):
        return block.text
    if isinstance(block, DocumentBlockParam):
        return _document(where, block)
    if isinstance(block, OtherBlock):
        raise UnsupportedError(f"{where}: content of type {block.type!r} is not supported yet.", param=where)
    raise InvalidInputError(f"{where}: a block of type {block.type!r} does not belong into this message.", param=where)


def _document(where: str, block: DocumentBlockParam) -> str:
    source = block.source
    if isinstance(source, TextSource):
        text = source.data
    elif isinstance(source, ContentSource):
        parts = source.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
    else:
        raise UnsupportedError(
            f"{where}: a document from a source of type {source.type!r} is not supported yet.",
            hint="Send its text: a source of type text.",
            param=f"{where}.source",
        )
    return "\n".join(part for part in (block.title, block.context, text) if part)
