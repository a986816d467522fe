"""Tools with the official `openai` client, a real server and tiny random models: what is forced is always right."""

import json

import jsonschema
import openai
import pytest
from fake_llm import live_server

from tiny import CHAT_TEMPLATE, write_tiny_model

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Lyon"]},
        "days": {"$ref": "#/$defs/days"},
        "note": {"type": "string", "maxLength": 6},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 0, "maximum": 9}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
LISTED = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
HI = [{"role": "user", "content": "fox"}]
# what tells each format, in a comment of the template
TEMPLATES = {
    "hermes": LISTED + "{# <tool_call> #}" + CHAT_TEMPLATE,
    "coder": LISTED + "{# <function= <parameter= #}" + CHAT_TEMPLATE,
    "llama": LISTED + "{# <|python_tag|> #}" + CHAT_TEMPLATE,
    "mistral": LISTED + "{# [TOOL_CALLS] #}" + CHAT_TEMPLATE,
    "pythonic": LISTED + "{# [func_name1( #}" + CHAT_TEMPLATE,
    "thinking": LISTED + "{# <tool_call> #}" + CHAT_TEMPLATE + "{% if add_generation_prompt %}<think>{% endif %}",
    "without": CHAT_TEMPLATE,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    from llmasos.inference.llm import LLM
    from llmasos.models.load import load_model

    llms = {}
    for name, template in TEMPLATES.items():
        folder = write_tiny_model(tmp_path_factory.mktemp("tools") / name, max_position_embeddings=4096)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        llms[name] = LLM(load_model(folder, device="cpu", dtype="float32"), name=name)
    with live_server(llms) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client
    for llm in llms.values():
        llm.close()


def check(calls) -> None:
    assert calls
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "thinking"])
def test_required_calls_are_valid_whole_and_streamed(client, name: str) -> None:
    for seed in range(3):
        fields = {"model": name, "messages": HI, "tools": TOOLS, "tool_choice": "required", "seed": seed}
        fields |= {"parallel_tool_calls": False, "temperature": 1.3, "max_tokens": 400}
        [choice] = client.chat.completions.create(**fields).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        check(choice.message.tool_calls)
        with client.chat.completions.stream(**fields) as stream:
            [streamed] = stream.get_final_completion().choices
        assert streamed.finish_reason == "tool_calls"
        [whole], [pieces] = choice.message.tool_calls, streamed.message.tool_calls
        assert pieces.function.arguments == whole.function.arguments and pieces.function.name == whole.function.name


def test_a_named_function_is_the_one_that_is_called(client) -> None:
    for name in ("hermes", "coder", "without"):
        answer = client.chat.completions.create(
            model=name,
            messages=HI,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "weather"}},
            max_tokens=300,
        )
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "weather"
        check([call])


def test_reasoning_that_the_prompt_begins_comes_before_a_forced_answer(client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}}
    answer = client.chat.completions.create(
        model="thinking", messages=HI, response_format=form, max_tokens=600, seed=3, extra_body={"top_k": 3}
    )
    [choice] = answer.choices
    if choice.finish_reason == "length":
        assert choice.message.content == "" and choice.message.reasoning_content
    else:
        jsonschema.validate(json.loads(choice.message.content), PARAMETERS)
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def test_the_clients_own_parsing_of_forms_and_tools(client) -> None:
    from pydantic import BaseModel, Field

    class Weather(BaseModel):
        """How the weather is."""

        days: int = Field(ge=0, le=9)
        kind: bool

    parsed = (
        client.chat.completions.parse(model="hermes", messages=HI, response_format=Weather, max_tokens=60)
        .choices[0]
        .message.parsed
    )
    assert isinstance(parsed, Weather)
    tool = openai.pydantic_function_tool(Weather)
    answer = client.chat.completions.parse(
        model="hermes", messages=HI, tools=[tool], tool_choice="required", max_tokens=400, parallel_tool_calls=False
    )
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)


def test_a_conversation_with_calls_and_results_goes_on(client) -> None:
    for name in ("hermes", "without"):
        first = client.chat.completions.create(
            model=name, messages=HI, tools=TOOLS, tool_choice="required", max_tokens=400, parallel_tool_calls=False
        )
        message = first.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
        answer = client.chat.completions.create(
            model=name, messages=[*HI, message, result], tools=TOOLS, tool_choice="none", max_tokens=5
        )
        assert answer.choices[0].message.tool_calls is None
