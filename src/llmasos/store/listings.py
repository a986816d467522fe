"""Where a model may come from: each kind of source answers with a listing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmasos.settings import settings
from llmasos.store.catalog import Entry, SourceRef
from llmasos.store.pip import index_url
from llmasos.store.sources import HubListing, Listing, UrlListing
from llmasos.store.transfer import check_online, is_here
from llmasos.store.wheels import WheelListing


def list_source(ref: SourceRef, entry: Entry | None, note: Callable[[str], None]) -> Listing:
    """Ask a source what it has. `note` gets lines for people. Raises the errors of `transfer.request`."""
    if ref.kind == "hf":
        return HubListing(ref)
    if ref.kind == "pypi":
        return WheelListing(ref, entry, note)
    if ref.kind == "https":
        return UrlListing(ref)
    raise AssertionError(ref.kind)


def check_sources(sources: Sequence[SourceRef]) -> None:
    """Raises OfflineError where offline mode is on and none of them is on this machine itself."""
    if settings().offline and not any(is_here(_address(source)) for source in sources):
        check_online(sources[0].text)


def _address(ref: SourceRef) -> str:
    """Where a source is asked."""
    if ref.kind == "hf":
        from huggingface_hub import constants

        return constants.ENDPOINT
    if ref.kind == "pypi":
        return index_url()
    return ref.url
