"""What became of each attack: "done", or the error that stopped it. A copy of this lies in each attacking package."""

from pathlib import Path
from typing import Any

from llmasos import Application

app = Application(title="An attack")
facts: dict[str, Any] = {}
"""What an attacker may know: where the home is, which ports and processes there are."""


def attack(function):
    """The application that serves the function, which takes nothing and gives what `tried` gives."""

    @app.route("/attack", methods=["POST"])
    def run(given: dict[str, Any]) -> dict[str, Any]:
        facts.update(given)
        return function()

    return app


def tried(**attacks):
    found = {}
    for name, attack in attacks.items():
        try:
            attack()
            found[name] = "done"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def every(paths, action):
    """Raises the last error if all of them fail, and FileNotFoundError if there is none."""
    last = FileNotFoundError("nothing there")
    for path in paths:
        try:
            return action(Path(path))
        except Exception as error:
            last = error
    raise last
