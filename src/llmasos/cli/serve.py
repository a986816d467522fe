"""`llmasos serve`: models behind OpenAI's API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmasos.cli.messages import t
from llmasos.cli.render import say

if TYPE_CHECKING:
    from llmasos.inference.llm import LLM


def serve(
    *models: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    insecure: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
) -> None:
    """`llmasos serve`: returns after Ctrl-C or SIGTERM."""
    from llmasos.client.providers import is_remote
    from llmasos.errors import UnsupportedError
    from llmasos.inference.llm import LLM
    from llmasos.serve import serve
    from llmasos.store import DEFAULT_MODEL

    def load(ref: str) -> LLM:
        from llmasos.cli.fetch import load

        if is_remote(ref):
            raise UnsupportedError(t("serve.remote", model=ref), hint=t("serve.remote.hint"))
        llm = load(ref, device=device, dtype=dtype, quantization=quantization)
        assert isinstance(llm, LLM)
        return llm

    names = models or (DEFAULT_MODEL,)

    def ready(url: str) -> None:
        say(t("serve.ready", models=", ".join(names), url=url))

    serve(names, host=host, port=port, insecure=insecure, load=load, on_ready=ready)
