"""Replies read out of text: every format, every split, everything malformed."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmasos.errors import InvalidInputError
from llmasos.text.reply import (
    ReasoningDelta,
    ReplyParser,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    reply_form,
)
from llmasos.text.template import render

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
CITY = 'Pa"ris\n<é> }'
ARGUMENTS = {"city": CITY, "days": 3, "tags": ["a", {"b": None}]}
JSON = json.dumps(ARGUMENTS)
GET, NOW = f'{{"name": "get_weather", "arguments": {JSON}}}', '{"name": "now", "arguments": {}}'
_D = "｜DSML｜"

# by name: the texts of a template that tell the format, and two calls as a model of that kind writes them
FORMATS = {
    "hermes": (
        "<tool_call>",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "hermes 2 pro, arguments first": (
        "<tool_call>",
        f'<tool_call>{{"arguments": {JSON}, "name": "get_weather"}}</tool_call>'
        '<tool_call>{"name": "now"}</tool_call>',
    ),
    "arguments as text in a string": (
        "<tool_call>",
        f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(JSON)}}}</tool_call>'
        '<tool_call>{"name": "now", "arguments": null}</tool_call>',
    ),
    "an outer bracket forgotten": (
        "<tool_call>",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}\n</tool_call>\n'
        '<tool_call>{"name": "now"}</tool_call>',
    ),
    "llama": (
        "<|python_tag|>",
        f'{{"name": "get_weather", "parameters": {JSON}}}; {{"name": "now", "parameters": {{}}}}',
    ),
    "llama with its tag": (
        "<|python_tag|>",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {JSON}}};{{"name": "now"}}',
    ),
    "mistral": (
        "[TOOL_CALLS]",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {JSON}, "id": "abcdefghi"}}, {NOW}]',
    ),
    "mistral 2025": (
        "[TOOL_CALLS] [ARGS]",
        f"[TOOL_CALLS]get_weather[ARGS]{JSON}[TOOL_CALLS]now[CALL_ID]123[ARGS]{{}}",
    ),
    "granite": (
        "<|tool_call|>",
        f"<|tool_call|>[{GET}, {NOW}]",
    ),
    "phi-4-mini": (
        "<|tool_call|>",
        f"<|tool_call|>[{GET},{NOW}]<|/tool_call|>",
    ),
    "command r7b": (
        "<|START_ACTION|> tool_name",
        f'<|START_ACTION|>[\n    {{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {JSON}}},\n'
        '    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
    ),
    "nemotron": (
        "<TOOLCALL>",
        f'<TOOLCALL>[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "now"}}]</TOOLCALL>',
    ),
    "deepseek v3": (
        "<｜tool▁call▁begin｜> ```json",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        f"```json\n{JSON}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n"
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek v3.1": (
        "<｜tool▁call▁begin｜>",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "kimi": (
        "<|tool_call_begin|> <|tool_call_argument_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{JSON}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
    ),
    "function tag": ("<function=", f"<function=get_weather>{JSON}</function><function=now>{{}}</function>"),
    "qwen3-coder": (
        "<function= <parameter=",
        f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{CITY}\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        '<parameter=tags>\n["a", {"b": null}]\n</parameter>\n</function>\n</tool_call>\n'
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "qwen3-coder without its wrapper": (
        "<function= <parameter=",
        f"<function=get_weather>\n<parameter=city>\n{CITY}\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        '<parameter=tags>\n["a", {"b": None}]\n</parameter>\n</function>\n<function=now></function>',
    ),
    "seed-oss": (
        "<seed:tool_call> <function=",
        f"<seed:tool_call>\n<function=get_weather>\n<parameter=city>{CITY}</parameter>\n<parameter=days>3</parameter>\n"
        '<parameter=tags>["a", {"b": null}]</parameter>\n</function>\n</seed:tool_call>\n'
        "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    ),
    "minimax-m2": (
        "<minimax:tool_call> <invoke name=",
        f'<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">{CITY}</parameter>\n'
        '<parameter name="days">3</parameter>\n<parameter name="tags">["a", {"b": null}]</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    ),
    "deepseek v3.2": (
        f"{_D} invoke",
        f'<{_D}function_calls>\n<{_D}invoke name="get_weather">\n'
        f'<{_D}parameter name="city" string="true">{CITY}</{_D}parameter>\n'
        f'<{_D}parameter name="days" string="false">3</{_D}parameter>\n'
        f'<{_D}parameter name="tags" string="false">["a", {{"b": null}}]</{_D}parameter>\n</{_D}invoke>\n'
        f'<{_D}invoke name="now">\n</{_D}invoke>\n</{_D}function_calls>',
    ),
    "glm-4.5": (
        "<arg_key> <arg_value>",
        f"<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{CITY}</arg_value>\n<arg_key>days</arg_key>\n"
        '<arg_value>3</arg_value>\n<arg_key>tags</arg_key>\n<arg_value>["a", {"b": null}]</arg_value>\n</tool_call>\n'
        "<tool_call>now\n</tool_call>",
    ),
    "pythonic": (
        "[func_name1(",
        f'[get_weather(city={CITY!r}, days=3, tags=["a", {{"b": None}}]), now()]',
    ),
    "llama 4": (
        "<|python_start|>",
        f'<|python_start|>[get_weather(city={CITY!r}, days=3, tags=["a", {{"b": null}}]), now()]<|python_end|>',
    ),
    "lfm2": (
        "<|tool_list_start|>",
        f'<|tool_call_start|>[get_weather(city={CITY!r}, days=3, tags=["a", {{"b": None}}]), now()]<|tool_call_end|>',
    ),
    "unknown": (
        "{{ tools }}",
        f'[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "now", "arguments": {{}}}}]',
    ),
    "harmony": (
        "<|channel|> <|message|>",
        f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{JSON}<|end|><|start|>assistant"
        "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>",
    ),
}
MARKED = [name for name in FORMATS if FORMATS[name][1].startswith(reply_form(FORMATS[name][0]).calls.begins or "\0")]
PUBLISHED = [
    "ByteDance-Seed-OSS",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "GLM-4.6",
    "GLM-4.7-Flash",
    "LFM2.5-8B-A1B",
    "MiniMax-M2",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "Qwen-Qwen2.5-7B-Instruct",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "Qwen-Qwen3-0.6B",
    "Qwen3-Coder",
    "Qwen3.5-4B",
    "deepseek-ai-DeepSeek-V3.1",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.2",
    "ibm-granite-granite-4.0",
    "moonshotai-Kimi-K2",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "meetkai-functionary-medium-v3.1",
]
REASONING = {
    "<think>": ("<think>", "</think>"),
    "[THINK]": ("[THINK]", "[/THINK]"),
    "</think>": ("<think>", "</think>"),
    "<seed:think>": ("<seed:think>", "</seed:think>"),
    "<|START_THINKING|>": ("<|START_THINKING|>", "<|END_THINKING|>"),
}


def read(pieces, template, *, tools=TOOLS, **options):
    """All events, neighbours joined as a client joins them; ids are numbered."""
    ids = iter(f"id{i}" for i in range(1000))
    parser = ReplyParser(reply_form(template), tools=tools, new_id=lambda: next(ids), **options)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    joined = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, TextDelta | ReasoningDelta) and type(last) is type(event):
            joined[-1] = type(event)(last.text + event.text)
        elif isinstance(event, ToolCallDelta) and isinstance(last, ToolCallDelta):
            assert event.index == last.index
            joined[-1] = ToolCallDelta(last.index, last.arguments + event.arguments)
        else:
            joined.append(event)
    return joined


def calls_of(events):
    starts = [event for event in events if isinstance(event, ToolCallStart)]
    arguments = [event.arguments for event in events if isinstance(event, ToolCallDelta)]
    assert [start.index for start in starts] == list(range(len(starts)))
    return [(start.name, json.loads(text)) for start, text in zip(starts, arguments, strict=True)]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextDelta))


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_read_in_every_format(name: str) -> None:
    template, written = FORMATS[name]
    events = read([written], template)
    assert calls_of(events) == [("get_weather", ARGUMENTS), ("now", {})]
    assert text_of(events) == ""


@pytest.mark.parametrize("name", FORMATS)
def test_one_character_at_a_time_gives_the_same_events(name: str) -> None:
    template, written = FORMATS[name]
    assert read(written, template) == read([written], template)


@pytest.mark.parametrize("name", MARKED)
def test_text_before_and_behind_calls_is_kept_without_the_space_between(name: str) -> None:
    template, written = FORMATS[name]
    events = read([f"I look  it up: <b> [1] \n\n{written}"], template)
    assert text_of(events) == "I look  it up: <b> [1]" and len(calls_of(events)) == 2
    if not written.endswith(("}", "]")):
        events = read([f"{written}\n Done."], template)
        assert text_of(events) == "Done." and len(calls_of(events)) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_without_tools_what_looks_like_a_call_is_text(name: str) -> None:
    template, written = FORMATS[name]
    if name != "harmony":
        assert read(written, template, tools=()) == [TextDelta(written)]


_WRITTEN = [written for _, written in FORMATS.values()]
_PIECES = sorted({piece for text in _WRITTEN for piece in text.replace(">", ">\0").replace("]", "]\0").split("\0")})


@settings(max_examples=400)
@given(data=st.data())
def test_any_split_of_any_text_gives_the_same_events(data: st.DataObject) -> None:
    """Texts are put together from whole and broken calls, marks, reasoning and words."""
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    template, written = FORMATS[name]
    template += data.draw(st.sampled_from(["", "<think>", "[THINK]"]))
    cut = st.integers(0, len(written)).map(lambda n: written[:n])
    rest = st.integers(0, len(written)).map(lambda n: written[n:])
    marks = [*reply_form(template).marks, "<think>", "</think>", " \n", "[", "{", '"', "\\", '{"name": "now"}', "now("]
    part = st.one_of(st.just(written), cut, rest, st.sampled_from(marks), st.sampled_from(_PIECES), st.text(max_size=5))
    text = "".join(data.draw(st.lists(part, max_size=5)))
    options = {"prompt": data.draw(st.sampled_from(["", "<think>\n", "[THINK]"]))}
    whole = read([text], template, **options)
    assert read(text, template, **options) == whole
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert read(pieces, template, **options) == whole


@settings(max_examples=300)
@given(data=st.data())
def test_nothing_is_lost_and_nothing_is_told_twice(data: st.DataObject) -> None:
    """Words that stand in the text come out once, wherever a call breaks off around them."""
    name = data.draw(st.sampled_from(sorted(set(FORMATS) - {"arguments as text in a string", "harmony"})))
    template, written = FORMATS[name]
    first, second = sorted([data.draw(st.integers(0, len(written))), data.draw(st.integers(0, len(written)))])
    text = f"alpha {written[:first]} QUUX {written[second:]} omega"
    events = read([text], template)
    out = "".join(
        event.text if isinstance(event, TextDelta) else getattr(event, "arguments", "") or getattr(event, "name", "")
        for event in events
    )
    assert out.count("alpha") == 1
    # only what an object says under other keys than a call's is left out
    assert out.count("omega") == 1 and out.count("QUUX") <= 1


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call>oops</tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "{"}</tool_call>',
        '<tool_call>{"name": "now" "arguments"',
        '<tool_call>{"arguments": {"a": 1}, "nam',
        "a < b and <tool_cal or <tool",
        "  leading and trailing  \n",
    ],
)
def test_what_is_no_call_is_the_same_text(text: str) -> None:
    assert read([text], "<tool_call>") == read(text, "<tool_call>") == [TextDelta(text)]


def test_a_call_behind_a_broken_one_is_read() -> None:
    events = read('<tool_call>oops <tool_call>{"name": "now"}</tool_call>', "<tool_call>")
    assert text_of(events) == "<tool_call>oops" and calls_of(events) == [("now", {})]


def test_arguments_that_break_off_are_handed_on_as_they_are() -> None:
    cut = read('<tool_call>{"name": "now", "arguments": {"a": "b', "<tool_call>")
    assert cut == [ToolCallStart(0, "id0", "now"), ToolCallDelta(0, '{"a": "b')]
    wrong = read('<tool_call>{"name": "now", "arguments": {"a": ]}}\n</tool_call> ok', "<tool_call>")
    assert wrong == [ToolCallStart(0, "id0", "now"), ToolCallDelta(0, '{"a": ]}}\n'), TextDelta("ok")]


@pytest.mark.parametrize("name", FORMATS)
def test_a_mark_that_ends_calls_is_no_text_when_it_is_cut(name: str) -> None:
    template, written = FORMATS[name]
    for end in range(len(written), 0, -1):
        events = read([written[:end]], template)
        if sum(isinstance(event, ToolCallStart) for event in events) < 2:
            break
        assert text_of(events) == "", written[:end]
    assert end < len(written)


def test_what_stands_behind_the_arguments_and_fits_nothing_is_text() -> None:
    events = read('<tool_call>{"name": "now", "arguments": {oops}", "x"</tool_call>', "<tool_call>")
    assert events[:2] == [ToolCallStart(0, "id0", "now"), ToolCallDelta(0, "{oops}")]
    assert text_of(events) == '", "x"</tool_call>'


def test_arguments_come_as_they_are_written() -> None:
    parser = ReplyParser(reply_form("<tool_call>"), tools=TOOLS, new_id=lambda: "x")
    assert parser.push('<tool_call>{"name": "now", "arguments": {"a": "') == [
        ToolCallStart(0, "x", "now"),
        ToolCallDelta(0, '{"a": "'),
    ]
    assert parser.push("word ") == [ToolCallDelta(0, "word ")] and parser.num_calls == 1
    coder = ReplyParser(reply_form("<function= <parameter="), tools=TOOLS, new_id=lambda: "x")
    coder.push("<function=get_weather><parameter=city>\n")
    assert coder.push('a "quoted"') == [ToolCallDelta(0, 'a \\"quoted\\"')]


def test_a_json_answer_of_a_model_that_calls_without_a_mark_is_text() -> None:
    for text in ('{"name": "Ann", "parameters": {}}', '{"answer": 5}', "[1, 2]", '{"name": "now"', "[Paris](http://x)"):
        for template in ("<|python_tag|>", "{{ tools }}", "[func_name1("):
            assert read(text, template) == [TextDelta(text)]


def test_a_built_in_tool_of_llama_is_a_call() -> None:
    events = read('<|python_tag|>get_weather.call(city="x", days=2)', "<|python_tag|>")
    assert calls_of(events) == [("get_weather", {"city": "x", "days": 2})]
    assert read("<|python_tag|>print(1)", "<|python_tag|>") == [TextDelta("<|python_tag|>print(1)")]


def test_ids_are_those_that_the_templates_take() -> None:
    [_, start, *_] = read("x[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}", "[TOOL_CALLS][ARGS]")
    assert start.id == "123456789"
    parser = ReplyParser(reply_form("[TOOL_CALLS]"), tools=TOOLS)
    [start, _] = parser.push('[TOOL_CALLS][{"name": "now", "arguments": {}}]')
    assert len(start.id) == 9 and start.id.isalnum()
    template, written = FORMATS["kimi"]
    ids = [event.id for event in read(written, template) if isinstance(event, ToolCallStart)]
    assert ids == ["functions.get_weather:0", "functions.now:1"]
    [start, _] = ReplyParser(reply_form("<tool_call>"), tools=TOOLS).push('<tool_call>{"name": "now"}')
    assert start.id.startswith("call_") and len(start.id) == 29


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "string"}, "null", "null"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "[1]", "[1]"),
        ({"enum": ["a", "b"]}, "a", "a"),
        ({"type": "integer"}, " 3 ", 3),
        ({"type": "number"}, "2.5", 2.5),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "maybe", "maybe"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "None", None),
        ({"type": "object"}, "{'a': 1}", {"a": 1}),
        ({}, "3", 3),
        ({}, "three", "three"),
        (None, '"x"', "x"),
        ({"type": "integer"}, '"x"', '"x"'),
    ],
)
def test_a_tags_value_is_what_its_schema_says(schema, written, value) -> None:
    properties = {} if schema is None else {"a": schema}
    tools = [{"function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}]
    for template, text in (
        ("<function= <parameter=", f"<function=f><parameter=a>\n{written}\n</parameter></function>"),
        ("<arg_key> <arg_value>", f"<tool_call>f\n<arg_key>a</arg_key><arg_value>{written}</arg_value></tool_call>"),
    ):
        assert calls_of(read(text, template, tools=tools)) == [("f", {"a": value})]


@pytest.mark.parametrize("template", REASONING)
def test_reasoning_is_told_from_the_answer(template: str) -> None:
    begin, end = REASONING[template]
    for tools in ((), TOOLS):
        whole = [ReasoningDelta("Let me see:\n 1 < 2"), TextDelta("It is 2.\n")]
        assert read(f"{begin}\nLet me see:\n 1 < 2\n{end}\n\nIt is 2.\n", template, tools=tools) == whole
        assert read(f"Let me see:\n 1 < 2\n{end}It is 2.\n", template, tools=tools, prompt=f"x{begin}\n") == whole
        assert read("No need to.", template, tools=tools) == [TextDelta("No need to.")]
        assert read(f"{begin}\n\n{end}\n\nHi", template, tools=tools) == [TextDelta("Hi")]
        assert read(f"Hm {begin} b", template, tools=tools, prompt="x") == [TextDelta(f"Hm {begin} b")]
        assert read("cut of", template, tools=tools, prompt=begin) == [ReasoningDelta("cut of")]


def test_reasoning_can_be_left_alone() -> None:
    assert read("<think>x</think>y", "<think>", reasoning=False) == [TextDelta("<think>x</think>y")]


def test_the_parser_knows_whether_it_is_in_reasoning() -> None:
    parser = ReplyParser(reply_form("<think>"), prompt="<think>\n")
    assert parser.is_reasoning and parser.push("a") and parser.is_reasoning
    parser.push("</think>")
    assert not parser.is_reasoning


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "harmony"])
def test_calls_follow_reasoning(name: str) -> None:
    template, written = FORMATS[name]
    events = read(f"<think>\nI call {written[:9]}.\n</think>\n\n{written}", f"{template}<think>")
    assert events[0] == ReasoningDelta(f"I call {written[:9]}.")
    assert calls_of(events) == [("get_weather", ARGUMENTS), ("now", {})] and text_of(events) == ""


def test_harmony_has_reasoning_text_and_calls() -> None:
    head, then = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant", "<|channel|>final<|message|>Hello"
    template = FORMATS["harmony"][0]
    assert read(head + then, template) == [ReasoningDelta("Hm."), TextDelta("Hello")]
    assert read(head + then, template, tools=()) == [ReasoningDelta("Hm."), TextDelta("Hello")]
    assert read("just text", template) == [TextDelta("just text")]
    assert read("<|channel|>commentary<|message|>First,<|end|>", template) == [TextDelta("First,")]
    calling = read(head + " to=functions.now<|channel|>commentary json<|message|>{}<|call|>", template)
    assert calling == [ReasoningDelta("Hm."), ToolCallStart(0, "id0", "now"), ToolCallDelta(0, "{}")]


@pytest.mark.shared
def test_calls_that_published_templates_write_are_read() -> None:
    """Each template writes two past calls of an assistant (or one, where it takes no more); they are read back."""
    folder = os.environ.get("LLMASOS_TEST_DATA")
    paths = sorted(path for path in Path(folder).rglob("*.jinja") if path.stem in PUBLISHED) if folder else []
    if not paths:
        pytest.skip("LLMASOS_TEST_DATA has no chat templates")
    for path in paths:
        source, marks = path.read_text(encoding="utf-8"), {"bos_token": "<BOS>", "eos_token": "<EOS>"}
        for count in (2, 1):
            ids = [f"abcdefgh{i}" for i in range(count)]
            function = {"name": "get_weather", "arguments": {"city": "x", "days": 3}}
            calls = [{"id": id, "type": "function", "function": function} for id in ids]
            results = [{"role": "tool", "content": "y", "tool_call_id": id, "name": "get_weather"} for id in ids]
            asked = [{"role": "user", "content": "Q?"}]
            told = [*asked, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
            tools = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "description": "Says the weather."}}]
            try:
                prompt = render(source, asked, tools=tools, variables=marks)
                text = render(source, told, tools=tools, variables=marks)
            except InvalidInputError:
                continue
            same = next((at for at, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
            events = read([text[same:]], source, prompt=text[:same])
            assert calls_of(events) == [("get_weather", function["arguments"])] * count, path.stem
            break
        else:
            raise AssertionError(f"{path.stem} can't be rendered")


def test_plain_text_passes_through_at_once() -> None:
    parser = ReplyParser(reply_form("<tool_call>"))
    assert parser.push("a <tool_call> ") == [TextDelta("a <tool_call> ")] and parser.finish() == []
    parser = ReplyParser(reply_form("<tool_call>"), tools=TOOLS)
    assert parser.push("word") == [TextDelta("word")] and parser.push(" next") == [TextDelta(" next")]
