"""Pipelines: references, order, branches, maps, tries, cache, and what is kept of a run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_task_model import FakeModel
from hypothesis import given
from hypothesis import strategies as st

from llmasos.errors import FormatError, InvalidInputError, NetworkError, NotFoundError
from llmasos.tasks import pipeline as room
from llmasos.tasks.history import StepRecord, open_history
from llmasos.tasks.model import Reply
from llmasos.tasks.pipeline import Pipeline, resolved

YAML = """
steps:
  - id: moods
    task: sentiment
    map: ${inputs.reviews}
    inputs: {text: "${item.text}"}
  - id: summary
    task: summarise
    when: ${inputs.wanted}
    inputs: {text: "Reviews: ${inputs.reviews.text} Moods: ${moods.label}", words: 20}
  - id: short
    task: keywords
    when: {value: "${moods[0].label}", is: negative}
    inputs: {text: "${summary.text}"}
output: {moods: "${moods.label}", summary: "${summary.text}", short: "${short.keywords}"}
"""


def moody(**options: Any) -> FakeModel:
    def likely(wish: str, text: str) -> float:
        return 1.0 if ("negative" in wish) == ("bad" in text) and "neutral" not in wish else 0.0

    return FakeModel(lambda question, schema: None, likely=likely, **options)


class Meeting(FakeModel):
    """Answers three questions when they are there."""

    barrier: asyncio.Barrier | None = None

    async def ask(self, messages: Any, schema: Any, *, max_tokens: int) -> Any:
        self.barrier = self.barrier or asyncio.Barrier(3)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await self.barrier.wait()
        self.num_running -= 1
        self.asked.append(messages[-1]["content"])
        return Reply("hello")


def one(**step: Any) -> Pipeline:
    return Pipeline.of({"steps": [{"id": "a", "task": "chat", "inputs": {"message": "${inputs.q}"}, **step}]})


def test_a_pipeline_from_yaml_maps_branches_and_joins(tmp_path: Path) -> None:
    file = tmp_path / "reviews.yaml"
    file.write_text(YAML, encoding="utf-8")
    pipeline = Pipeline.load(file)
    assert pipeline.name == "reviews" and pipeline.input_names == ["reviews", "wanted"]
    model, steps = moody(), list[StepRecord]()
    reviews = [{"text": "good"}, {"text": "bad"}]
    found = pipeline.run({"reviews": reviews, "wanted": True}, model=model, on_step=steps.append)
    assert found == {"moods": ["positive", "negative"], "summary": "A word.", "short": None}
    assert model.asked[0].endswith("Reviews: good\nbad Moods: positive\nnegative")
    assert [(step.id, step.state) for step in steps] == [("moods", "done"), ("summary", "done"), ("short", "skipped")]


def test_a_step_that_is_skipped_gives_null_to_those_after_it() -> None:
    steps = [
        {"id": "a", "task": "chat", "when": "${inputs.no}", "inputs": {"message": "x"}},
        {"id": "b", "task": "chat", "when": "${a.text}", "inputs": {"message": "${a.text}"}},
    ]
    model = FakeModel()
    assert Pipeline.of({"steps": steps}).run({"no": False}, model=model) is None and not model.asked


def test_steps_run_at_once_where_nothing_is_waited_for_and_no_more_than_asked() -> None:
    steps = [{"id": f"s{i}", "task": "chat", "inputs": {"message": f"at once {i}"}} for i in range(6)]
    model = Meeting()
    Pipeline.of({"steps": steps, "parallel": 3}).run(model=model)
    assert model.most_running == 3 and len(model.asked) == 6
    steps = [{**step, "inputs": {"message": f"${{s{i - 1}.text}}{i}" if i else "0"}} for i, step in enumerate(steps)]
    model = FakeModel()
    Pipeline.of({"steps": list(reversed(steps))}).run(model=model)
    assert model.most_running == 1 and model.asked[0] == "0" and model.asked[-1] == "hello5"


def test_an_equal_question_is_not_asked_again() -> None:
    model, steps = FakeModel(), list[StepRecord]()
    for q in ("x", "x", "y"):
        assert one().run({"q": q}, model=model, on_step=steps.append)["text"] == "hello"
    assert model.asked == ["x", "y"] and [step.num_cached for step in steps] == [0, 1, 0]
    one(cache=False).run({"q": "x"}, model=model)
    one().run({"q": "x"}, model=FakeModel(name="another"))
    assert model.asked == ["x", "y", "x"]


def test_a_damaged_cache_entry_is_made_anew(tmp_path: Path) -> None:
    one().run({"q": "x"}, model=FakeModel(), cache=tmp_path / "cache")
    [file] = (tmp_path / "cache").iterdir()
    file.write_bytes(b'{"te')
    assert one().run({"q": "x"}, model=FakeModel(), cache=tmp_path / "cache")["text"] == "hello"


def test_network_errors_are_tried_again_and_wrong_inputs_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "RETRY_SECONDS", 0.0)
    failures: list[Exception] = [NetworkError("gone"), NetworkError("gone")]
    model, steps = FakeModel(lambda *_: failures.pop() if failures else "fine"), list[StepRecord]()
    assert one(retry=2).run({"q": "x"}, model=model, on_step=steps.append)["text"] == "fine"
    assert steps[0].attempts == 3
    failures[:] = [NetworkError("gone"), NetworkError("gone")]
    with pytest.raises(NetworkError, match="Step a: gone"):
        one(retry=1).run({"q": "y"}, model=model)
    with pytest.raises(InvalidInputError, match=r"Step a: .*message"):
        one(retry=9).run({"q": 3}, model=model)


def test_the_first_error_ends_the_other_steps_and_is_kept() -> None:
    async def fails(model: FakeModel) -> None:
        steps = [
            {"id": "slow", "task": "chat", "inputs": {"message": "slow"}},
            {"id": "bad", "task": "chat", "map": "${inputs.all}", "inputs": {"message": "${item}"}},
            {"id": "after", "task": "chat", "inputs": {"message": "${bad.text}"}},
        ]
        with pytest.raises(NetworkError, match="Step bad: gone"):
            await Pipeline.of({"name": "failing", "steps": steps}).arun({"all": ["boom"]}, model=model)

    class Slow(FakeModel):
        async def ask(self, messages: Any, schema: Any, *, max_tokens: int) -> Any:
            if messages[-1]["content"] == "slow":
                await asyncio.Event().wait()
            return await super().ask(messages, schema, max_tokens=max_tokens)

    asyncio.run(fails(Slow(lambda *_: NetworkError("gone"))))
    with open_history() as history:
        [run] = history.list()
    assert (run.state, run.pipeline, run.model) == ("failed", "failing", "fake")
    assert run.error == "Step bad: gone" and {step.id: step.state for step in run.steps}["bad"] == "failed"


def test_a_run_is_kept_with_its_steps_and_output() -> None:
    one().run({"q": "x"}, model=FakeModel())
    one().run({"q": "x"}, model=FakeModel(), record=False)
    with open_history() as history:
        [run] = history.list()
        assert history.get(run.id) == run
        with pytest.raises(NotFoundError, match="llmasos task runs"):
            history.get("run_none")
    assert run.state == "done" and run.inputs == {"q": "x"} and run.output == {"text": "hello", "is_whole": True}
    assert [(step.id, step.task, step.num_calls, step.attempts) for step in run.steps] == [("a", "chat", 1, 1)]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"steps": []}, "at steps"),
        ({"steps": [{"id": "a", "task": "chat", "wen": 1}]}, "steps.0.wen"),
        ({"steps": [{"id": "item", "task": "chat"}]}, "'item' is reserved"),
        ({"steps": [{"id": "a", "task": "chat"}] * 2}, "'a' is there twice"),
        ({"steps": [{"id": "a", "task": "chat", "inputs": {"mesage": "x"}}]}, "no input 'mesage'"),
        ({"steps": [{"id": "a", "task": "chat", "inputs": {"message": "${b}"}}]}, "refers to 'b'"),
        ({"steps": [{"id": "a", "task": "chat", "inputs": {"message": "${item}"}}]}, "no step of a map"),
        ({"steps": [{"id": "a", "task": "chat", "inputs": {"message": "${a b}"}}]}, "is no reference"),
        ({"steps": [{"id": "a", "task": "chat"}], "output": "${c.text}"}, "output refers to 'c'"),
        (
            {"steps": [{"id": i, "task": "chat", "inputs": {"message": f"${{{j}}}"}} for i, j in ("ab", "ba")]},
            "wait for each other",
        ),
    ],
)
def test_wrong_pipelines_say_what_is_wrong(document: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Pipeline.of(document)


def test_wrong_files_and_values_say_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Pipeline.load(tmp_path / "none.yaml")
    for text in ("a: [", "- 1", "\x00"):
        (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(FormatError, match=r"bad\.yaml"):
            Pipeline.load(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("steps:\n- {id: a, task: chat}\n- id: b\n  task: chat\n  id: c\n")
    with pytest.raises(FormatError, match=r"gives steps\[1\]\.id twice: in line 3 and in line 5"):
        Pipeline.load(tmp_path / "bad.yaml")
    with pytest.raises(FormatError, match="cannot be read: Is a directory"):
        Pipeline.load(tmp_path)
    with pytest.raises(NotFoundError, match="no task 'dance'"):
        Pipeline.of({"steps": [{"id": "a", "task": "dance"}]})
    with pytest.raises(InvalidInputError, match="map needs a list, not str"):
        one(map="${inputs.q}").run({"q": "x"}, model=FakeModel())
    with pytest.raises(InvalidInputError, match="leads nowhere: there is no 'q'"):
        one().run({}, model=FakeModel())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5).filter(lambda text: "$" not in text),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_a_reference_alone_is_the_value_itself(value: Any) -> None:
    assert resolved({"x": ["${inputs.v}", value]}, {"inputs": {"v": value}}) == {"x": [value, value]}


def test_references_reach_into_lists() -> None:
    values = {"inputs": {"rows": [{"n": [1, 2]}, {"n": [3, 4]}]}}
    assert resolved("${inputs.rows.n}", values) == [[1, 2], [3, 4]]
    assert resolved("${inputs.rows[1].n[0]} of ${inputs.rows[0]}", values) == '3 of {"n":[1,2]}'
