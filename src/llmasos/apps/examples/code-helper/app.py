"""Code helper: writes Python functions, runs them in the sandbox before you see them, and explains code."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from llmasos import Application, tasks
from llmasos.apps.sandbox import run_python
from llmasos.errors import UnsupportedError
from llmasos.tasks.writing import Code

app = Application(title="Code helper")

TEACHER = {"role": "system", "content": "You are a teacher of programming. Explain code in plain, short sentences."}


@app.route(
    "/write",
    methods=["POST"],
    tool=True,
    read_only=True,
    examples=[{"task": "A function add(a, b) that returns the sum of a and b", "tests": "assert add(2, 3) == 5"}],
)
def write(
    task: Annotated[str, Field(min_length=3, max_length=4000)],
    tests: Annotated[str, Field(max_length=20_000)] = "",
    max_tokens: Annotated[int, Field(ge=32, le=2000)] = 200,
) -> Code:
    """Write Python, run it in a sandbox, and mend it once if it fails. `check` says how it ran.

    Args:
        task: What the program or function does.
        tests: Python that is run behind it, such as asserts.
        max_tokens: Length of the program, at most.
    """
    wanted: dict[str, Any] = {"instruction": task, "tests": tests, "max_tokens": max_tokens}
    try:
        return tasks.write_code(**wanted, check=True, run_code=run_python, model=app.llm)
    except UnsupportedError:  # this system can't hold a program: it is written, and not run
        return tasks.write_code(**wanted | {"tests": ""}, model=app.llm)


@app.route("/explain", read_only=True, output="markdown", examples=[{"code": "print(sum(range(10)))"}])
def explain(
    code: Annotated[str, Field(min_length=1, max_length=8000)], max_tokens: Annotated[int, Field(ge=16, le=1000)] = 150
) -> Iterator[str]:
    """Explain code, as it is written.

    Args:
        code: Lines of any language.
        max_tokens: Length of the explanation, at most.
    """
    question = {"role": "user", "content": f"What does this code do?\n\n```\n{code}\n```"}
    for chunk in app.llm.stream([TEACHER, question], max_tokens=max_tokens):
        yield chunk.text


if __name__ == "__main__":
    app.run()
