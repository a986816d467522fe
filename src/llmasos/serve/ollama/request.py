"""From Ollama's chat and generate to the chat request that every wire format becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmasos.client.types import ChatCompletionRequest, ChatMessage, CompletionRequest, FunctionCall, ToolCall
from llmasos.client.types.ollama import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaOptions,
)
from llmasos.errors import InvalidInputError
from llmasos.serve.ollama.names import seconds
from llmasos.serve.served import ServedModel
from llmasos.serve.thinking import effort_variables, thinking_variables

Generating = OllamaChatRequest | OllamaGenerateRequest
_SAME_NAME = ("temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty")
_MAX_STOPS = 16


@dataclass
class Asked:
    """A request made ready as far as that can be without its model. `keep_alive` in seconds, as asked for."""

    name: str
    stream: bool
    sampling: dict[str, Any]
    max_tokens: int | None
    keep_alive: float | None
    messages: list[ChatMessage] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    prompt: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Nothing is to be answered: the model is to be loaded, or unloaded."""
        return not (self.messages or self.prompt)

    def chat(self) -> ChatCompletionRequest:
        fields: dict[str, Any] = {"model": self.name, "messages": self.messages, "stream": True, **self.sampling}
        if self.messages[-1].role == "assistant" and not self.messages[-1].tool_calls:
            fields["continue_final_message"] = True
        if self.tools:
            fields |= {"tools": self.tools, "tool_choice": "auto"}
        if self.max_tokens is not None:
            fields["max_completion_tokens"] = self.max_tokens
        form = fields.pop("format", None)
        if form is not None:
            schema = {"type": "json_schema", "json_schema": {"schema": form}}
            fields["response_format"] = {"type": "json_object"} if form == "json" else schema
        return ChatCompletionRequest.model_validate(fields)

    def completion(self, max_tokens: int) -> CompletionRequest:
        """For a prompt that goes to the model as it is."""
        fields: dict[str, Any] = {"model": self.name, "prompt": self.prompt, "max_tokens": max_tokens, **self.sampling}
        form = fields.pop("format", None)
        if form is not None:
            fields["structured_outputs"] = {"json_object": True} if form == "json" else {"json": form}
        logprobs, top = fields.pop("logprobs", None), fields.pop("top_logprobs", None)
        if logprobs:
            fields["logprobs"] = top or 0
        return CompletionRequest.model_validate(fields)


def read(body: Generating, name: str) -> Asked:
    """`name`: of the served model. Raises InvalidInputError and UnsupportedError that name the field."""
    sampling = _sampling(body.options or OllamaOptions())
    if body.format:
        sampling["format"] = body.format
    if body.top_logprobs and not body.logprobs:
        raise InvalidInputError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if body.logprobs:
        sampling |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    num_predict = body.options.num_predict if body.options else None
    asked = Asked(
        name=name,
        stream=body.stream is not False,
        sampling=sampling,
        max_tokens=num_predict if num_predict is not None and num_predict > 0 else None,
        keep_alive=keep_alive_of(body),
        warnings=body.options.warnings() if body.options else [],
    )
    if body.truncate:
        asked.warnings.append("truncate has no effect: a prompt that is too long is refused, never cut.")
    if body.shift:
        asked.warnings.append("shift has no effect: an answer ends where the context does.")
    if isinstance(body, OllamaChatRequest):
        asked.messages = _messages(body.messages or ())
        asked.tools = [tool.model_dump(exclude_none=True) | {"type": "function"} for tool in body.tools or ()]
    else:
        _read_prompt(body, asked)
    return asked


def _read_prompt(body: OllamaGenerateRequest, asked: Asked) -> None:
    prompt = body.prompt or ""
    if body.raw:
        if body.system:
            raise InvalidInputError("raw takes the prompt as it is: system has no place in it.", param="system")
        if body.think is not None:
            asked.warnings.append("think has no effect: raw takes the prompt as it is.")
    asked.prompt = prompt
    if not body.raw and prompt:
        texts = [("system", body.system), ("user", prompt)] if body.system else [("user", prompt)]
        asked.messages = [ChatMessage.model_validate({"role": role, "content": text}) for role, text in texts]


