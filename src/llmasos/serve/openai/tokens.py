"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from llmasos.client.types import DetokenizeRequest, TokenizeRequest, Tokens, TokensText
from llmasos.errors import InvalidInputError
from llmasos.serve import prepare
from llmasos.serve.caller import Caller
from llmasos.serve.models import Models
from llmasos.serve.served import ServedModel


async def tokenize(models: Models, caller: Caller, body: TokenizeRequest) -> Tokens:
    async with models.lease(body.model, caller) as served:
        return await asyncio.to_thread(_tokens, served.model, body)


def _tokens(model: ServedModel, body: TokenizeRequest) -> Tokens:
    ids = _ids(model, body)
    found = Tokens(count=len(ids), max_model_len=model.context_length, tokens=ids)
    if body.return_token_strs:
        found.token_strs = [model.tokenizer.token(i) for i in ids]
    return found


def _ids(model: ServedModel, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidInputError("Send either prompt or messages.", param="prompt")
    if body.messages is None:
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise InvalidInputError(f"{name} needs messages.", param=name)
        text, around = prepare.unicode(body.prompt or "", "prompt"), body.add_special_tokens is not False
    else:
        messages = [prepare.template_message(message, i) for i, message in enumerate(body.messages)]
        options: dict[str, Any] = {}
        if body.add_generation_prompt is False:
            options["add_generation_prompt"] = False
        if body.continue_final_message:
            options["continue_final_message"] = True
        if body.chat_template_kwargs:
            options["variables"] = body.chat_template_kwargs
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        text = prepare.unicode(model.chat_prompt(messages, tools or None, **options), "messages")
        around = body.add_special_tokens is True  # the template writes them itself
    return model.tokenizer.encode(text, add_special_tokens=around)


async def detokenize(models: Models, caller: Caller, body: DetokenizeRequest) -> TokensText:
    async with models.lease(body.model, caller) as served:
        return TokensText(prompt=await asyncio.to_thread(_text, served.model, body.tokens))


def _text(model: ServedModel, ids: list[int]) -> str:
    prepare.check_ids(model, ids, "tokens")
    return model.tokenizer.decode(ids, skip_special_tokens=False)
