"""What a key is: its text, its hash, its rights and limits.

The text is `sk-llmasos-ID-SECRET`. The ID (10 characters) is public: lists and logs name the key by it. The secret has
256 random bits; only its argon2id hash is kept, so the database gives nobody a key. Before that stands a mark of 32
bits, a fast hash's: wrong secrets are told by it at no cost, and the 224 bits that it leaves are as far from guessing.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Literal

from llmasos.serve.caller import Caller, Scope

if TYPE_CHECKING:
    from argon2 import PasswordHasher

PREFIX = "sk-llmasos-"
SCOPES: tuple[Scope, ...] = ("inference", "manage", "publish")
"""Those that a key can be made with; applications' keys are made at their installation."""
_ID_LETTERS = string.ascii_lowercase + string.digits
_SECRET_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH, _SECRET_LENGTH = 10, 43  # 62^43 > 2^256
_TEXT = re.compile(rf"{PREFIX}([a-z0-9]{{{_ID_LENGTH}}})-([A-Za-z0-9]{{{_SECRET_LENGTH}}})")
_ANYWHERE = re.compile(rf"({PREFIX}[a-z0-9]{{{_ID_LENGTH}}})-[A-Za-z0-9]+")

KeyState = Literal["active", "expired", "revoked"]


@dataclass(frozen=True)
class Limits:
    """What a key may ask for; None: no limit. Days and months are UTC's; tokens are those of prompts and answers."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    max_parallel: int | None = None

    @property
    def has_quota(self) -> bool:
        return (self.requests_per_day, self.tokens_per_day, self.tokens_per_month) != (None, None, None)


@dataclass(frozen=True)
class Key:
    """A key as the server knows it: without its secret."""

    id: str
    name: str
    secret_hash: str = field(repr=False)
    scopes: tuple[Scope, ...]
    created: datetime
    models: tuple[str, ...] | None = None
    apps: tuple[str, ...] | None = None
    limits: Limits = Limits()
    priority: int = 0
    share_cache: bool = False
    expires: datetime | None = None
    revoked: datetime | None = None
    last_used: datetime | None = None

    def state(self, now: datetime) -> KeyState:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"

    @property
    def caller(self) -> Caller:
        return Caller(
            key_id=self.id,
            name=self.name,
            scopes=frozenset(self.scopes),
            models=self.models,
            apps=self.apps,
            priority=self.priority,
            cache_salt=None if self.share_cache else self.id,
        )


def new_text() -> tuple[str, str]:
    """ID and secret of a new key."""
    return _random(_ID_LETTERS, _ID_LENGTH), _random(_SECRET_LETTERS, _SECRET_LENGTH)


def _random(letters: str, length: int) -> str:
    return "".join(secrets.choice(letters) for _ in range(length))


def text_of(id: str, secret: str) -> str:
    return f"{PREFIX}{id}-{secret}"


def parts_of(text: str) -> tuple[str, str] | None:
    """ID and secret of a key's text; None if it is none."""
    found = _TEXT.fullmatch(text)
    return (found[1], found[2]) if found else None


def redacted(text: str) -> str:
    """`text` without the secrets of keys that somebody put where none belongs, such as a path."""
    return _ANYWHERE.sub(r"\1-…", text) if PREFIX in text else text


@cache
def _hasher() -> PasswordHasher:
    from argon2 import PasswordHasher

    # OWASP's smallest: some 20 ms. More would protect guessable passwords, which these are not.
    return PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)


def hash_of(secret: str) -> str:
    """`MARK$argon2id$...`."""
    return _mark(secret) + _hasher().hash(secret)


def may_be_secret(secret_hash: str, secret: str) -> bool:
    """False for all wrong ones but one of 2^32. Hashes that were made before there were marks begin with $."""
    return secret_hash.startswith(("$", f"{_mark(secret)}$"))


def _mark(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()[:8]


def is_secret(secret_hash: str, secret: str) -> bool:
    """Whether `secret` is the hashed one. Blocking, some 20 ms."""
    from argon2.exceptions import VerificationError

    try:
        return _hasher().verify(secret_hash[secret_hash.index("$") :], secret)
    except VerificationError:
        return False
