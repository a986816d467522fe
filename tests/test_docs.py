"""README and docs: every Python block runs, every `llmasos` line parses, tables equal the code, zh equals en."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
import types
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import httpx
import pytest
import served as applications

from doc_examples import (
    PAGES,
    ROOT,
    SERVED,
    Block,
    Curl,
    anchors,
    blocks,
    code,
    commands,
    curls,
    headings,
    links,
    live_server,
    prose,
    rows,
    shown_output,
    visit,
    without_comments,
    write_tiny_models,
)
from llmasos.apps import Application
from llmasos.cli.app import build
from llmasos.cli.commands import COMMANDS, Command
from llmasos.cli.run import is_prompt
from llmasos.client import Client
from llmasos.client import types as wire
from llmasos.client.providers.table import PROVIDERS
from llmasos.errors import LLMasOSError
from llmasos.inference.config import EngineConfig
from llmasos.inference.request import SamplingParams
from llmasos.models.families import known_architectures
from llmasos.models.families.gguf import known_gguf_architectures
from llmasos.serve.access.routes import RULES, rule_for
from llmasos.serve.config import ServeConfig, flag_of
from llmasos.serve.config import flags as server_flags
from llmasos.settings import APP_HOST_VARIABLES, Settings, settings
from llmasos.store import import_model, resolve
from tiny import write_tiny_adapter

READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
FILES = [*READMES, ROOT / "CONTRIBUTING.md", *PAGES]
LANGUAGES = ("en", "zh")
DOORS = (
    """\
from llmasos.model_zoo import get_model
from llmasos.inference import generate_text
model = get_model("gpt2")
print(generate_text(model, "The quick brown fox jumps over the lazy dog.", max_length=50))
""",
    """\
from llmasos import LLM
model = LLM.from_pretrained("gpt2")
text = model.generate(prompt="The quick brown fox", max_length=50, num_beams=5)
""",
    """\
from llmasos import LLM, Application
model = LLM.from_pretrained("gpt2")
app = Application(model)
@app.route("/ask")
def ask(question):
    answer = model.generate_text(question, max_length=100)
    return answer
app.run()
""",
)
"""The public doors: promised to run exactly as written."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def page(language: str, name: str) -> str:
    return (ROOT / "docs" / language / name).read_text(encoding="utf-8")


# the examples run


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def served(tiny_models: dict[str, Path]) -> Iterator[dict[str, Any]]:
    from llmasos.inference.llm import LLM
    from llmasos.models.load import load_model

    llms = {name: LLM(load_model(tiny_models[name], device="cpu", dtype="float32"), name=name) for name in SERVED}
    yield llms
    for llm in llms.values():
        llm.close()


@pytest.fixture
def server(served: dict[str, Any], home: Path) -> Iterator[str]:
    """A server of its own for every page: its files and keys are in the test's home."""
    with live_server(served) as url:
        yield url
    for llm in served.values():  # what a page trained or loaded is not there for the next one
        for adapter in llm.adapters:
            llm.unload_adapter(adapter.name)


def is_run(path: Path) -> bool:
    """Not the Chinese pages: their code is that of the English ones, which another test holds."""
    return "zh" not in path.relative_to(ROOT).as_posix()


