import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.client.providers import PROVIDERS, is_remote, parse, shown
from llmasos.client.providers.anthropic import AnthropicWire
from llmasos.client.sse import Event
from llmasos.errors import InvalidInputError, ProviderError, UnsupportedError
from llmasos.inference.request import SamplingParams

WIRE = AnthropicWire(PROVIDERS["anthropic"])


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("openai:gpt-4.1", True),
        ("anthropic:claude", True),
        ("http://127.0.0.1:8000/v1#m", True),
        ("openai+http://127.0.0.1:8000/v1#m", True),
        ("openai+https://host/v1", True),
        ("https://host/model.gguf", False),
        ("hf:owner/name", False),
        ("pypi:some-model", False),
        ("openai", False),
        ("/home/me/openai:model", False),
        ("smollm2-135m-instruct", False),
    ],
)
def test_which_names_mean_a_model_behind_an_api(name: str, remote: bool) -> None:
    assert is_remote(name) is remote


def test_a_name_gives_provider_model_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_API_KEY", "secret")
    endpoint = parse("mistral:mistral-small-latest")
    assert (endpoint.provider.base_url, endpoint.model, endpoint.key) == (
        "https://api.mistral.ai/v1",
        "mistral-small-latest",
        "secret",
    )
    assert parse("mistral:x", api_key="mine").key == "mine"


def test_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROVIDERS:
        monkeypatch.delenv(f"{name.upper()}_API_KEY", raising=False)
        with pytest.raises(ProviderError, match=f"{name.upper()}_API_KEY"):
            parse(f"{name}:model")


def test_a_url_is_its_own_provider_and_gets_no_other_providers_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret")
    monkeypatch.delenv("LLMASOS_API_KEY", raising=False)
    endpoint = parse("openai+http://10.0.0.1:8000/v1/#org/model")
    assert (endpoint.provider.name, endpoint.provider.base_url) == ("10.0.0.1:8000", "http://10.0.0.1:8000/v1")
    assert (endpoint.model, endpoint.key) == ("org/model", "")
    endpoint = parse("anthropic+https://host/v1#m")
    assert endpoint.provider.protocol == "anthropic" and endpoint.key == "" and not endpoint.provider.completions
    monkeypatch.setenv("LLMASOS_API_KEY", "ours")
    assert parse("http://host/v1#m").key == "ours"


@pytest.mark.parametrize(
    "name", ["nobody:model", "openai:", "http://host/v1", "http://#m", "http://host/v1?a=b#m", "plain", ""]
)
def test_other_names_are_refused_with_the_form_to_write(name: str) -> None:
    with pytest.raises(InvalidInputError, match="Write"):
        parse(name)


def test_parameters_in_the_table_are_sampling_parameters() -> None:
    known = set(SamplingParams.__dataclass_fields__)
    assert all(provider.parameters <= known for provider in PROVIDERS.values())


def test_anthropic_gets_system_tools_and_tool_results_in_its_own_form() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    path, body = WIRE.chat_call(
        {
            "model": "claude",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
                {"role": "user", "content": "So?"},
            ],
            "stop": "END",
            "temperature": 1.0,
            "top_p": 0.9,
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
                }
            ],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        }
    )
    assert path == "/messages"
    assert body == {
        "model": "claude",
        "max_tokens": 4096,
        "top_p": 0.9,
        "system": "Be brief.\n\nBe kind.",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "2"},
                    {"type": "text", "text": "So?"},
                ],
            },
        ],
        "stop_sequences": ["END"],
        "tools": [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ],
)
def test_what_anthropic_lacks_is_refused_by_name(more: dict[str, object], name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        WIRE.chat_call({"model": "m", "messages": [{"role": "user", "content": "x"}], **more})
    assert caught.value.param == name


def test_tool_arguments_that_are_not_json_are_named() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{oops"}}
    with pytest.raises(InvalidInputError, match="'add' are not JSON"):
        WIRE.chat_call({"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]})


def test_an_anthropic_message_becomes_a_chat_completion() -> None:
    reply = WIRE.chat_reply(
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "Let me "},
                {"type": "text", "text": "add."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
            ],
            "stop_reason": "tool_use",
            "usage": {"input_tokens": 5, "cache_read_input_tokens": 10, "output_tokens": 7},
        }
    )
    [choice] = reply.choices
    assert choice.message.content == "Let me add." and choice.message.reasoning_content == "hm"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 1}
    assert choice.finish_reason == "tool_calls"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (15, 7, 22)
    assert reply.usage.prompt_tokens_details.cached_tokens == 10


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "type", "usage", "index", "delta", "stop_reason", "text"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(json_values)
def test_a_reply_of_any_shape_is_an_answer_or_a_provider_error(data: object) -> None:
    with contextlib.suppress(ProviderError):
        WIRE.chat_reply(data)


@given(
    json_values,
    st.sampled_from(["message_start", "content_block_start", "content_block_delta", "message_delta", "message_stop"]),
)
def test_an_event_of_any_shape_is_read_or_a_provider_error(data: object, kind: str) -> None:
    body = {**data, "type": kind} if isinstance(data, dict) else data
    with contextlib.suppress(ProviderError):
        WIRE.stream_reader({}).read(Event(json.dumps(body)))


def test_a_login_or_a_token_in_a_name_is_never_shown() -> None:
    secret = "http://u:PASSWORD@127.0.0.1:9/v1"
    assert shown(f"openai+{secret}?k=TOKEN#m") == "openai+http://127.0.0.1:9/v1#m"
    assert shown("openai:gpt?x") == "openai:gpt?x"
    for name in (f"{secret}?k=TOKEN#m", f"openai+{secret}"):
        with pytest.raises(InvalidInputError) as caught:
            parse(name)
        assert "PASSWORD" not in str(caught.value) and "TOKEN" not in str(caught.value)
    assert "KEY" not in repr(parse(f"{secret}#m", api_key="KEY"))


@pytest.mark.parametrize("name", ["http://[x/v1#m", "http://h:99999/v1#m", "openai+https://[/#m"])
def test_an_address_that_can_not_be_is_an_input_error(name: str) -> None:
    assert is_remote(name)
    with pytest.raises(InvalidInputError, match="not a valid address"):
        parse(name)
