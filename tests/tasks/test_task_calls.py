"""Every task on a model that does as it is told."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fake_task_model import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from llmasos import tasks
from llmasos.errors import ContextOverflowError, InvalidInputError, NotFoundError, ProviderError, UnsupportedError
from llmasos.inference.remote import RemoteLLM
from llmasos.tasks.base import Progress, json_schema
from llmasos.tasks.model import ApiModel

TEXT = "The harbour road closes in spring. Anna Keller, the mayor of Lyon, is glad. Lyon pays two million euros."


# tasks as such


def test_all_tasks_are_on_the_list_and_describe_themselves() -> None:
    named = "summarise translate rewrite write_code chat classify sentiment answer extract keywords ner embed rerank"
    assert set(tasks.BUILT_IN) == set(named.split())
    for one in tasks.BUILT_IN.values():
        told = one.describe()
        assert told["summary"] and one.__doc__ and told["input"]["properties"] and told["output"]["properties"]


def test_an_unknown_task_is_not_found_with_those_there_are() -> None:
    with pytest.raises(NotFoundError, match="summarise, translate"):
        tasks.find_task("sumarise")


@pytest.mark.parametrize(
    ("args", "inputs", "message"),
    [
        ((), {}, "text: Field required"),
        (("  ",), {}, "text: String should match"),
        (("a",), {"wods": 3}, "wods: Extra inputs"),
        (("a",), {"words": 1}, "words: Input should be greater"),
        (("a",), {"text": "b"}, "text was given twice"),
        (("a", 9, "plain", "French", 1), {}, "has 4 inputs; 5 were given"),
    ],
)
def test_wrong_inputs_are_named(args: tuple[Any, ...], inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tasks.summarise(*args, model=FakeModel(), **inputs)


async def test_a_task_runs_in_a_loop_and_inside_of_a_running_one() -> None:
    assert (await tasks.chat.arun("hi", model=FakeModel())).text == "hello"
    assert tasks.chat("hi", model=FakeModel()).text == "hello"
    with pytest.raises(InvalidInputError):
        tasks.chat("", model=FakeModel())


def test_a_task_that_is_cancelled_stops_its_questions() -> None:
    model = FakeModel(delay=60)

    async def cancelled() -> None:
        work = asyncio.ensure_future(tasks.translate.arun("One.\n\nTwo.", to="French", model=model))
        while model.num_running < 2:
            await asyncio.sleep(0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert model.num_running == 0

    asyncio.run(cancelled())


def test_an_answer_of_another_form_is_an_error_that_shows_it() -> None:
    with pytest.raises(ProviderError, match="another form"):
        tasks.rewrite("a", model=FakeModel(lambda *_: {"words": 1}))


# summarise


@settings(max_examples=40)
@given(
    st.text(alphabet=st.sampled_from("ab. \n。é"), min_size=1, max_size=5000).filter(str.strip), st.integers(120, 400)
)
def test_a_summary_never_overflows_the_context(text: str, context: int) -> None:
    model = FakeModel(lambda question, _: {"text": question[-300:] + "."}, context_length=context)
    try:
        found = tasks.summarise(text, words=10, model=model)
    except InvalidInputError as e:
        assert "ran out of tokens" in e.message or isinstance(e, ContextOverflowError)
    else:
        assert found.text


def test_a_long_text_is_summarised_in_parts_and_the_parts_again() -> None:
    told: list[Progress] = []
    model = FakeModel(lambda *_: {"text": "A short part."}, context_length=200)
    found = tasks.summarise("A long sentence follows. " * 200, words=20, model=model, on_progress=told.append)
    assert found.text == "A short part." and found.num_parts > 5
    assert len(model.asked) > found.num_parts and model.asked[-1].endswith("A short part.")
    assert told[-1].done == told[-1].total == len(model.asked) and model.most_running > 1
    assert told[0].done == 0 and told[0].total == sum("A long" in one for one in model.asked), "told before the first"
    assert max(one.at_once for one in told) == model.most_running


def test_parts_of_a_sentiment_are_told_before_the_first_and_taken_back_where_the_model_tells_no_likelihood() -> None:
    told: list[Progress] = []
    text = "A kind sentence follows. " * 900
    tasks.sentiment(text, model=FakeModel(likely=lambda *_: -1.0), on_progress=told.append)
    assert told[0].total == told[-1].total == told[-1].done > 6
    told.clear()
    model = FakeModel()
    tasks.sentiment(text, model=model, on_progress=told.append)
    assert told[-1].done == told[-1].total == len(model.asked) + 1


def test_a_model_that_makes_no_summary_shorter_ends_in_an_error() -> None:
    model = FakeModel(lambda *_: {"text": "x" * 9999}, context_length=200, obeys=False)
    with pytest.raises(ContextOverflowError):
        tasks.summarise("A long sentence follows. " * 60, words=100, model=model)


def test_a_summary_has_at_most_as_many_words_and_no_half_sentence() -> None:
    model = FakeModel(lambda *_: {"text": "One two three four. Five six seven. Eight ni"})
    assert tasks.summarise(TEXT, words=7, model=model).text == "One two three four. Five six seven."


def test_a_summary_in_points_is_lines_with_dashes() -> None:
    model = FakeModel(lambda *_: {"points": ["- One  two.", "Three.", "Three.", "Four five six seven."]})
    assert tasks.summarise(TEXT, words=5, style="bullets", model=model).text == "- One two.\n- Three."


# the others


def test_a_translation_keeps_the_paragraphs() -> None:
    model = FakeModel(lambda question, _: {"text": question.rsplit("\n\n", 1)[1].upper()})
    found = tasks.translate("  One.\n\n\nTwo two.\n", to="French", model=model)
    assert found.text == "  ONE.\n\n\nTWO TWO.\n" and len(model.asked) == 2
    long = tasks.translate("One sentence more. " * 300, to="French", model=model)
    assert long.text == "ONE SENTENCE MORE. " * 300 and long.is_whole


def test_translations_that_are_shown_come_before_the_text() -> None:
    model = FakeModel(lambda question, _: {"text": question.rsplit("\n\n", 1)[1].upper()})
    shown = [{"text": "Thank you.", "translation": "Merci."}]
    assert tasks.translate("One.", to="French", examples=shown, model=model).text == "ONE."
    first, answer, last = model.messages[0]
    assert first["content"].endswith("Thank you.") and answer["content"] == '{"text":"Merci."}'
    assert last["content"].endswith("One.")


def test_a_translation_that_the_limit_ends_says_so() -> None:
    found = tasks.translate("One.", to="French", model=FakeModel(lambda *_: {"text": "x" * 999}))
    assert not found.is_whole and 0 < len(found.text) < 999


def test_a_rewriting_says_what_to_do() -> None:
    model = FakeModel()
    tasks.rewrite("a b", instruction="make it short.", tone="formal", model=model)
    tasks.rewrite("a b", model=model)
    assert "make it short; use a formal tone." in model.asked[0] and "correct spelling" in model.asked[1]


def test_an_answer_cites_the_passages_it_is_from() -> None:
    model = FakeModel(lambda *_: {"answer": "Anna Keller. And", "citations": [3, 3, 2]})
    found = tasks.answer(
        "Who?", context=["Bananas are yellow.", TEXT, "Anna Keller is tall.", "It rains."], model=model
    )
    assert found.text == "Anna Keller." and found.citations == [2, 3] and str(found) == "Anna Keller. [2] [3]"
    assert "[1] Bananas" in model.asked[0] and "[2] The harbour" in model.asked[0]


@pytest.mark.parametrize(
    ("said", "cited", "kept"),
    [
        ("Anna Keller", [1], [2]),  # the first has no word of it
        ("Anna Keller", [1, 2], [2]),
        ("Yellow", [1], [1]),
        ("Nobody knows", [1], [1]),  # other words than any passage has
        ("安娜", [1], [3]),
    ],
)
def test_a_citation_of_a_passage_that_says_nothing_of_the_answer_is_mended(
    said: str, cited: list[int], kept: list[int]
) -> None:
    context = ["Bananas are yellow.", "The mayor is Anna Keller.", "市长是安娜。"]
    model = FakeModel(lambda *_: {"answer": said, "citations": cited})
    assert tasks.answer("Who?", context=context, model=model).citations == kept


def test_an_answer_that_is_cut_before_its_citations_is_asked_for_them() -> None:
    def answers(_: str, schema: Any) -> Any:
        return {"answer": "z" * 999} if "answer" in schema["properties"] else {"citations": [2]}

    found = tasks.answer("Who?", context=["Bananas are yellow.", TEXT], words=5, model=FakeModel(answers))
    assert found.citations == [2] and set(found.text) == {"z"}


def test_more_passages_than_the_context_holds_are_read_in_groups() -> None:
    passages = [f"Passage number {i} says something. " * 4 for i in range(1, 21)]

    def answers(question: str, schema: Any) -> Any:
        numbers = schema["properties"]["citations"]["items"]["enum"]
        cited = 17 if 17 in numbers else numbers[0]
        return {"answer": f"It is {cited}.", "citations": [cited]}

    model = FakeModel(answers, context_length=300)
    found = tasks.answer("Which?", context=passages, words=20, model=model)
    assert found.citations == [17] and len(model.asked) > 3


def test_an_answer_without_passages_cites_nothing() -> None:
    assert tasks.answer("Who?", model=FakeModel(lambda *_: {"answer": "Nobody."})).citations == []


def test_a_class_is_what_makes_the_text_likeliest() -> None:
    model = FakeModel(likely=lambda wish, text: 0.0 if "sports" in wish else -3.0)
    found = tasks.classify("A goal!", labels=["politics", "sports"], model=model)
    assert found.label == "sports" and found.scores == pytest.approx({"politics": 0.0474, "sports": 0.9526}, abs=1e-3)
    assert model.asked == []
    several = tasks.classify("A goal!", labels=["politics", "sports"], multi=True, model=model)
    assert several.labels == ["sports"]


def test_where_the_model_tells_no_likelihoods_only_labels_can_be_answered() -> None:
    def answers(question: str, schema: Any) -> Any:
        assert schema["properties"]["label"]["enum"] == ["politics", "sports"]
        return {"label": "sports"}

    found = tasks.classify("A goal!", labels=["politics", "sports", "politics"], model=FakeModel(answers))
    assert found.labels == ["sports"] and found.scores is None
    model = FakeModel(lambda _, schema: dict.fromkeys(schema["properties"], True))
    examples = [{"text": "x", "label": ["a", "b"]}, {"text": "y", "label": "c"}]
    assert tasks.classify("A goal!", examples=examples, multi=True, model=model).labels == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({"labels": ["a"]}, "two labels"), ({"labels": ["a", "b"], "examples": [{"text": "x", "label": "c"}]}, "'c' of")],
)
def test_labels_that_make_no_sense_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tasks.classify("x", model=FakeModel(), **inputs)


@pytest.mark.parametrize(
    "task",
    [
        lambda text: tasks.classify(text, labels=["a", "b"], model=FakeModel()),
        lambda text: tasks.sentiment(text, model=FakeModel()),
    ],
)
def test_a_text_of_separators_is_empty(task: Any) -> None:
    with pytest.raises(InvalidInputError, match="The text is empty"):
        task("\n\x1f\xa0")


def test_a_classification_head_answers_by_itself() -> None:
    model = FakeModel(labels=("NEGATIVE", "POSITIVE!"))
    assert tasks.classify("x", model=model).labels == ["POSITIVE!"]
    with pytest.raises(UnsupportedError, match="'sports' is none of them"):
        tasks.classify("x", labels=["sports"], model=model)
    with pytest.raises(UnsupportedError, match="no moods"):
        tasks.sentiment("x", model=model)
    assert tasks.sentiment("x", model=FakeModel(labels=("Negative", "Neutral"))).label == "negative"


def test_sentiment_is_one_of_three() -> None:
    model = FakeModel(likely=lambda wish, text: 1.0 if "negative" in wish else 0.0)
    assert tasks.sentiment("Bad.", model=model).label == "negative"


class Person(BaseModel):
    name: str
    age: int


def test_facts_are_extracted_to_fields_a_schema_or_a_class() -> None:
    assert tasks.extract(TEXT, into=["name", "city"], model=FakeModel()).data == {"name": "A word.", "city": "A word."}
    assert tasks.extract(TEXT, Person, model=FakeModel()).data == {"name": "A word.", "age": 7}
    assert tasks.extract(TEXT, Person.model_json_schema(), model=FakeModel()).data["age"] == 7


def test_facts_that_are_cut_short_are_an_error_and_no_half_facts() -> None:
    with pytest.raises(InvalidInputError, match="not whole after 16 tokens"):
        tasks.extract(TEXT, into=["name", "city", "street", "age"], max_tokens=16, model=FakeModel())
    for wrong in ([], {}, ["a", "a"], [""]):
        with pytest.raises(InvalidInputError, match="no field"):
            tasks.extract(TEXT, into=wrong, model=FakeModel())


def test_keywords_stand_in_the_text_and_come_once() -> None:
    model = FakeModel(lambda *_: {"keywords": ["Lyon", "bees", "lyon", "mayor"]})
    assert tasks.keywords(TEXT, num=3, model=model).keywords == ["Lyon", "mayor"]


def test_entities_are_those_of_the_text_with_their_places() -> None:
    named = [{"text": "Lyon", "type": "place"}, {"text": "Anna Keller", "type": "person"}]
    named += [{"text": "Bob", "type": "person"}, {"text": "Ann", "type": "person"}]
    found = tasks.ner(TEXT, model=FakeModel(lambda *_: {"entities": named})).entities
    assert [(one.text, one.type) for one in found] == [("Anna Keller", "person"), ("Lyon", "place"), ("Lyon", "place")]
    assert all(TEXT[one.start : one.end] == one.text for one in found)


def test_a_list_that_is_cut_short_loses_its_last_entry_only() -> None:
    named = [{"text": "Lyon", "type": "place"}] * 12
    found = tasks.ner(TEXT, types=["place"], model=FakeModel(lambda *_: {"entities": named}, context_length=150))
    assert {one.text for one in found.entities} == {"Lyon"}


@pytest.mark.parametrize("written", ["x = 1\n", "```python\nx = 1\n```", "\nx = 1  \n\n"])
def test_code_comes_without_fences(written: str) -> None:
    found = tasks.write_code("set x", model=FakeModel(lambda *_: {"code": written}))
    assert found.code == "x = 1\n" and found.is_whole and str(found) == found.code


def test_code_that_is_cut_short_says_so() -> None:
    found = tasks.write_code("set x", max_tokens=16, model=FakeModel(lambda *_: {"code": "x = 1 + 2 + 3 + 4" * 9}))
    assert not found.is_whole and found.code.startswith("x = ")


def test_a_conversation_is_answered_with_its_system_message() -> None:
    model = FakeModel(lambda *_: "Fine. ")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert tasks.chat(said, system="Be kind.", model=model).text == "Fine." and model.asked == ["c"]


def test_texts_are_embedded_and_ranked() -> None:
    assert tasks.embed("a cat", model=FakeModel()).vectors == [[1.0, 0.0]]
    found = tasks.rerank("cats", ["a dog", "a cat", "cat"], top_n=2, model=FakeModel())
    assert [one.index for one in found.results] == [1, 2] and found.method == "cosine"


# models behind an API


def remote(answer: dict[str, Any], seen: list[Any], name: str) -> RemoteLLM:
    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(200, json=answer)

    return RemoteLLM(name, api_key="k", async_transport=httpx.MockTransport(handle))


def test_an_openai_api_is_asked_for_a_schema() -> None:
    message = {"role": "assistant", "content": '{"text": "Kurz."}'}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
    seen: list[Any] = []
    model = remote(answer, seen, "http://127.0.0.1:9/v1#m")
    assert tasks.summarise(TEXT, model=model).text == "Kurz."
    assert seen[0]["response_format"]["json_schema"]["schema"]["properties"] == {
        "text": {"minLength": 1, "type": "string"}
    }
    with pytest.raises(ProviderError, match="another form"):
        tasks.classify("x", labels=["a", "b"], model=model)


def test_an_anthropic_api_is_asked_for_the_call_of_a_function() -> None:
    content = [{"type": "tool_use", "id": "t", "name": "answer", "input": {"text": "Kurz."}}]
    usage = {"input_tokens": 1, "output_tokens": 1}
    answer = {"id": "x", "type": "message", "role": "assistant", "model": "m", "content": content}
    seen: list[Any] = []
    model = remote(answer | {"stop_reason": "tool_use", "usage": usage}, seen, "anthropic+http://127.0.0.1:9/v1#m")
    assert tasks.summarise(TEXT, model=model).text == "Kurz."
    assert seen[0]["tool_choice"]["name"] == "answer"


def test_tokens_behind_an_api_are_estimated_from_above() -> None:
    with RemoteLLM("http://127.0.0.1:9/v1#m", api_key="k", max_retries=0) as remote:
        model = ApiModel(remote)
        assert model.count_text("four letters") == 6 and model.count([{"role": "user", "content": "ab"}]) == 17


def test_tokens_are_counted_by_a_server_that_does_it() -> None:
    asked: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/tokenize":
            return httpx.Response(404, json={"error": {"message": "no", "type": "x"}})
        body = json.loads(request.content)
        asked.append(body)
        if body.get("prompt", "").startswith("strange"):
            return httpx.Response(400, json={"error": {"message": "no", "type": "x"}})
        num = len((body.get("prompt") or body["messages"][0]["content"]).split())
        return httpx.Response(200, json={"count": num, "max_model_len": 100, "tokens": [0] * num})

    with RemoteLLM("http://127.0.0.1:9/v1#m", api_key="k", transport=httpx.MockTransport(handle)) as remote:
        model = ApiModel(remote)
        text = "a long text of some words " * 4
        assert [model.count_text(text), model.count_text(text), model.count_text("short")] == [24, 24, 3]
        assert len(asked) == 1 and asked[0]["add_special_tokens"] is False
        assert model.count([{"role": "user", "content": text}]) == 24
        assert model.count_text("strange " * 8) == 32 and model.count_text(text + "x") == 53, "estimated from then on"
        assert len(asked) == 3


def test_titles_are_left_out_of_schemas_but_not_a_property_of_that_name() -> None:
    class Book(BaseModel):
        title: str

    assert json_schema(Book) == {
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
        "type": "object",
        "additionalProperties": False,
    }


# programs are run by whoever asks for them


class Ran:
    """How a program ended that nobody ran: it is fine where it has `good`."""

    def __init__(self, code: str) -> None:
        self.ok, self.stdout, self.reason = "good" in code, "out" * 1000, "exited"
        self.stderr = "" if self.ok else "NameError: bad"


def test_a_program_that_fails_is_mended_once() -> None:
    written = iter(["bad", "good"])
    model, seen = FakeModel(lambda *_: {"code": next(written)}), []
    found = tasks.write_code("x", tests="assert x", model=model, run_code=lambda code: seen.append(code) or Ran(code))
    assert found.code == "good\n" and found.check is not None
    assert (found.check.ok, found.check.tries, found.check.stderr, len(found.check.stdout)) == (True, 2, "", 1500)
    assert seen == ["bad\n\n\nassert x\n", "good\n\n\nassert x\n"]
    assert "NameError: bad" in str(model.asked[1]) and len(model.asked) == 2


def test_a_program_that_fails_twice_says_so_and_one_that_works_is_asked_for_once() -> None:
    model = FakeModel(lambda *_: {"code": "bad"})
    check = tasks.write_code("x", check=True, model=model, run_code=Ran).check
    assert check is not None and (check.ok, check.tries, check.stderr) == (False, 2, "NameError: bad")
    model = FakeModel(lambda *_: {"code": "good"})
    assert tasks.write_code("x", check=True, model=model, run_code=Ran).check.tries == 1 and len(model.asked) == 1
    assert tasks.write_code("x", model=model, run_code=Ran).check is None


def test_what_cannot_be_run_is_said_before_a_model_is_asked() -> None:
    model = FakeModel(lambda *_: {"code": "bad"})
    with pytest.raises(UnsupportedError, match="Nothing here runs programs"):
        tasks.write_code("x", check=True, model=model)
    with pytest.raises(UnsupportedError, match="Only Python is run, not go"):
        tasks.write_code("x", check=True, language="go", model=model, run_code=Ran)
    assert not model.asked
