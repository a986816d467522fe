"""`llmasos app dev test logs start stop restart ps`: applications while they are written, and while they run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.cli.messages import t
from llmasos.cli.render import emit, say, size, table
from llmasos.errors import InvalidInputError, LLMasOSError, NotFoundError, ServerError

if TYPE_CHECKING:
    from llmasos.client.native import AppAct
    from llmasos.client.types.apps import AppInfo

ACTIONS = ("dev", "test", "logs", "start", "stop", "restart", "ps")
LOOK_S = 0.5
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}


def clean(text: str) -> str:
    """What an application says, for a terminal."""
    return text.translate(_CONTROL)


@dataclass(frozen=True)
class Where:
    """The flags of these actions. What nobody typed is empty."""

    port: int | None = None
    follow: bool = False
    limit: int | None = None
    url: str | None = None
    api_key: str | None = None


_FLAGS = {"dev": {"port"}, "test": set[str](), "logs": {"follow", "limit", "url", "api_key"}}
_ASKING = {"url", "api_key"}


def run_action(action: str, words: Sequence[str], where: Where, as_json: bool) -> int | None:
    """`llmasos app ACTION [NAME]`."""
    from llmasos.cli.package import check_flags

    check_flags(action, {name for name, value in vars(where).items() if value}, tuple(_FLAGS.get(action, _ASKING)))
    most = 0 if action == "ps" else 1
    if len(words) > most:
        raise InvalidInputError(t("usage.extra", value=words[most]), hint=t("usage.see_help", command="llmasos app"))
    if not words and action not in ("ps", "dev", "test"):
        raise InvalidInputError(t("usage.missing", option="FILE"), hint=f"llmasos app {action} NAME", param="file")
    match action:
        case "dev":
            return _dev(words[0] if words else ".", where.port or 8000)
        case "test":
            return _test(Path(words[0] if words else "."), as_json)
        case "ps":
            _ps(where, as_json)
        case "logs":
            _logs(words[0], where, as_json)
        case "start" | "stop" | "restart":
            _change(action, words[0], where, as_json)
    return None


# on a server


def _change(action: AppAct, name: str, where: Where, as_json: bool) -> None:
    from llmasos.cli.server import server

    with server(where.url, where.api_key) as native:
        found = native.change_app(name, action)
    if as_json:
        emit(found.model_dump(mode="json"))
    else:
        say(t(f"running.{action}", name=found.name, version=found.version))


def _ps(where: Where, as_json: bool) -> None:
    from llmasos.cli.server import server

    with server(where.url, where.api_key) as native:
        found = native.apps()
    if as_json:
        emit([one.model_dump(mode="json") for one in found])
    elif not found:
        say(t("package.none_installed"))
    else:
        names = ("name", "version", "state", "memory", "computed", "calls", "remark")
        print(table([t(f"head.{name}") for name in names], [_row(one) for one in found]))


def _row(one: AppInfo) -> tuple[str, ...]:
    use = one.use
    lacking = [row.what for row in one.enforced if not row.by]
    remark = one.error or (t("running.not_enforced", what=", ".join(lacking)) if lacking else "")
    return (
        one.name,
        one.version,
        t(f"running.state.{one.state}"),
        f"{size(use.memory)}/{size(one.limits.memory or 0)}" if use else "-",
        f"{use.cpu_seconds:.1f} s" if use else "-",
        f"{use.running_calls}/{use.calls}" if use else "-",
        clean(remark),
    )


def _logs(name: str, where: Where, as_json: bool) -> None:
    """From a server that runs, else from the file that the last one left."""
    from llmasos.cli.server import server
    from llmasos.errors import NetworkError, ProviderError

    limit = where.limit if where.limit is not None else 100
    try:
        with server(where.url, where.api_key) as native:
            if not where.follow:
                print(native.app_log(name, limit=limit), end="")
                return
            for line in native.follow_app_log(name, limit=limit):
                print(line.model_dump_json() if as_json else _shown(line), flush=True)
    except NetworkError as e:
        if where.url is not None or where.follow or isinstance(e, ProviderError):
            raise
        _print_kept(name, limit, e)


def _shown(line: Any) -> str:
    return f"{line.time:%Y-%m-%dT%H:%M:%SZ} {line.stream:<6} {clean(line.text)}"


def _print_kept(name: str, limit: int, e: Exception) -> None:
    from llmasos.serve.apps.log import path_of
    from llmasos.settings import settings
    from llmasos.store.packages import check_app_name

    path = path_of(settings().home, check_app_name(name))
    if not path.is_file():
        raise NotFoundError(t("running.no_log", name=name), hint=str(e)) from e
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines[-limit:] if limit else ():
        print(clean(line))


# while it is written


def _dev(reference: str, port: int) -> int:
    """Serve it, and again after each change of its files, until Ctrl-C."""
    from llmasos.apps.hosting import listen

    if not 0 < port < 65536:
        raise InvalidInputError(t("usage.bad_value", option="--port", value=port, kind="1-65535"), param="port")
    folder, reference = _entry(reference)
    listen("127.0.0.1", port).close()  # a change of the files would not help
    code = "import sys; from llmasos.cli.running import serve_once; serve_once(*sys.argv[1:])"
    command = [sys.executable, "-c", code, reference, str(port), str(folder)]
    with _ended_in_order():
        return _again_and_again(command, folder)


def _again_and_again(command: Sequence[str], folder: Path) -> int:
    while True:
        seen = _stamps(folder)
        process = subprocess.Popen(command)
        try:
            while process.poll() is None and _stamps(folder) == seen:
                time.sleep(LOOK_S)
            if process.returncode not in (None, 0):
                say(t("running.waits"))
                while _stamps(folder) == seen:
                    time.sleep(LOOK_S)
            elif process.returncode == 0:
                return 0  # it was told to stop
        except KeyboardInterrupt:
            return 0
        finally:
            _end(process)
        say(t("running.again"))


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """What ends this program (Ctrl-C, a service manager, its terminal) ends what it has started, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    wanted = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, leave) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve_once(reference: str, port: str, folder: str) -> None:
    """In a process of its own. An error is shown from where it is in the application's files."""
    from llmasos.apps.loading import load_application

    try:
        load_application(reference).run(port=int(port))
    except LLMasOSError as e:
        sys.exit(str(e))
    except Exception as e:
        told = traceback.TracebackException.from_exception(e)
        own = [frame for frame in told.stack if Path(frame.filename).is_relative_to(Path(folder).absolute())]
        if own:
            told.stack[:] = told.stack[told.stack.index(own[0]) :]
        else:
            told.stack.clear()
        print("".join(told.format()), end="", file=sys.stderr, flush=True)
        sys.exit(1)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _entry(reference: str) -> tuple[Path, str]:
    """The folder to watch, and what to load."""
    from llmasos.store.packages import read_manifest

    path = Path(reference)
    if path.is_dir():
        manifest = read_manifest(path)
        return path, str(path / manifest.app.entry)
    file = Path(reference.rpartition(":")[0] or reference) if not path.is_file() else path
    if not file.is_file():
        raise NotFoundError(t("running.no_file", file=reference), hint="llmasos app dev FOLDER")
    return file.parent, reference


