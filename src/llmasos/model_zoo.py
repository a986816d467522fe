"""Names -> models: `get_model` loads one, `list_models` and `search_models` look through catalogue and library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmasos.inference.llm import LLM
    from llmasos.inference.remote import RemoteLLM
    from llmasos.store import Card, Entry, Progress


@dataclass(frozen=True)
class ModelInfo:
    """One line of a listing. `installed` models lie in the home folder; others are fetched on first use."""

    name: str
    family: str
    licence: str
    upstream: str
    installed: bool
    notice: str = ""
    use: str = ""
    """chat, base, encoder or embedding; empty where nobody said."""
    aliases: tuple[str, ...] = ()


def get_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
) -> LLM | RemoteLLM:
    """A model by name, fetched if need be; the same as `LLM.from_pretrained`."""
    from llmasos.inference.llm import LLM

    return LLM.from_pretrained(name, device=device, dtype=dtype, quantization=quantization, on_progress=on_progress)


def list_models() -> list[ModelInfo]:
    """Every model that a name is known for: the installed ones first, then the rest of the catalogue."""
    return search_models("")


def search_models(query: str) -> list[ModelInfo]:
    """The models whose facts contain every word of `query`, in any case; installed ones first."""
    from llmasos.store import Library, catalog

    cards = {card.name: card for card in Library().list() if not card.error}
    entries = catalog().search(query)
    found = [_of_entry(entry, (entry.stored_as or entry.name) in cards) for entry in entries]
    catalogued = {entry.stored_as or entry.name for entry in catalog().entries}
    words = query.lower().split()
    for card in cards.values():
        info = _of_card(card)
        text = " ".join((info.name, info.family, card.architecture or "", info.licence, info.upstream, info.use))
        if card.name not in catalogued and all(word in text.lower() for word in words):
            found.append(info)
    return sorted(found, key=lambda info: not info.installed)


def _of_entry(entry: Entry, installed: bool) -> ModelInfo:
    notice = entry.notice or ""
    return ModelInfo(entry.name, entry.family, entry.licence, entry.repo, installed, notice, entry.use, entry.aliases)


def _of_card(card: Card) -> ModelInfo:
    """An installed model that the catalogue does not have."""
    upstream = card.upstream.repo or card.upstream.url or card.source
    return ModelInfo(card.name, card.family or "", card.licence or "", upstream, True, use=card.use or "")
