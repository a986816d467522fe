"""What people get for wrong input: an exit code, the value that was wrong, the next step, and never a traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Cli, Result
from store_web import Web, tiny_repo


@dataclass
class Place:
    """Where a case happens."""

    folder: Path
    model: Path
    encoder: Path
    patch: pytest.MonkeyPatch

    def write(self, path: str, data: str | bytes) -> str:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(target)

    def copy(self, name: str = "copy") -> Path:
        shutil.copytree(self.model, self.folder / name)
        return self.folder / name

    def env(self, **variables: str) -> None:
        for name, value in variables.items():
            self.patch.setenv(name, value)

    def config(self, **changes: Any) -> str:
        folder = self.copy()
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)


@pytest.fixture
def place(
    tmp_path: Path, tiny_model: Path, tiny_encoders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Place:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("LLMASOS_PYPI_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return Place(tmp_path / "work", tiny_model, tiny_encoders("BertModel"), monkeypatch)


Args = tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """`args` may contain {model} and {encoder}, or come from `make`; `says` must all stand in the message, `hints` in
    the hint."""

    name: str
    exit_code: int
    says: tuple[str, ...]
    args: Args = ()
    hints: tuple[str, ...] = ()
    make: Callable[[Place], Args] | None = None
    stdin: str = ""
    has_hint: bool = True


def case(name: str, exit_code: int, says: str | tuple[str, ...], *args: str, **more: Any) -> Case:
    hints = more.pop("hints", ())
    return Case(
        name,
        exit_code,
        (says,) if isinstance(says, str) else says,
        args,
        (hints,) if isinstance(hints, str) else hints,
        **more,
    )


def made(name: str, exit_code: int, says: str | tuple[str, ...], make: Callable[[Place], Args], **more: Any) -> Case:
    return case(name, exit_code, says, make=make, **more)


def environment(variable: str, value: str, *args: str, hints: str | tuple[str, ...] = ()) -> Case:
    def make(place: Place) -> Args:
        place.env(**{variable: value})
        return args or ("ls",)

    says = "tpu" if value == "tpu" else (variable, value)
    return made(f"{variable}={value}", 2, says, make, hints=hints, has_hint=bool(hints))


def corrupt_gguf(place: Place) -> Args:
    return "run", place.write("bad.gguf", b"GGUF\x03\0\0\0" + b"\xff" * 64), "hi"


def not_a_gguf(place: Place) -> Args:
    return "run", place.write("web.gguf", "<!DOCTYPE html><html>not found</html>"), "hi"


def pickle_file(place: Place) -> Args:
    return "import", place.write("pytorch_model.bin", b"\x80\x04.")


def pickle_folder(place: Place) -> Args:
    folder = place.copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "import", str(folder)


def bad_config(place: Place) -> Args:
    folder = place.copy()
    (folder / "config.json").write_text('{"architectures": [')
    return "run", str(folder), "hi"


def truncated_safetensors(place: Place) -> Args:
    weights = place.copy() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return "run", str(weights.parent), "hi"


def no_tokenizer(place: Place) -> Args:
    folder = place.copy()
    (folder / "tokenizer.json").unlink()
    return "run", str(folder), "hi"


def bad_tokenizer(place: Place) -> Args:
    folder = place.copy()
    (folder / "tokenizer.json").write_text('{"model": 3}')
    return "run", str(folder), "hi"


def untemplated(*more: str) -> Callable[[Place], Args]:
    def make(place: Place) -> Args:
        folder = place.copy()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return (more[0], str(folder), *more[1:])

    return make


def home_is_a_file(place: Place) -> Args:
    place.env(LLMASOS_HOME=place.write("afile", ""))
    return ("ls",)


def home_cannot_be_made(place: Place) -> Args:
    place.env(LLMASOS_HOME=place.write("afile", "") + "/home")
    return "import", str(place.model)


def broken_settings(text: str) -> Callable[[Place], Args]:
    def make(place: Place) -> Args:
        place.env(LLMASOS_HOME=str(Path(place.write("home2/config.toml", text)).parent))
        return ("ls",)

    return make


def name_is_taken(place: Place) -> Args:
    home = Path(os.environ["LLMASOS_HOME"])
    shutil.copytree(place.model, home / "models" / "tiny")
    return "import", str(place.model), "--name", "tiny"


def damaged_card(place: Place) -> Args:
    folder = Path(os.environ["LLMASOS_HOME"]) / "models" / "tiny"
    shutil.copytree(place.model, folder)
    (folder / "llmasos.json").write_text("{")
    return "plan", "tiny"


def full_disk(place: Place) -> Args:
    def copyfile(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.patch.setattr(shutil, "copyfile", copyfile)
    return "import", str(place.model), "--copy"


def unreadable_file(place: Place) -> Args:
    def denied(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    place.patch.setattr(Path, "write_text", denied)
    return "chat", str(place.model)


BASE = ("{model}", "hi")
CASES = [
    # models
    case("unknown model", 3, "nosuchmodel", "run", "nosuchmodel", "hi", hints="llmasos search"),
    case("misspelt model", 3, "smolm2", "run", "smolm2", "hi", hints="smollm2"),
    case("missing path", 3, "/no/such.gguf", "run", "file:/no/such.gguf", "hi"),
    case("import of a missing path", 3, "/no/such", "import", "/no/such"),
    case("rm of an unknown model", 3, "nosuchmodel", "rm", "nosuchmodel", "--yes", hints="llmasos ls"),
    case("show of an unknown model", 3, "nosuchmodel", "show", "nosuchmodel"),
    case("verify of an unknown model", 3, "nosuchmodel", "verify", "nosuchmodel"),
    case("repository without owner", 2, "hf:noslash", "pull", "hf:noslash", hints="hf:owner/name"),
    case("address of no model", 2, "model.zip", "pull", "https://host/model.zip", hints="hf:owner/name"),
    case("wheel without version", 2, "pypi:thing", "pull", "pypi:thing", hints="pypi:project==version"),
    case("name that is no folder's", 2, "../up", "import", "{model}", "--name", "../up"),
    case("pin of the wrong length", 2, "sha256=12", "pull", "https://host/m.gguf#sha256=12", hints="64 hex"),
    made("name that is taken", 5, "tiny", name_is_taken, hints="--name"),
    made("damaged card", 4, "tiny", damaged_card, hints="llmasos rm tiny"),
    case("copy and link", 2, ("--copy", "--link"), "import", "{model}", "--copy", "--link"),
    case("no network", 6, "acme/tiny", "pull", "hf:acme/tiny"),
    # files
    made("corrupt GGUF", 4, "bad.gguf", corrupt_gguf),
    made("web page named .gguf", 4, "web.gguf", not_a_gguf),
    made("pickle file", 4, ("pytorch_model.bin", "pickle"), pickle_file, hints="safetensors"),
    made("pickle folder", 4, ("pytorch_model.bin", "pickle"), pickle_folder, hints="safetensors"),
    made("bad JSON", 4, "config.json", bad_config),
    made("truncated safetensors", 4, "model.safetensors", truncated_safetensors),
    made(
        "unknown architecture", 4, "FooForCausalLM", lambda p: ("run", p.config(architectures=["FooForCausalLM"]), "x")
    ),
    made("sizes that do not match", 4, "[96, 32]", lambda p: ("run", p.config(intermediate_size=48), "x")),
    made("no tokenizer", 3, "tokenizer", no_tokenizer),
    made("bad tokenizer", 4, "tokenizer.json", bad_tokenizer),
    made("full disk", 5, "full", full_disk, hints="llmasos rm"),
    # the line
    case("unknown command", 2, "chatt", "chatt", hints="llmasos chat"),
    case("unknown option", 2, "--temperatur", "run", *BASE, "--temperatur", "1", hints="--temperature"),
    case("unknown option of the whole", 2, "--frob", "--frob", hints="--help"),
    case("word for a number", 2, ("--max-tokens", "'abc'"), "run", *BASE, "--max-tokens", "abc", hints="run --help"),
    case("fraction for a count", 2, ("--top-k", "1.5"), "run", *BASE, "--top-k", "1.5"),
    case("option without value", 2, "--max-tokens", "run", *BASE, "--max-tokens"),
    case("option given twice", 2, "--top-k", "run", *BASE, "--top-k", "1", "--top-k", "2"),
    case("missing argument", 2, "MODEL", "pull", hints="pull --help"),
    case("argument too many", 2, "extra", "show", "gpt2", "extra"),
    case("unknown shell", 2, "tcsh", "completion", "tcsh", hints="completion --help"),
    # values
    case("negative temperature", 2, "temperature=-1", "run", *BASE, "--temperature", "-1", has_hint=False),
    case("top_p above 1", 2, "top_p=1.5", "run", *BASE, "--top-p", "1.5", has_hint=False),
    case(
        "temperature that is no number", 2, "temperature=nan", "chat", "{model}", "--temperature", "nan", has_hint=False
    ),
    case("more answers than beams", 2, "n=3", "run", *BASE, "--n", "3", "--num-beams", "2", has_hint=False),
    case("empty stop", 2, "stop", "run", *BASE, "--stop", "", has_hint=False),
    case("empty prompt", 2, "prompt is empty", "run", "{model}", ""),
    case("empty pipe", 2, "prompt is empty", "run", "{model}", stdin=" \n"),
    case("prompt of broken bytes", 2, "UTF-8", "run", "{model}", "caf\udce9", has_hint=False),
    case("over-long prompt", 2, "256", "run", "{model}", "word " * 400, hints="Shorten"),
    case("too many new tokens", 2, ("5000", "256"), "run", *BASE, "--max-tokens", "5000", hints="at most"),
    case("unknown dtype", 2, "float12", "run", *BASE, "--dtype", "float12", hints="bfloat16"),
    case("unknown quantization", 2, "int3", "run", *BASE, "--quantization", "int3", hints="int8"),
    case("unknown device", 2, "abacus", "run", *BASE, "--device", "abacus", hints="cuda"),
    case("device that is not here", 7, "xpu", "run", *BASE, "--device", "xpu", hints="doctor"),
    case("context of nothing", 2, "0", "plan", "{model}", "--context", "0"),
    case("context beyond the model's", 2, ("99999", "256"), "plan", "{model}", "--context", "99999", hints="256"),
    case("no requests at once", 2, "0 requests", "plan", "{model}", "--concurrency", "0"),
    case("rm without a terminal", 2, "gone", "rm", "gone", make=lambda p: _installed(p, "gone"), hints="--yes"),
    # the engine
    case("no sequences", 2, "max_num_seqs=0", "serve", "{model}", "--max-num-seqs", "0", has_hint=False),
    case(
        "share above 1",
        2,
        "gpu_memory_utilization=1.5",
        "run",
        *BASE,
        "--gpu-memory-utilization",
        "1.5",
        has_hint=False,
    ),
    case(
        "unknown kind of keys", 2, ("--kv-cache-dtype", "int3", "int8"), "chat", "{model}", "--kv-cache-dtype", "int3"
    ),
    case("page of an odd size", 2, "page_size=24", "run", *BASE, "--page-size", "24", has_hint=False),
    case("context beyond the model", 2, ("999", "256"), "run", *BASE, "--max-model-len", "999", hints="at most 256"),
    case("too few pages", 7, "256 tokens", "run", *BASE, "--kv-cache-memory", "100", hints="max_model_len"),
    case("too many guesses", 2, "num_speculative_tokens=99", "run", *BASE, "--speculative-ngram", "99", has_hint=False),
    case(
        "two ways to guess",
        2,
        "--speculative-model",
        "run",
        *BASE,
        "--speculative-ngram",
        "4",
        "--speculative-model",
        "gpt2",
    ),
    case("unknown model to guess", 3, "nosuchmodel", "run", *BASE, "--speculative-model", "nosuchmodel"),
    case("engine of an API", 2, "max_num_seqs", "run", "openai:gpt-4.1", "hi", "--max-num-seqs", "4", hints="local"),
    case("missing adapter", 3, "no/such", "run", *BASE, "--adapter", "no/such", hints="PEFT"),
    case("adapter of an encoder", 2, "encoder", "run", "{encoder}", "hi", "--adapter", "x"),
    case("adapter without a name", 2, "./mine", "serve", "{model}", "--adapter", "./mine", hints="--adapter"),
    case("adapter of two models", 2, "several", "serve", "{model}", "{encoder}", "--adapter", "a=b", "--port", "0"),
    # kinds of model
    made("chat without template", 2, "chat template", untemplated("chat"), hints="llmasos run"),
    made("system text without template", 2, "--system", untemplated("run", "hi", "--system", "x")),
    case("system text and raw", 2, "--system", "run", *BASE, "--raw", "--system", "x"),
    case("chat with an encoder", 2, "makes embeddings", "chat", "{encoder}", hints="llmasos task embed"),
    case("provider without key", 6, "OPENAI_API_KEY", "run", "openai:gpt-4.1", "hi", hints="export OPENAI_API_KEY"),
    case("provider without model", 2, "openai:", "run", "openai:", "hi", hints="openai:MODEL"),
    case("missing conversation", 3, "none.json", "chat", "{model}", stdin="/load none.json\n"),
    made("unwritable conversation", 5, "/x.json", unreadable_file, stdin="/save /x.json\n"),
    case("unknown word in a chat", 2, "/frob", "chat", "{model}", stdin="/frob\n", hints="/help"),
    # serving
    case("host that others reach", 8, "0.0.0.0", "serve", "{model}", "--host", "0.0.0.0", hints="--insecure"),
    case(
        "host that is not",
        8,
        "no.such.host.invalid",
        "serve",
        "{model}",
        "--host",
        "no.such.host.invalid",
        "--insecure",
    ),
    case("serving a remote model", 2, "openai:gpt-4.1", "serve", "openai:gpt-4.1", "--port", "0"),
    # settings
    environment("LLMASOS_OFFLINE", "maybe", hints="LLMASOS_OFFLINE=1"),
    environment("LLMASOS_LANG", "xx", "--help", hints="zh"),
    environment("LLMASOS_THREADS", "many"),
    environment("LLMASOS_LOG_LEVEL", "loud", hints="debug"),
    environment("LLMASOS_DEVICE", "tpu", "run", "{model}", "hi", hints="cuda"),
    made("home that is a file", 2, ("LLMASOS_HOME", "afile"), home_is_a_file),
    made("home that cannot be made", 5, "afile", home_cannot_be_made),
    made("config.toml that is no TOML", 2, "config.toml", broken_settings("home = ")),
    made("setting that is unknown", 2, "'colour'", broken_settings('colour = "red"'), hints="device"),
]


def _installed(place: Place, name: str) -> Args:
    shutil.copytree(place.model, Path(os.environ["LLMASOS_HOME"]) / "models" / name)
    return "rm", name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_wrong_input_is_answered(cli: Cli, place: Place, case: Case) -> None:
    args = case.make(place) if case.make else case.args
    filled = [arg.format(model=place.model, encoder=place.encoder) if "{" in arg else arg for arg in args]
    result = cli(*filled, stdin=case.stdin)
    assert result.code == case.exit_code, result
    check(result, case.says, case.hints, has_hint=case.has_hint)


def check(result: Result, says: tuple[str, ...], hints: tuple[str, ...] = (), *, has_hint: bool = True) -> None:
    lines = result.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.err, result.err
    assert "unexpected" not in errors[0]
    for word in says:
        assert word in errors[0]
    hint = [line for line in lines if line.startswith("hint: ")]
    assert len(hint) == has_hint, result.err
    for word in hints:
        assert word in hint[0]


def test_there_are_thirty_and_no_two_alike() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 30


def test_offline_asks_nobody(cli: Cli, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """But this machine, whose servers are not the outside."""
    web.add_repo("acme/tiny", tiny_repo())
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example.org")
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    for args in (["pull", "acme/tiny"], ["plan", "acme/tiny"], ["run", "acme/tiny", "hi"]):
        result = cli(*args)
        assert result.code == 6
        check(result, ("acme/tiny", "offline"), ("LLMASOS_OFFLINE",))
    assert web.requests == []


def test_a_port_in_use_is_named_with_another(cli: Cli, tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cli("serve", str(tiny_model), "--port", str(port))
    assert result.code == 8
    check(result, (str(port), "in use"), (f"--port {port + 1}",))


def test_a_download_that_does_not_fit_on_the_disk_is_not_begun(
    cli: Cli, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    monkeypatch.setattr(sys.modules["llmasos.store.plan"], "disk_free", lambda path: 1000)
    result = cli("pull", "acme/tiny")
    assert result.code == 5
    check(result, ("disk", "1.0 kB"), ("--force",))
    assert len(web.asked(f"/acme/tiny/resolve/{'c0ffee' + '0' * 34}/model.safetensors")) <= 1, "only the header"
    assert files


def test_a_model_that_does_not_fit_into_memory_is_not_begun_unless_forced(
    cli: Cli, web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    monkeypatch.setattr("llmasos.devices.free_memory", lambda device="cpu": 10_000)
    for args in (["pull", "acme/tiny"], ["run", "acme/tiny", "hi"]):
        result = cli(*args)
        assert result.code == 7
        check(result, ("10.0 kB",), ("--force",))
    assert cli("plan", "acme/tiny").code == 7
    assert not (home / "models").exists()
    assert cli("pull", "acme/tiny", "--force").code == 0
    assert (home / "models" / "acme--tiny").is_dir()


def test_a_disk_that_fills_up_leaves_the_library_as_it_was(
    cli: Cli, web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if self.suffix == ".part" and "b" in mode and mode != "rb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    result = cli("pull", "acme/tiny")
    assert result.code == 5
    check(result, ("full",), ("llmasos rm",))
    assert not list((home / "models").glob("*")) if (home / "models").exists() else True


def test_a_wrong_checksum_is_refused(cli: Cli, web: Web, home: Path) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    body = bytearray(files["model.safetensors"].body)
    body[-1] ^= 1
    files["model.safetensors"].body = bytes(body)
    result = cli("pull", "acme/tiny")
    assert result.code == 5
    check(result, ("model.safetensors", "SHA-256"), ("repeat",))


def test_a_changed_file_fails_verification(cli: Cli, tiny_model: Path, home: Path) -> None:
    cli("import", str(tiny_model), "--name", "tiny", "--copy")
    weights = home / "models" / "tiny" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (home / "models" / "tiny" / "tokenizer.json").unlink()
    result = cli("verify", "tiny", "--json")
    assert result.code == 5
    assert result.json[0]["changed"] == ["model.safetensors"] and result.json[0]["missing"] == ["tokenizer.json"]
    shown = cli("verify")
    assert shown.code == 5 and "NOT" in shown.out and "llmasos rm tiny" in shown.err


class Broken(io.TextIOWrapper):
    """A pipe whose bytes are no UTF-8."""

    def isatty(self) -> bool:
        return False


def test_a_pipe_of_broken_bytes_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmasos.cli import main

    monkeypatch.setattr("sys.stdin", Broken(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert main(["run", str(tiny_model)]) == 2
    check(Result(2, *capsys.readouterr()), ("UTF-8",), has_hint=False)


@pytest.mark.parametrize(
    "args", [["run", "x" * 5000, "hi"], ["show", "a/b/c"], ["pull", "\0"], ["import", "\0"], ["rm", "."]]
)
def test_odd_names_are_answered_too(cli: Cli, args: list[str]) -> None:
    result = cli(*args)
    assert result.code in (2, 3)
    check(result, ())


@pytest.fixture(autouse=True)
def close_connections() -> Iterator[None]:
    yield
    if "llmasos.store.transfer" in sys.modules:
        sys.modules["llmasos.store.transfer"].close_clients()
