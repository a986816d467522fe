import os
import socket

from tried import attack, facts, tried


def connect(target):
    path = os.environ.get("LLMASOS_APP_PROXY")
    if path is None:
        raise PermissionError("no proxy, no network")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        sock.sendall(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
        answer = sock.recv(1000).decode()
    if " 200 " not in answer:
        raise PermissionError(answer.strip().splitlines()[-1])


@attack
def app() -> dict:
    port = facts["port"]
    return tried(
        directly=lambda: socket.create_connection(("127.0.0.1", port), timeout=3).close(),
        the_server=lambda: connect(f"127.0.0.1:{port}"),
        the_server_by_name=lambda: connect(f"localhost:{port}"),
        another_host=lambda: connect("example.com:443"),
        another_port=lambda: connect("granted.example:22"),
        hidden_in_its_name=lambda: connect("granted.example.evil.example:443"),
        another_spelling=lambda: connect(f"2130706433:{port}"),
        two_lines=lambda: connect(f"granted.example:443 HTTP/1.1\r\nHost: 127.0.0.1:{port}"),
    )
