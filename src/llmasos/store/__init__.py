"""The shelves: find a model by name, see what it would cost, fetch it, keep it, check it, remove it.

Importing this loads neither torch nor huggingface_hub.
"""

from llmasos.store.card import Card, CardFile, Upstream
from llmasos.store.catalog import DEFAULT_MODEL, Catalog, Entry, Resolved, SourceRef, catalog, resolve
from llmasos.store.library import ImportPlan, Library, Verification, import_model
from llmasos.store.plan import Plan, plan
from llmasos.store.pull import ensure, pull
from llmasos.store.transfer import Progress

__all__ = [
    "DEFAULT_MODEL",
    "Card",
    "CardFile",
    "Catalog",
    "Entry",
    "ImportPlan",
    "Library",
    "Plan",
    "Progress",
    "Resolved",
    "SourceRef",
    "Upstream",
    "Verification",
    "catalog",
    "ensure",
    "import_model",
    "plan",
    "pull",
    "resolve",
]
