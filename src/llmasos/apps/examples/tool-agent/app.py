"""Tool agent: a model that calculates, counts and looks at the calendar before it answers."""

import ast
import operator
from datetime import date
from typing import Annotated, Any

from pydantic import BaseModel, Field

from llmasos import Application
from llmasos.apps import Message
from llmasos.apps.agent import Agent, AgentLimits
from llmasos.errors import InvalidInputError

app = Application(title="Tool agent")

SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
HOW: dict[str, Any] = {"tool_choice": "required", "parallel_calls": False, "keep": False, "temperature": 0.0}


class Answer(BaseModel):
    text: str
    steps: list[str] = Field(description="the calls that it made, with their results")


@app.route("/calculate", tool=True, read_only=True, examples=[{"expression": "(12 + 30) * 2"}])
def calculate(expression: Annotated[str, Field(max_length=200, pattern=r"^[0-9(][-+*/() .0-9]*$")]) -> int | float:
    """Calculate a sum, difference, product or quotient of numbers, such as (12 + 30) * 2."""
    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ArithmeticError, MemoryError) as e:  # the last: too many brackets
        raise InvalidInputError(f"{expression!r} can't be calculated: {e}.", param="expression") from e


def value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("only numbers, + - * / and brackets are known")


@app.route("/count-words", tool=True, read_only=True, examples=[{"text": "one two three"}])
def count_words(text: Annotated[str, Field(max_length=20_000)]) -> int:
    """Count the words of a text."""
    return len(text.split())


@app.route("/weekday", tool=True, read_only=True, examples=[{"day": "2026-12-24"}])
def weekday(day: date) -> str:
    """Say which day of the week a date is, such as 2026-12-24."""
    return f"{day:%A}"


@app.route("/ask", methods=["POST"], read_only=True, examples=[{"question": "What is 12 * 30?"}])
def ask(question: Annotated[str, Field(min_length=2, max_length=2000)]) -> Answer:
    """Answer a question with the help of the tools, and show which were used."""
    return run([{"role": "user", "content": question}])


@app.chat
def chat(messages: list[Message]) -> str:
    """Answer with the help of the tools."""
    return run(messages).text


def run(messages: list[Message]) -> Answer:
    limits = AgentLimits(steps=3, answer_tokens=100)
    done = Agent(app.llm, tools=(calculate, count_words, weekday), limits=limits, **HOW).run(messages)
    calls = [call for step in done.steps for call in step.calls]
    results = [call.result for call in calls if call.result and not call.is_error]
    text = done.text.replace("<tool_response>", "").replace("</tool_response>", "").strip()
    if results and not any(one in text for one in results):
        text = results[-1]  # small models say the call again instead of what came of it
    return Answer(text=text or "I don't know.", steps=[f"{one.name}({one.arguments}) = {one.result}" for one in calls])


if __name__ == "__main__":
    app.run()
