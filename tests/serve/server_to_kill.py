"""A server with a fake model, for tests that kill it: `python server_to_kill.py PORT DELAY` prints when it is ready."""

import sys

from fake_llm import FakeLLM

from llmasos.apps.hosting import listen, run
from llmasos.serve import create_app

if __name__ == "__main__":
    port, delay = int(sys.argv[1]), float(sys.argv[2])
    with listen("127.0.0.1", port) as listener:
        run(
            create_app(FakeLLM(delay=delay)), listener, grace=1, ready=lambda: print("ready", flush=True), lifespan="on"
        )
