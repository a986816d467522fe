"""seccomp: system calls that fail for a process and all that it starts. A list of what is denied, as a program for the
kernel's small machine (BPF; Documentation/userspace-api/seccomp_filter.rst of Linux), for x86_64 and aarch64. Calls
of the 32-bit and x32 interfaces are not looked at one by one: they end the process, or fail."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmasos.apps.sandbox import linux

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000
_NUMBERS = {  # name: (x86_64, aarch64); None: not there
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241), "bpf": (321, 280),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "mount": (165, 40), "umount2": (166, 39), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "pivot_root": (155, 41), "chroot": (161, 51),
    "setns": (308, 268), "unshare": (272, 97), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116), "vhangup": (153, 58),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    "iopl": (172, None), "ioperm": (173, None), "personality": (135, 92),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
    "socket": (41, 198), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221), "execveat": (322, 281), "ioctl": (16, 29),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "open": (2, None), "openat": (257, 56), "openat2": (437, 437), "creat": (85, None),
    "mknod": (133, None), "mknodat": (259, 33), "seccomp": (317, 277), "sched_setaffinity": (203, 122),
}  # fmt: skip
_ALWAYS = tuple(_NUMBERS)[: tuple(_NUMBERS).index("socket")]
"""Denied whatever the policy: other processes, the kernel, namespaces, and memory that no limit counts."""
_ABSENT = ("clone3", "openat2")
"""Their arguments lie in memory, where a filter cannot look; programs fall back to the older calls."""
_NEW_NAMESPACES = 0x7E020000
_SETUID_BITS, _CREATES = 0o6000, 0o100 | 0o20000000
_FAST_OPEN = 0x20000000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_LOAD, _AND, _EQUAL, _AT_LEAST, _JUMP, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x05, 0x06
_ALLOW, _ERRNO, _KILL, _NOTIFY = 0x7FFF0000, 0x00050000, 0x80000000, 0x7FC00000
_NEW_LISTENER = 8
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1


@dataclass(frozen=True)
class Where:
    """Whether an argument's lower 32 bits, `mask`ed, are among `values`, or not `inside` them."""

    argument: int
    values: tuple[int, ...]
    inside: bool = True
    mask: int = 0xFFFFFFFF


@dataclass(frozen=True)
class Rule:
    """What becomes of a call, if all of `where` holds."""

    call: str
    where: tuple[Where, ...] = ()
    action: int = _ERRNO | errno.EPERM


CORES_KEPT = [Rule("sched_setaffinity")]
"""For who computes on chosen processors only."""


def available() -> bool:
    return linux.MACHINE in ARCHITECTURES


def rules_for(families: Iterable[int], *, only_tcp: bool) -> list[Rule]:
    """`families`: those of sockets that may be made. `only_tcp`: of AF_INET and AF_INET6 only TCP, so that Landlock's
    rules about its ports hold for all of it."""
    rules = [Rule(call) for call in _ALWAYS]
    rules += [Rule(call, action=_ERRNO | errno.ENOSYS) for call in _ABSENT]
    rules.append(Rule("socket", (Where(0, tuple(families), inside=False),)))
    if only_tcp:
        internet = Where(0, (socket.AF_INET, socket.AF_INET6))
        rules.append(Rule("socket", (internet, Where(1, (socket.SOCK_STREAM,), inside=False, mask=0xF))))
        rules.append(Rule("socket", (internet, Where(2, (0, socket.IPPROTO_TCP), inside=False))))
        flags = {"sendto": 3, "sendmsg": 2, "sendmmsg": 3}  # connect without connect()
        rules += [Rule(call, (_any_bit(at, _FAST_OPEN),)) for call, at in flags.items()]
    rules.append(Rule("clone", (_any_bit(0, _NEW_NAMESPACES),)))
    rules.append(Rule("ioctl", (Where(1, (_TIOCSTI, _TIOCLINUX)),)))  # typing into a terminal
    modes = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1, "mknod": 1, "mknodat": 2}
    rules += [Rule(call, (_any_bit(at, _SETUID_BITS),)) for call, at in modes.items()]
    for call, at in (("open", 1), ("openat", 2)):
        rules.append(Rule(call, (_any_bit(at, _CREATES), _any_bit(at + 1, _SETUID_BITS))))
    return rules


