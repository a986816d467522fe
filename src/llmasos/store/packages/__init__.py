"""Applications, models, adapters and datasets as packages: what they say of themselves, made, signed, published, found,
checked and installed."""

from llmasos.store.packages.bundled import indexes
from llmasos.store.packages.index import Found, Index, Release, choose, search
from llmasos.store.packages.installed import Apps, Installed, NotAcceptedError, Request
from llmasos.store.packages.manifest import (
    Grant,
    Manifest,
    check_app_name,
    grants,
    parse_manifest,
    read_manifest,
    sheet,
    widened,
)
from llmasos.store.packages.pack import Packed, pack
from llmasos.store.packages.shelf import Packages, Shelf
from llmasos.store.packages.sign import KeyChangedError, Publisher, sign, verify
from llmasos.store.packages.unpack import Package, open_package

__all__ = [
    "Apps",
    "Found",
    "Grant",
    "Index",
    "Installed",
    "KeyChangedError",
    "Manifest",
    "NotAcceptedError",
    "Package",
    "Packages",
    "Packed",
    "Publisher",
    "Release",
    "Request",
    "Shelf",
    "check_app_name",
    "choose",
    "grants",
    "indexes",
    "open_package",
    "pack",
    "parse_manifest",
    "read_manifest",
    "search",
    "sheet",
    "sign",
    "verify",
    "widened",
]
