"""llmasos.toml: what is read, what is refused in which words, and which permissions an update adds."""

from pathlib import Path

import pytest
from app_packages import manifest

from llmasos.errors import FormatError
from llmasos.store.packages import Grant, grants, parse_manifest, read_manifest, sheet, widened
from llmasos.store.packages.manifest import num_bytes, seconds

WHOLE = """
[models]
default = "gpt2"
reader = { min_context = 4096, capabilities = ["tools", "embed"], max_size = "1.5GB" }
[permissions]
net = ["api.example.com:443", "*.example.org"]
fs.read = ["$inputs", "/srv/texts/"]
fs.write = ["$data"]
env = ["TZ"]
exec = true
gpu = false
models = ["default"]
[resources]
memory = "512MB"
cpu = 2
processes = 8
timeout = "5m"
concurrency = 4
[config]
style = { type = "choice", choices = ["a", "b"], default = "a" }
words = { type = "number", minimum = 1, maximum = 9, default = 3 }
token = { type = "secret", required = true }
place = { type = "folder" }
"""


def test_a_whole_manifest_gives_its_sheet() -> None:
    assert sheet(parse_manifest(manifest(more=WHOLE))) == {
        "kind": "app",
        "name": "ask",
        "version": "1.0.0",
        "summary": "Answers it",
        "license": "MIT",
        "permissions": [
            {"kind": "net", "value": "api.example.com:443"},
            {"kind": "net", "value": "*.example.org"},
            {"kind": "fs.read", "value": "$inputs"},
            {"kind": "fs.read", "value": "/srv/texts"},
            {"kind": "fs.write", "value": "$data"},
            {"kind": "env", "value": "TZ"},
            {"kind": "exec", "value": ""},
            {"kind": "models", "value": "default"},
        ],
        "models": {
            "default": "gpt2",
            "reader": {"min_context": 4096, "capabilities": ["tools", "embed"], "max_size": "1.5GB"},
        },
        "resources": {"memory": "512MB", "cpu": 2.0, "processes": 8, "timeout": "5m", "concurrency": 4},
        "config": {"style": "choice", "words": "number", "token": "secret", "place": "folder"},
    }


