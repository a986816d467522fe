import pytest
from app import app, calculate

from llmasos.apps.agent import ScriptedModel
from llmasos.errors import InvalidInputError

CALL = {"calls": [{"name": "calculate", "arguments": {"expression": "12 * 30"}}]}


def test_the_tools_are_exact() -> None:
    assert calculate("(12 + 30) * 2") == 84 and calculate("7 / 2") == 3.5
    with app.test_client() as client:
        assert client.get("/weekday", params={"day": "2026-12-24"}).json() == "Thursday"
        assert client.post("/count-words", json={"text": "one two three"}).json() == 3


def test_nothing_but_sums_is_calculated() -> None:
    for expression in ("2 ** 9999", "__import__('os')", "1 / 0", "x", "9" * 99 + "*" + "9" * 99 + " 1", "(" * 200):
        with pytest.raises(InvalidInputError):
            calculate(expression)
    with app.test_client() as client:
        assert client.get("/calculate", params={"expression": "2 + x"}).status_code == 422


def test_the_agent_calls_a_tool_and_the_answer_has_its_result() -> None:
    model = app.llm
    try:
        for said, text in (("It is 360.", "It is 360."), ("<tool_response>\n12 * 30", "360")):
            app.llm = ScriptedModel([CALL, said])
            with app.test_client() as client:
                found = client.post("/ask", json={"question": "What is 12 * 30?"}).json()
            assert found["text"] == text and found["steps"][0].endswith("= 360")
    finally:
        app.llm = model


def test_a_model_that_is_here_uses_a_tool_first() -> None:
    asked = {"model": "tool-agent", "messages": [{"role": "user", "content": "What is 12 * 30?"}]}
    with app.test_client() as client:
        assert client.post("/v1/chat/completions", json=asked).status_code == 200
