"""An application on a real socket, while a block runs."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from llmasos.apps import Application
from llmasos.apps.hosting import listen


@contextlib.contextmanager
def served(app: Application, socket_path: str | None = None) -> Iterator[str]:
    """Its base URL; on a Unix socket where a path is given."""
    if socket_path is None:
        listener = listen("127.0.0.1", 0)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(socket_path)
        listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield f"unix:{socket_path}" if socket_path else f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
