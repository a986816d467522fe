"""The JavaScript SDK: its own tests, and what it makes of our real server."""

import inspect
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from fake_llm import FakeLLM, live_server
from served import served
from six_routes import CALLS, app

from doc_examples import blocks, headings, rows
from llmasos import __version__
from llmasos.client import Client

JS = Path(__file__).parents[2] / "js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def node(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([NODE, *arguments], cwd=JS, capture_output=True, text=True, timeout=100, **options)


def test_its_own_tests_pass() -> None:
    done = node("--test", "--test-reporter=tap", "tests/node.test.js")
    assert done.returncode == 0, done.stdout[-5000:]
    assert "# fail 0" in done.stdout and "# pass 0" not in done.stdout


def test_its_own_tests_pass_in_chromium() -> None:
    done = node("--test", "--test-reporter=tap", "tests/browser.test.js")
    assert done.returncode == 0, done.stdout[-5000:]
    if (reason := re.search(r"# SKIP (.*)", done.stdout)) is not None:
        pytest.skip(reason[1])


@pytest.mark.skipif(shutil.which("deno") is None, reason="deno is not installed")
def test_its_own_tests_pass_in_deno() -> None:
    done = subprocess.run(["deno", "run", "-A", "tests/deno.js"], cwd=JS, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("\nok: ") > 10


def test_the_declarations_fit_a_program() -> None:
    compiler = JS / "node_modules" / "typescript" / "bin" / "tsc"
    if not compiler.exists():
        pytest.skip("typescript is not installed; run npm install in js/")
    flags = json.loads((JS / "package.json").read_text(encoding="utf-8"))["scripts"]["types"].split()[1:]
    done = node(str(compiler), *flags)
    assert done.returncode == 0, done.stdout


def test_it_works_with_our_server() -> None:
    fake, slow = FakeLLM("fake"), FakeLLM("slow", delay=0.05)
    with live_server({"fake": fake, "slow": slow}) as url:
        done = node("tests/live.js", url, env={**os.environ, "LLMASOS_API_KEY": ""})
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        failed = {check["title"]: check["error"] for check in found if "error" in check}
        assert found and not failed
        deadline = time.monotonic() + 10
        while slow.num_running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert slow.num_cancelled == 5 and slow.num_running == 0
        assert slow.num_tokens < 5 * len("a long tale!")


def test_applications_give_what_every_surface_gives() -> None:
    calls = []
    for name, values, result in CALLS:
        route = app.find(name)
        method = "POST" if "POST" in route.methods else "GET"
        calls.append([route.path, method, values, result, route.streams])
    with served(app) as url:
        done = node("tests/app.js", url, json.dumps(calls))
    assert done.returncode == 0, done.stderr
    for (result, items, from_job), (path, _, _, expected, streams) in zip(json.loads(done.stdout), calls, strict=True):
        assert result == from_job == expected
        assert not streams or ("".join(items) if path == "/say" else items) == expected


def code_blocks(name: str) -> list[str]:
    return [block.text for block in blocks((JS / name).read_text(encoding="utf-8"), "js")]


def test_the_readme_runs_and_prints_what_it_shows() -> None:
    served = {"smollm2-135m-instruct": FakeLLM(delay=0.001), "all-minilm-l6-v2": FakeLLM()}
    source = "\n".join(code_blocks("README.md"))
    with live_server(served) as url:
        program = source.replace("http://127.0.0.1:8000/v1", url)
        done = node("--input-type=module", "-", input=program, env={**os.environ, "LLMASOS_API_KEY": ""})
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"// → (.*)$", source, re.MULTILINE)
    assert shown and [line for line in done.stdout.splitlines() if line in shown] == shown


def test_both_readmes_have_the_same_code_and_structure() -> None:
    english, chinese = ((JS / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert headings(english) == headings(chinese)
    ours, theirs = (
        [re.sub(r"// (?!→).*", "//", code) for code in code_blocks(name)] for name in ("README.md", "README.zh.md")
    )
    assert ours == theirs
    assert [len(cells) for cells in rows(english)] == [len(cells) for cells in rows(chinese)]


def test_the_lock_file_names_no_registry_and_the_version_is_ours() -> None:
    assert "resolved" not in (JS / "package-lock.json").read_text(encoding="utf-8")
    assert json.loads((JS / "package.json").read_text(encoding="utf-8"))["version"] == __version__
    assert (JS / "LICENSE").read_bytes() == (JS.parent / "LICENSE").read_bytes()


def test_it_has_the_methods_of_the_python_client_in_camel_case() -> None:
    program = """
        import { LLMasOS } from "llmasos";
        const client = new LLMasOS();
        const methods = (object) => Object.getOwnPropertyNames(Object.getPrototypeOf(object));
        const found = { client: methods(client) };
        for (const [name, value] of Object.entries(client)) if (typeof value === "object") found[name] = methods(value);
        console.log(JSON.stringify(found));
    """
    done = node("--input-type=module", "-", input=program)
    found = {name: set(methods) - {"constructor"} for name, methods in json.loads(done.stdout).items()}
    names = [name for name, value in inspect.getmembers(Client) if hasattr(value, "attrname") and name[0] != "_"]
    client = Client()
    expected = {camel_case(name): camel_case_methods(getattr(client, name)) for name in names}
    expected["client"] = camel_case_methods(client) - {"close"}  # fetch has nothing to close
    expected["files"] -= {"download"}  # to a disk, which browsers have not
    expected["native"] -= {"upload"}
    assert found.pop("apps") == {"run", "stream", "start", "jobs", "job", "cancel", "follow", "wait"}
    assert found == expected


def camel_case_methods(thing: object) -> set[str]:
    return {camel_case(name) for name, _ in inspect.getmembers(type(thing), inspect.isfunction) if name[0] != "_"}


def camel_case(name: str) -> str:
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)
