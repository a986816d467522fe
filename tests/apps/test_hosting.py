"""Addresses: which may be had, and what is said of those that may not."""

from __future__ import annotations

import socket

import pytest

from llmasos.apps.hosting import check_exposure, foreign_host, listen, url_of
from llmasos.errors import InvalidInputError, ServerError


def test_only_loopback_is_open_without_being_asked_for() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", ""):
        with pytest.raises(ServerError, match="--insecure"):
            check_exposure(host, insecure=False)
        check_exposure(host, insecure=True)
    for host in ("127.0.0.1", "127.5.5.5", "::1", "localhost"):
        check_exposure(host, insecure=False)


def test_a_port_in_use_is_said_with_another_one() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"Port {port} is in use.*--port {port % 65535 + 1}"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a" * 300, "x..y"])
def test_an_address_that_is_not_ours_is_a_typed_error(host: str) -> None:
    with pytest.raises(ServerError, match="can't be used"):
        listen(host, 0)


@pytest.mark.parametrize("port", [70000, -1, True, "80"])
def test_what_is_no_port_is_refused(port: object) -> None:
    with pytest.raises(InvalidInputError, match="port="):
        listen("127.0.0.1", port)  # type: ignore[arg-type]


def test_localhost_is_ipv4_first_and_ipv6_has_brackets_in_an_address() -> None:
    with listen("localhost", 0) as listener:
        assert listener.family == socket.AF_INET
    assert (url_of("::1", 80), url_of("localhost", 80)) == ("http://[::1]:80", "http://localhost:80")


def test_a_request_without_a_host_is_foreign() -> None:
    assert foreign_host({"headers": []})
    assert foreign_host({"headers": [(b"host", b"[::1]:80")]}) is None
