"""The application that `llmasos app new` writes: small, whole, ready to run and to pack."""

from __future__ import annotations

from pathlib import Path

from llmasos.errors import InvalidInputError
from llmasos.store.packages.manifest import MANIFEST, check_app_name
from llmasos.store.packages.pack import IGNORE
from llmasos.store.transfer import disk_errors

_MANIFEST = """\
[app]
name = "{name}"
version = "0.1.0"
summary = "Answers questions"
license = "Apache-2.0"
python = ">=3.11"
entry = "app.py"

[models]
default = "smollm2-135m-instruct"   # or what it must have: {{ min_context = 4096, capabilities = ["tools"] }}

[permissions]                       # what is not named here is not asked for
models = ["default"]
# net = ["api.example.com:443"]
# fs.read = ["$inputs"]
"""
_APP = '''\
"""Answers questions."""

from typing import Annotated

from pydantic import Field

from llmasos import Application

app = Application("smollm2-135m-instruct", title="{name}")


@app.route("/ask", examples=[{{"question": "Why is the sky blue?"}}])
def ask(question: str, words: Annotated[int, Field(ge=1, le=500)] = 50) -> str:
    """Answer a question."""
    return app.llm.generate_text(question, max_tokens=words)


if __name__ == "__main__":
    app.run()
'''
_IGNORE = """\
# What does not belong into the package: a path, or a part of one, a line; * and ? stand for any characters.
tests
"""


def create(folder: Path) -> list[Path]:
    """Write the application into the new `folder`, whose name is its name. Raises InvalidInputError if it is there."""
    name = check_app_name(folder.name)
    if folder.exists():
        raise InvalidInputError(f"{folder} is there already.", hint="Choose another name.", param="file")
    files = {MANIFEST: _MANIFEST, "app.py": _APP, IGNORE: _IGNORE}
    with disk_errors(folder):
        folder.mkdir(parents=True)
        for path, text in files.items():
            (folder / path).write_text(text.format(name=name), encoding="utf-8")
    return [folder / path for path in files]
