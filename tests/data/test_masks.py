"""What is trained is the assistant's turns with their end tokens, under any template; transformers says the same where
templates have marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmasos.data import Example, Masker, RowError, Sample
from llmasos.data.bpe import CHATML
from llmasos.errors import NoChatTemplateError, UnsupportedError
from llmasos.text import Tokenizer, load_tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": " Hello, 猫!\n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
SAID = [" Hello, 猫!\n<|end|>", "See you.<|end|>"]
END = "<|end|>"
LOOP = "{% for m in messages %}<|{{ m['role'] }}|>"
PLAIN = LOOP + "\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
MARKED = (
    LOOP + "\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}\n{% endfor %}"
)
MARKED_WITHOUT_END = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
NO_PROMPT = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|end|>{% else %}[{{ m['content'] }}]{% endif %}{% endfor %}"  # noqa: E501
TWICE = PLAIN + "{% if not add_generation_prompt %}<|end|>{% endif %}"
"""Ends the whole with one more end token, as some templates do."""


def said(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """Texts of the runs of trained tokens."""
    found: list[list[int]] = []
    was = False
    for token, is_trained in zip(sample.tokens.tolist(), sample.trained.tolist(), strict=True):
        if is_trained and not was:
            found.append([])
        if is_trained:
            found[-1].append(token)
        was = is_trained
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in found]


def chat(messages: list[Any], **more: Any) -> Example:
    return Example("chat", messages=messages, **more)


@pytest.mark.parametrize("template", [None, PLAIN, MARKED, MARKED_WITHOUT_END, NO_PROMPT, TWICE])
def test_exactly_the_turns_of_the_assistant_are_trained(tokenizer: Tokenizer, template: str | None) -> None:
    [sample] = Masker(tokenizer, template=template)(chat(CHAT))
    assert said(sample, tokenizer) == SAID


WORDS = st.text(st.sampled_from("ab 猫\n<|>é😀."), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.sampled_from([PLAIN, MARKED, NO_PROMPT, TWICE]))
def test_any_chat_trains_its_answers(tokenizer: Tokenizer, turns: list[tuple[str, str]], template: str) -> None:
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    [sample] = Masker(tokenizer, template=template)(chat(messages))
    whole = tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)
    assert whole == tokenizer.apply_chat_template(messages, template=template, add_generation_prompt=False)
    # bytes of one character may belong to two tokens, but never to the turn and to what is before it
    assert said(sample, tokenizer) == [answer + END for _, answer in turns]


@pytest.mark.parametrize("template", [MARKED, CHATML.replace("<|im_end|>", END).replace("<|im_start|>", "<|user|>")])
def test_marks_mean_what_they_mean_to_transformers(tokenizer: Tokenizer, tokenizer_folder: Path, template: str) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    theirs = reference.apply_chat_template(
        CHAT, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    [ours] = Masker(tokenizer, template=template)(chat(CHAT))
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert ours.trained.astype(int).tolist() == theirs["assistant_masks"]


def test_a_conversation_is_divided_where_a_template_rewrites_earlier_turns(tokenizer: Tokenizer) -> None:
    forgetful = (
        LOOP + "{% if m['role'] == 'assistant' %}{% if loop.last %}{{ m['content'] }}"
        "{% else %}{{ m['content'].split('/')[-1] }}{% endif %}{% else %}{{ m['content'] }}{% endif %}<|end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hm/b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "oh/d"},
    ]
    samples = Masker(tokenizer, template=forgetful)(chat(messages))
    assert [said(one, tokenizer) for one in samples] == [["hm/b<|end|>"], ["oh/d<|end|>"]]
    assert tokenizer.decode(samples[1].tokens, skip_special_tokens=False) == (
        "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>oh/d<|end|>"
    )


def test_a_chat_may_begin_with_the_assistant(tokenizer: Tokenizer) -> None:
    [sample] = Masker(tokenizer)(chat(CHAT[2:]))
    assert said(sample, tokenizer) == SAID


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP + "{{ m['content'] if m['role'] == 'user' }}<|end|>{% endfor %}", "does not write this turn"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "no end token"),
        ("{% for m in messages %}{{ m['content'] | upper }}<|end|>{% endfor %}", "not known what is the assistant's"),
        ("{% for m in messages %}{% if m['role'] == 'x' %}{% generation %}a{% endgeneration %}{% endif %}"
         "{{ m['content'] }}<|end|>{% endfor %}", "marks nothing"),
    ],
)  # fmt: skip
def test_a_template_that_hides_the_answer_is_refused(tokenizer: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        Masker(tokenizer, template=template)(chat(CHAT))


def test_tool_calls_that_a_template_leaves_out_are_told(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "find_tea", "arguments": {"x": 1}}}
    messages = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(RowError, match="leaves the assistant's tool calls out"):
        Masker(tokenizer)(chat(messages))
    writes = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['tool_calls'] | tojson if m['tool_calls'] }}")
    [sample] = Masker(tokenizer, template=writes)(chat(messages))
    assert "find_tea" in said(sample, tokenizer)[0]


def test_a_text_is_trained_whole_and_begins_and_ends_where_its_document_does(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_id
    [whole] = Masker(tokenizer)(Example("text", text="Tea is hot."))
    assert whole.trained.all() and whole.tokens.tolist() == [*tokenizer.encode("Tea is hot."), end]
    [part] = Masker(tokenizer)(Example("text", text="Tea is hot.", ends=False))
    assert part.tokens.tolist() == tokenizer.encode("Tea is hot.")
    assert Masker(tokenizer)(Example("text", text="")) == []


def test_a_tokenizer_that_puts_a_first_token_does_so_in_training(tokenizer_folder: Path) -> None:
    from tokenizers import processors

    tokenizer = load_tokenizer(tokenizer_folder)
    bos = tokenizer.bos_token_id
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    masker = Masker(tokenizer)
    assert masker(Example("text", text="Tea."))[0].tokens[0] == bos
    assert masker(Example("text", text="Tea.", begins=False))[0].tokens[0] != bos
    tokenizer.chat_templates = {}
    [sample] = Masker(tokenizer)(chat(CHAT[1:3], is_plain=True))
    assert sample.tokens[0] == bos and said(sample, tokenizer) == [" Hello, 猫!\n<|end|>"]


def test_without_a_template_only_prompts_and_completions_are_understood(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_templates = {}
    with pytest.raises(NoChatTemplateError):
        Masker(tokenizer)(chat(CHAT))
    [sample] = Masker(tokenizer)(chat(CHAT[1:3], is_plain=True))
    assert tokenizer.decode(sample.tokens, skip_special_tokens=False) == "Hi there Hello, 猫!\n<|end|>"
    assert said(sample, tokenizer) == [" Hello, 猫!\n<|end|>"]


def test_preferences_are_not_trained_as_if_they_were_chats(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnsupportedError, match="preference data"):
        Masker(tokenizer)(Example("preference", messages=CHAT, rejected=CHAT))
