"""The form of an application in the console: a browser gives what every surface gives, and the code that it shows
runs."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_llm import FakeLLM
from served import served
from six_routes import CALLS, app
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from llmasos.client.types.apps import AppInfo
from llmasos.serve.server import create_app

JS = Path(__file__).parents[2] / "js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def node(*arguments: str) -> str:
    done = subprocess.run([NODE, *arguments], cwd=JS, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_logic_of_forms_and_pages() -> None:
    assert "# fail 0" in node(
        "--test", "--test-reporter=tap", "tests/form.test.js", "tests/pages.test.js", "tests/chats.test.js"
    )


@contextlib.contextmanager
def server_with_six_routes():
    """A server with the console that has the application as one that is installed; its process is this one."""
    whole = create_app({"fake": FakeLLM()})
    info = AppInfo(name="six", version="1.2.0", versions=["1.2.0"], title=app.title, state="running").model_dump(
        mode="json"
    )
    whole.router.routes[:0] = [
        Route("/llmasos/v1/apps", lambda _: JSONResponse({"object": "list", "data": [info]})),
        Route("/llmasos/v1/apps/six", lambda _: JSONResponse(info)),
        Mount("/apps/six", app),
    ]
    with served(whole) as url:
        yield url


@pytest.mark.timeout(300)  # a browser, beside whatever else runs
def test_the_browsers_form_gives_what_every_surface_gives() -> None:
    with server_with_six_routes() as url:
        calls = [[name, values] for name, values, _ in CALLS]
        told = json.loads(
            node(
                "tests/form.browser.js",
                f"{url}/console/#/apps/app/six/run/",
                f"{url}/apps/six/docs#/apps/",
                json.dumps(calls),
            )
        )
        if "missing" in told:
            pytest.skip(told["missing"])
        for (result, from_job), (name, _, expected) in zip(told["found"], CALLS, strict=True):
            assert without_names(result) == without_names(from_job) == without_names(expected), name
        assert told["wrong"] == ["This is needed.", "At most 100."]
        assert told["linked"] == 9
        assert told["alone"] == {"corners": [{"x": 1, "y": -2}, {"x": 3, "y": 0}], "area": 4}
        for language, text in told["snippets"].items():
            assert output_of(language, text).strip() == "9", text


def without_names(value: object) -> object:
    """A result of files but for the names of those that a browser must name, as people choose no nameless files."""
    return json.loads(re.sub(r'"file\.\w+"', '"file"', json.dumps(value)))


def output_of(language: str, text: str) -> str:
    if language == "curl":
        words = shlex.split(text.replace("\\\n", " "))
        return subprocess.run([*words, "-s"], capture_output=True, text=True, timeout=30).stdout
    if language == "Python":
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(text, "snippet", "exec"), {})
        return said.getvalue()
    if language == "JavaScript":
        return node("--input-type=module", "-e", text)
    words = shlex.split(text)
    assert words[:4] == ["llmasos", "app", "run", "six"]
    file = str(Path(__file__).parents[1] / "apps" / "six_routes.py")
    code = f"from llmasos.cli import main; raise SystemExit(main({[*words[1:3], file, *words[4:]]!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
