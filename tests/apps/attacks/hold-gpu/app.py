import os
from pathlib import Path

from tried import attack, every, tried


def devices():
    return [path for pattern in ("nvidia*", "dri/*", "kfd", "accel*", "vfio/*") for path in Path("/dev").glob(pattern)]


@attack
def app() -> dict:
    return tried(
        open_a_card=lambda: every(devices(), lambda path: os.open(path, os.O_RDWR)),
        make_a_device=lambda: os.mknod("card", 0o20600, os.makedev(195, 0)),
        disks=lambda: every(Path("/dev").glob("[sv]d*"), lambda path: os.open(path, os.O_RDONLY)),
        memory=lambda: os.open("/dev/mem", os.O_RDONLY),
        drivers=lambda: every(Path("/proc/driver").glob("nvidia*"), lambda path: list(path.iterdir())),
    )