def _any_bit(argument: int, mask: int) -> Where:
    return Where(argument, (0,), inside=False, mask=mask)


def program(rules: Sequence[Rule], machine: str) -> bytes:
    """The filter, as an array of struct sock_filter."""
    column = list(ARCHITECTURES).index(machine)
    code = [_one(_LOAD, 4), _one(_EQUAL, ARCHITECTURES[machine], 1, 0), _one(_RETURN, _KILL), _one(_LOAD, 0)]
    if machine == "x86_64":
        code += [_one(_AT_LEAST, X32, 0, 1), _one(_RETURN, _ERRNO | errno.ENOSYS)]
    for rule in rules:
        number = _NUMBERS[rule.call][column]
        if number is not None:
            body = _body(rule)
            code += [_one(_EQUAL, number, 0, len(body)), *body]
    return b"".join([*code, _one(_RETURN, _ALLOW)])


def _body(rule: Rule) -> list[bytes]:
    """Behind the comparison with a call's number: its conditions, its action. What does not hold jumps to the end,
    where the call's number is loaded again."""
    if not rule.where:
        return [_one(_RETURN, rule.action)]
    tail = [_one(_RETURN, rule.action), _one(_LOAD, 0)]
    for where in reversed(rule.where):
        to_end = len(tail) - 1
        n = len(where.values)
        head = [_one(_LOAD, 16 + 8 * where.argument), _one(_AND, where.mask)]
        if where.inside:
            tests = [_one(_EQUAL, value, n - i, 0) for i, value in enumerate(where.values)]
            tests.append(_one(_JUMP, to_end))
        else:
            tests = [_one(_EQUAL, value, n - 1 - i + to_end, 0) for i, value in enumerate(where.values)]
        tail = [*head, *tests, *tail]
    return tail


def _one(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _boxed(filter_: bytes) -> tuple[ctypes.Array[ctypes.c_char], bytes]:
    """struct sock_fprog, and what it points to, which must be kept as long."""
    code = ctypes.create_string_buffer(filter_, len(filter_))
    return code, struct.pack("@HxxxxxxQ", len(filter_) // 8, ctypes.addressof(code))


def install(rules: Sequence[Rule]) -> None:
    """From here on. no_new_privs must be set. Raises OSError where the kernel has no seccomp."""
    kept, boxed = _boxed(program(rules, linux.MACHINE))
    linux.prctl(linux.PR_SET_SECCOMP, 2, ctypes.c_char_p(boxed))
    del kept


def listen_for_exec() -> int:
    """From here on every execve waits for the holder of the file descriptor that is returned; when nobody holds it, it
    fails. A filter alone cannot tell the first from the others. Raises OSError on kernels before 5.5."""
    rules = [Rule(call, action=_NOTIFY) for call in ("execve", "execveat")]
    kept, boxed = _boxed(program(rules, linux.MACHINE))
    number = _NUMBERS["seccomp"][list(ARCHITECTURES).index(linux.MACHINE)]
    assert number is not None
    fd = linux.syscall("seccomp", number, 1, _NEW_LISTENER, ctypes.c_char_p(boxed))
    del kept
    return fd


def let_one_exec(listener: int) -> None:
    """Let the next execve pass, and none after it."""
    try:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        if not poll.poll()[0][1] & select.POLLIN:  # the process has ended
            return
        notice = fcntl.ioctl(listener, _RECEIVE, bytes(80))
        (which,) = struct.unpack_from("=Q", notice)
        fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", which, 0, 0, _CONTINUE))
    finally:
        os.close(listener)