RUN = [p for p in FILES if is_run(p) and blocks(p.read_text(encoding="utf-8"), "python")]


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_the_python_blocks_run(
    path: Path,
    tiny_models: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, folder in tiny_models.items():
        import_model(folder, name=name)
    write_tiny_adapter(settings().home / "adapters" / "poems")
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(Application, "run", visit)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    module = types.ModuleType("documented_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        source = block.text
        with contextlib.ExitStack() as stack:
            if "AppClient(" in source:  # the application above, which its page runs
                source = source.replace("http://127.0.0.1:8000", stack.enter_context(applications.served(module.app)))
            elif "127.0.0.1:8000" in source:
                source = source.replace("http://127.0.0.1:8000", request.getfixturevalue("server"))
            capsys.readouterr()
            exec(compile("\n" * (block.line - 1) + source, str(path), "exec"), module.__dict__)
        printed = capsys.readouterr().out.splitlines()
        for line in shown_output(block):
            assert line in printed, f"{name_of(path)}:{block.line} shows {line!r} and prints {printed}"


def curl_lines(path: Path) -> list[Curl]:
    return [curl for block in blocks(path.read_text(encoding="utf-8"), "bash") for curl in curls(block)]


ASKING = [p for p in FILES if is_run(p) and curl_lines(p) and p.name != "applications.md"]
"""Pages whose `curl` lines ask a server; those of applications ask the application before them."""


@pytest.mark.parametrize("path", ASKING, ids=name_of)
def test_the_curl_lines_are_answered(path: Path, server: str) -> None:
    adapter = write_tiny_adapter(settings().home / "adapters" / "poems")
    for curl in curl_lines(path):
        body = curl.body.replace("/adapters/poems", str(adapter)) if curl.body else None
        url = curl.url.replace("http://127.0.0.1:8000", server)
        answer = httpx.request(curl.method, url, headers=curl.headers, content=body, timeout=60)
        assert answer.status_code == 200, f"{curl.url}: {answer.text}"


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_the_readmes_open_with_the_public_doors(path: Path) -> None:
    python = [block.text for block in blocks(path.read_text(encoding="utf-8"), "python")]
    assert python[:3] == list(DOORS)


# the shell lines and the command line's page


def shell_lines() -> list[tuple[str, list[str]]]:
    return [
        (f"{name_of(path)}:{block.line}", words)
        for path in FILES
        for block in blocks(path.read_text(encoding="utf-8"), "bash")
        for words in commands(block)
    ]


def arguments(words: list[str]) -> dict[str, Any]:
    """What the parser makes of a command line. Raises one of its errors for a wrong one."""
    tokens = ["STDIN" if word == "-" else word for word in words]
    _, bound, _ = parser().parse_args(tokens, exit_on_error=False, print_error=False)
    return bound.arguments


@functools.cache
def parser() -> Any:
    return build(COMMANDS.values())


def test_every_command_line_is_understood() -> None:
    lines = shell_lines()
    for where, words in lines:
        try:
            arguments(words)
        except Exception as e:
            pytest.fail(f"{where}: llmasos {' '.join(words)}: {e}")
    assert {words[0] for _, words in lines} == set(COMMANDS), "a command without an example"


def test_every_model_that_a_command_line_would_fetch_is_known() -> None:
    found = set()
    lines = list(shell_lines())
    trained = {words[words.index("--name") + 1] for _, words in lines if words[0] == "train" and "--name" in words}
    for where, words in lines:
        if words[0] in ("run", "chat", "pull", "plan", "serve"):
            given = arguments(words)
            for model in (*given.get("models", ()), *filter(None, [given.get("model")])):
                if not is_prompt(model) and model not in trained:
                    assert resolve(model).sources, where
                    found.add(model)
    assert {"gpt2", "qwen3-0.6b", "smollm2-135m-instruct"} <= found


def flags(command: Command) -> set[str]:
    arguments = build([command])[command.name].assemble_argument_collection()
    return {name for argument in arguments for name in argument.names if name.startswith("--")}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_the_page_of_the_command_line_has_every_flag(language: str, command: Command) -> None:
    sections = re.split(r"^## ", prose(page(language, "cli.md")), flags=re.MULTILINE)
    [section] = [s for s in sections if s.split("\n", 1)[0] == command.name]
    documented = set(re.findall(r"`(--[a-z.-]+)", section))
    assert documented == flags(command)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_exit_codes_are_all_documented(language: str) -> None:
    section = page(language, "cli.md").rpartition("\n## ")[2]
    codes = {int(cells[0]) for cells in rows(section) if cells[0].isdigit()}
    assert codes == {0, 1, 130, 141} | {error.exit_code for error in errors()}


# tables that repeat what the code says


def errors() -> list[type[LLMasOSError]]:
    found = [LLMasOSError]
    for error in found:
        found += [sub for sub in error.__subclasses__() if sub.__module__ == "llmasos.errors"]
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_errors_is_that_of_the_code(language: str) -> None:
    table = {tuple(cells[:3]) for cells in rows(page(language, "python.md")) if cells[0].endswith("Error`")}
    assert table == {(f"`{e.__name__}`", str(e.exit_code), str(e.http_status)) for e in errors()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_sampling_parameters_is_that_of_the_code(language: str) -> None:
    section = page(language, "python.md").partition("\n## SamplingParams\n")[2].partition("\n## ")[0]
    fields = [
        [f"`{f.name}`", f"`{f.default!r}`" if f.default is not dataclasses.MISSING else "`{}`"]
        for f in dataclasses.fields(SamplingParams)
    ]
    assert [cells[:2] for cells in rows(section)[1:]] == fields


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_engine_options_is_that_of_the_code(language: str) -> None:
    fields = [[f"`{f.name}`", f"`{f.default!r}`"] for f in dataclasses.fields(EngineConfig)]
    found = [cells[:2] for cells in rows(page(language, "engine.md")) if len(cells) == 3]
    assert found[1:] == fields


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_server_options_is_that_of_the_code(language: str) -> None:
    section = page(language, "cli.md").partition("\n## serve\n")[2].partition("\n## ")[0]
    told = [[f"`{flag_of(flag.field)}`", flag.default, flag.help[language]] for flag in server_flags()]
    assert rows(section)[2:-1] == told


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_example_of_server_options_is_understood(language: str, tmp_path: Path) -> None:
    [example] = blocks(page(language, "cli.md"), "toml")
    file = tmp_path / "serve.toml"
    file.write_text(example.text, encoding="utf-8")
    config = ServeConfig.read(path=file, environ={})
    assert config.options_of("helper").reference == "all-minilm-l6-v2" and config.memory == {"cpu": 16 * 2**30}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_metrics_is_that_of_the_server(language: str) -> None:
    from llmasos.inference.host.status import ModelStatus
    from llmasos.serve.metrics import Metrics

    times = dict.fromkeys(("plan_error", "load_seconds", "last_used", "expires_at", "retry_at"))
    counts = dict.fromkeys(("num_replicas", "busy", "waiting", "keep_alive", "loads", "restarts"), 1)
    tables = {name: {"cpu": 1} for name in ("predicted_bytes", "measured_bytes", "evictions")}
    texts = dict.fromkeys(("why_evicted", "last_error"))
    one = ModelStatus("m", "m", "ready", (), pinned=False, **times, **counts, **tables, **texts)
    told = Metrics(dict, lambda: [one]).text().decode()
    named = {f"{name}_total" if kind == "counter" else name for name, kind in _METRIC.findall(told)}
    table = [cells for cells in rows(page(language, "server.md")) if len(cells) == 2]
    found = {name for cells in table for name in code(cells[0])}
    assert named == {name for name in found if " /" not in name}, "another table has routes"


_METRIC = re.compile(r"^# TYPE llmasos:(\w+?)(?:_total)? (\w+)$", re.MULTILINE)


def variables() -> set[str]:
    return {variable for option in dataclasses.fields(Settings) for variable in option.metadata["env"]}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_settings_is_that_of_the_code(language: str) -> None:
    section = page(language, "configuration.md").split("\n## ")[1]
    table = {code(cells[0])[0]: cells[1:] for cells in rows(section)[1:]}
    assert list(table) == [option.name for option in dataclasses.fields(Settings)]
    for option in dataclasses.fields(Settings):
        environment, default, meaning = table[option.name]
        assert code(environment) == list(option.metadata["env"])
        if isinstance(option.default, bool | int) or option.default in ("auto", "warning"):
            assert default == f"`{str(option.default).lower()}`"
        assert meaning == option.metadata["help"] or language == "zh"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_environment_variable_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = set(re.findall(r"\b(?:[A-Z]+|LLMasOS)(?:_[A-Z]+)+\b", text))
    keys = {f"{name.upper()}_API_KEY" for name in (*PROVIDERS, "llmasos")}
    others = {"HF_ENDPOINT"}  # huggingface_hub's own
    others |= {"OMP_NUM_THREADS", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"} & found  # OpenMP's and pip's
    clients = {"ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "OLLAMA_HOST", "OLLAMA_API_KEY"}
    trackers = {"MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT"}
    words = {"INVALID_JSON", "LLMASOS_SERVE", "START_THINKING", "TOOL_CALLS"}
    others |= (clients | trackers | words | set(APP_HOST_VARIABLES.values())) & found
    others |= {f"LLMASOS_SERVE_{option.name.upper()}" for option in dataclasses.fields(ServeConfig)} & found
    assert found <= variables() | keys | others
    if path.name == "configuration.md":
        assert found == variables() | keys | others


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_of_models_has_every_architecture(language: str) -> None:
    text = page(language, "models.md")
    table = [cells[1] for cells in rows(text) if len(cells) == 2]
    documented = [name for cell in table for name in code(cell) if re.match(r"[A-Z]\w+", name)]
    assert sorted(documented) == sorted(known_architectures())
    [paragraph] = [p for p in prose(text).split("\n\n") if "`general.architecture`" in p]
    assert sorted(code(paragraph)) == sorted({"general.architecture", *known_gguf_architectures()})


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_of_the_api_has_every_parameter(language: str) -> None:
    table = [cells for cells in rows(page(language, "api.md")) if len(cells) == 2]
    documented = {name for _, cell in table for name in code(cell)}
    models = (wire.ChatCompletionRequest, wire.CompletionRequest, wire.EmbeddingRequest, wire.StreamOptions)
    fields = {name for model in models for name in (*model.model_fields, *model.UNSUPPORTED)}
    assert fields <= documented


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_of_the_sdk_has_every_method(language: str) -> None:
    table = [cells[0] for cells in rows(page(language, "sdk.md"))[1:]]
    documented = {name for cell in table for name in code(cell)}
    with Client() as client:
        names = ("responses", "conversations", "files", "batches", "fine_tuning", "access", "agents", "native")
        names += ("jobs", "tasks", "knowledge", "packages")
        groups = {name: getattr(client, name) for name in names}
        methods = {f"{name}.{method}" for name, group in groups.items() for method in public_methods(group)}
        assert documented == methods | set(public_methods(client)) - {"close"}


def public_methods(thing: object) -> list[str]:
    return [name for name in dir(thing) if not name.startswith("_") and inspect.ismethod(getattr(thing, name))]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_of_who_may_call_what_is_that_of_the_code(language: str) -> None:
    levels: list[tuple[str, bool]] = [("open", False), ("any", False), ("inference", True), ("inference", False)]
    levels += [("publish", False), ("manage", False), ("metrics", False)]
    table = [row for row in rows(page(language, "access.md")) if len(row) == 2 and re.search(r"`\S+ /", row[1])]
    patterns = [(name, level) for row, level in zip(table, levels, strict=True) for name in code(row[1])]
    used = set()
    for rule in RULES:
        fits = [(name, level) for name, level in patterns if fnmatchcase(f"{rule.method} {rule.path}", name)]
        assert fits, rule
        name, level = fits[0]
        assert level == (rule.access, rule.counted), rule
        used.add(name)
    assert used == {name for name, _ in patterns}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_route_that_is_named_exists(path: Path) -> None:
    for span in code(prose(path.read_text(encoding="utf-8"))):
        if found := re.fullmatch(r"(GET|POST|PUT|PATCH|DELETE) (/[^*?]*)(\?.*)?", span):
            assert path.name == "applications.md" or rule_for(found[1], found[2]), span


# two languages, one text


def pairs() -> list[tuple[Path, Path]]:
    names = sorted(p.name for p in (ROOT / "docs" / "en").glob("*.md"))
    return [(READMES[0], READMES[1]), *((ROOT / "docs/en" / n, ROOT / "docs/zh" / n) for n in names)]


def test_both_languages_have_the_same_pages() -> None:
    english, chinese = ({p.name for p in PAGES if p.parent.name == language} for language in LANGUAGES)
    assert english == chinese and len(english) == 22


@pytest.mark.parametrize(("english", "chinese"), pairs(), ids=lambda p: p.name)
def test_both_languages_have_the_same_structure(english: Path, chinese: Path) -> None:
    ours, theirs = english.read_text(encoding="utf-8"), chinese.read_text(encoding="utf-8")
    assert headings(ours) == headings(theirs)
    assert [shape(block) for block in blocks(ours)] == [shape(block) for block in blocks(theirs)]
    assert [len(cells) for cells in rows(ours)] == [len(cells) for cells in rows(theirs)]
    assert re.search(r"[\u4e00-\u9fff]", prose(theirs))


def shape(block: Block) -> tuple[str, str]:
    """What a translation may not change: language and code. A drawing's words are translated."""
    return block.language, "" if block.language == "text" else without_comments(block)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in links(path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(ROOT) and target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link
