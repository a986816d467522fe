"""The ten examples and the bundled index that they are in. Their own tests run here with a tiny random model, and with
SmolLM2 and MiniLM where LLMASOS_TEST_HOME names a home that has them."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from doc_examples import write_tiny_bert
from llmasos.apps.loading import load_application
from llmasos.errors import InvalidInputError
from llmasos.inference.llm import LLM
from llmasos.models.load import load_model
from llmasos.store.packages import Apps, NotAcceptedError, choose, grants, indexes, open_package, pack, search
from llmasos.store.packages.bundled import FOLDER
from llmasos.tasks.texts import num_words
from tiny import write_tiny_model

MODELS = ["models default"]
RIGHTS = {
    "classifier": ["fs.read $inputs", *MODELS],
    "code-helper": ["exec", *MODELS],
    "document-chat": ["fs.read $inputs", "fs.write $data", *MODELS, "models encoder"],
    "json-extractor": MODELS,
    "meeting-notes": MODELS,
    "question-answering": MODELS,
    "story-writer": MODELS,
    "summariser": ["fs.read $inputs", *MODELS],
    "tool-agent": MODELS,
    "translator": MODELS,
}
"""What each asks for: no more than it needs, and never the network."""
NAMES = sorted(RIGHTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LLM]]:
    folder = tmp_path_factory.mktemp("models")
    chat = write_tiny_model(folder / "chat", max_position_embeddings=2048)
    bert = write_tiny_bert(folder / "bert", "BertModel", max_position_embeddings=256)
    with (
        LLM(load_model(chat, device="cpu", dtype="float32"), name="smollm2-135m-instruct") as default,
        LLM(load_model(bert, device="cpu", dtype="float32"), name="all-minilm-l6-v2") as encoder,
    ):
        yield {"default": default, "encoder": encoder}


@contextlib.contextmanager
def example(name: str, models: dict[str, Any]) -> Iterator[tuple[Any, ModuleType]]:
    """The application with these models, and its own tests."""
    path, file = list(sys.path), FOLDER / name / "test_app.py"
    spec = importlib.util.spec_from_file_location(f"test_of_{name.replace('-', '_')}", file)
    assert spec is not None and spec.loader is not None
    try:
        app = load_application(str(FOLDER / name / "app.py"))
        app.llm = models["default"]
        app.models.update(models)
        tests = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tests)
        yield app, tests
    finally:
        sys.path[:] = path
        sys.modules.pop("app", None)


def run_tests(tests: ModuleType) -> int:
    found = [one for name, one in vars(tests).items() if name.startswith("test_") and inspect.isfunction(one)]
    for test in found:
        test()
    return len(found)


def test_the_bundled_index_has_the_ten_without_any_setting() -> None:
    assert [(found.name, str(found.index)) for found in search(indexes())] == [(name, "bundled") for name in NAMES]
    assert [found.name for found in search(indexes(), ["json"])] == ["json-extractor"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_installs_offline_with_the_sheet_that_it_needs(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    apps = Apps()
    with pytest.raises(NotAcceptedError) as caught:
        apps.install(name, indexes())
    assert [str(grant) for grant in caught.value.request.asked] == RIGHTS[name]
    installed = apps.install(name, indexes(), accept=True)
    assert installed.manifest is not None and [str(one) for one in grants(installed.manifest)] == RIGHTS[name]
    assert installed.record is not None and installed.record.source == "bundled"
    assert apps.update(name, indexes()).version == installed.version
    assert pack(FOLDER / name, tmp_path / "again.llmapp").sha256 == installed.record.sha256
    with open_package(tmp_path / "again.llmapp") as package:
        package.check()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_documented_and_offers_a_tool(name: str) -> None:
    folder = FOLDER / name
    assert len((folder / "app.py").read_text(encoding="utf-8").splitlines()) < 80
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert f"llmasos app install {name}\n" in readme and any("\u4e00" <= c <= "\u9fff" for c in readme)
    with example(name, {"default": None}) as (app, _):
        assert app.name == name
        for route in app.routes:
            assert inspect.getdoc(route.function), route.name
            for entry in route.inputs:
                bounds = {"maxLength", "maximum", "exclusiveMaximum", "enum", "maxItems", "x-llmasos-media", "format"}
                shown = str(entry.schema)
                limited = entry.place == "path" or any(f"'{bound}'" in shown for bound in bounds) or "items" in shown
                assert limited or entry.name == "json_schema", f"{route.name}: {entry.name} has no limit"
        tools = [route for route in app.routes if route.hints.tool]
        assert tools and any(route.examples for route in tools)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_passes_its_own_tests_with_a_tiny_model(name: str, models: dict[str, LLM]) -> None:
    with example(name, models) as (_, tests):
        assert run_tests(tests) >= 1


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_an_example_passes_its_own_tests_with_smollm2(name: str, real: dict[str, LLM]) -> None:
    with example(name, real) as (app, tests):
        assert run_tests(tests) >= 1
        with app.test_client() as client:
            for path, body, is_right in REAL.get(name, ()):
                said = client.post(path, json=body, headers={"Accept": "application/json"}).json()
                assert is_right(said), f"{path}: {said!r}"


def is_in(script: str) -> Callable[[Any], bool]:
    """Whether a text is in this script, whatever it says: SmolLM2 has seen little but English."""
    return lambda said: bool(re.search(r"\w", said)) and not re.search(r"[^\W\d_]", re.sub(script, "", said))


LATIN, CHINESE, JAPANESE = r"[A-Za-z\u00c0-\u024f]", r"[\u3400-\u9fff]", r"[\u3040-\u30ff\u3400-\u9fff]"
MORNING = "Good morning. How are you?"
RAIN = "It rains in Bern. The trains are late. Ben takes the bus to work, and Anna stays at home."
PEOPLE = ["Bread needs salt.", "The mayor is Anna Keller."]
LABELS = ["sports", "politics", "weather"]
REAL: dict[str, list[tuple[str, dict[str, Any], Callable[[Any], bool]]]] = {
    "classifier": [
        ("/classify", {"text": "The team won the final.", "labels": LABELS}, lambda said: said["label"] == "sports"),
        ("/classify", {"text": "It will rain tomorrow.", "labels": LABELS}, lambda said: said["label"] == "weather"),
    ],
    "code-helper": [
        (
            "/write",
            {"task": "A function add(a, b) that returns the sum of a and b", "tests": "assert add(2, 3) == 5"},
            lambda said: "def add(a, b)" in said["code"] and (said["check"] is None or said["check"]["ok"]),
        ),
        ("/explain", {"code": "print(sum(range(10)))", "max_tokens": 40}, lambda said: num_words("".join(said)) > 8),
    ],
    "json-extractor": [
        (
            "/fields",
            {"text": "John Smith from Boston turns 40 in May.", "fields": ["name", "city"]},
            lambda said: said == {"name": "John Smith", "city": "Boston"},
        ),
    ],
    "question-answering": [
        (
            "/look-up",
            {"question": "Who is the mayor?", "passages": PEOPLE, "words": 20},
            lambda said: "Anna Keller" in said["answer"] and said["passages"] == [2],
        ),
    ],
    "story-writer": [
        ("/title", {"about": "a fox who learns to read"}, lambda said: 1 <= num_words(said) <= 8),
        ("/story", {"about": "a fox", "words": 40, "seed": 7}, lambda said: 15 <= num_words("".join(said)) <= 80),
    ],
    "summariser": [
        ("/summarise", {"text": RAIN, "words": 12}, lambda said: 3 <= num_words(said) <= 16 and said.endswith(".")),
    ],
    "tool-agent": [
        ("/ask", {"question": "What is 12 * 30?"}, lambda said: "360" in said["text"]),
        ("/ask", {"question": "Which day of the week is 2026-12-24?"}, lambda said: "Thursday" in said["text"]),
        ("/ask", {"question": "How many words has this text: one two three"}, lambda said: "3" in said["text"]),
    ],
    "translator": [
        ("/translate", {"text": MORNING, "to": "French"}, lambda said: is_in(LATIN)(said) and "morning" not in said),
        ("/translate", {"text": MORNING, "to": "Spanish"}, lambda said: is_in(LATIN)(said) and "morning" not in said),
        ("/translate", {"text": MORNING, "to": "Chinese"}, is_in(CHINESE)),
        ("/translate", {"text": MORNING, "to": "Japanese", "source": "English"}, is_in(JAPANESE)),
        ("/translate", {"text": "早上好。", "to": "English"}, is_in(LATIN)),
    ],
}
"""What SmolLM2 can do: path, body, and what must hold of the answer. The temperature is 0, or there is a seed."""


@pytest.fixture(scope="module")
def real() -> Iterator[dict[str, LLM]]:
    home = os.environ.get("LLMASOS_TEST_HOME")
    names = {"default": "smollm2-135m-instruct", "encoder": "all-minilm-l6-v2"}
    if not home or not all(Path(home, "models", name).is_dir() for name in names.values()):
        pytest.skip("LLMASOS_TEST_HOME names no home with smollm2-135m-instruct and all-minilm-l6-v2")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("LLMASOS_HOME", home)
        yield {key: stack.enter_context(LLM.from_pretrained(name)) for key, name in names.items()}


def test_nobody_publishes_to_the_bundled_index(tmp_path: Path) -> None:
    packed = pack(FOLDER / "translator", tmp_path / "t.llmapp")
    [bundled] = indexes(["bundled"])
    with pytest.raises(InvalidInputError, match="can't be written to"):
        bundled.publish(packed.path)
    assert choose([bundled], "translator").version == "1.0.0"
