import socket

from tried import attack, facts, tried


def squat():
    """A name that others could look for."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\0" + facts["abstract_free"])
        sock.listen()
        held.append(sock.dup())


def abstract():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + facts["abstract"])


held = []


@attack
def app() -> dict:
    return tried(
        port=lambda: socket.create_server(("0.0.0.0", 0)),
        own_port=lambda: socket.create_server(("127.0.0.1", facts["port"]), reuse_port=True),
        abstract_of_the_outside=abstract,
        squat_abstract=squat,
    )
