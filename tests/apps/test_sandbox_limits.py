"""Programs that take too much, each capped by what it does itself as well, in case that a limit should fail."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmasos.apps.sandbox import Exit, Limits, Policy, enforced, start
from llmasos.apps.sandbox.policy import MB, python_paths

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the programs are written for POSIX")
WAIT = 60.0
SLEEP = "\nimport time\ntime.sleep(100)\n"
FORKS = "import os, time\nfor i in range(100):\n    if os.fork() == 0:\n        time.sleep(100)\n"
FORK = "import os\nfor i in range(3):\n  if os.fork() == 0:\n    "
TOUCH = "x[::4096] = b'x' * len(x[::4096])\n"
WITHOUT = [(), ("namespaces",)]


def run(code: str, tmp_path: Path, *, without: tuple[str, ...] = (), **limits: object) -> tuple[Exit, str, str]:
    """How it ends, and what it writes."""
    folder = tmp_path.resolve() / "data"
    folder.mkdir(exist_ok=True)
    policy = Policy(read=python_paths(), write=(folder,), limits=Limits(**{"wall_seconds": WAIT, **limits}))
    pipe = subprocess.PIPE
    command = [sys.executable, "-I", "-u", "-c", code]
    process = start(command, policy, stdout=pipe, stderr=pipe, without=without)
    end = process.wait(2 * WAIT)
    os.set_blocking(process.stdout.fileno(), False)  # if anything of it lived on, this would be no end of the file
    with process.stdout, process.stderr:
        out, err = process.stdout.read(), process.stderr.read()
    assert out is not None, "a process of the sandbox lives on"
    return end, out.decode(), err.decode()


def held_by(what: str, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    [row] = [row for row in enforced(without=without) if row.what == what]
    return row.by


def test_an_endless_loop_ends_with_its_computing_time(tmp_path: Path) -> None:
    end, _, _ = run("while True: pass", tmp_path, cpu_seconds=1)
    assert end.reason == "cpu"


def test_a_sleeper_ends_with_its_time(tmp_path: Path) -> None:
    assert run(SLEEP, tmp_path, wall_seconds=0.5)[0] == Exit(None, "wall")


@pytest.mark.parametrize("without", WITHOUT)
def test_a_fork_bomb_is_ended_whole(tmp_path: Path, without: tuple[str, ...]) -> None:
    end, _, err = run(FORKS + SLEEP, tmp_path, processes=20, without=without)
    if "rlimits" in held_by("processes", without):
        assert end.reason == "exited" and "BlockingIOError" in err
    else:
        assert end.reason == "processes"


@pytest.mark.parametrize("without", WITHOUT)
def test_daemons_do_not_survive(tmp_path: Path, without: tuple[str, ...]) -> None:
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        print('daemon')\n"
    daemon += "        time.sleep(100)\n    os._exit(0)\nos.wait()\ntime.sleep(0.2)\n"
    if not held_by("survivors", without):
        pytest.skip("the report says that survivors is not enforced here")
    end, out, _ = run(daemon, tmp_path, without=without)
    assert (end, out) == (Exit(0, "exited"), "daemon\n")


@pytest.mark.parametrize("without", [*WITHOUT, ("namespaces", "landlock")])
def test_killing_the_parent_frees_nobody(tmp_path: Path, without: tuple[str, ...]) -> None:
    code = "import os, signal, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(100)\ntime.sleep(0.3)\n"
    code += "try:\n    os.kill(os.getppid(), signal.SIGKILL)\nexcept PermissionError:\n    pass\n"
    end, _, _ = run(code, tmp_path, without=without)
    assert end == Exit(0, "exited") or not held_by("signals", without)


def test_a_process_gets_no_more_memory_than_its_limit(tmp_path: Path) -> None:
    end, _, err = run(f"x = bytearray({200 * MB}){SLEEP}", tmp_path, memory=100 * MB)
    assert (end.code == 1 and "MemoryError" in err) if "rlimits" in held_by("memory") else end.reason == "memory"


@pytest.mark.parametrize(
    "code",
    [
        f"import mmap\nx = memoryview(mmap.mmap(-1, {150 * MB}))\n{TOUCH}",
        f"{FORK}x = memoryview(bytearray({60 * MB}))\n    {TOUCH}    break\n",
    ],
    ids=["shared", "several processes"],
)
def test_memory_is_counted_for_all_processes(tmp_path: Path, code: str) -> None:
    assert run(code + SLEEP, tmp_path, memory=100 * MB)[0] == Exit(None, "memory")


@pytest.mark.parametrize("after", ["", "os.unlink(name)"], ids=["kept", "deleted but open"])
def test_the_disk_cannot_be_filled(tmp_path: Path, after: str) -> None:
    if after and sys.platform != "linux":
        pytest.skip("deleted files are found on Linux")
    code = "import os\nfiles = []\nfor i in range(40):\n    name = str(i)\n    files.append(open(name, 'wb'))\n"
    code += f"    {after}\n"
    code += f"    files[-1].write(os.urandom({MB}))\n    files[-1].flush()\n"
    assert run(code + SLEEP, tmp_path, disk=10 * MB)[0] == Exit(None, "disk")


def test_a_program_that_ends_in_time_is_found_to_have_filled_the_disk(tmp_path: Path) -> None:
    code = f"import os\nopen('x', 'wb').write(os.urandom({20 * MB}))"
    assert run(code, tmp_path, disk=10 * MB)[0].reason == "disk"


def test_a_file_cannot_grow_beyond_its_limit(tmp_path: Path) -> None:
    code = f"import os\ntry:\n    os.truncate(os.open('x', os.O_CREAT | os.O_RDWR), {3 * MB})\n"
    code += "except OSError as error:\n    print(error.errno)\n"
    assert run(code, tmp_path, file_size=2 * MB)[1] == f"{errno.EFBIG}\n"
    end, _, _ = run("import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n" + code, tmp_path, file_size=MB)
    assert end.reason == "file_size"


def test_files_cannot_be_opened_without_end(tmp_path: Path) -> None:
    code = "import os\ntry:\n    for i in range(100): os.dup(0)\nexcept OSError as error:\n    print(i, error.errno)\n"
    _, out, _ = run(code, tmp_path, open_files=20)
    number, what = out.split()
    assert int(number) < 20 and int(what) == errno.EMFILE


def test_a_program_that_is_let_be_ends_by_itself(tmp_path: Path) -> None:
    end, out, err = run("print('hello')\nraise SystemExit(3)", tmp_path)
    assert (end, out, err) == (Exit(3, "exited"), "hello\n", "")


def test_a_signal_is_told(tmp_path: Path) -> None:
    end, _, _ = run("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", tmp_path)
    assert end == Exit(-15, "signal")