def test_what_is_not_named_is_not_asked_for() -> None:
    assert grants(parse_manifest(manifest())) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[app", "not valid TOML"),
        ("[app]\nname = 'ask'", "app.version is missing"),
        (manifest(name="Ask"), "app.name = 'Ask': 'Ask' cannot be the name"),
        (manifest(name="con"), "cannot be the name"),
        (manifest(name="../x"), "cannot be the name"),
        (manifest("1.0.0-beta"), "app.version = '1.0.0-beta': is not in its normal spelling; write '1.0.0b0'"),
        (manifest("1.0+cpu"), "has an epoch or a local part"),
        (manifest("1!1.0"), "has an epoch or a local part"),
        (manifest("../1"), "is no version"),
        (manifest(more="entry = '../app.py'"), "names no file of the application"),
        (manifest(more="entry = 'app.py:a b'"), "names no file of the application"),
        (manifest(more="python = 'three'"), "is no range of versions"),
        (manifest().replace("Answers", r"\u001b[2J"), "has a control character"),
        (manifest(more=r"[models]" + "\n" + r'a = "\u202egpt2"'), "models.a = '\\u202egpt2': has a control character"),
        (manifest(more=r"[permissions]" + "\n" + r'fs.read = ["/a\nb"]'), "has a control character"),
        (manifest(more="pyhton = '>=3.11'"), "there is no key app.pyhton. Known there: name, version, summary"),
        (manifest(more="[permission]"), "there is no key permission. Known there: app, models, permissions"),
        (manifest(more="[permissions]\nnet = ['http://x']"), "permissions.net[0] = 'http://x': is no host"),
        (manifest(more="[permissions]\nnet = ['x:70000']"), "is no host"),
        (manifest(more="[permissions]\nnet = 'x'"), "permissions.net = 'x': input should be a valid list"),
        (manifest(more="[permissions]\nfs.read = ['texts']"), 'is neither "$data"'),
        (manifest(more="[permissions]\nfs.read = ['/a/../b']"), 'is neither "$data"'),
        (manifest(more="[permissions]\nfs.read = ['$home']"), 'is neither "$data"'),
        (
            manifest(more="[permissions]\nfs.delete = ['/a']"),
            "there is no key permissions.fs.delete. Known there: read",
        ),
        (manifest(more="[permissions]\nexec = 1"), "permissions.exec = 1: input should be a valid boolean"),
        (manifest(more="[permissions]\nenv = ['A=B']"), "is no name of an environment variable"),
        (manifest(more="[permissions]\nmodels = ['reader']"), "names 'reader', which [models] does not have"),
        (manifest(more="[models]\na = { context = 1 }"), "there is no key models.a.context. Known there: min_context"),
        (manifest(more="[models]\na = { min_context = 0 }"), "models.a.min_context = 0: input should be greater"),
        (manifest(more="[models]\na = { max_size = '2' }"), "is no size"),
        (manifest(more="[models]\na = { capabilities = ['vision'] }"), "'vision': no vision model is supported yet"),
        (manifest(more="[models]\na = { capabilities = ['fly'] }"), "input should be 'tools' or 'embed'"),
        (manifest(more="[resources]\ntimeout = '0s'"), "is no span of time"),
        (manifest(more="[config.a]\ntype = 'choice'"), 'choices = ["a", "b"] belongs to type = "choice"'),
        (manifest(more="[config.a]\ntype = 'choice'\nchoices = ['x']\ndefault = 'y'"), "'y' is none of x"),
        (manifest(more="[config.a]\ntype = 'number'\nmaximum = 2\ndefault = 3"), "3 is above maximum = 2"),
        (manifest(more="[config.a]\ntype = 'string'\nminimum = 2\ndefault = 'x'"), "'x' is below minimum = 2"),
        (manifest(more="[config.a]\ntype = 'number'\ndefault = true"), "is no number"),
        (manifest(more="[config.a]\ntype = 'secret'\ndefault = 'x'"), "a secret has no default"),
        (manifest(more="[config.a]\ntype = 'bool'\nminimum = 1"), "have no meaning for type = 'bool'"),
        (manifest(more="[config.a]\ntype = 'number'\nminimum = 2\nmaximum = 1"), "is above maximum"),
        (manifest(more="[config.a]\nkind = 'bool'"), "config.a"),
    ],
)
def test_what_is_wrong_is_named_with_its_key_and_value(text: str, words: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_manifest(text, "x/llmasos.toml")
    assert words in str(caught.value) and caught.value.message.startswith("x/llmasos.toml") and caught.value.hint


def test_a_folder_without_a_manifest_is_told_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has no llmasos\.toml") as caught:
        read_manifest(tmp_path)
    assert "app new" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "added"),
    [
        ("", "", []),
        ("", "net = ['a.com']", ["net a.com"]),
        ("net = ['a.com', 'b.com']", "net = ['b.com']", []),
        ("net = ['a.com']", "net = ['a.com:443']", []),
        ("net = ['a.com:443']", "net = ['a.com']", ["net a.com"]),
        ("net = ['a.com:443']", "net = ['a.com:80']", ["net a.com:80"]),
        ("net = ['*.a.com']", "net = ['x.a.com', 'a.com', 'xa.com']", ["net a.com", "net xa.com"]),
        ("net = ['x.a.com']", "net = ['*.a.com']", ["net *.a.com"]),
        ("net = ['*']", "net = ['a.com:1', '[::1]:80']", []),
        ("net = ['*:443']", "net = ['a.com:443', 'a.com:80']", ["net a.com:80"]),
        ("fs.read = ['/srv']", "fs.read = ['/srv/a', '/srvx']", ["fs.read /srvx"]),
        ("fs.read = ['/']", "fs.read = ['/etc']", []),
        ("fs.read = ['/srv']", "fs.write = ['/srv']", ["fs.write /srv"]),
        ("fs.write = ['/srv']", "fs.read = ['/srv']", ["fs.read /srv"]),
        ("env = ['A']", "env = ['A', 'B']\nexec = true\ngpu = true", ["env B", "exec", "gpu"]),
        ("exec = true", "exec = false", []),
        ("", "models = ['m']", ["models m"]),
    ],
)
def test_an_update_asks_for_what_the_old_version_could_not_do(old: str, new: str, added: list[str]) -> None:
    before, after = (
        parse_manifest(manifest(more=f"[models]\nm = 'gpt2'\n[permissions]\n{text}")) for text in (old, new)
    )
    assert [str(grant) for grant in widened(before, after)] == added


def test_a_grant_covers_only_its_own_kind() -> None:
    assert not Grant("net", "*").covers(Grant("env", "A"))


def test_sizes_and_spans_are_numbers() -> None:
    assert (num_bytes("1.5GB"), num_bytes("512MiB"), seconds("2h")) == (3 << 29, 1 << 29, 7200)
