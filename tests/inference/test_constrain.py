"""Structured output: masks, jump-ahead, drafts, errors; on tiny tokenizers of every kind."""

import codecs
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_schemas import SCHEMAS
from tiny_tokenizers import KINDS

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.inference import constrain
from llmasos.inference.constrain import GrammarCompiler, Matcher, num_words
from llmasos.inference.request import SamplingParams, StructuredOutput
from llmasos.text import Tokenizer, load_tokenizer

EOS = {"byte_level": 1, "byte_fallback": 2, "metaspace_unigram": 1}
OBJECT = {
    "type": "object",
    "properties": {"the": {"type": "integer"}, "quick": {"enum": ["fox", "dog", "lazy dog"]}},
    "required": ["the", "quick"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compilers() -> dict[str, GrammarCompiler]:
    """By kind of tokenizer; the model's vocabulary is padded by 45."""
    made = {kind: Tokenizer(KINDS[kind](), special={"eos": eos}) for kind, eos in EOS.items()}
    return {kind: GrammarCompiler(tokenizer, tokenizer.vocab_size + 45) for kind, tokenizer in made.items()}


@pytest.fixture(scope="module")
def compiler(compilers: dict[str, GrammarCompiler]) -> GrammarCompiler:
    return compilers["byte_level"]


def allowed(matcher: Matcher, compiler: GrammarCompiler) -> set[int]:
    mask = masks(compiler, 1)
    matcher.fill_masks(mask)
    return set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def masks(compiler: GrammarCompiler, num_rows: int) -> np.ndarray:
    """Rows that allow everything."""
    return np.full((num_rows, num_words(compiler.vocab_size)), -1, np.int32)


def ids_of(compiler: GrammarCompiler, text: str) -> list[int]:
    return compiler.tokenizer.encode(text, add_special_tokens=False)


def assert_same_bytes(compiler: GrammarCompiler) -> None:
    """llguidance's bytes of every token are ours, but for the byte FF, which no text has."""
    ours = {i: compiler.tokenizer.token_bytes(i) for i in range(compiler.tokenizer.vocab_size)}
    known = {i: piece for i, piece in ours.items() if piece and b"\xff" not in piece}
    assert {i: compiler._vocabulary.decode_bytes([i]) for i in known} == known and len(known) > 50


def begins_text(piece: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(piece)
    except UnicodeDecodeError:
        return False
    return piece != b""


def walk(compiler: GrammarCompiler, matcher: Matcher, rng: random.Random, most: int = 200) -> list[int]:
    """Random allowed tokens, to the end."""
    tokens: list[int] = []
    while not matcher.is_finished and len(tokens) < most:
        token = rng.choice(sorted(allowed(matcher, compiler)))
        tokens.append(token)
        matcher.accept(token)
        assert matcher.error is None
    return [t for t in tokens if t not in compiler.tokenizer.eos_token_ids]


@pytest.mark.parametrize("kind", EOS)
def test_the_grammar_sees_every_token_as_the_bytes_that_it_adds_to_a_text(compilers, kind: str) -> None:
    assert_same_bytes(compilers[kind])


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_mask_allows_exactly_the_tokens_that_some_choice_goes_on_with(compilers, kind: str) -> None:
    compiler = compilers[kind]
    tokenizer = compiler.tokenizer
    choices = ("hello world", "the fox", "the 🚀", "helper", "t")
    matcher = compiler.matcher(StructuredOutput(choice=choices))
    written = b""
    for wanted in (b"t", b"h", b"e"):
        rest = [c.encode()[len(written) :] for c in choices if c.encode().startswith(written)]
        expected = {
            i
            for i in range(tokenizer.vocab_size)
            if i not in tokenizer.special_ids | tokenizer.eos_token_ids
            and (piece := tokenizer.token_bytes(i))
            and any(r.startswith(piece) for r in rest)
        }
        if written.decode() in choices:
            expected |= tokenizer.eos_token_ids
        if len({r[:1] for r in rest}) > 1:  # else what is forced goes by the tokenizer's own cut
            assert allowed(matcher, compiler) == expected
        written += wanted
        matcher.accept(next(i for i in sorted(expected) if tokenizer.token_bytes(i) == wanted))
    assert not matcher.may_stop


def test_ids_that_pad_the_model_and_special_tokens_are_never_allowed(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(StructuredOutput(regex="(.|\n)*"))
    tokenizer = compiler.tokenizer
    texts = {i for i in range(tokenizer.vocab_size) if begins_text(tokenizer.token_bytes(i))}
    assert allowed(matcher, compiler) == texts - tokenizer.special_ids | {1}


@pytest.mark.parametrize("kind", EOS)
def test_random_outputs_match_the_regular_expression(compilers, kind: str) -> None:
    compiler, rng = compilers[kind], random.Random(1)
    pattern = "(the|hello) [a-d]{2,4}(é|🚀)?"
    if kind == "metaspace_unigram":
        pattern = "(the|hello) [a-d]{2,4}(é)?"  # it has no bytes to write others with
    for _ in range(20):
        tokens = walk(compiler, compiler.matcher(StructuredOutput(regex=pattern)), rng)
        written = b"".join(compiler.tokenizer.token_bytes(t) for t in tokens)
        assert re.fullmatch(pattern, written.decode())


def test_json_has_the_properties_in_order_on_one_line(compiler: GrammarCompiler) -> None:
    rng = random.Random(2)
    for _ in range(10):
        matcher = compiler.matcher(StructuredOutput(json=OBJECT))
        text = compiler.tokenizer.decode(walk(compiler, matcher, rng))
        value = json.loads(text)
        assert list(value) == ["the", "quick"] and isinstance(value["the"], int)
        assert value["quick"] in ("fox", "dog", "lazy dog") and "\n" not in text
        assert matcher.may_stop and matcher.is_finished


@pytest.mark.parametrize("asked", [{"json": True}, {"json": {}}, {"json": "{}"}, {"json_object": True}])
def test_any_json_object_can_be_asked_for_in_four_ways(compiler: GrammarCompiler, asked) -> None:
    def fits(text: str) -> bool:
        matcher = compiler.matcher(StructuredOutput(**asked))
        ids = ids_of(compiler, text)
        return matcher.num_accepted(ids) == len(ids)

    assert fits('{"the": [1, {"fox": null}]}') and not fits("[1]") and not fits("3")


@pytest.mark.parametrize(
    "grammar",
    ['root ::= "the" (" " word)+\nword ::= "fox" | [0-9]{2}\n', 'start: "the" (" " word)+\nword: "fox" | /[0-9]{2}/\n'],
)
def test_grammars_are_read_in_both_notations(compiler: GrammarCompiler, grammar: str) -> None:
    def fits(text: str) -> bool:
        matcher = compiler.matcher(StructuredOutput(grammar=grammar))
        return [matcher.accept(i) for i in ids_of(compiler, text)] != [] and matcher.error is None and matcher.may_stop

    assert fits("the fox 12 fox") and not fits("the") and not fits("the 1 fox")


def test_taking_tokens_back_gives_the_masks_of_before(compiler: GrammarCompiler) -> None:
    @settings(max_examples=25)
    @given(seed=st.integers(0, 10**6), back=st.integers(0, 12))
    def check(seed: int, back: int) -> None:
        matcher, rng = compiler.matcher(StructuredOutput(json=OBJECT)), random.Random(seed)
        seen, steps = [allowed(matcher, compiler)], rng.randrange(1, 20)
        while len(seen) <= steps and not matcher.is_finished:
            matcher.accept(rng.choice(sorted(seen[-1])))
            seen.append(allowed(matcher, compiler))
        twin = matcher.copy()
        back = min(back, len(seen) - 1)
        matcher.rollback(back)
        assert allowed(matcher, compiler) == seen[-1 - back]
        assert allowed(twin, compiler) == seen[-1]  # a copy goes its own way

    check()


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_forced_tokens_are_those_that_the_masks_allow_one_by_one(compilers, kind: str) -> None:
    compiler = compilers[kind]
    for asked in ({"json": OBJECT}, {"regex": "hello the world ü你[ab]"}, {"choice": ("the quick brown fox",)}):
        jumping, plain = (compiler.matcher(StructuredOutput(**asked)) for _ in range(2))
        forced = jumping.forced_tokens()
        assert len(forced) > 2
        for token in forced:
            assert allowed(plain, compiler) == {token}
            plain.accept(token)
        assert allowed(jumping, compiler) == allowed(plain, compiler) and jumping.forced_tokens() == []


def test_forced_tokens_are_cut_as_the_tokenizer_cuts_the_text(compiler: GrammarCompiler) -> None:
    text = "hello world streaming tokens"
    assert compiler.matcher(StructuredOutput(choice=(text,))).forced_tokens() == ids_of(compiler, text)
    half = compiler.matcher(StructuredOutput(choice=(text,)))
    assert half.forced_tokens(2) + half.forced_tokens() == ids_of(compiler, text) and half.is_finished


def test_the_text_of_a_special_token_is_spelled_out(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(StructuredOutput(regex="a<s>b|c"))
    tokens = ids_of(compiler, "a")
    matcher.accept(tokens[0])
    tokens += matcher.forced_tokens()
    assert not set(tokens) & compiler.tokenizer.special_ids
    assert b"".join(map(compiler.tokenizer.token_bytes, tokens)).startswith(b"a<") and matcher.error is None


def test_drafts_are_checked_without_moving(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(StructuredOutput(regex="the (fox|dog)"))
    good, bad = ids_of(compiler, "the fox"), ids_of(compiler, "the cat")
    assert matcher.num_accepted(good) == len(good) and matcher.num_accepted([*good, 1, 5]) == len(good) + 1
    assert matcher.num_accepted(bad) < len(bad) and matcher.num_accepted([]) == 0
    assert allowed(matcher, compiler) == {good[0]} and matcher.error is None


def test_masks_behind_drafts_are_those_of_accepting_them(compiler: GrammarCompiler) -> None:
    asked = [("the (fox|dog)+", "the foxfox"), ("[a-z ]+", "hello"), ("the dog", "the cat"), ("[0-9]", "")]
    fills, expected, row = [], {}, 0
    for pattern, text in asked:
        matcher, drafts = compiler.matcher(StructuredOutput(regex=pattern)), ids_of(compiler, text)
        fills.append((matcher, row, drafts))
        stepping = matcher.copy()
        for i, token in enumerate([*drafts, None]):
            mask = masks(compiler, 1)
            stepping.fill_masks(mask)
            expected[row + i] = mask[0]
            if token is None or stepping.num_accepted([token]) == 0:
                break
            stepping.accept(token)
        row += len(drafts) + 2
    together, single = masks(compiler, row), masks(compiler, row)
    compiler.fill_masks(fills, together)
    for matcher, first, drafts in fills:
        matcher.fill_masks(single[first : first + len(drafts) + 1], drafts)
        assert matcher.error is None
    compiler.fill_masks(fills[:1], again := masks(compiler, row))
    for filled, rows in ((together, range(row)), (single, range(row)), (again, range(3))):
        for i in rows:
            assert (filled[i] == expected.get(i, -1)).all(), i


def test_a_token_that_is_not_allowed_is_an_error_of_that_matcher_alone(compiler: GrammarCompiler) -> None:
    asked = StructuredOutput(regex="the fox")
    wrong, right = compiler.matcher(asked), compiler.matcher(asked)
    assert wrong.accept(5) and wrong.is_finished
    assert isinstance(wrong.error, InvalidInputError) and "token" in wrong.error.message
    compiler.fill_masks([(wrong, 0, ()), (right, 1, ())], filled := masks(compiler, 2))
    assert right.error is None and not (filled[1] == -1).any() and filled[1].any()


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"regex": "("}, "regex='[(]' can't be enforced.*unclosed group"),
        ({"json": {"not": {}}}, "json=.*can't be enforced.*not"),
        ({"json": {"type": "objekt"}}, "Invalid type: objekt"),
        ({"json": {"$ref": "#/$defs/none"}}, "can't be enforced"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "root ::= ("}, "can't be enforced.*Expected"),
        ({"grammar": "root ::= missing"}, "'missing' not found"),
    ],
)
def test_what_cannot_be_enforced_is_said_with_its_value(compiler: GrammarCompiler, asked, complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=f"(?s){complaint}") as caught:
        compiler.matcher(StructuredOutput(**asked))
    assert caught.value.param == "structured"


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({}, "names no form"),
        ({"regex": "a", "choice": ["a"]}, "names regex and choice"),
        ({"json": "{"}, "no JSON Schema"),
        ({"json": 3}, "no JSON Schema"),
        ({"json": {"a": {1}}}, "no JSON Schema"),
        ({"choice": "yes"}, "not a list"),
        ({"choice": []}, "has no text"),
        ({"choice": ["a", 1]}, "has no text"),
        ({"regex": ""}, "has no text"),
        ({"json_object": False}, "asks for nothing"),
    ],
)
def test_forms_that_ask_for_nothing_or_too_much_are_refused(asked, complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=complaint):
        StructuredOutput(**asked)


