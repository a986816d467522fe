import os
import threading
from typing import Any

from tried import app


def spin():
    while True:
        pass


@app.route("/attack", methods=["POST"])
async def attack(given: dict[str, Any]) -> dict:
    try:
        os.sched_setaffinity(0, range(os.cpu_count()))
        os.nice(-20)
    except OSError:
        pass
    for _ in range(8):
        threading.Thread(target=spin, daemon=True).start()
    spin()
