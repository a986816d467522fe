"""The JavaScript SDK: its own tests, and what it makes of our real server."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from fake_llm import FakeLLM, live_server

JS = Path(__file__).parents[2] / "js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def node(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([NODE, *arguments], cwd=JS, capture_output=True, text=True, timeout=100, **options)


def test_its_own_tests_pass() -> None:
    done = node("--test", "tests/node.test.js")
    assert done.returncode == 0, done.stdout[-5000:]
    assert "# fail 0" in done.stdout or "ℹ fail 0" in done.stdout


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
