"""Finding an application in a file, a module or among the installed ones, without starting its server.

    app.py    app.py:name    FOLDER with a llmasos.toml    package.module    package.module:name
    NAME of an installed one

An installed application's name goes before a folder's, and that before a module's. Its code then runs in this process,
with its user's rights.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from llmasos.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from llmasos.apps.application import Application

is_loading: ContextVar[bool] = ContextVar("is_loading", default=False)
"""`app.run()` at the end of a file does nothing while the file is read for its application."""


def load_application(reference: str) -> Application:
    """The application that `reference` names, or the only one there is.

    Raises NotFoundError for a file, module or name that is not there, InvalidInputError for none or several,
    UnsupportedError if an installed one needs packages that are not here, and what the file raises.
    """
    from llmasos.apps.application import Application

    place, name = _split(_installed(reference))
    with _reading():
        module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    found = {key: value for key, value in vars(module).items() if isinstance(value, Application)}
    if name:
        if name not in found:
            raise NotFoundError(f"{place} has no application {name!r}.", hint=_known(found))
        return found[name]
    if len({id(value) for value in found.values()}) != 1:
        what = "several applications" if found else "no application"
        raise InvalidInputError(f"{place} has {what}.", hint=_known(found))
    return next(iter(found.values()))


def _installed(reference: str) -> str:
    """The file and name that an installed application's name or a folder stands for; any other reference as it is."""
    from llmasos.store.packages import Apps, read_manifest
    from llmasos.store.packages.requirements import check_importable

    if not Apps().has(reference):
        folder = Path(reference).expanduser()
        is_one = (folder / "llmasos.toml").is_file()
        return str(folder / read_manifest(folder).app.entry) if is_one else reference
    found = Apps().get(reference)
    check_importable(found.folder, f"{found.name} {found.version}")
    return found.entry


def _known(found: dict[str, Application]) -> str:
    return f"It has {', '.join(found)}: write file.py:name." if found else "Write app = Application() in it."


def _split(reference: str) -> tuple[str, str]:
    place, colon, name = reference.rpartition(":")
    return (place, name) if colon and name.isidentifier() else (reference, "")


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    token = is_loading.set(True)
    try:
        yield
    finally:
        is_loading.reset(token)


def _from_file(path: Path) -> ModuleType:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise NotFoundError(f"There is no file {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and type hints look their module up
    sys.path.insert(0, str(path.parent))  # it may import its neighbours, as when it is run
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _from_name(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is None or not (name == e.name or name.startswith(f"{e.name}.")):
            raise
        raise NotFoundError(
            f"There is no application and no module {name!r}.",
            hint="`llmasos app ls` shows what is installed; a file is named with its ending: app.py",
        ) from e
