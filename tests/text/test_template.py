"""Chat templates render as in transformers, and a hostile one is stopped."""

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template

from llmasos.errors import InvalidInputError, NoChatTemplateError
from llmasos.text import Tokenizer, json_schema, template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOLS = """{{ bos_token }}
{%- if tools %}
    {% for tool in tools %}
{{ tool | tojson(indent=2) }}{{ "," if not loop.last }}
    {% endfor %}
{%- endif %}
{%- set ns = namespace(count=0) %}
{% for message in messages if message.role != "system" %}
    {%- if message.role not in ["user", "assistant", "tool"] %}{{ raise_exception("Role " ~ message.role) }}{% endif %}
    {%- set ns.count = ns.count + 1 %}
[{{ loop.index }}/{{ loop.length }} {{ message.role }}] {{ message.content | default("") | trim }}
    {%- for call in message.tool_calls or [] %}
 -> {{ call.function.name }}{{ call.function.arguments | tojson }}
    {%- endfor %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
{% endfor %}
{{ ns.count }}{% if documents %}{{ documents | map(attribute="title") | join(", ") }}{% endif %}
{% if add_generation_prompt %}assistant:{% endif %}"""
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{{ m.reasoning_content }}\n{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "<b>Wetter</b> & 'mehr' für heute", "parameters": {}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>&amp;"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Hi "},
        {"role": "assistant", "content": "Hello! "},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "look it up", "name": None},
        {"role": "tool", "content": "sunny"},
        {"role": "user", "content": "Thanks"},
    ],
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def theirs(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(render_jinja_template([messages], chat_template=source, **TOKENS, **options)[0][0])


@pytest.mark.parametrize("source", [CHATML, TOOLS, GENERATION, PARTS], ids=["chatml", "tools", "generation", "parts"])
@pytest.mark.parametrize("messages", CHATS, ids=["one", "system", "tool_call"])
@pytest.mark.parametrize("prompt", [True, False])
def test_a_rendering_equals_transformers(source: str, messages, prompt: bool) -> None:
    options = {"tools": [WEATHER], "documents": [{"title": "A", "text": "a"}], "add_generation_prompt": prompt}
    assert template.render(source, messages, variables=TOKENS, **options) == theirs(source, messages, **options)


@pytest.mark.parametrize(
    "source, content",
    [
        *((source, content) for source in (CHATML, TOOLS, PARTS) for content in ("Paris is", "Paris is ")),
        (PARTS, [{"type": "text", "text": "Paris is"}]),
    ],
)
def test_continuing_the_final_message_equals_transformers(source: str, content) -> None:
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": content}]
    ours = template.render(source, messages, variables=TOKENS, continue_final_message=True, add_generation_prompt=False)
    assert ours == theirs(source, messages, continue_final_message=True)


def test_content_parts_become_text_for_templates_that_know_only_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    image = [{"type": "image", "url": "x"}, *parts]
    assert "user\na\nb<|im_end|>" in template.render(CHATML, [{"role": "user", "content": parts}])
    assert template.render(PARTS, [{"role": "user", "content": image}]) == "user:<image>ab\n"
    with pytest.raises(InvalidInputError, match=r"messages\[0\] has a part of type 'image'"):
        template.render(CHATML, [{"role": "user", "content": image}])


def test_dates_are_todays() -> None:
    source = "{{ strftime_now('%Y') }}{% if messages %}{% endif %}"
    assert template.render(source, CHATS[0]) == str(datetime.now().year)


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "messages is empty"),
        ("hello", "messages is a str, not a list"),
        ([{"role": "user", "content": "a"}, "b"], r"messages[1] is a str, not a dict"),
        ([{"content": "a"}], "messages[0] has the role None"),
        ([{"role": "user"}], "messages[0] has no content"),
        ([{"role": "user", "content": 5}], "messages[0] has content of type int"),
        ([{"role": "user", "content": ["a"]}], "messages[0] has a content part 0 without a type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0] has a text part 0 whose text is None"),
        ([{"role": "user", "content": "a", "x": object()}], "messages[0] holds a object, which is no JSON value"),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "messages[0] has tool_calls that are no list"),
    ],
)
def test_a_malformed_message_is_named(messages, complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(complaint)):
        template.render(CHATML, messages)


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("{{ raise_exception('Roles must alternate') }}", "refuses this input: Roles must alternate"),
        ("line\n{% if %}", "syntax error in line 2"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nothing.here.at.all }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for a in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "endless recursion"),
        ("{{ 'a' * 10**9 }}", "characters"),
        ("{{ 10 ** 10000000 }}", "characters"),
        ("{{ '%999999999d' % 1 }}", "characters"),
        ("{{ 'a'.ljust(10**9) }}", "characters"),
        ("{{ 'a' | center(10**9) }}", "characters"),
        (
            "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "characters",
        ),
        ("{% set x = 'a' * 10**6 %}{% for i in range(1000) %}{{ x }}{% endfor %}", "characters"),
    ],
)
def test_a_template_that_fails_or_never_ends_is_an_error(source: str, complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(complaint)):
        template.render(source, CHATS[0])


