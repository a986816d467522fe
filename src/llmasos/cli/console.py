"""`llmasos console`: the page of a server."""

from __future__ import annotations

import contextlib
import sys
import webbrowser

from llmasos.cli.messages import t
from llmasos.cli.render import say
from llmasos.cli.server import address, own_api
from llmasos.errors import ProviderError


def console(*, url: str | None = None, api_key: str | None = None, no_open: bool = False) -> None:
    """Print its address, and open it in the browser where somebody sits at the terminal. Raises NetworkError where no
    server answers."""
    with own_api(url, api_key) as http, contextlib.suppress(ProviderError):  # a refusal is an answer, too
        http.json("GET", "/usage")
    page = f"{address(url, api_key).url}/console/"
    print(page)
    if not no_open and sys.stdout.isatty() and not webbrowser.open(page):
        say(t("console.by_hand"))
