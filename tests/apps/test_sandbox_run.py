"""Starting and ending, what a policy grants, Python code of others, and seccomp's little programs."""

import asyncio
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llmasos.apps.sandbox import Exit, Limits, Policy, enforced, run_python, seccomp, start
from llmasos.apps.sandbox import python as sandboxed_python
from llmasos.apps.sandbox.policy import python_paths
from llmasos.apps.sandbox.report import Enforcement, enforcements
from llmasos.errors import InvalidInputError, NotFoundError, ServerError, UnsupportedError

posix = pytest.mark.skipif(os.name != "posix", reason="for POSIX")
SLEEP = "import time; print('begun', flush=True); time.sleep(100)"


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-c", code, *arguments]


def output(command: list[str], policy: Policy) -> str:
    process = start(command, policy, stdout=subprocess.PIPE)
    with process.stdout:
        said = process.stdout.read().decode()
    assert process.wait(60).code == 0
    return said


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path.resolve() / "data"
    folder.mkdir()
    return folder


def policy_for(data: Path, **changes: object) -> Policy:
    return Policy(**{"read": python_paths(), "write": (data,), **changes})


# starting and ending


def test_kill_ends_it_and_says_so(data: Path) -> None:
    process = start(python(SLEEP), policy_for(data), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n" and process.running
    process.kill()
    assert process.wait(60) == Exit(None, "killed") and not process.running
    assert process.stdout.read() == b""
    process.stdout.close()


def test_nothing_runs_unwatched(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(generations: object, num_keepers: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("llmasos.apps.sandbox.run.use_of", fail)
    process = start(python(SLEEP), policy_for(data), stdout=subprocess.PIPE)
    with pytest.raises(ZeroDivisionError):
        process.wait(60)
    assert process.stdout.read() in (b"begun\n", b"")  # to the end: it has ended
    process.stdout.close()


async def test_an_event_loop_can_wait(data: Path) -> None:
    process = start(python("print(1)"), policy_for(data), stdout=subprocess.DEVNULL)
    assert await asyncio.wait_for(process.ended(), 60) == Exit(0, "exited")


@posix
def test_the_sandbox_ends_with_the_process_that_made_it(data: Path) -> None:
    code = "import os, sys\nfrom pathlib import Path\nfrom llmasos.apps.sandbox import Policy, start\n"
    code += "from llmasos.apps.sandbox.policy import python_paths\n"
    code += f"start([sys.executable, '-I', '-c', {SLEEP!r}], Policy(read=python_paths(), write=(Path(sys.argv[1]),)))\n"
    code += "os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code, str(data)], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0  # its output has come to an end: nothing holds it any more


@posix
def test_a_system_that_starts_no_process_is_named_and_nothing_is_left_open(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    with monkeypatch.context() as patch:
        patch.setattr("llmasos.apps.sandbox.run.subprocess.Popen", full)
        with pytest.raises(ServerError, match="no more processes"):  # an open socket would be a ResourceWarning
            start(python(SLEEP), Policy(read=python_paths(), write=(data,)))


def test_a_program_that_is_not_there_is_named(data: Path) -> None:
    with pytest.raises(NotFoundError, match="no-such-program"):
        start(["no-such-program"], policy_for(data))
    with pytest.raises(InvalidInputError, match="empty"):
        start([], policy_for(data))


@posix
def test_what_cannot_begin_raises_and_leaves_nothing(data: Path) -> None:
    program = data / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    with pytest.raises(ServerError, match="could not be started"):
        start([str(program)], policy_for(data))


@pytest.mark.parametrize(
    "wrong",
    [
        {"read": (Path("relative"),)},
        {"read": (Path("/no/such/path").absolute(),)},
        {"write": (Path(__file__).resolve(),)},
        {"net": "some"},
        {"net": (0,)},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        Policy(**wrong)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="memory"):
        Limits(memory=0)


# what is granted


def test_home_and_temporary_files_are_in_the_data_folder(data: Path) -> None:
    code = "import os, pathlib, tempfile\nprint(os.getcwd(), pathlib.Path.home(), tempfile.mkstemp()[1])"
    cwd, home, file = output(python(code), policy_for(data)).split()
    assert cwd == home == str(data) and Path(file).parent == data


def test_only_named_variables_are_passed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_GRANTED", "yes")
    monkeypatch.setenv("SANDBOX_OTHER", "no")
    code = "import os\nprint(os.environ.get('SANDBOX_GRANTED'), os.environ.get('SANDBOX_OTHER'))"
    assert output(python(code), policy_for(data, env=("SANDBOX_GRANTED",))) == "yes None\n"


@posix
def test_programs_run_where_that_is_granted_but_not_from_the_data_folder(data: Path) -> None:
    policy = policy_for(data, exec=True)
    copy = data / "copy"
    shutil.copy(shutil.which("true"), copy)
    assert output([shutil.which("sh"), "-c", "true && echo done"], policy) == "done\n"
    said = output([shutil.which("sh"), "-c", f"{copy} 2>/dev/null && echo done; true"], policy)
    landlock = "landlock" in {name for row in enforced(policy) for name in row.by}
    assert said == ("" if landlock else "done\n")


@posix
def test_only_granted_ports_can_be_connected_to(data: Path) -> None:
    code = """import socket, sys
for port in sys.argv[1:3]:
    try:
        socket.create_connection(("127.0.0.1", int(port)), timeout=5).close()
        print("done")
    except OSError:
        print("stopped")
def fast():
    socket.socket().sendto(b"x", 0x20000000, ("127.0.0.1", int(sys.argv[2])))
def udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def multipath():
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
def bind():
    socket.create_server(("127.0.0.1", 0))
for attack in fast, udp, multipath, bind:
    try:
        attack()
        print("done")
    except OSError:
        print("stopped")
"""
    with socket.create_server(("127.0.0.1", 0)) as granted, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [sock.getsockname()[1] for sock in (granted, other)]
        policy = policy_for(data, net=(ports[0],))
        rows = {row.what: row for row in enforced(policy)}
        assert rows["network_hosts"] == Enforcement("network_hosts", (), "hosts")
        said = output(python(code, *map(str, ports)), policy).split()
    assert said[0] == "done"
    if not rows["network"].by:
        pytest.skip("the report says that network is not enforced here")
    assert said[1:] == ["stopped"] * 5


@posix
def test_only_granted_sockets_can_be_connected_to(data: Path) -> None:
    code = """import socket, sys
for path in sys.argv[1:]:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        print("done")
    except OSError:
        print("stopped")
"""
    with (
        tempfile.TemporaryDirectory() as short,
        socket.socket(socket.AF_UNIX) as one,
        socket.socket(socket.AF_UNIX) as two,
    ):
        paths = [Path(short).resolve() / name for name in "ab"]
        for sock, path in zip((one, two), paths, strict=True):
            sock.bind(str(path))
            sock.listen()
        policy = policy_for(data, sockets=(paths[0],))
        said = output(python(code, *map(str, paths)), policy).split()
    assert said[0] == "done"
    if not {row.what: row.by for row in enforced(policy)}["unix_sockets"]:
        pytest.skip("the report says that unix_sockets is not enforced here")
    assert said[1] == "stopped"


def test_symbolic_links_to_what_is_granted_lead_there(data: Path, tmp_path: Path) -> None:
    real = tmp_path.resolve() / "real"
    (real / "deep").mkdir(parents=True)
    (real / "deep" / "file").write_text("found")
    link = tmp_path.resolve() / "link"
    link.symlink_to("real", target_is_directory=True)
    code = "import sys\nprint(open(sys.argv[1]).read())"
    policy = policy_for(data, read=(*python_paths(), link / "deep"))
    assert output(python(code, str(link / "deep" / "file")), policy) == "found\n"


# the report


def test_a_system_without_any_means_is_said_to_have_none() -> None:
    rows = enforcements({}, Policy())
    held = {row.what for row in rows if row.by}
    assert held == {"environment", "descriptors", "memory", "cpu_seconds", "processes", "disk", "wall_seconds"}
    assert all(bool(row.by) != bool(row.why) for row in rows)


def test_what_a_policy_grants_is_no_row() -> None:
    policy = Policy(net="all", exec=True, gpu=True, limits=Limits(disk=None))
    assert not {"network", "programs", "gpu", "disk"} & {row.what for row in enforced(policy)}


@pytest.mark.parametrize(
    ("version", "held"), [(1, {"files_read"}), (3, {"files_read", "files_write"}), (6, {"signals", "abstract_sockets"})]
)
def test_old_landlock_is_not_credited_with_what_it_cannot(version: int, held: set[str]) -> None:
    rows = {row.what for row in enforcements({"landlock": version}, Policy()) if "landlock" in row.by}
    assert held <= rows and ("signals" in rows) == (version >= 6) and ("files_write" in rows) == (version >= 3)


# Python code of others

run = pytest.mark.skipif(
    not {"files_read", "files_write", "network"} <= {row.what for row in enforced() if row.by},
    reason="the report says that files or network are not enforced here",
)


@run
def test_code_runs_and_its_output_comes_back() -> None:
    result = run_python("import sys\nprint('你好')\nprint('error', file=sys.stderr)\nopen('x', 'w').write('x')")
    assert (result.stdout, result.stderr, result.exit_code, result.reason) == ("你好\n", "error\n", 0, "exited")
    assert result.ok and not result.truncated


@run
def test_code_that_raises_or_takes_too_much_says_how_it_ended() -> None:
    failed = run_python("1 / 0")
    assert failed.exit_code == 1 and "ZeroDivisionError" in failed.stderr and not failed.ok
    assert run_python("import time\ntime.sleep(100)", timeout=0.5).reason == "wall"
    assert run_python("x = bytearray(10**9)").reason == "memory"


@run
def test_output_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandboxed_python, "OUTPUT_BYTES", 1000)
    result = run_python("print('x' * 100_000)")
    assert result.ok and result.truncated and result.stdout == "x" * 1000


@run
def test_the_packages_of_this_environment_are_there_and_the_folder_is_gone() -> None:
    result = run_python("import os, psutil\nprint(os.getcwd())")
    assert result.ok and not Path(result.stdout.strip()).exists()


def test_code_does_not_run_where_its_needs_are_not_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandboxed_python, "enforced", lambda: enforcements({}, Policy()))
    with pytest.raises(UnsupportedError, match="files_read, files_write, network"):
        run_python("print(1)")
    assert run_python("print(1)", needs=()).stdout == "1\n"


# seccomp's programs, run by a machine of our own: also for the processor that this test does not run on

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
CALLS = {
    "x86_64": {"read": 0, "socket": 41, "clone": 56, "clone3": 435, "ptrace": 101, "openat": 257, "sendto": 44},
    "aarch64": {"read": 63, "socket": 198, "clone": 220, "clone3": 435, "ptrace": 117, "openat": 56, "sendto": 206},
}


def verdict(program: bytes, number: int, arguments: tuple[int, ...], architecture: int) -> int:
    """What the kernel would do with a system call."""
    memory = struct.pack("=IIQ6Q", number, architecture, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    at = a = 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == 0x20:
            (a,) = struct.unpack_from("=I", memory, value)
        elif operation == 0x54:
            a &= value
        elif operation == 0x05:
            at += value
        elif operation == 0x06:
            return value
        else:
            at += yes if {0x15: a == value, 0x35: a >= value}[operation] else no


@pytest.mark.parametrize("machine", list(CALLS))
@pytest.mark.parametrize(
    ("call", "arguments", "wanted"),
    [
        ("read", (), ALLOW),
        ("ptrace", (), EPERM),
        ("clone3", (), ENOSYS),
        ("clone", (17,), ALLOW),
        ("clone", (0x10000011,), EPERM),
        ("socket", (1, 1, 0), ALLOW),
        ("socket", (2, 1 | 0o2000000, 0), ALLOW),
        ("socket", (10, 1, 6), ALLOW),
        ("socket", (2, 2, 0), EPERM),
        ("socket", (2, 1, 262), EPERM),
        ("socket", (2, 3, 1), EPERM),
        ("socket", (16, 3, 0), EPERM),
        ("socket", (1 << 32 | 16, 3, 0), EPERM),
        ("sendto", (3, 0, 1, 0x20000000), EPERM),
        ("sendto", (3, 0, 1, 0x40), ALLOW),
        ("openat", (0, 0, 0o102, 0o4755), EPERM),
        ("openat", (0, 0, 0o102, 0o755), ALLOW),
        ("openat", (0, 0, 0, 0o4755), ALLOW),
    ],
)
def test_system_calls_are_told_apart(machine: str, call: str, arguments: tuple[int, ...], wanted: int) -> None:
    program = seccomp.program(seccomp.rules_for([1, 2, 10], only_tcp=True), machine)
    number = CALLS[machine][call]
    assert verdict(program, number, arguments, seccomp.ARCHITECTURES[machine]) == wanted
    assert verdict(program, number, arguments, 0x40000003) == KILL  # the calls of 32-bit x86
    assert machine == "aarch64" or verdict(program, 0x40000000 | number, arguments, 0xC000003E) == ENOSYS
