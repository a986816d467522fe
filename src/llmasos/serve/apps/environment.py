"""A Python environment for each version of an application: what its `requirements.lock` names and this one lacks, from
the package's own `wheels/`, or from the index where there is a network. Packages of this Python are there, too, and
read-only in the sandbox.

It lies in the cache, `<home>/cache/app-environments/NAME/VERSION/`, and is made anew where it is missing or made for
another Python. Only wheels are installed, and its Python is not started here once they are: what a package has
written into a `.pth` would run then, outside the sandbox.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from contextlib import suppress
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

import llmasos
from llmasos.errors import UnsupportedError
from llmasos.settings import settings
from llmasos.store.library import model_lock
from llmasos.store.packages import Installed
from llmasos.store.packages.requirements import LOCK_FILE, parse_requirements

INSTALL_SECONDS = 600
COMPILE_SECONDS = 300
_READY = "llmasos.json"
_INSTALLERS = (("uv", "pip"), (sys.executable, "-m", "uv", "pip"), (sys.executable, "-m", "pip"))


def folder_of(home: Path, name: str, version: str) -> Path:
    return home / "cache" / "app-environments" / name / version


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure(home: Path, app: Installed) -> Path:
    """Its Python. Blocking; made if it is not there. Raises UnsupportedError for packages that are not to be had."""
    folder = folder_of(home, app.name, app.version)
    wanted = lacking(app)
    made_for = _fingerprint(app, wanted)
    if _made_for(folder) != made_for:
        with model_lock(home, f"app-environment.{app.name}"):
            if _made_for(folder) != made_for:
                _make(folder, app, wanted)
                (folder / _READY).write_text(json.dumps({"made_for": made_for}), encoding="utf-8")
    return python_of(folder)


def remove(home: Path, name: str) -> None:
    """Those of all its versions."""
    shutil.rmtree(folder_of(home, name, "_").parent, ignore_errors=True)


def runtime_paths() -> tuple[Path, ...]:
    """Where this package and its packages are: on the path of every application."""
    own = Path(llmasos.__file__).resolve().parents[1]
    return tuple(dict.fromkeys((own, *(Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")))))


def lacking(app: Installed) -> list[Requirement]:
    """What the application's lock names and this Python does not have."""
    lock = app.folder / LOCK_FILE
    if not lock.is_file():
        return []
    found = parse_requirements(lock.read_bytes(), str(lock))
    return [one for one in found if (not one.marker or one.marker.evaluate()) and not _is_here(one)]


def _is_here(wanted: Requirement) -> bool:
    if canonicalize_name(wanted.name) == "llmasos":
        return True
    try:
        return wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def _fingerprint(app: Installed, wanted: list[Requirement]) -> str:
    sha256 = app.record.sha256 if app.record else ""
    facts = [sys.version, sys.base_prefix, *map(str, runtime_paths()), sha256, *map(str, wanted)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _made_for(folder: Path) -> str | None:
    try:
        found = json.loads((folder / _READY).read_bytes())["made_for"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and python_of(folder).exists() else None


def _make(folder: Path, app: Installed, wanted: list[Requirement]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    venv.EnvBuilder(symlinks=os.name != "nt", with_pip=False).create(folder)
    # behind the application's own packages
    (_packages(folder) / "llmasos-runtime.pth").write_text(
        "".join(f"{path}\n" for path in runtime_paths()), encoding="utf-8"
    )
    if wanted:
        _install(folder, app, wanted)


def _packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))


def _install(folder: Path, app: Installed, wanted: list[Requirement]) -> None:
    if built := [str(one) for one in wanted if one.url]:
        raise UnsupportedError(
            f"{app.name} {app.version} needs {built[0]}, which has to be built, and building runs its code.",
            hint=f"Its publisher puts a wheel into the package's wheels/ and its version into {LOCK_FILE}.",
        )
    wheels = app.folder / "wheels"
    missing = [str(one) for one in wanted if not _has_wheel(wheels, one)]
    if missing and settings().offline:
        raise UnsupportedError(
            f"{app.name} {app.version} needs packages that are neither in its wheels/ nor here, and offline mode is on:"
            f" {', '.join(missing)}.",
            hint="Ask its publisher for a package that has them, or unset LLMASOS_OFFLINE.",
        )
    installer = next((one for one in _INSTALLERS if _runs(one)), None)
    if installer is None:
        raise UnsupportedError("Packages can't be installed: there is neither uv nor pip.", hint="pip install uv")
    with tempfile.TemporaryDirectory(prefix="llmasos-") as name:
        listed = Path(name, "requirements.txt")
        listed.write_text("".join(f"{one}\n" for one in wanted), encoding="utf-8")
        try:
            found = subprocess.run(
                _command(installer, folder, listed, wheels if wheels.is_dir() else None, offline=not missing),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=INSTALL_SECONDS,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as e:
            raise UnsupportedError(
                f"The packages of {app.name} {app.version} were not there after {INSTALL_SECONDS} s.",
                hint="Try again, or ask its publisher for a package that has them in its wheels/.",
            ) from e
    if found.returncode:
        said = (found.stderr or found.stdout).split()
        raise UnsupportedError(
            f"{app.name} {app.version} needs packages that could not be installed:"
            f" {', '.join(missing or map(str, wanted))}. {' '.join(said)[-300:]}",
            hint="Without a network all of them have to be in the package's wheels/.",
        )
    _compile(_packages(folder))


def _compile(packages: Path) -> None:
    """Byte code, which the application can't write itself. By this Python, without its environment's packages: uv and
    pip would start the application's. Without it, starts are slower, and that is all."""
    command = [sys.executable, "-I", "-S", "-m", "compileall", "-qq", str(packages)]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=COMPILE_SECONDS)


def _command(
    installer: tuple[str, ...], folder: Path, listed: Path, wheels: Path | None, *, offline: bool
) -> list[str]:
    is_uv = "uv" in installer
    command = [*installer, "install"] if is_uv else [*installer, "--python", str(python_of(folder)), "install"]
    command += ["--python", str(python_of(folder)), "--quiet"] if is_uv else ["--no-input", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "-r", str(listed)]
    command += ["--no-index"] if offline else []
    command += ["--find-links", str(wheels)] if wheels else []
    if is_uv:
        return command
    return [*command, "--no-compile", "--disable-pip-version-check", *(["--isolated"] if offline else [])]


def _runs(command: tuple[str, ...]) -> bool:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*command, "--help"], capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
        return done.returncode == 0
    return False


def _has_wheel(wheels: Path, wanted: Requirement) -> bool:
    for path in wheels.glob("*.whl"):
        with suppress(InvalidWheelFilename):
            name, version, _, _ = parse_wheel_filename(path.name)
            if name == canonicalize_name(wanted.name) and wanted.specifier.contains(version, prereleases=True):
                return True
    return False
