"""Every task on a random model: nonsense, but always of the right form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from llmasos import tasks
from llmasos.tasks.model import LocalModel
from tiny import CORPUS, write_tiny_model

TEXT = " ".join(CORPUS[:2])
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "kind": {"enum": ["fox", "dog"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("summarise", {"text": TEXT, "words": 10}),
    ("summarise", {"text": TEXT * 30, "words": 10}),
    ("summarise", {"text": TEXT, "words": 20, "style": "bullets"}),
    ("translate", {"text": "What?\n\nIt is Paris.", "to": "French"}),
    ("rewrite", {"text": "What?", "tone": "formal"}),
    ("write_code", {"instruction": "Add.", "max_tokens": 40}),
    ("chat", {"message": "What is it?", "max_tokens": 10}),
    ("classify", {"text": TEXT, "labels": ["fox", "models"]}),
    ("classify", {"text": TEXT, "labels": ["fox", "models"], "multi": True}),
    ("sentiment", {"text": TEXT}),
    ("answer", {"question": "Who jumps?", "words": 10}),
    ("answer", {"question": "Who jumps?", "context": [*CORPUS, TEXT * 9], "words": 10}),
    ("extract", {"text": TEXT, "into": SCHEMA}),
    ("keywords", {"text": TEXT, "num": 3}),
    ("ner", {"text": TEXT}),
    ("embed", {"texts": CORPUS}),
    ("rerank", {"query": "fox", "texts": CORPUS}),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from llmasos.inference.llm import LLM
    from llmasos.models.load import load_model

    folder: Path = write_tiny_model(tmp_path_factory.mktemp("tasks") / "tiny", max_position_embeddings=1024)
    with LLM(load_model(folder, device="cpu", dtype="float32"), name="tiny") as model:
        yield model


@pytest.mark.parametrize(("name", "inputs"), CALLS, ids=[name for name, _ in CALLS])
def test_the_output_has_the_form_that_the_task_says(llm: Any, name: str, inputs: dict[str, Any]) -> None:
    found = tasks.TASKS[name](model=llm, **inputs)
    jsonschema.validate(found.model_dump(mode="json"), tasks.TASKS[name].describe()["output"])
    if name == "extract":
        jsonschema.validate(found.data, SCHEMA)
    if name == "ner":
        assert all(inputs["text"][one.start : one.end] == one.text for one in found.entities)
    if name == "keywords":
        assert found.keywords and all(word.casefold() in TEXT.casefold() for word in found.keywords)
    if name == "classify" and not inputs.get("multi"):
        assert found.label in inputs["labels"] and sum(found.scores.values()) == pytest.approx(1)
    if name == "answer" and inputs.get("context"):
        assert found.citations and set(found.citations) <= {1, 2, 3, 4}


def test_every_task_of_the_list_was_called() -> None:
    assert {name for name, _ in CALLS} == set(tasks.BUILT_IN)


async def test_a_likelihood_is_that_of_the_models_score(llm: Any) -> None:
    messages = [{"role": "user", "content": "What jumps?"}]
    found = await LocalModel(llm).likelihood(messages, "The fox")
    assert found == pytest.approx(llm.score("The fox", prompt=llm.chat_prompt(messages)).logprob, abs=1e-4)


def test_a_named_model_is_loaded_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmasos.model_zoo

    folder = write_tiny_model(home / "tiny")
    loads: list[str] = []
    real = llmasos.model_zoo.get_model
    monkeypatch.setattr(llmasos.model_zoo, "get_model", lambda name: loads.append(name) or real(name))
    for _ in range(2):
        assert tasks.chat("hi", max_tokens=2, model=str(folder)).text is not None
    assert loads == [str(folder)]
