"""Imports point one way: a module imports only modules named before it in ORDER (its own package aside)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ORDER = [
    "errors",
    "settings",
    "client",
    "devices",
    "formats",
    "text",
    "models",
    "store",
    "data",
    "inference",
    "model_zoo",
    "tasks",
    "lab",
    "train",
    "apps",
    "serve",
    "cli",
]
PACKAGE = Path(__file__).parent.parent / "src" / "llmasos"


def imports_of(path: Path) -> set[str]:
    """First-level llmasos modules that a file imports anywhere, including inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            if node.module == "llmasos":
                found |= {alias.name for alias in node.names if alias.name in ORDER}
            elif node.module and node.module.startswith("llmasos."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("llmasos.")}
    return found


def files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_floors(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if relative.name == "__main__.py" and len(relative.parts) == 1:
        return  # python -m llmasos: the door itself
    room = relative.parts[0].removesuffix(".py")
    assert room in ORDER, f"{relative}: {room} is not a room of the house"
    allowed = set(ORDER[: ORDER.index(room) + 1])
    assert imports_of(path) <= allowed, f"{relative} imports {sorted(imports_of(path) - allowed)} from above its floor"


@pytest.mark.parametrize(
    "statement",
    ["import llmasos", "import llmasos.errors, llmasos.settings", "import llmasos.client", "import llmasos.cli"],
)
def test_the_ground_loads_no_torch(statement: str) -> None:
    code = f"{statement}\nimport sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
