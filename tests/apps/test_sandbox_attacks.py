"""Every attack fails in the sandbox, by each means alone that the report names for it; where the report says that
nothing holds it, nothing is claimed. Without the sandbox the same attacks succeed."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sandbox_attacks

from llmasos.apps.sandbox import Policy, enforced, start
from llmasos.apps.sandbox.policy import python_paths

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the attacks are written for POSIX")
WITHOUT = {
    "all": (),
    "without_namespaces": ("namespaces",),
    "without_landlock": ("landlock",),
    "without_seccomp": ("seccomp",),
    "only_seccomp": ("namespaces", "landlock"),
    "only_landlock": ("namespaces", "seccomp"),
}
NEED_ROOT = {"rights__setuid", "rights__chown", "network__raw"}
NOT_EVERYWHERE = {  # systems, containers and users differ in what of this is allowed at all
    *("network__vsock", "network__tcp_by_fast_open", "kernel_calls__io_uring", "kernel_calls__unshare"),
    *("kernel_calls__clone_into_a_namespace", "process_memory__read", "process_memory__file", "files_read__hard_link"),
    *(
        "kernel_calls__ptrace",
        "files_read__through_the_root_of_the_parent",
        "file_attributes__chmod_of_what_may_be_read",
    ),
    *("files_write__python_itself", "process_memory__environment", "network__netlink"),
    *("rights__mount", "kernel_calls__mount_in_a_namespace"),
}


class World:
    """What is attacked: a folder beside the data folder, listening sockets, this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory = ctypes.create_string_buffer(b"darkness")
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.path = folder / "s"
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.path))
        self.name = f"llmasos-test-{os.getpid()}"
        self.sockets = [self.tcp, self.udp, self.unix, self.abstract]
        if sys.platform == "linux":
            self.abstract.bind("\0" + self.name)
        for sock in (self.unix, self.abstract):
            sock.listen(50)

    def facts(self, *, sandboxed: bool = True) -> dict[str, object]:
        """For one run, with all that it may damage made anew."""
        outside = self.folder / "outside"
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        for name in ("secret", "long", "victim", "movable"):
            (outside / name).write_text("something")
        readable = self.folder / "readable"
        readable.write_text("x")
        return {
            "outside": str(outside),
            "readable": str(readable),
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "socket": str(self.path),
            "abstract": self.name,
            "pid": os.getpid(),
            "address": ctypes.addressof(self.memory),
            "true": shutil.which("true"),
            "descriptor": 77,
            "sandboxed": sandboxed,
        }

    def data(self, name: str) -> Path:
        data = self.folder / name
        data.mkdir()
        return data

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    world = World(tmp_path_factory.mktemp("world").resolve())
    yield world
    world.close()


@pytest.fixture(scope="module", params=list(WITHOUT))
def attacked(request: pytest.FixtureRequest, world: World):
    """Results of all attacks, and the names of the rows that are enforced."""
    without = WITHOUT[request.param]
    facts = world.facts()
    script = Path(sandbox_attacks.__file__)
    policy = Policy(read=(*python_paths(), script, Path(facts["readable"])), write=(world.data(request.param),))
    descriptor = os.open(facts["outside"], os.O_RDONLY)
    os.dup2(descriptor, facts["descriptor"], inheritable=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ATTACKED_SECRET", "1")
            command = [sys.executable, "-I", str(script), json.dumps(facts)]
            process = start(command, policy, stdout=subprocess.PIPE, stderr=subprocess.PIPE, without=without)
    finally:
        os.close(descriptor)
        os.close(facts["descriptor"])
    out, err = process.stdout.read(), process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    assert process.wait().code == 0, err.decode()
    held = {row.what for row in enforced(policy, without=without) if row.by}
    return json.loads(out), held, Path(facts["outside"])


@pytest.mark.parametrize("attack", sandbox_attacks.names())
def test_an_attack_is_stopped(attacked, attack: str) -> None:
    results, held, _ = attacked
    what = attack.partition("__")[0]
    if what not in held:
        pytest.skip(f"the report says that {what} is not enforced here")
    assert results[attack] != "done"


def test_what_was_attacked_is_whole(attacked) -> None:
    _, held, outside = attacked
    if "files_write" not in held:
        pytest.skip("the report says that files_write is not enforced here")
    assert {path.name: path.read_text() for path in outside.iterdir()} == dict.fromkeys(
        ("secret", "long", "victim", "movable"), "something"
    )


def test_what_the_kernel_has_is_used() -> None:
    """Else a report that claims nothing would pass."""
    if sys.platform != "linux":
        pytest.skip("for Linux")
    held = {row.what: row.by for row in enforced()}
    assert all(held[what] for what in ("rights", "environment", "descriptors", "memory", "cpu_seconds", "survivors"))
    if "Seccomp:" in Path("/proc/self/status").read_text() and os.uname().machine in sandbox_attacks.SYSCALLS:
        assert "seccomp" in held["kernel_calls"] and "seccomp" in held["network"] and "seccomp" in held["programs"]
    modules = Path("/sys/kernel/security/lsm")
    if modules.exists() and "landlock" in modules.read_text():
        assert "landlock" in held["files_read"]


def test_the_same_attacks_succeed_without_the_sandbox(world: World) -> None:
    facts = world.facts(sandboxed=False)
    descriptor = os.open(facts["outside"], os.O_RDONLY)
    os.dup2(descriptor, facts["descriptor"], inheritable=True)
    done = subprocess.run(
        [sys.executable, "-I", sandbox_attacks.__file__, json.dumps(facts)],
        cwd=world.data("outside-the-sandbox"),
        env={**os.environ, "ATTACKED_SECRET": "1"},
        pass_fds=[facts["descriptor"]],
        capture_output=True,
    )
    os.close(descriptor)
    os.close(facts["descriptor"])
    assert done.returncode == 0, done.stderr.decode()
    results = json.loads(done.stdout)
    excused = NOT_EVERYWHERE | (NEED_ROOT if os.geteuid() else set())
    if sys.platform != "linux":
        excused |= {"abstract_sockets__of_the_outside", "kernel_calls__memory_that_no_limit_counts"}
    assert {name: said for name, said in results.items() if said != "done" and name not in excused} == {}
