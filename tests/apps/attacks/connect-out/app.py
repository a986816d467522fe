import socket
import urllib.request

from tried import attack, facts, tried


def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", facts["port"]))


@attack
def app() -> dict:
    server = f"http://127.0.0.1:{facts['port']}"
    return tried(
        the_server=lambda: socket.create_connection(("127.0.0.1", facts["port"]), timeout=3).close(),
        the_servers_keys=lambda: urllib.request.urlopen(f"{server}/llmasos/v1/keys", timeout=3).read(),
        elsewhere=lambda: socket.create_connection(("192.0.2.1", 80), timeout=3).close(),
        name=lambda: socket.getaddrinfo("example.com", 80),
        datagram=datagram,
        ipv6=lambda: socket.create_connection(("::1", facts["port"]), timeout=3).close(),
        raw=lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close(),
        netlink=lambda: socket.socket(16, socket.SOCK_RAW, 0).close(),
        packet=lambda: socket.socket(17, socket.SOCK_RAW, 0).close(),
    )