def apply_model(body: Generating, asked: Asked, request: ChatCompletionRequest, model: ServedModel) -> None:
    """What depends on the model: thinking, and the room that was asked for."""
    if body.think is not None:
        variables = thinking_variables(model, body.think is not False, param="think")
        if isinstance(body.think, str):
            found = effort_variables(model, body.think)
            variables |= found
            if not found:
                asked.warnings.append(
                    f"think: {body.think!r} means true: the chat template of {model.name} has no levels."
                )
        request.chat_template_kwargs = variables or None


def check_room(options: OllamaOptions | None, asked: Asked, model: ServedModel) -> None:
    if options and options.num_ctx and options.num_ctx > model.context_length:
        asked.warnings.append(
            f"options.num_ctx is {options.num_ctx}; the context of {model.name} holds {model.context_length} tokens."
        )


def keep_alive_of(body: Generating | OllamaEmbedRequest | OllamaEmbeddingsRequest) -> float | None:
    """Seconds; infinity for ever. Raises InvalidInputError."""
    if body.keep_alive is None or body.keep_alive == "":
        return None
    found = seconds(body.keep_alive)
    if found is None or math.isnan(found):
        raise InvalidInputError(
            f"keep_alive is {body.keep_alive!r}, which is no duration.",
            hint='Send seconds, or text such as "5m"; a negative one keeps the model for ever.',
            param="keep_alive",
        )
    return found


def _sampling(options: OllamaOptions) -> dict[str, Any]:
    found = {name: value for name in _SAME_NAME if (value := getattr(options, name)) is not None}
    if options.repeat_penalty is not None:
        found["repetition_penalty"] = options.repeat_penalty
    if options.seed is not None and options.seed >= 0:
        found["seed"] = options.seed
    if options.stop:
        found["stop"] = [options.stop] if isinstance(options.stop, str) else options.stop
        if len(found["stop"]) > _MAX_STOPS:
            raise InvalidInputError(f"options.stop holds more than {_MAX_STOPS} strings.", param="options.stop")
    return found


def _messages(messages: Sequence[OllamaMessage]) -> list[ChatMessage]:
    """Calls and results are matched by id where clients send one, else by the tool's name, in order."""
    result: list[ChatMessage] = []
    open_calls: list[tuple[str, str]] = []  # ids and names of calls whose result has not come
    num_calls = 0
    for i, message in enumerate(messages):
        calls = []
        for call in message.tool_calls or ():
            id = call.id or f"call_{num_calls}"
            num_calls += 1
            open_calls.append((id, call.function.name))
            arguments = json.dumps(call.function.arguments, ensure_ascii=False)
            calls.append(ToolCall(id=id, function=FunctionCall(name=call.function.name, arguments=arguments)))
        fields: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.role == "tool":
            found = _result_of(message, i, open_calls)
            if found in open_calls:
                open_calls.remove(found)
            fields |= {"tool_call_id": found[0], "name": found[1]}
        if message.thinking:
            fields["reasoning_content"] = message.thinking
        result.append(ChatMessage.model_validate({**fields, "tool_calls": calls or None}))
    return result


def _result_of(message: OllamaMessage, index: int, open_calls: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Id and name of the call that a message answers."""
    for id, name in open_calls:
        if message.tool_call_id == id or (
            not message.tool_call_id and (not message.tool_name or message.tool_name == name)
        ):
            return id, name
    if message.tool_name:  # a client that shortens what it sends may have dropped the call
        return message.tool_call_id or f"call_for_{index}", message.tool_name
    raise InvalidInputError(
        f"Message {index} is a tool's result, and no earlier message calls a tool whose result is missing.",
        hint="Send tool_name with it.",
        param=f"messages.{index}.tool_name",
    )