@pytest.mark.parametrize("clash", [{"ignore_eos": True}, {"num_beams": 2}])
def test_options_that_structured_output_rules_out_are_refused_by_name(clash) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(clash))):
        SamplingParams(structured=StructuredOutput(regex="a"), **clash)
    with pytest.raises(InvalidInputError, match="no StructuredOutput"):
        SamplingParams(structured={"regex": "a"})  # type: ignore[arg-type]  # what a user might write


def test_a_grammar_is_compiled_once_and_the_oldest_is_dropped(compiler: GrammarCompiler, monkeypatch) -> None:
    compiled = []
    real = constrain._compile
    monkeypatch.setattr(constrain, "_compile", lambda asked, v: compiled.append(asked.regex) or real(asked, v))
    monkeypatch.setattr(constrain, "MAX_COMPILED", 2)
    compiler._compiled.clear()
    for pattern in ("a", "b", "a", "c", "a", "b"):
        compiler.matcher(StructuredOutput(regex=pattern))
    assert compiled == ["a", "b", "c", "b"]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="end-of-sequence"):
        GrammarCompiler(Tokenizer(KINDS["byte_level"]()), 500)


def test_every_schema_of_the_list_gives_valid_json(compiler: GrammarCompiler) -> None:
    rng = random.Random(3)
    for name, schema in SCHEMAS.items():
        matcher = compiler.matcher(StructuredOutput(json=schema))
        tokens = walk(compiler, matcher, rng, most=2000)
        assert matcher.is_finished, name
        value = json.loads(b"".join(map(compiler.tokenizer.token_bytes, tokens)))
        assert "required" not in schema or set(schema["required"]) <= set(value), name
    assert len(SCHEMAS) == 20


@pytest.mark.shared
def test_a_real_vocabulary_is_seen_byte_for_byte_and_gives_valid_json() -> None:
    folder = os.environ.get("LLMASOS_TEST_DATA")
    paths = sorted(Path(folder).rglob("*.gguf")) if folder else []
    names = ("smollm2", "llama-spm", "llama-bpe", "qwen2", "phi-3", "gemma")
    paths = [path for path in paths if any(name in path.name.lower() for name in names)]
    if not paths:
        pytest.skip("LLMASOS_TEST_DATA has no .gguf of a known vocabulary")
    for path in paths:
        tokenizer = load_tokenizer(path)
        compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size + 7)
        rng = random.Random(4)
        assert_same_bytes(compiler)
        for schema in SCHEMAS.values():
            matcher = compiler.matcher(StructuredOutput(json=schema))
            tokens: list[int] = []
            while not matcher.is_finished and len(tokens) < 2000:
                tokens += matcher.forced_tokens()
                if not matcher.is_finished:
                    tokens.append(rng.choice(sorted(allowed(matcher, compiler))))
                    matcher.accept(tokens[-1])
                assert matcher.error is None
            json.loads(b"".join(tokenizer.token_bytes(t) for t in tokens if t not in tokenizer.eos_token_ids))
