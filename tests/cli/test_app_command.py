"""`llmasos app`: routes called from the command line give what every surface gives."""

import base64
import json
from pathlib import Path

import pytest
from cli_runner import Cli

from llmasos.apps import Application
from llmasos.apps.loading import load_application
from llmasos.cli.inputs import parse
from llmasos.errors import InvalidInputError

APPS = Path(__file__).parents[1] / "apps"
FILE = str(APPS / "six_routes.py")
GOLDEN = json.loads((APPS / "six_routes.json").read_text())
CALLS = [(name, values, result) for name, values, result in load_application(FILE).state.calls]


def words_of(values: dict) -> list[str]:
    """As flags, in any of the ways to write them."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{name}", one if isinstance(one, str) else json.dumps(one)]
    return words


@pytest.mark.parametrize(("name", "values", "result"), CALLS)
def test_a_call_gives_what_every_surface_gives(cli: Cli, name: str, values: dict, result: object) -> None:
    done = cli("app", "run", FILE, name, *words_of(values), "--json")
    assert (done.code, done.json, done.err) == (0, result, "")


def test_text_is_printed_as_text_and_all_else_as_json(cli: Cli) -> None:
    assert cli("app", "run", FILE, "say", "a b").out == "a b \n"
    assert cli("app", "run", FILE, "count", "2").out == "[\n  1,\n  2\n]\n"


def test_inputs_come_from_files_and_standard_input(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("你好", encoding="utf-8")
    assert cli("app", "run", FILE, "say", f"@{tmp_path / 'text'}").out == "你好 \n"
    assert cli("app", "run", FILE, "say", "@@home").out == "@home \n"
    assert cli("app", "run", FILE, "say", "-", stdin="from a pipe").out == "from a pipe \n"
    (tmp_path / "points.json").write_text('[{"x": 1}, {"x": 4, "y": 2}]')
    assert cli("app", "run", FILE, "box", f"@{tmp_path / 'points.json'}", "--json").json["area"] == 6


def test_files_are_inputs_and_results(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixel = dict(CALLS[-2][1])["picture"].partition(",")[2]
    (tmp_path / "a.png").write_bytes(base64.b64decode(pixel))
    monkeypatch.chdir(tmp_path)
    said = cli("app", "run", FILE, "stamp", "@a.png", "--name", "b.png", "--json").json
    assert said == f"data:image/png;name=b.png;base64,{pixel}"
    shown = cli("app", "run", FILE, "sizes", "@a.png", "@a.png", "--note", f"@{__file__}")
    assert shown.code == 2 and "at most 1,024 are taken" in shown.err
    table = cli("app", "run", FILE, "sizes", "@a.png", "@a.png").out.splitlines()
    assert [line.split() for line in table] == [["name", "bytes"], ["a.png", "70"], ["a.png", "70"]]
    missing = cli("app", "run", FILE, "stamp", "@none.png")
    assert missing.code == 2 and "none.png" in missing.err
    assert cli("app", "run", FILE, "stamp", f"@{__file__}").code == 2


def test_routes_and_their_inputs_are_shown(cli: Cli) -> None:
    assert "note    A note by its name" in cli("app", "show", FILE).out
    assert "--style plain|loud [plain]" in cli("app", "show", FILE, "say").out
    assert cli("app", "show", FILE, "--json").json == GOLDEN
    assert cli("app", "show", FILE, "add", "--json").json == GOLDEN["routes"][0]


def test_clients_are_written(cli: Cli) -> None:
    assert "class SixRoutes(AppClient):" in cli("app", "client", FILE).out
    assert "export class SixRoutes {" in cli("app", "client", FILE, "--language", "javascript").out


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["run", FILE], 2, "ROUTE is missing"),
        (["run", FILE, "sub"], 3, "Known: add, say"),
        (
            ["run", FILE, "add", "x"],
            2,
            'a: Input should be a valid integer, unable to parse string as an integer (given "x")',
        ),
        (["run", FILE, "add", "1", "2", "3"], 2, "'3' is one argument too many"),
        (["run", FILE, "add", "1", "--a", "2", "--a", "3"], 2, "--a was given twice"),
        (["run", FILE, "add", "--c", "2"], 2, "There is no option --c"),
        (["run", FILE, "add", "--a"], 2, "--a needs a value"),
        (["run", FILE, "box", "{"], 2, "points.0: Input should be"),
        (["run", FILE, "box", "[]"], 8, "box() failed: ValueError: no points"),
        (["run", FILE, "say", "@/none"], 2, "/none can't be read: No such file"),
        (["run", "/none.py", "add"], 3, "There is no file /none.py"),
        (["run", "no.such.module", "add"], 3, "There is no application and no module 'no.such.module'"),
        (["run", f"{FILE}:other", "add"], 3, "no application 'other'"),
        (["show", FILE, "add", "more"], 2, "'more' is one argument too many"),
        (["mcp", FILE, "add"], 2, "'add' is one argument too many"),
        (["fly", FILE], 2, "run, show, mcp, client"),
    ],
)
def test_wrong_lines_say_what_is_wrong(cli: Cli, line: list[str], code: int, words: str) -> None:
    done = cli("app", *line)
    assert (done.code, done.out) == (code, "")
    assert words in done.err


def test_a_file_that_runs_its_application_is_read_without_serving(tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "snippet_app.py"
    file.write_text(
        "from llmasos import Application\nimport neighbour_of_app\napp = Application()\n"
        "@app.on_start\ndef begin(): app.state.word = neighbour_of_app.WORD\n"
        '@app.route("/ask")\ndef ask(question): return f"{question} {app.state.word}"\napp.run()\n'
    )
    (tmp_path / "neighbour_of_app.py").write_text('WORD = "indeed"\n')
    assert cli("app", "run", str(file), "ask", "why").out == "why indeed\n"


def test_progress_is_for_people(tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "progress_app.py"
    file.write_text(
        "from llmasos.apps import Application, report_progress\napp = Application()\n"
        '@app.route("/work")\ndef work():\n    report_progress(0.5, "half")\n    return 1\n'
    )
    done = cli("app", "run", str(file), "work")
    assert (done.out, done.err) == ("1\n", "work: 50% half\n")


def test_several_applications_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "two_apps.py"
    file.write_text("from llmasos import Application\na = Application(title='A')\nb = Application(title='B')\nc = b\n")
    assert load_application(f"{file}:b").title == "B"
    with pytest.raises(InvalidInputError, match="several applications") as caught:
        load_application(str(file))
    assert "a, b, c" in caught.value.hint
    file.write_text("x = 1\n")
    with pytest.raises(InvalidInputError, match="no application"):
        load_application(str(file))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def (", "app.py:1: SyntaxError: invalid syntax"),
        ("import no_such_package_of_ours", "app.py:1: ModuleNotFoundError: No module named 'no_such_package_of_ours'"),
        ("import json\n\njson.loads('{')", "app.py:3: JSONDecodeError: Expecting property name"),
    ],
)
@pytest.mark.parametrize("action", ["run", "show"])
def test_what_is_wrong_with_its_file_is_its_authors(
    cli: Cli, tmp_path: Path, code: str, said: str, action: str
) -> None:
    file = tmp_path / "app.py"
    file.write_text(code)
    done = cli("app", action, str(file), "add")
    assert done.code == 8 and f"{file} can't be loaded: " in done.err and said in done.err
    assert "This is a bug" not in done.err and "Traceback" not in done.err


def test_a_folder_stands_for_what_its_manifest_names(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("app", "new", "hello").code == 0
    assert cli("app", "show", "hello").out == cli("app", "show", "hello/app.py").out != ""
    assert cli("app", "run", "hello", "ask").err == cli("app", "run", "hello/app.py", "ask").err.replace("/app.py", "")


def test_what_may_be_a_list_or_one_is_the_one_that_was_typed() -> None:
    either = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
    into = {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "object"}]}
    schema = {"properties": {"message": either, "into": into}}
    for word in ("Say hello", "123", "null", "{"):
        assert parse(schema, [word]) == {"message": word}
    assert parse(schema, ["--into", '{"type": "object"}']) == {"into": {"type": "object"}}
    assert parse(schema, ["--into", "city"]) == {"into": ["city"]}
    assert parse(schema, ["--into", "city", "--into", "year"]) == {"into": ["city", "year"]}
    assert parse(schema, ['[{"role": "user"}]']) == {"message": [{"role": "user"}]}
    assert parse(schema, ["--message", "a", "--message", "b"]) == {"message": ["a", "b"]}


def test_words_become_what_the_schema_says() -> None:
    app = Application()

    @app.route("/f")
    def f(
        text: str, number: float | None = None, flag: bool = False, anything=None, lists: list[list[int]] | None = None
    ) -> None: ...

    from llmasos.apps.document import describe_route

    schema = describe_route(app.routes[0])["input"]
    assert parse(schema, ["12"]) == {"text": "12"}
    assert parse(schema, ["--text=--x", "--number", "1e3"]) == {"text": "--x", "number": 1000.0}
    assert parse(schema, ["t", "--flag", "false"]) == {"text": "t", "flag": False}
    assert parse(schema, ["t", "--anything", '{"a": 1}'])["anything"] == {"a": 1}
    assert parse(schema, ["t", "--anything", "word"])["anything"] == "word"
    assert parse(schema, ["--lists", "[[1]]", "t"]) == {"text": "t", "lists": [[1]]}
    assert parse(schema, ["--flag", "--", "--text"]) == {"text": "--text", "flag": True}


def test_examples_hints_chats_and_schedules_are_shown(cli: Cli, tmp_path: Path) -> None:
    shown = cli("app", "show", FILE, "add").out
    assert "Hints: tool, read_only" in shown and shown.rstrip().endswith(f"app run {FILE} add --a 1 --b 2")
    assert "--files @FILE..." in cli("app", "show", FILE, "sizes").out
    file = tmp_path / "more.py"
    file.write_text(
        "from llmasos.apps import Application\n"
        "app = Application(title='More')\n"
        "app.chat(lambda messages: 'x')\n"
        "@app.schedule(every=60)\n"
        "def tidy():\n    'Tidy up.'\n"
        "@app.route('/x', examples=[{'words': ['a b', '@c'], 'loud': True, 'box': {'n': 1}}])\n"
        "def x(words: list[str], loud: bool, box: dict[str, int]): return [words, loud, box]\n"
    )
    shown = cli("app", "show", str(file)).out
    assert "app/more" in shown and "tidy  [every 60 s]  Tidy up." in shown
    line = cli("app", "show", str(file), "x").out.rstrip().splitlines()[-1]
    import shlex

    assert cli(*shlex.split(line)[1:], "--json").json == [["a b", "@c"], True, {"n": 1}]


def test_a_session_keeps_state_between_calls_and_the_background_ends_first(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "keeps.py"
    file.write_text(
        "from pathlib import Path\n"
        "from llmasos.apps import Application, Session\n"
        "app = Application(title='Keeps')\n"
        "@app.route('/n')\n"
        "def n(session: Session) -> int:\n"
        "    app.background(Path(__file__).with_name('done').write_text, 'x')\n"
        "    session['n'] = session.get('n', 0) + 1\n"
        "    return session['n']\n"
    )
    results = [
        cli("app", "run", *words, str(file), "n").out for words in (["--session", "me"], ["--session", "me"], [])
    ]
    assert results == ["1\n", "2\n", "1\n"]
    assert (tmp_path / "done").read_text() == "x"
    refused = cli("app", "show", "--session", "me", str(file))
    assert refused.code == 2 and "--session" in refused.err
