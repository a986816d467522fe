"""An application on a real socket, while a block runs."""

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from llmasos.apps import Application
from llmasos.apps.hosting import listen


@contextlib.contextmanager
def served(app: Application) -> Iterator[str]:
    """Its base URL."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
