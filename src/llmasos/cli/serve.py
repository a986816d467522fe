"""`llmasos serve`: models behind OpenAI's API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmasos.cli.engine import take_engine
from llmasos.cli.messages import t
from llmasos.cli.render import say
from llmasos.errors import InvalidInputError, UnsupportedError

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
    adapter: tuple[str, ...] = (),
    enable_lora_loading: bool = False,
    **engine: Any,
) -> None:
    """`llmasos serve`: returns after Ctrl-C or SIGTERM."""
    from llmasos.client.providers import is_remote
    from llmasos.inference.llm import LLM
    from llmasos.serve import serve
    from llmasos.store import DEFAULT_MODEL

    options = take_engine(engine)
    adapters = dict(map(_named, adapter))

    def load(ref: str) -> LLM:
        from llmasos.cli.fetch import load

        if is_remote(ref):
            raise UnsupportedError(t("serve.remote", model=ref), hint=t("serve.remote.hint"))
        llm = load(ref, device=device, dtype=dtype, quantization=quantization, **options)
        assert isinstance(llm, LLM)
        return llm

    names = models or (DEFAULT_MODEL,)

    def ready(url: str) -> None:
        say(t("serve.ready", models=", ".join([*names, *adapters]), url=url))

    serve(
        names,
        host=host,
        port=port,
        insecure=insecure,
        adapters=adapters,
        load=load,
        on_ready=ready,
        enable_lora_loading=enable_lora_loading,
    )


def _named(adapter: str) -> tuple[str, str]:
    """The two sides of `name=path`."""
    name, _, path = adapter.partition("=")
    if not name or not path:
        raise InvalidInputError(
            t("serve.adapter", value=adapter), hint="llmasos serve MODEL --adapter poems=./poems-lora", param="adapter"
        )
    return name, path
