"""A Python environment for each version of an application: what its `requirements.lock` names and this one lacks, from
the package's own `wheels/`, or from where pip takes packages: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS,
pip's configuration, else the public index; in offline mode only from those that are on this machine. Where the lock has
hashes, no other file is installed. Packages of this Python are there, too, and read-only in the sandbox.

It lies in the cache, `<home>/cache/app-environments/NAME/VERSION/`, and is made anew where it is missing or made for
another Python. Only wheels are installed, and its Python is not started here once they are: what a package has
written into a `.pth` would run then, outside the sandbox.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

import llmasos
from llmasos.errors import FormatError, UnsupportedError
from llmasos.settings import settings
from llmasos.store.library import model_lock
from llmasos.store.packages import Installed
from llmasos.store.packages.requirements import LOCK_FILE, WHEELS, Locked, is_for, parse_lock
from llmasos.store.pip import pip_option
from llmasos.store.transfer import is_here, redact

INSTALL_SECONDS = 600
COMPILE_SECONDS = 300
_READY = "llmasos.json"
_OF_SOURCES = re.compile(r"PIP_.*|UV_.*(INDEX|LINKS|OFFLINE|CONFIG).*|(.*_)?PROXY", re.IGNORECASE)
"""Variables that say where an installer asks."""
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


def lacking(app: Installed) -> list[Locked]:
    """What the application's lock names and this Python does not have."""
    lock = app.folder / LOCK_FILE
    if not lock.is_file():
        return []
    found = ((one, one.requirement) for one in parse_lock(lock.read_bytes(), str(lock)))
    return [one for one, wanted in found if (not wanted.marker or wanted.marker.evaluate()) and not _is_here(wanted)]


