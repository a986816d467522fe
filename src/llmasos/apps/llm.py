"""`app.llm`: which model an application gets.

An application names a model, or says what one must have (`Requirement`); who runs it decides. Under a server
(`LLMASOS_SERVER`) it is one of that server's models, asked over its API with the application's key; else one of this
machine, in this process: of the installed ones that meet it, the largest. Where none is installed at all, the
catalogue's usual one is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmasos.errors import InvalidInputError, LLMasOSError, NotFoundError, UnsupportedError
from llmasos.settings import app_host

if TYPE_CHECKING:
    from llmasos.client.types import Model
    from llmasos.inference.remote import RemoteLLM
    from llmasos.store import Card, Library
    from llmasos.store.packages.manifest import Manifest

Capability = Literal["tools", "embed"]
_CAPABILITIES = ("tools", "embed")


@dataclass(frozen=True)
class Requirement:
    """What a model must have: a context of so many tokens, capabilities, files of at most so many bytes ("2GB")."""

    min_context: int | None = None
    capabilities: tuple[Capability, ...] = ()
    max_size: str | int | None = None

    def __post_init__(self) -> None:
        if "vision" in self.capabilities:
            raise UnsupportedError("capabilities: no vision model is supported yet.", hint="Leave it out.", param="llm")
        if isinstance(self.capabilities, str) or (unknown := set(self.capabilities) - set(_CAPABILITIES)):
            wrong = self.capabilities if isinstance(self.capabilities, str) else min(unknown)
            raise InvalidInputError(
                f"capabilities: {wrong!r} is none.",
                hint=f"Write a tuple of: {', '.join(_CAPABILITIES)}.",
                param="capabilities",
            )
        object.__setattr__(self, "capabilities", tuple(self.capabilities))
        _ = self.max_bytes

    @property
    def max_bytes(self) -> int | None:
        return bytes_of(self.max_size) if isinstance(self.max_size, str) else self.max_size

    def __str__(self) -> str:
        words = [f"a context of {self.min_context} tokens"] if self.min_context else []
        words += [f"files of at most {self.max_size}"] if self.max_size else []
        return ", ".join((*words, *self.capabilities)) or "any model"


def bytes_of(size: str) -> int:
    """Of a size as manifests write it. Raises InvalidInputError."""
    from llmasos.store.packages.manifest import ModelNeed, num_bytes

    try:
        ModelNeed(max_size=size)
    except ValueError:
        raise InvalidInputError(
            f"max_size={size!r} is no size.", hint='Write one like "512MB" or "2GB".', param="max_size"
        ) from None
    return num_bytes(size)


def required(manifest: Manifest | None, name: str = "default") -> str | Requirement | None:
    """What `[models]` says under a name; under "default", also its only one."""
    models = manifest.models if manifest is not None else {}
    if name == "default" and name not in models and len(models) == 1:
        name = next(iter(models))
    found = models.get(name)
    if found is None or isinstance(found, str):
        return found
    return Requirement(found.min_context, tuple(found.capabilities), found.max_size)


def resolve(wanted: str | Requirement) -> Any:
    """The model, with the methods of `LLM`. Raises NotFoundError if there is none such, and what loading it raises."""
    server = app_host().server
    if server:
        return _served(server, wanted)
    from llmasos.model_zoo import get_model

    return get_model(wanted if isinstance(wanted, str) else _here(wanted))


def _served(server: str, wanted: str | Requirement) -> RemoteLLM:
    from llmasos.client.address import is_unix
    from llmasos.inference.remote import RemoteLLM

    root = server.rstrip("/").removesuffix("/v1").rstrip(":")
    base = f"{root}:/v1" if is_unix(root) else f"{root}/v1"
    name = wanted if isinstance(wanted, str) else _listed(base, wanted)
    return RemoteLLM(f"{base}#{name}")


def _listed(base: str, wanted: Requirement) -> str:
    from llmasos.client import Client

    with Client(base) as client:
        models = [one for one in client.models() if not one.id.startswith("app/")]
    for one in sorted(models, key=lambda one: one.parent is not None):  # adapters last
        if not _lacks_served(one, wanted):
            return one.id
    raise _nothing(wanted, [f"{one.id} lacks {_lacks_served(one, wanted)}" for one in models])


def _lacks_served(model: Model, wanted: Requirement) -> str:
    """What keeps a server's model from being the one; what the server does not tell is not held against it."""
    can, context = model.capabilities, model.context_length
    if wanted.min_context and context is not None and context < wanted.min_context:
        return f"{wanted.min_context - context} tokens of context"
    if can is None:
        return ""
    if "embed" not in wanted.capabilities and not can.completion:
        return "text generation"
    has = {"tools": can.tools, "embed": can.embeddings}
    size = getattr(model, "size", None)
    if wanted.max_bytes and isinstance(size, int) and size > wanted.max_bytes:
        return "smaller files"
    return next((one for one in wanted.capabilities if not has[one]), "")


def _here(wanted: Requirement) -> str:
    """The name of an installed model, or of the usual one, which is then fetched."""
    from llmasos.store import Library, ensure
    from llmasos.store.catalog import DEFAULT_MODEL

    library = Library()
    if not library.has(DEFAULT_MODEL) and not library.list() and not wanted.capabilities:
        ensure(DEFAULT_MODEL)
    cards = [card for card in library.list() if not card.error]
    reasons = []
    for card in sorted(cards, key=lambda card: card.size, reverse=True):
        try:
            lack = _lacks_here(library, card, wanted)
        except LLMasOSError as e:
            lack = f"({e.message})"
        if not lack:
            return card.name
        reasons.append(f"{card.name} lacks {lack}")
    raise _nothing(wanted, reasons)


def _lacks_here(library: Library, card: Card, wanted: Requirement) -> str:
    from llmasos.store.plan import plan
    from llmasos.text import load_tokenizer
    from llmasos.text.template import free_variables

    if wanted.max_bytes is not None and card.size > wanted.max_bytes:
        return "smaller files"
    path = library.path(card.name)
    embeds, encoder = "embed" in wanted.capabilities, card.use in ("encoder", "embedding")
    if embeds != encoder:
        return "embeddings" if embeds else "text generation"
    made = plan(card.name)
    if wanted.min_context and made.context_length < wanted.min_context:
        return f"{wanted.min_context - made.context_length} tokens of context"
    if not made.fits_memory:
        return "memory here"
    if encoder:
        return ""
    template = load_tokenizer(path).chat_template
    if template is None:
        return "a chat template"
    if "tools" in wanted.capabilities and not free_variables(template) & {"tools", "functions", "custom_tools"}:
        return "tools"
    return ""


def _nothing(wanted: Requirement, reasons: list[str]) -> NotFoundError:
    found = "; ".join(reasons[:5]) or "there is none"
    return NotFoundError(
        f"No model here meets the requirement ({wanted}): {found}.",
        hint="`llmasos search` lists models, `llmasos pull NAME` fetches one.",
    )
