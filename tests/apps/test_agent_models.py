"""Agents on models: tiny random ones that a grammar holds to calls and forms, an API, and SmolLM2 where it is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_llm import FakeLLM, live_server
from pydantic import BaseModel, Field

from llmasos.apps.agent import Agent, AgentLimits, knowledge_tool, open_traces, python_tool, replay, task_tool, tool
from llmasos.apps.agent.models import chat_model, estimate
from llmasos.errors import InvalidInputError
from llmasos.inference.llm import LLM
from llmasos.inference.remote import RemoteLLM
from tiny import CHAT_TEMPLATE, write_tiny_model

SHORT = AgentLimits(steps=2, answer_tokens=200)


@tool(read_only=True)
def weather(city: Literal["Bern", "Rom"]) -> dict[str, object]:
    """Tell the temperature of a city.

    Args:
        city: Its name.
    """
    return {"city": city, "degrees": 18}


class Reading(BaseModel):
    city: Literal["Bern", "Rom"]
    degrees: int = Field(ge=0, le=99)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    from llmasos.models.load import load_model

    folder = write_tiny_model(tmp_path_factory.mktemp("agent") / "tiny", max_position_embeddings=2048)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    with LLM(load_model(folder, device="cpu", dtype="float32"), name="tiny") as model:
        yield model


def test_a_grammar_holds_a_random_model_to_one_right_call(llm: LLM) -> None:
    agent = Agent(
        llm, tools=[weather], tool_choice="required", parallel_calls=False, limits=SHORT, seed=1, temperature=1.0
    )
    run = agent.run("fox")
    [call] = run.steps[0].calls
    assert call.name == "weather" and not call.is_error
    assert json.loads(call.result or "")["degrees"] == 18
    assert run.prompt_tokens > 0 and run.output_tokens > 0 and not run.steps[0].is_estimated
    with open_traces() as traces:
        assert traces.get(run.id) == run and [one.id for one in traces.list()] == [run.id]
    assert replay(run).differences == ()


def test_a_grammar_holds_a_random_model_to_the_form_of_the_answer(llm: LLM) -> None:
    run = Agent(llm, output=Reading, limits=SHORT, keep=False).run("fox")
    assert run.state == "done" and Reading.model_validate(run.output), run.stop


def test_a_model_behind_an_api_is_asked_the_same_way() -> None:
    fake = FakeLLM(context_length=5000)
    fake.answers += ['<tool_call>{"name": "weather", "arguments": {"city": "Rom"}}</tool_call>', "18 degrees."]
    with live_server(fake) as url, RemoteLLM(f"{url}#fake") as remote:
        run = Agent(remote, tools=[weather], keep=False, temperature=0.0).run("How warm?")
        model = chat_model(remote)
        assert (run.state, run.text) == ("done", "18 degrees.")
        assert run.steps[0].calls[0].arguments == '{"city": "Rom"}'
        assert run.steps[1].prompt_tokens > run.steps[0].prompt_tokens > 0 and not run.steps[1].is_estimated
        assert model.name == remote.name
        told = [{"role": "user", "content": "How warm?"}]
        assert model.count(told, []) == len(fake.chat_prompt(told).encode()), "the server counts"
        fake.takes_tools = False
        definition = {"type": "function", "function": {"name": "f", "parameters": {}}}
        assert model.count(told, [definition]) == estimate(told, [definition])
        assert model.count(told, []) == estimate(told, []), "one that does not is not asked again"
    assert replay(run).differences == ()


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="is no model"):
        Agent(7).run("Hi")


def test_python_runs_in_the_sandbox_and_says_how_it_ended() -> None:
    run_python = python_tool(timeout=20)
    assert run_python(code="print(sum(range(10)))") == "45"
    assert run_python(code="pass") == "[It printed nothing.]"
    said = run_python(code="print(1); raise ValueError('no')")
    assert (
        said.startswith("1\n[stderr]")
        and "ValueError: no" in said
        and said.endswith("[It ended with the exit code 1.]")
    )


def test_knowledge_and_tasks_are_tools() -> None:
    class Base:
        name = "my notes"

    async def search(query: str, k: int) -> list[Any]:
        return []

    found: Any = Base()
    made = knowledge_tool(found, search=search, about="Of tea.")
    assert made.name == "search_my_notes" and made.read_only and made.description.endswith("Of tea.")
    keywords = task_tool("keywords")
    assert set(keywords.parameters["properties"]) == {"text", "num"}
    assert keywords.arguments is not None and keywords.arguments('{"text": "a"}') == {"text": "a"}


@pytest.mark.shared
@pytest.mark.timeout(900)
def test_smollm2_calls_a_tool_and_answers_from_its_result() -> None:
    folder = os.environ.get("LLMASOS_TEST_DATA")
    path = next(Path(folder).rglob("SmolLM2-135M-Instruct*.gguf"), None) if folder else None
    if path is None:
        pytest.skip("LLMASOS_TEST_DATA has no SmolLM2-135M-Instruct GGUF")
    with LLM.from_pretrained(path) as model:
        limits = AgentLimits(steps=3, answer_tokens=48, seconds=None)
        agent = Agent(
            model, tools=[weather], tool_choice="required", parallel_calls=False, limits=limits, temperature=0.0
        )
        run = agent.run("How warm is it in Bern?")
    [call] = run.steps[0].calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Bern"})
    assert run.messages[2]["content"] == '{"city":"Bern","degrees":18}'
    assert len(run.steps) >= 2 and "18" in (run.steps[1].text or run.messages[2]["content"])
    assert replay(run).differences == ()
