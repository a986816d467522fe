import typing

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from llmasos.client import types
from llmasos.errors import UnsupportedError

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        (types.ChatCompletionRequest, chat_params.CompletionCreateParamsBase),
        (types.CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (types.EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
    ],
)
def test_every_documented_request_field_is_known_or_refused_by_name(model, reference) -> None:
    documented = set(typing.get_type_hints(reference)) | {"stream"}
    assert documented <= set(model.model_fields) | set(model.UNSUPPORTED) | {"stream"}
    assert not set(model.model_fields) & set(model.UNSUPPORTED)


@pytest.mark.parametrize("name", sorted(types.ChatCompletionRequest.UNSUPPORTED))
def test_a_field_that_we_do_not_support_is_refused_by_name_and_null_is_not(name: str) -> None:
    types.ChatCompletionRequest.model_validate(CHAT | {name: None})
    with pytest.raises(UnsupportedError, match=name) as caught:
        types.ChatCompletionRequest.model_validate(CHAT | {name: {"some": "wish"}})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        (types.ChatCompletionRequest, "store", False),
        (types.ChatCompletionRequest, "service_tier", "auto"),
        (types.ChatCompletionRequest, "modalities", ["text"]),
        (types.CompletionRequest, "best_of", 1),
        (types.CompletionRequest, "suffix", ""),
    ],
)
def test_a_value_that_asks_for_nothing_is_accepted(model, name: str, value: object) -> None:
    model.model_validate(
        {"model": "m", "prompt": "x", name: value} if "prompt" in model.model_fields else CHAT | {name: value}
    )


def test_an_unknown_field_is_an_error_at_every_depth() -> None:
    for body in (CHAT | {"temprature": 1}, CHAT | {"messages": [{"role": "user", "content": "x", "mood": "good"}]}):
        with pytest.raises(ValidationError, match="Extra inputs"):
            types.ChatCompletionRequest.model_validate(body)


@pytest.mark.parametrize(
    "more", [{"max_tokens": "5"}, {"n": True}, {"temperature": "1"}, {"logprobs": 1}, {"top_p": float("nan")}]
)
def test_types_are_not_converted(more: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        types.ChatCompletionRequest.model_validate(CHAT | more)


def test_a_reply_can_be_sent_back_as_a_message() -> None:
    reply = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
    }
    assert types.ChatMessage.model_validate(reply).content == "x"


def test_answers_keep_fields_that_we_do_not_know() -> None:
    usage = types.Usage.model_validate({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost": 0.1})
    assert usage.model_dump()["cost"] == 0.1
