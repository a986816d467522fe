"""A network of one's own, and processors: `net="loopback"`, `Limits.cores`, and asking a program to end."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmasos.apps.sandbox import Limits, Policy, enforced, start
from llmasos.apps.sandbox.policy import python_paths
from llmasos.errors import InvalidInputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that is asked")
CODE = """
import json, os, socket, sys
found = {"cores": len(os.sched_getaffinity(0)), "nice": os.nice(0)}
def tried(name, action):
    try:
        action()
        found[name] = "done"
    except OSError as e:
        found[name] = type(e).__name__
def own():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("192.0.2.1", 9))
tried("own", own)
tried("outside", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5))
tried("elsewhere", datagram)
tried("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0" + sys.argv[2]))
tried("more_cores", lambda: os.sched_setaffinity(0, range(os.cpu_count())))
print(json.dumps(found))
"""


def run(tmp_path: Path, net: str, without: tuple[str, ...] = ()) -> dict:
    name = f"llmasos-test-{os.getpid()}-{net}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + name)
        abstract.listen()
        policy = Policy(read=python_paths(), write=(tmp_path,), net=net, limits=Limits(cores=1))
        command = [sys.executable, "-I", "-c", CODE, str(server.getsockname()[1]), name]
        process = start(command, policy, stdout=subprocess.PIPE, without=without)
        assert process.stdout is not None
        with process.stdout as out:
            found = json.loads(out.read())
        process.wait()
    return {**found, "net": bool(process.means.get("net"))}


def test_its_own_network_has_nobody_else(tmp_path: Path) -> None:
    found = run(tmp_path, "loopback")
    if not found["net"]:
        pytest.skip("this system has no network namespaces for this user")
    assert found["own"] == "done"
    assert "done" not in (found["outside"], found["elsewhere"], found["abstract"])
    row = next(row for row in enforced(Policy(net="loopback")) if row.what == "network")
    assert row.by == ("namespaces",)


def test_without_namespaces_there_is_none_at_all(tmp_path: Path) -> None:
    found = run(tmp_path, "loopback", without=("namespaces",))
    assert not found["net"]
    assert {found["own"], found["outside"], found["elsewhere"]} == {"PermissionError"}
    row = next(row for row in enforced(Policy(net="loopback"), without=("namespaces",)) if row.what == "network")
    assert row.by == ("seccomp",)


def test_it_computes_on_as_many_processors_as_it_was_given(tmp_path: Path) -> None:
    found = run(tmp_path, "none")
    assert found["cores"] == 1 and found["nice"] >= 10 and found["more_cores"] == "PermissionError"
    assert "cores" not in {row.what for row in enforced(Policy())}
    assert next(row for row in enforced(Policy(limits=Limits(cores=1))) if row.what == "cores").by == ("rlimits",)


def test_a_network_of_another_name_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="loopback"):
        Policy(net="host")  # type: ignore[arg-type]  # what is tested


def test_a_program_is_asked_to_end(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(7))\nprint('up', flush=True)\n"
        # in short sleeps: a signal that comes just before one does not end it
        "for _ in range(600): time.sleep(0.1)"
    )
    policy = Policy(read=python_paths(), write=(tmp_path,))
    process = start([sys.executable, "-I", "-c", code], policy, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == b"up\n"
        assert process.use().processes == 1
        process.terminate()
        end = process.wait(20)
    assert (end.code, end.reason) == (7, "exited")
