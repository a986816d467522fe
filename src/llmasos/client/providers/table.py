"""Models behind an API: names such as `openai:gpt-4.1` or `http://127.0.0.1:8000/v1#my-model`, and what they mean.

Standard library only, so that a name can be looked at without loading an HTTP client.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from llmasos.client.address import is_unix, place_of, split_unix
from llmasos.errors import InvalidInputError, ProviderError
from llmasos.settings import api_key as key_from_environment

OPENAI_PARAMETERS = frozenset(
    {"n", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias"}
    | {"logprobs"}
)
EXTENSIONS = frozenset({"top_k", "min_p", "typical_p", "repetition_penalty", "stop_token_ids", "ignore_eos"})
"""Sampling fields that LLMasOS and other servers for open models add to OpenAI's."""


@dataclass(frozen=True)
class Provider:
    """`parameters`: the SamplingParams fields that the API documents; any other one is refused, never dropped."""

    name: str
    base_url: str
    protocol: Literal["openai", "anthropic"] = "openai"
    parameters: frozenset[str] = OPENAI_PARAMETERS
    completions: bool = False
    """The API continues raw text. Elsewhere a bare prompt is sent as one user message."""
    embeddings: bool = True
    max_tokens_field: str = "max_tokens"
    seed_field: str = "seed"

    @property
    def key_variable(self) -> str:
        return f"{self.name.upper()}_API_KEY" if self.name in PROVIDERS else "LLMASOS_API_KEY"


PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("openai", "https://api.openai.com/v1", max_tokens_field="max_completion_tokens"),
        Provider(
            "anthropic",
            "https://api.anthropic.com/v1",
            protocol="anthropic",
            parameters=frozenset({"max_tokens", "temperature", "top_p", "top_k", "stop"}),
            embeddings=False,
        ),
        Provider(
            "openrouter",
            "https://openrouter.ai/api/v1",
            parameters=OPENAI_PARAMETERS - {"n"} | {"top_k", "min_p", "repetition_penalty"},
            embeddings=False,
        ),
        Provider(
            "groq",
            "https://api.groq.com/openai/v1",
            parameters=OPENAI_PARAMETERS - {"n", "logit_bias", "logprobs"},
            embeddings=False,
        ),
        Provider(
            "mistral",
            "https://api.mistral.ai/v1",
            parameters=OPENAI_PARAMETERS - {"logit_bias", "logprobs"},
            seed_field="random_seed",
        ),
        Provider(
            "deepseek",
            "https://api.deepseek.com",
            parameters=OPENAI_PARAMETERS - {"n", "seed", "logit_bias"},
            embeddings=False,
        ),
        Provider(
            "together",
            "https://api.together.xyz/v1",
            parameters=OPENAI_PARAMETERS - {"logprobs"} | {"top_k", "min_p", "repetition_penalty"},
        ),
    )
}

_URL = re.compile(r"^(?:(?P<protocol>openai|anthropic)\+)?(?P<url>(?:https?://|unix:).*)$", re.DOTALL)
_FORMS = "provider:model (e.g. openai:gpt-4.1), http(s)://host/v1#model or unix:/path/of.sock:/v1#model"


@dataclass(frozen=True)
class Endpoint:
    """A model behind an API, and the key for it."""

    provider: Provider
    model: str
    key: str = field(default="", repr=False)


def is_remote(name: str) -> bool:
    """Does this name mean a model behind an API? `https://` without `#model` is a file to download, so it does not."""
    if match := _URL.match(name):
        return bool(match["protocol"]) or bool(name.partition("#")[2])
    return name.partition(":")[0] in PROVIDERS and ":" in name


def shown(name: str) -> str:
    """`name` without a login or a query, which may hold secrets: for messages."""
    return re.sub(r"\?[^#]*", "", re.sub(r"//[^/?#]*@", "//", name)) if _URL.match(name) else name


def parse(name: str, *, api_key: str | None = None) -> Endpoint:
    """The endpoint that a name means. `api_key` overrides the environment variable.

    Raises InvalidInputError for a name of another form and ProviderError when the variable with the key is not set.
    """
    if match := _URL.match(name):
        return _parse_url(name, match["url"], match["protocol"] or "openai", api_key)
    provider_name, colon, model = name.partition(":")
    provider = PROVIDERS.get(provider_name)
    if provider is None or not colon:
        known = ", ".join(PROVIDERS)
        raise InvalidInputError(f"{name!r} names no model behind an API.", hint=f"Write {_FORMS}. Providers: {known}.")
    if not model:
        raise InvalidInputError(f"{name!r} lacks the model's name.", hint=f"Write {provider_name}:MODEL.")
    key = api_key or key_from_environment(provider.name)
    if not key:
        raise ProviderError(
            f"There is no key for {provider.name}: {provider.key_variable} is not set.",
            hint=f"export {provider.key_variable}=...",
        )
    return Endpoint(provider, model, key)


def _parse_url(name: str, url: str, protocol: str, api_key: str | None) -> Endpoint:
    """A server of one's own. Its key, if it wants one, is in LLMASOS_API_KEY: another provider's never goes there."""
    if is_unix(url):
        base_url, _, model = url.partition("#")
        split_unix(base_url)
        if not model:
            raise InvalidInputError(f"{url!r} lacks the model.", hint=f"Write {_FORMS}.")
        return _endpoint(base_url, model, protocol, api_key)
    try:
        parts = urlsplit(url)
        _ = parts.port  # looked at here, because it may be none
    except ValueError as e:
        raise InvalidInputError(f"{shown(name)!r} is not a valid address: {e}.", hint=f"Write {_FORMS}.") from e
    if not parts.hostname or not parts.fragment:
        raise InvalidInputError(
            f"{shown(name)!r} lacks the {'model' if parts.hostname else 'host'}.", hint=f"Write {_FORMS}."
        )
    if parts.query:
        raise InvalidInputError(
            f"{shown(name)!r} was given with a query, which a base URL can't have.", hint=f"Write {_FORMS}."
        )
    base_url = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
    return _endpoint(base_url, parts.fragment, protocol, api_key)


def _endpoint(base_url: str, model: str, protocol: str, api_key: str | None) -> Endpoint:
    provider = own_server(base_url).provider
    if protocol == "anthropic":
        parameters = PROVIDERS["anthropic"].parameters
        provider = replace(provider, protocol="anthropic", parameters=parameters, completions=False, embeddings=False)
    return Endpoint(provider, model, api_key or key_from_environment("llmasos"))


def own_server(base_url: str, *, api_key: str | None = None) -> Endpoint:
    """Any server that speaks OpenAI's protocol, named by its host; `api_key=None` reads LLMASOS_API_KEY."""
    name = place_of(base_url) if is_unix(base_url) else urlsplit(base_url).netloc.rpartition("@")[2]
    provider = Provider(name, base_url, parameters=OPENAI_PARAMETERS | EXTENSIONS, completions=True)
    return Endpoint(provider, "", key_from_environment("llmasos") if api_key is None else api_key)
