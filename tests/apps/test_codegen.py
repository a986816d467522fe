"""Written clients: the same results as every surface, and types that say what the routes say."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from served import served
from six_routes import CALLS, app

from llmasos.apps import Application
from llmasos.apps.codegen import javascript_client, python_client

JS = Path(__file__).parents[2] / "js"
NODE = shutil.which("node")


def module_of(source: str, folder: Path, name: str):
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_python_client_gives_what_every_surface_gives(tmp_path: Path) -> None:
    module = module_of(python_client(app.document()), tmp_path, "six_client")
    with served(app) as url, module.SixRoutes(url) as client:
        for name, values, result in CALLS:
            found = getattr(client, name)(**values)
            if app.find(name).streams:
                found = "".join(found) if app.find(name).joins else list(found)
            assert found == result
        assert client.add(1, 40) == 41


def test_its_types_are_those_of_the_routes() -> None:
    source = python_client(app.document())
    for line in (
        "class Point(TypedDict):\n    x: float\n    y: NotRequired[float]\n",
        "class Box(TypedDict):\n    corners: list[Point]\n",
        "    def add(self, a: int, b: int = UNSET) -> int:\n",
        "words: str, style: Literal['plain', 'loud'] = UNSET) -> Generator[str, None, None]:",
        "    def note(self, name: str) -> dict[str, str] | None:\n",
        "    def stamp(self, picture: FileLike, name: str = UNSET) -> str:\n",
        "    def sizes(self, files: list[FileLike], note: FileLike | None = UNSET)",
        "    def greet(self, name: str, polite: bool = UNSET) -> str:\n",
    ):
        assert line in source
    assert source.count("class Point") == 1


def test_names_that_python_or_the_client_has_and_words_that_break_docstrings(tmp_path: Path) -> None:
    other = Application(title='A "quoted" \\ title')

    class Tree(dict):
        pass

    from pydantic import BaseModel, Field

    class Node(BaseModel):
        children: list["Node"] = []
        odd: int = Field(0, alias="odd-name")

    @other.route("/call")
    def call(from_: str = "", *, node: Node | None = None) -> Node | None:
        """Say \"\"\" and \\n: */ done."""
        return node

    source = python_client(other.document())
    module = module_of(source, tmp_path, "odd_client")
    assert "NotRequired[list[Node]]" in source
    with served(other) as url, module.AQuotedTitle(url) as client:
        assert client.call_(node={"children": [{}], "odd-name": 3})["odd-name"] == 3
        assert client.call_() is None
    assert "* /" in javascript_client(other.document())


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_javascript_client_gives_what_every_surface_gives(tmp_path: Path) -> None:
    source = javascript_client(app.document()).replace('"llmasos"', json.dumps((JS / "llmasos.js").as_uri()), 1)
    (tmp_path / "client.mjs").write_text(source, encoding="utf-8")
    calls = [(name, values, app.find(name).streams) for name, values, _ in CALLS]
    program = f"""
        import {{ SixRoutes }} from "./client.mjs";
        const client = new SixRoutes(process.argv[2], {{ maxRetries: 0 }});
        const found = [];
        for (const [name, values, streams] of {json.dumps(calls)}) {{
          const items = [];
          if (streams) for await (const item of client[name](values)) items.push(item);
          found.push(streams ? items : await client[name](values));
        }}
        console.log(JSON.stringify(found));
    """
    (tmp_path / "run.mjs").write_text(program, encoding="utf-8")
    with served(app) as url:
        done = subprocess.run([NODE, "run.mjs", url], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for found, (name, _, result) in zip(json.loads(done.stdout), CALLS, strict=True):
        assert ("".join(found) if name == "say" else found) == result


@pytest.mark.skipif(not (JS / "node_modules/typescript").exists(), reason="typescript is not installed in js/")
def test_typescript_reads_the_javascript_clients_types(tmp_path: Path) -> None:
    (tmp_path / "client.js").write_text(javascript_client(app.document()), encoding="utf-8")
    modules = tmp_path / "node_modules"
    modules.mkdir()
    (modules / "llmasos").symlink_to(JS)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "use.ts").write_text(
        'import { SixRoutes } from "./client.js";\nconst c = new SixRoutes();\n'
        "const n: number = await c.add({ a: 1 });\nfor await (const s of c.say({ words: 'a' })) s.toUpperCase();\n"
        "const b: { x: number }[] = (await c.box({ points: [{ x: 1 }] })).corners;\n"
        "// @ts-expect-error: a is a number\nawait c.add({ a: 'x' });\nexport { n, b };\n"
    )
    flags = "--noEmit --strict --allowJs --checkJs --target es2022 --module nodenext --lib es2022,dom,dom.iterable"
    command = [NODE, str(JS / "node_modules/typescript/bin/tsc"), *flags.split(), "use.ts"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout


def test_files_are_paths_and_blobs(tmp_path: Path) -> None:
    assert '@param {{ "picture": string | Blob; "name"?: string }} inputs' in javascript_client(app.document())
    module = module_of(python_client(app.document()), tmp_path, "files_client")
    file = tmp_path / "a.txt"
    file.write_text("hello")
    with served(app) as url, module.SixRoutes(url) as client:
        assert client.sizes([file, b"12"], note=file)[0] == {"name": "a.txt", "bytes": 5}
