"""Attacks on what lies outside the sandbox, each harmless where it succeeds. Run as a program: takes the facts as JSON,
tries all, prints as JSON what became of each: "done", or the error that stopped it. Standard library only."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
SYSCALLS = {"x86_64": {"process_vm_readv": 310, "io_uring_setup": 425}}
SYSCALLS["aarch64"] = {"process_vm_readv": 270, "io_uring_setup": 425}


def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def in_a_child(attack):
    pid = os.fork()
    if pid == 0:
        try:
            attack()
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise PermissionError


class Attacks:
    """Method names: `<row of the report>__<attack>`."""

    def __init__(self, facts):
        self.outside, self.secret = Path(facts["outside"]), Path(facts["outside"], "secret")
        self.facts = facts

    def files_read__secret(self):
        assert self.secret.read_text()

    def files_read__list(self):
        assert os.listdir(self.outside)

    def files_read__symlink_out_of_the_data_folder(self):
        Path("link").symlink_to(self.secret)
        assert Path("link").read_text()

    def files_read__hard_link(self):
        os.link(self.secret, "hard")

    def files_read__up_from_the_working_folder(self):
        assert Path("..", "outside", "secret").read_text()

    def files_read__through_the_root_of_the_parent(self):
        assert Path(f"/proc/{os.getppid()}/root{self.secret}").read_text()

    def files_write__new_file(self):
        (self.outside / f"new-{os.getpid()}").write_text("x")

    def files_write__append(self):
        with self.secret.open("a") as file:
            file.write("x")

    def files_write__truncate(self):
        os.truncate(self.outside / "long", 3)

    def files_write__unlink(self):
        (self.outside / "victim").unlink()

    def files_write__move_in(self):
        os.rename(self.outside / "movable", "moved")

    def files_write__python_itself(self):
        open(os.__file__, "r+").close()

    def file_attributes__chmod(self):
        self.secret.chmod(0o644)

    def file_attributes__times(self):
        os.utime(self.secret, (0, 0))

    def file_attributes__chmod_of_what_may_be_read(self):
        path = Path(self.facts["readable"])
        path.chmod(path.stat().st_mode & 0o777)

    def environment__secret(self):
        assert os.environ["ATTACKED_SECRET"]

    def descriptors__inherited(self):
        assert os.listdir(self.facts["descriptor"])

    def network__tcp(self):
        socket.create_connection(("127.0.0.1", self.facts["tcp"]), timeout=5).close()

    def network__tcp_by_fast_open(self):
        with socket.socket() as sock:
            sock.sendto(b"x", 0x20000000, ("127.0.0.1", self.facts["tcp"]))

    def network__udp(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("127.0.0.1", self.facts["udp"]))

    def network__netlink(self):
        socket.socket(16, socket.SOCK_RAW, 0).close()

    def network__raw(self):
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()

    def network__vsock(self):
        socket.socket(40, socket.SOCK_STREAM).close()

    def unix_sockets__of_the_outside(self):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.facts["socket"])

    def abstract_sockets__of_the_outside(self):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("\0" + self.facts["abstract"])

    def signals__another_process(self):
        os.kill(self.facts["pid"], 0)

    def signals__all_processes(self):
        for pid in range(2, 300):  # by number 0: nothing is sent
            if pid != os.getpid():
                try:
                    os.kill(pid, 0)
                    return
                except ProcessLookupError:
                    pass
        os.kill(self.facts["pid"], 0)

    def process_memory__read(self):
        ours = ctypes.create_string_buffer(8)
        local = (ctypes.c_ulong * 2)(ctypes.addressof(ours), 8)
        remote = (ctypes.c_ulong * 2)(self.facts["address"], 8)
        number = SYSCALLS[os.uname().machine]["process_vm_readv"]
        checked(libc.syscall(number, self.facts["pid"], local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), 0))
        assert ours.raw == b"darkness"

    def process_memory__file(self):
        with open(f"/proc/{self.facts['pid']}/mem", "rb", buffering=0) as file:
            file.seek(self.facts["address"])
            assert file.read(8) == b"darkness"

    def process_memory__environment(self):
        assert Path(f"/proc/{self.facts['pid']}/environ").read_bytes()

    def kernel_calls__ptrace(self):
        in_a_child(lambda: checked(libc.ptrace(0, 0, 0, 0)))  # PTRACE_TRACEME

    def kernel_calls__unshare(self):
        in_a_child(lambda: checked(libc.unshare(0x10000000)))

    def kernel_calls__clone_into_a_namespace(self):
        number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
        pid = libc.syscall(number, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        checked(pid)
        os.waitpid(pid, 0)

    def kernel_calls__memory_that_no_limit_counts(self):
        os.close(os.memfd_create("x"))

    def kernel_calls__io_uring(self):
        parameters = ctypes.create_string_buffer(120)
        fd = libc.syscall(SYSCALLS[os.uname().machine]["io_uring_setup"], 1, parameters)
        checked(fd)
        os.close(fd)

    def rights__setuid(self):
        in_a_child(lambda: os.setuid(54321))

    def rights__mount(self):
        assert self.facts["sandboxed"], "root could do it"
        checked(libc.mount(b"none", b".", b"tmpfs", ctypes.c_ulong(0), None))

    def kernel_calls__mount_in_a_namespace(self):
        def attack():
            checked(libc.unshare(0x10020000))
            checked(libc.mount(b"none", b"/", None, ctypes.c_ulong(1 << 18 | 1 << 14), None))

        in_a_child(attack)

    def rights__chown(self):
        Path("owned").touch()
        os.chown("owned", 54321, 54321)

    def setuid_files__chmod(self):
        Path("suid").touch()
        Path("suid").chmod(0o4755)

    def setuid_files__open(self):
        os.close(os.open("suid2", os.O_CREAT | os.O_WRONLY, 0o4755))

    def programs__of_the_system(self):
        subprocess.run([self.facts["true"]], check=True)

    def programs__python_again(self):
        subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)


def names():
    return [name for name in vars(Attacks) if "__" in name.strip("_")]


def main():
    attacks = Attacks(json.loads(sys.argv[1]))
    results = {}
    for name in names():
        try:
            getattr(attacks, name)()
            results[name] = "done"
        except (OSError, AssertionError, KeyError) as error:
            results[name] = repr(error)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
