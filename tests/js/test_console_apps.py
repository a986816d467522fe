"""The page of applications in a browser: installing from a folder with the permission sheet, running, updating to a
version that asks for more, rolling back, uninstalling."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_llm import FakeLLM
from served import served

from llmasos.serve.access.access import Access
from llmasos.serve.access.policy import Policy
from llmasos.serve.server import create_app
from llmasos.store.database import Database
from llmasos.store.packages import Index, pack

JS = Path(__file__).parents[2] / "js"
NODE = shutil.which("node")
pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's"),
]

MANIFEST = """
[app]
name = "notes"
version = "{version}"
summary = "Keeps notes in its own folder"
license = "Apache-2.0"
entry = "app.py"

[permissions]
fs.write = ["$data"]
{more}
"""
SOURCE = '''
from llmasos import Application
app = Application(title="Notes")

@app.route("/keep", methods=["POST"], examples=[{"name": "milk", "text": "Buy milk."}])
def keep(name: str, text: str) -> int:
    """Keep a note."""
    (app.data / name).write_text(text)
    print("kept", name, flush=True)
    return len(text)
'''


def publish(folder: Path, version: str, more: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "llmasos.toml").write_text(MANIFEST.format(version=version, more=more))
    (folder / "app.py").write_text(SOURCE)
    Index(folder.parent / "index").publish(pack(folder, folder.parent / f"{version}.llmapp").path)


@pytest.mark.timeout(300)  # a browser, beside whatever else runs
def test_an_application_is_installed_run_updated_and_removed_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLMASOS_APP_INDEX", str(tmp_path / "index"))
    publish(tmp_path / "notes", "0.1.0")
    with Database.open(f"sqlite:///{tmp_path / 'access.db'}") as database:
        whole = create_app({"fake": FakeLLM()}, access=Access(database, Policy()))
        with served(whole) as url:
            browser = subprocess.Popen(
                [NODE, "tests/apps.browser.js", url, str(tmp_path)],
                cwd=JS,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            while browser.poll() is None and not (tmp_path / "next.go").exists():
                time.sleep(0.02)
            publish(tmp_path / "notes", "0.2.0", 'net = ["api.example.com:443"]')
            (tmp_path / "published").touch()
            said, errors = browser.communicate(timeout=280)
    assert browser.returncode == 0, errors
    told = json.loads(said)
    if "missing" in told:
        pytest.skip(told["missing"])
    assert told["sheet"] == ["Keep files in its own folder"]
    assert told["refused"] == 0, "somebody said no"
    assert told["ran"] == "9" and told["logged"]
    assert told["asked"] == ["Connect to api.example.com:443new"]
    assert told["widened"] == ["Connect to api.example.com:443new", "Keep files in its own folder"]
    assert not told["elsewhere"] and not told["errors"]
    assert told["uploaded"] and (tmp_path / "home" / "apps" / "notes" / "current").read_text().strip() == "0.1.0"
