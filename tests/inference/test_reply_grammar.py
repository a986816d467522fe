"""Grammars of whole replies: what they let through is what the parser of the same format reads."""

import json
import random

import jsonschema
import numpy as np
import pytest
from tiny_tokenizers import byte_level

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.inference.constrain import GrammarCompiler, num_words
from llmasos.inference.reply_grammar import Calls, Reasoning, reply_grammar
from llmasos.inference.request import StructuredOutput
from llmasos.text import Tokenizer
from llmasos.text.reply import ReasoningDelta, ReplyParser, TextDelta, ToolCallDelta, ToolCallStart, reply_form

FOX = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "maxLength": 8},
        "code": {"type": "string", "pattern": "^[A-C]{2}/[0-9]$"},
        "kind": {"enum": ["fox", "dog"]},
        "count": {"$ref": "#/$defs/small"},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["word", "kind"],
    "additionalProperties": False,
    "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 99}},
}
TOOLS = [
    {"type": "function", "function": {"name": "fox", "parameters": FOX}},
    {"type": "function", "function": {"name": "dog"}},
]
PARAMETERS = {"fox": FOX, "dog": {"type": "object", "maxProperties": 0}}
SPECIAL = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<think>", "</think>", "<|channel|>", "<|message|>"]
TEMPLATES = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "mistral 2025": "[TOOL_CALLS] [ARGS]",
    "llama": "<|python_tag|>",
    "granite": "<|tool_call|>",
    "command r7b": "<|START_ACTION|> tool_name",
    "deepseek v3": "<｜tool▁call▁begin｜> ```json",
    "deepseek v3.1": "<｜tool▁call▁begin｜>",
    "kimi": "<|tool_call_begin|> <|tool_call_argument_begin|>",
    "function tag": "<function=",
    "qwen3-coder": "<function= <parameter=",
    "seed-oss": "<seed:tool_call> <function=",
    "minimax-m2": "<minimax:tool_call> <invoke name=",
    "deepseek v3.2": "｜DSML｜ invoke",
    "glm-4.5": "<arg_key> <arg_value>",
    "pythonic": "[func_name1(",
    "llama 4": "<|python_start|>",
    "unknown": "",
    "harmony": "<|channel|> <|message|>",
}


@pytest.fixture(scope="module")
def compilers() -> dict[bool, GrammarCompiler]:
    """With the marks as special tokens, and with the marks as text."""
    made = {}
    for has_special in (False, True):
        backend = byte_level()
        if has_special:
            backend.add_special_tokens(SPECIAL)
        tokenizer = Tokenizer(backend, special={"eos": 2})
        made[has_special] = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    return made


def special_of(compiler, form):
    tokenizer = compiler.tokenizer
    return {m: tokenizer.id(m) for m in form.marks if tokenizer.id(m) in tokenizer.special_ids}


def calls(form, tools=TOOLS, **options) -> Calls:
    layout = form.calls.layout(tools)
    begin = layout.begin or getattr(layout.calls[0][0], "text", "")
    return Calls(layout, next((m for m in form.calls.begins if begin.startswith(m)), ""), **options)


ENDS = [
    "</｜DSML｜function_calls>",
    "</parameter>",
    "\n</parameter>",
    "</｜DSML｜parameter>",
    "</arg_value>",
    "</think>",
]


def walk(compiler, asked, rng, most=1500) -> str:
    """A random reply within the grammar, that ends as soon as it can."""
    matcher, tokens = compiler.matcher(asked), []
    ends = [compiler.tokenizer.encode(end, add_special_tokens=False) for end in ENDS]
    closing = {i for i in range(compiler.vocab_size) if compiler.tokenizer.token_bytes(i) in (b'"', b"}", b"]")}
    mask = np.zeros((1, num_words(compiler.vocab_size)), np.int32)
    while not (tokens and matcher.may_stop):
        assert len(tokens) < most, compiler.tokenizer.decode(tokens, skip_special_tokens=False)
        if forced := matcher.forced_tokens():
            tokens += forced
            continue
        fitting = [end for end in ends if rng.random() < 0.3 and matcher.num_accepted(end) == len(end)]
        if fitting:
            more = fitting[0]
        else:
            matcher.fill_masks(mask)
            allowed = set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())
            allowed -= compiler.tokenizer.eos_token_ids
            # what closes strings and brackets is likelier than in a random text
            more = [rng.choice(sorted(allowed & closing if allowed & closing and rng.random() < 0.4 else allowed))]
        for token in more:
            matcher.accept(token)
        tokens += more
        assert matcher.error is None
    return compiler.tokenizer.decode(tokens, skip_special_tokens=False)


def accepts(compiler, asked, text) -> bool:
    matcher = compiler.matcher(asked)
    for token in compiler.tokenizer.encode(text, add_special_tokens=False):
        matcher.accept(token)
    return matcher.error is None and matcher.may_stop


def read(text, form, **options):
    parser = ReplyParser(form, tools=TOOLS, **options)
    return parser.push(text) + parser.finish()


