"""The way out of applications: hosts that were granted, by name, on the public internet; nothing else."""

import asyncio
import contextlib
import http.server
import itertools
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from app_world import package_of, running

from llmasos.serve.apps.network import NetworkDoor, Refused, check_granted, is_public
from llmasos.store.packages.manifest import Grant

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")


@pytest.fixture
def site() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"{self.path} {self.headers['host']} {self.headers.get('proxy-connection')}".encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.asynccontextmanager
async def door(tmp_path: Path, *hosts: str) -> AsyncIterator[tuple[Path, list[str]]]:
    told: list[str] = []
    found = NetworkDoor(hosts, told.append)
    await found.open(tmp_path / "net.sock")
    try:
        yield tmp_path / "net.sock", told
    finally:
        await found.close()


async def ask(path: Path, text: str) -> str:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(text.encode())
    answer = await asyncio.wait_for(reader.read(4000), 10)
    while b"\r\n\r\n" in answer and answer.startswith(b"HTTP/1.1 200 Connection") is False:
        more = await asyncio.wait_for(reader.read(4000), 10)
        if not more:
            break
        answer += more
    writer.close()
    return answer.decode()


async def test_a_granted_host_is_reached_both_ways(tmp_path: Path, site: int) -> None:
    async with door(tmp_path, f"127.0.0.1:{site}") as (path, told):
        head = f"GET http://127.0.0.1:{site}/a?b=c HTTP/1.1\r\nhost: 127.0.0.1\r\nproxy-connection: keep-alive\r\n\r\n"
        assert (await ask(path, head)).endswith("/a?b=c 127.0.0.1 None")
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(f"CONNECT 127.0.0.1:{site} HTTP/1.1\r\n\r\n".encode())
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"GET /through HTTP/1.0\r\nhost: x\r\n\r\n")
        assert (await reader.read()).endswith(b"/through x None")
        writer.close()
        assert told == []


@pytest.mark.parametrize(
    "target",
    ["127.0.0.1:{other}", "localhost:{site}", "evil.example:443", "[::ffff:127.0.0.1]:{site}", "2130706433:{site}"],
)
async def test_another_host_is_refused_and_told(tmp_path: Path, site: int, target: str) -> None:
    async with door(tmp_path, f"127.0.0.1:{site}") as (path, told):
        answer = await ask(path, f"CONNECT {target.format(site=site, other=site + 1)} HTTP/1.1\r\n\r\n")
        assert answer.startswith("HTTP/1.1 403") and len(told) == 1


async def test_a_name_that_leads_to_this_machine_is_refused(
    tmp_path: Path, site: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolved(*_: object, **__: object) -> list:
        return [(2, 1, 6, "", ("127.0.0.1", site)), (2, 1, 6, "", ("10.0.0.1", site))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolved, raising=False)
    async with door(tmp_path, "granted.example", "*") as (path, _):
        answer = await ask(path, f"CONNECT granted.example:{site} HTTP/1.1\r\n\r\n")
        assert answer.startswith("HTTP/1.1 403") and "not on the public internet" in answer


@pytest.mark.parametrize(
    "head",
    ["nonsense\r\n\r\n", "CONNECT nohost HTTP/1.1\r\n\r\n", "GET /path HTTP/1.1\r\n\r\n", "CONNECT a:99999 X\r\n\r\n"],
)
async def test_what_is_no_request_for_a_proxy_is_answered_so(tmp_path: Path, head: str) -> None:
    async with door(tmp_path, "*") as (path, _):
        assert (await ask(path, head)).startswith("HTTP/1.1 400")


async def test_a_head_without_end_ends_the_connection(tmp_path: Path) -> None:
    async with door(tmp_path, "*") as (path, _):
        reader, writer = await asyncio.open_unix_connection(path)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"x" * 1000)
                await writer.drain()
            assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


def test_grants_are_by_name_and_port() -> None:
    granted = [Grant("net", "a.example:443"), Grant("net", "*.b.example")]
    for host, port in (("a.example", 443), ("x.b.example", 80), ("y.x.b.example", 1)):
        check_granted(granted, host, port)
    for host, port in (("a.example", 80), ("b.example", 80), ("xb.example", 80), ("a.example.evil", 443), ("", 1)):
        with pytest.raises(Refused):
            check_granted(granted, host, port)
    for pattern, host in itertools.product(
        ("*", "*:80", "*.0.0.1", "*.localhost"), ("127.0.0.1", "localhost", "[::1]", "x.localhost")
    ):
        with pytest.raises(Refused):
            check_granted([Grant("net", pattern)], host, 80)  # any host is any name, whatever the port
    check_granted([Grant("net", "localhost:80")], "localhost", 80)


def test_offline_mode_holds_for_applications(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    with pytest.raises(Refused, match="offline"):
        check_granted([Grant("net", "*")], "a.example", 443)
    check_granted([Grant("net", "127.0.0.1")], "127.0.0.1", 443)


def test_addresses_of_the_public_internet() -> None:
    assert all(map(is_public, ("93.184.215.14", "2606:2800:21f::1")))
    inner = "127.0.0.1 10.1.2.3 192.168.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 fe80::1%eth0 fc00::1 ::"
    assert not any(map(is_public, [*inner.split(), "::ffff:127.0.0.1", "2002:7f00:1::"]))


def test_an_application_gets_out_by_the_usual_clients(tmp_path: Path, site: int) -> None:
    code = (
        "import httpx, urllib.request\nfrom llmasos import Application\napp = Application()\n\n"
        '@app.route("/get")\ndef get(url: str, way: str) -> str:\n    """Get."""\n'
        '    if way == "httpx":\n        return httpx.get(url, timeout=10).text\n'
        "    return urllib.request.urlopen(url, timeout=10).read().decode()\n"
    )
    with running(tmp_path) as world:
        info = world.install(
            package_of(tmp_path, code, name="out", more=f'[permissions]\nnet = ["127.0.0.1:{site}"]\n')
        )
        rows = {row["what"]: row["by"] for row in info["enforced"]}
        if rows["network"] != ["namespaces"]:
            pytest.skip("this system gives applications no network of their own")
        for way in ("httpx", "urllib"):
            url = f"http://127.0.0.1:{site}/{way}"
            found = world.client.get("/apps/out/get", params={"url": url, "way": way})
            assert found.status_code == 200 and found.json().startswith(f"/{way}"), found.text
        log = world.client.get("/llmasos/v1/apps/out/logs").text
        port = world.client.base_url.port
        url = f"http://127.0.0.1:{port}/llmasos/v1/keys"
        refused = world.client.get("/apps/out/get", params={"url": url, "way": "httpx"})
        assert "none of the hosts that were granted" in refused.text, log