def test_a_template_cannot_raise_its_own_budget() -> None:
    source = "{% set budget = namespace(spend_steps=1) %}{% for i in range(9) %}{{ i }}{% endfor %}"
    assert template.render(source, CHATS[0]) == "012345678"


def tokenizer(**templates: str) -> Tokenizer:
    backend = Backend(models.BPE({"<s>": 0, "</s>": 1}, []))
    return Tokenizer(backend, special={"bos": 0, "eos": 1}, chat_templates=templates)


def test_the_tool_template_is_taken_for_tools_and_others_by_name() -> None:
    subject = tokenizer(default="d{{ bos_token }}", tool_use="t{{ tools[0].function.name }}", rag="r{{ x }}")
    assert subject.apply_chat_template(CHATS[0]) == "d<s>"
    assert subject.apply_chat_template(CHATS[0], tools=[WEATHER]) == "tweather"
    assert subject.apply_chat_template(CHATS[0], template="rag", x=3) == "r3"
    assert subject.apply_chat_template(CHATS[0], template="{{ eos_token }}") == "</s>"
    with pytest.raises(InvalidInputError, match="no chat template 'rga'") as error:
        subject.apply_chat_template(CHATS[0], template="rga")
    assert "default, rag, tool_use" in error.value.hint


def test_a_model_without_template_says_what_to_do() -> None:
    with pytest.raises(NoChatTemplateError, match="no chat template") as error:
        tokenizer().apply_chat_template(CHATS[0])
    assert "template=" in error.value.hint
    with pytest.raises(NoChatTemplateError, match="none of them is the default"):
        tokenizer(rag="x").apply_chat_template(CHATS[0])


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C", tags: list[str] | None = None) -> dict[str, int]:
    """
    Tell the weather.

    In one or more lines.

    Args:
        city: Where, as
            "City, Country"
        days: How many days
        unit: Of temperature
        tags: What to leave out

    Returns:
        A forecast
    """
    return {city: days}


def test_a_function_becomes_the_schema_that_transformers_makes() -> None:
    expected = get_json_schema(weather)
    expected["function"].pop("return")
    assert json_schema(weather) == expected
    assert template.render("{{ tools | tojson }}", CHATS[0], tools=[weather]).startswith('[{"type": "function"')


def test_a_function_that_says_too_little_is_refused() -> None:
    def silent(a: int) -> None: ...

    def untyped(a):
        """Do it."""

    def undescribed(a: int) -> None:
        """Do it."""

    def odd(a: Path) -> None:
        """Do it.

        Args:
            a: A path
        """

    for function, complaint in (
        (silent, "no docstring"),
        (untyped, "no type hint"),
        (undescribed, "not described"),
        (odd, "no JSON schema"),
    ):
        with pytest.raises(InvalidInputError, match=complaint):
            json_schema(function)
    with pytest.raises(InvalidInputError, match=re.escape("tools[0] is a str")):
        template.render(CHATML, CHATS[0], tools=["weather"])


@pytest.mark.shared
def test_published_templates_render_as_in_transformers() -> None:
    folder = os.environ.get("LLMASOS_TEST_DATA")
    paths = sorted(Path(folder).rglob("models/templates/*.jinja")) if folder else []
    if not paths:
        pytest.skip("LLMASOS_TEST_DATA has no models/templates/*.jinja")
    compared, different = 0, []
    for path in paths:
        source = path.read_text(encoding="utf-8")
        for messages in CHATS:
            options = {"tools": [WEATHER] if len(messages) > 3 else None, "add_generation_prompt": True}
            try:
                expected = theirs(source, messages, **options)
            except Exception:
                with pytest.raises(InvalidInputError):
                    template.render(source, messages, variables=TOKENS, **options)
                continue
            compared += 1
            if template.render(source, messages, variables=TOKENS, **options) != expected:
                different.append(path.name)
    assert different == []
    assert compared > 2 * len(paths)
