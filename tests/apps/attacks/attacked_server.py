"""A real server that the attacks are run against: `python attacked_server.py` prints its URL when it is ready. A fake
model, a database in the home folder, and an abstract socket that nobody may reach."""

import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "serve"))

from fake_llm import FakeLLM

from llmasos.apps.hosting import listen, run
from llmasos.serve.access.open import open_access
from llmasos.serve.server import create_app

if __name__ == "__main__":
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + sys.argv[1])
    abstract.listen()
    with open_access("", "127.0.0.1") as access, listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        app = create_app({"fake": FakeLLM("fake"), "other": FakeLLM("other")}, access=access)
        run(app, listener, grace=2, ready=lambda: print(port, flush=True), lifespan="on")
