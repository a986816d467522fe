import ctypes
import os
import socket
from pathlib import Path

from tried import attack, every, facts, tried


def environments():
    mine = os.environ["LLMASOS_API_KEY"]
    others = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            others += [part for part in path.read_bytes().split(b"\0") if part.startswith(b"LLMASOS_API_KEY=")]
        except OSError:
            continue
    if not [one for one in others if one.decode().partition("=")[2] != mine]:
        raise PermissionError("no key but its own")


def peek():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, facts["victim"], 0, 0) < 0:
        raise PermissionError(os.strerror(ctypes.get_errno()))


def others_socket():
    own = Path(os.environ["LLMASOS_SERVER"].removeprefix("unix:")).parent
    found = [path for path in own.parent.glob("llmasos-app-*/*.sock") if path.parent != own]
    with socket.socket(socket.AF_UNIX) as sock:
        every(found, lambda path: sock.connect(str(path)))


@attack
def app() -> dict:
    return tried(
        environments=environments,
        environment_of_the_server=lambda: every([f"/proc/{facts['pid']}/environ"], Path.read_bytes),
        memory=lambda: every([f"/proc/{facts['victim']}/mem", f"/proc/{facts['pid']}/mem"], Path.open),
        trace=peek,
        command_lines=lambda: every([f"/proc/{facts['pid']}/cmdline"], Path.read_bytes),
        open_files=lambda: every([f"/proc/{facts['pid']}/fd"], lambda path: list(path.iterdir())),
        socket_of_another=others_socket,
        publishers_key=lambda: (Path(facts["home"]) / "keys" / "publisher.pem").read_bytes(),
    )