def _stamps(folder: Path) -> dict[str, int]:
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".") and one not in ("__pycache__", "data")]
        for name in files:
            if name.endswith((".py", ".toml", ".json", ".yaml", ".yml", ".txt", ".md", ".html")):
                with suppress(OSError):
                    found[f"{root}/{name}"] = os.stat(f"{root}/{name}").st_mtime_ns
    return found


def _test(folder: Path, as_json: bool) -> int:
    """What an install would find: pack it, install it in a home of its own, start it in its sandbox; then its own
    tests, where it has some."""
    from llmasos.serve.apps.trial import try_out
    from llmasos.store.packages import Apps, pack

    with tempfile.TemporaryDirectory(prefix="llmasos-") as name:
        packed = pack(folder, Path(name) / "tried.llmapp")
        apps = Apps(Path(name).resolve() / "home")
        app = apps.install(packed.path, accept=True)
        trial = try_out(apps, app)
    routes = [str(route.get("name")) for route in trial.documents.app.get("routes", ())]
    lacking = [row.what for row in trial.enforced if not row.by]
    own = _own_tests(folder)
    passed = (trial.error is None or trial.unsure) and own in (None, 0)
    if as_json:
        emit(
            {
                "name": app.name,
                "version": app.version,
                "runs": trial.error is None and not trial.unsure,
                "unsure": trial.unsure,
                "error": str(trial.error) if trial.error else None,
                "routes": routes,
                "not_enforced": lacking,
                "own_tests": own,
            }
        )
        return int(not passed)
    if trial.error is not None and not trial.unsure:
        raise ServerError(str(trial.error))
    said = "running.unsure" if trial.unsure else "running.works"
    say(t(said, name=app.name, version=app.version, routes=", ".join(routes) or "-", error=str(trial.error or "")))
    if lacking:
        say(t("running.not_enforced", what=", ".join(lacking)))
    if own is not None:
        say(t("running.tests_passed" if own == 0 else "running.tests_failed"))
    return int(not passed)


def _own_tests(folder: Path) -> int | None:
    """The exit code of pytest; None: it has no tests, or there is no pytest."""
    import importlib.util

    if not [*folder.glob("test_*.py"), *folder.glob("tests/test_*.py")] or importlib.util.find_spec("pytest") is None:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, stdout=sys.stderr).returncode
