import sys
import threading

from tried import attack


def shout():
    while True:
        sys.stdout.write("x" * 100_000)
        sys.stderr.write("\x1b[2J\n" * 1000)


@attack
def app() -> dict:
    threading.Thread(target=shout, daemon=True).start()
    return {}