@pytest.mark.parametrize("has_special", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_required_calls_are_always_calls_of_the_tools_with_valid_arguments(compilers, name, has_special) -> None:
    compiler, form, rng = compilers[has_special], reply_form(TEMPLATES[name]), random.Random(5)
    asked = reply_grammar(calls=calls(form, required=True), special=special_of(compiler, form))
    seen = set()
    for _ in range(8):
        events = read(text := walk(compiler, asked, rng), form)
        starts = [event for event in events if isinstance(event, ToolCallStart)]
        arguments = [
            "".join(e.arguments for e in events if isinstance(e, ToolCallDelta) and e.index == s.index) for s in starts
        ]
        assert starts and not any(isinstance(event, TextDelta) for event in events), text
        for start, one in zip(starts, arguments, strict=True):
            jsonschema.validate(json.loads(one), PARAMETERS[start.name])
            seen.add(start.name)
    assert seen == {"fox", "dog"}


@pytest.mark.parametrize("has_special", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_grammar_lets_through_text_and_calls_as_far_as_it_should(compilers, name, has_special) -> None:
    compiler, form, rng = compilers[has_special], reply_form(TEMPLATES[name]), random.Random(6)
    special = special_of(compiler, form)
    one = walk(compiler, reply_grammar(calls=calls(form, required=True, parallel=False), special=special), rng)
    assert sum(isinstance(event, ToolCallStart) for event in read(one, form)) == 1
    must = reply_grammar(calls=calls(form, required=True), special=special)
    assert accepts(compiler, must, one) and not accepts(compiler, must, "the quick fox")
    if form.channels:
        return
    may = reply_grammar(calls=calls(form), special=special)
    assert accepts(compiler, may, one) and accepts(compiler, may, "the quick fox")
    for wrong in (one.replace("fox", "cat").replace("dog", "cat"), one[: len(one) // 2]):
        if form.calls.begins:
            assert not accepts(compiler, may, wrong)
    single = reply_grammar(calls=calls(form, parallel=False), special=special)
    assert accepts(compiler, single, one) and not accepts(compiler, single, f"{one}\n{one}")
    if calls(form).mark:
        assert accepts(compiler, may, f"hello {one}") and accepts(compiler, single, f"hello {one}")


@pytest.mark.parametrize("has_special", [False, True])
def test_reasoning_comes_before_the_form(compilers, has_special) -> None:
    compiler, form = compilers[has_special], reply_form("<tool_call><think>")
    special = special_of(compiler, form)
    asked = StructuredOutput(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    for begun, fits in ((True, ["hm</think>\n\n%s", "</think>%s"]), (False, ["<think>hm</think>%s", "%s"])):
        grammar = reply_grammar(form=asked, reasoning=Reasoning("<think>", "</think>", begun), special=special)
        assert all(accepts(compiler, grammar, text % '{"a": 3}') for text in fits)
        assert not any(accepts(compiler, grammar, text % "three") for text in fits)
    grammar = reply_grammar(
        calls=calls(form, required=True), reasoning=Reasoning("<think>", "</think>", True), special=special
    )
    text = walk(compiler, grammar, random.Random(1))
    events = read(text, form, prompt="<think>\n")
    assert any(isinstance(event, ToolCallStart) for event in events)
    assert not any(isinstance(event, TextDelta) for event in events)
    assert "</think>" in text and all(isinstance(e, ReasoningDelta | ToolCallStart | ToolCallDelta) for e in events)


@pytest.mark.parametrize(
    ("asked", "fits", "differs"),
    [
        ({"json": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}}, '{"a": 1}', "1"),
        ({"json_object": True}, '{"b": 1}', "[]"),
        ({"regex": r"[0-9]+/\w\n"}, "12/a\n", "12"),
        ({"choice": ('say "yes"', "no")}, 'say "yes"', "say"),
    ],
)
def test_a_form_for_text_stands_beside_calls(compilers, asked, fits, differs) -> None:
    compiler, form = compilers[False], reply_form("<tool_call>")
    grammar = reply_grammar(calls=calls(form), form=StructuredOutput(**asked))
    assert accepts(compiler, grammar, fits) and not accepts(compiler, grammar, differs)
    assert accepts(compiler, grammar, '<tool_call>\n{"name": "dog", "arguments": {}}\n</tool_call>')


def test_what_can_not_be_joined_is_refused_and_what_needs_no_joining_is_not() -> None:
    form, grammar = reply_form("<tool_call>"), StructuredOutput(grammar='start: "a"')
    assert reply_grammar(form=grammar) is grammar
    with pytest.raises(UnsupportedError) as caught:
        reply_grammar(calls=calls(form), form=grammar)
    assert caught.value.param == "structured_outputs"


def test_a_schema_that_can_not_be_enforced_is_an_error_only_where_it_must_be(compilers) -> None:
    form = reply_form("<tool_call>")
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "poem"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
    assert accepts(compilers[False], reply_grammar(calls=calls(form, tools, required=True)), text)
    with pytest.raises(InvalidInputError, match="poem"):
        compilers[False].matcher(reply_grammar(calls=calls(form, tools, required=True, strict=True)))