def _is_here(wanted: Requirement) -> bool:
    if canonicalize_name(wanted.name) == "llmasos":
        return True
    try:
        return wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def _fingerprint(app: Installed, wanted: list[Locked]) -> str:
    sha256 = app.record.sha256 if app.record else ""
    facts = [sys.version, sys.base_prefix, *map(str, runtime_paths()), sha256, *map(str, wanted)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _made_for(folder: Path) -> str | None:
    try:
        found = json.loads((folder / _READY).read_bytes())["made_for"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and python_of(folder).exists() else None


def _make(folder: Path, app: Installed, wanted: list[Locked]) -> None:
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


@dataclass(frozen=True)
class _Sources:
    """Where wheels may come from. Without an index, the installer's own is asked unless it is `closed`: then nothing
    is but these."""

    index: str = ""
    more: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    closed: bool = True

    @classmethod
    def of_pip(cls) -> _Sources:
        """Those of pip's settings; in offline mode those that are on this machine."""
        closed = settings().offline
        indexes = (
            () if _pip("no-index") else (settings().pypi_index or pip_option("index-url"), *_several("extra-index-url"))
        )
        if not closed:
            return cls(indexes[0] if indexes else "", indexes[1:], _several("find-links"), closed=not indexes)
        here = [one for one in indexes if one and _is_local(one)]
        return cls("".join(here[:1]), tuple(here[1:]), tuple(filter(_is_local, _several("find-links"))))

    def and_of(self, wheels: Path) -> _Sources:
        return replace(self, folders=(*self.folders, str(wheels))) if wheels.is_dir() else self

    def options(self, *, uv: bool) -> list[str]:
        found = ["--no-index"] if self.closed and not self.index else []
        found += ["--default-index" if uv else "--index-url", self.index] if self.index else []
        for option, places in (("--extra-index-url", self.more), ("--find-links", self.folders)):
            for place in places:
                found += [option, place]
        if uv:
            # as pip does, which all these settings are of: any index may have the version that is named
            return [*found, "--index-strategy", "unsafe-best-match", *(["--no-config"] if self.closed else [])]
        return [*found, *(["--isolated", "--retries", "0"] if self.closed else [])]

    def __str__(self) -> str:
        return ", ".join(redact(one) for one in (self.index, *self.more, *self.folders) if one)


def _several(option: str) -> tuple[str, ...]:
    return tuple(_pip(option).split())


def _pip(option: str) -> str:
    """An option of pip's, from the environment or its configuration."""
    found = os.environ.get(f"PIP_{option.upper().replace('-', '_')}") or pip_option(option)
    return "" if option == "no-index" and found.lower() in ("0", "false", "no", "off") else found


def _is_local(place: str) -> bool:
    return is_here(place) if "://" in place and not place.startswith("file://") else True


def _install(folder: Path, app: Installed, wanted: list[Locked]) -> None:
    who, requirements = f"{app.name} {app.version}", [one.requirement for one in wanted]
    if built := [str(one) for one in requirements if one.url]:
        raise UnsupportedError(
            f"{who} needs {built[0]}, which has to be built, and building runs its code.",
            hint=f"Its publisher puts a wheel into the package's {WHEELS}/ and its version into {LOCK_FILE}.",
        )
    wheels, is_offline = app.folder / WHEELS, settings().offline
    missing = [str(one) for one in requirements if not _has_wheel(wheels, one)]
    outside = _Sources.of_pip() if missing else _Sources()
    asked = f" (offline mode is on: only {outside} was asked)" if is_offline and missing else ""
    if asked and not str(outside):
        raise UnsupportedError(
            f"{who} needs packages that are neither in its {WHEELS}/ nor here, and offline mode is on:"
            f" {', '.join(missing)}.",
            hint="Ask its publisher for a package that has them; name a folder of wheels (PIP_FIND_LINKS) or an index"
            " (PIP_INDEX_URL) on this machine; or unset LLMASOS_OFFLINE.",
        )
    installer = next((one for one in _INSTALLERS if _runs(one)), None)
    if installer is None:
        raise UnsupportedError("Packages can't be installed: there is neither uv nor pip.", hint="pip install uv")
    with tempfile.TemporaryDirectory(prefix="llmasos-") as name:
        listed = Path(name, "requirements.txt")
        listed.write_text("".join(f"{one}\n" for one in wanted), encoding="utf-8")
        sources = outside.and_of(wheels)
        try:
            found = subprocess.run(
                _command(installer, folder, listed, sources),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=INSTALL_SECONDS,
                stdin=subprocess.DEVNULL,
                env=_closed_environment() if sources.closed else None,
            )
        except subprocess.TimeoutExpired as e:
            raise UnsupportedError(
                f"The packages of {who} were not there after {INSTALL_SECONDS} s.",
                hint="Try again, or ask its publisher for a package that has them in its wheels/.",
            ) from e
    if found.returncode:
        said = found.stderr or found.stdout
        _check_hashes(who, said, wanted)
        raise UnsupportedError(
            f"{who} needs packages that could not be installed: {', '.join(missing or map(str, requirements))}{asked}."
            f" {' '.join(said.split())[-300:]}",
            hint="Without a network all of them have to be in the package's wheels/, or where PIP_FIND_LINKS or"
            " PIP_INDEX_URL lead to on this machine.",
        )
    _compile(_packages(folder))


def _check_hashes(who: str, said: str, wanted: list[Locked]) -> None:
    """Raises FormatError if uv or pip refused a file for its hash."""
    uv = re.search(r"Hash mismatch for `([^`]+)`.*Computed:\s+sha256:([0-9a-f]{64})", said, re.DOTALL)
    pip = re.search(r"^\s+\S+ from (\S+)[^\n]*\n(?:\s+Expected[^\n]+\n)+\s+Got\s+([0-9a-f]{64})", said, re.MULTILINE)
    if not (match := uv or pip):
        return
    name = match[1].partition("==")[0] if uv else match[1].rpartition("/")[2].partition("-")[0]
    hashes = [one.hashes for one in wanted if canonicalize_name(one.requirement.name) == canonicalize_name(name)]
    expected = " or ".join(hashes[0]) if hashes else "another"
    raise FormatError(
        f"{who} needs {redact(match[1])}, which is not the file that its {LOCK_FILE} has a hash of: expected sha256"
        f" {expected}, found {match[2]}.",
        hint="It was changed on the way, or where it lies. Tell its publisher; nothing was installed.",
    )


def _compile(packages: Path) -> None:
    """Byte code, which the application can't write itself. By this Python, without its environment's packages: uv and
    pip would start the application's. Without it, starts are slower, and that is all."""
    command = [sys.executable, "-I", "-S", "-m", "compileall", "-qq", str(packages)]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=COMPILE_SECONDS)


def _command(installer: tuple[str, ...], folder: Path, listed: Path, sources: _Sources) -> list[str]:
    is_uv = "uv" in installer
    command = [*installer, "install"] if is_uv else [*installer, "--python", str(python_of(folder)), "install"]
    command += ["--python", str(python_of(folder)), "--quiet"] if is_uv else ["--no-input", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "-r", str(listed), *sources.options(uv=is_uv)]
    return command if is_uv else [*command, "--no-compile", "--disable-pip-version-check"]


def _closed_environment() -> dict[str, str]:
    """For an installer that may ask this machine only, wherever an index's links lead."""
    found = {name: value for name, value in os.environ.items() if not _OF_SOURCES.fullmatch(name)}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    here = {"NO_PROXY": "localhost,127.0.0.0/8,::1", "PIP_CONFIG_FILE": os.devnull, "UV_HTTP_RETRIES": "0"}
    return found | nowhere | here


def _runs(command: tuple[str, ...]) -> bool:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*command, "--help"], capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
        return done.returncode == 0
    return False


def _has_wheel(wheels: Path, wanted: Requirement) -> bool:
    for path in wheels.glob("*.whl"):
        with suppress(InvalidWheelFilename):
            project, version, _, _ = parse_wheel_filename(path.name)
            if is_for(wanted, project, version):
                return True
    return False
