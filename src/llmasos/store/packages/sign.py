"""Who made a package: ed25519 signatures (RFC 8032) over its list of hashes. Needs the extra `apps`.

The key is made once, as `<home>/keys/publisher.pem` (PKCS #8), for its owner's eyes only. `signature.json` in the
package has the public key and the signature of `files.sha256`, so it holds for every listed byte.

A signature alone says only that one key signed all of it. Whose key that is, is told by the first install: the key of
an application's publisher is noted in `<home>/keys/publishers`, and another one, or none, is refused from then on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmasos.errors import FormatError, InvalidInputError, StoreError, UnsupportedError
from llmasos.settings import settings
from llmasos.store.packages.manifest import check_app_name
from llmasos.store.packages.pack import SIGNATURE, bytes_source, write_whole, write_zip
from llmasos.store.packages.unpack import Package, open_package
from llmasos.store.transfer import disk_errors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_PURPOSE = b"llmasos package 1\n"
"""Before the signed bytes, so that a signature for anything else is none for a package."""


class Signature(BaseModel):
    """`signature.json`. Keys and signatures in base64; `key_id`: the first 32 hex digits of the key's SHA-256."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    algorithm: Literal["ed25519"] = "ed25519"
    key_id: str
    public_key: str
    signature: str


@dataclass(frozen=True)
class Publisher:
    """Whose signature holds."""

    key_id: str
    public_key: str


def _library() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as e:
        raise UnsupportedError(
            "Signatures need the package cryptography, which is not installed.", hint="pip install llmasos[apps]"
        ) from e
    return ed25519


def publisher_key(home: Path | None = None) -> Ed25519PrivateKey:
    """This home's key, made now if there is none."""
    ed25519 = _library()
    from cryptography.hazmat.primitives import serialization

    path = (home or settings().home) / "keys" / "publisher.pem"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            made = ed25519.Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            _write_once(path, made)
        if os.name != "nt" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise StoreError(f"Others can read the key {path}.", hint=f"chmod 600 {path}")
        data = path.read_bytes()
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError) as e:
        raise FormatError(
            f"{path} is no key: {e}.", hint="Put the right one there; without it a new one is made."
        ) from e
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise FormatError(f"{path} is no ed25519 key.", hint="Put the right one there; without it a new one is made.")
    return key


def _write_once(path: Path, data: bytes) -> None:
    """Whole, private from its first byte, and never over another's."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if os.name == "nt":
            os.rename(temporary, path)
        else:
            os.link(temporary, path)  # fails where there is one
    except FileExistsError:
        return  # another process was faster: its key is the key
    finally:
        temporary.unlink(missing_ok=True)


def sign(path: Path, home: Path | None = None) -> Publisher:
    """Sign the package at `path` with this home's key, in place of a signature that it has. Raises FormatError for a
    package that is not whole."""
    key = publisher_key(home)
    from cryptography.hazmat.primitives import serialization

    public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    with open_package(path) as package:
        package.check()
        made = Signature(
            key_id=_key_id(public),
            public_key=base64.b64encode(public).decode(),
            signature=base64.b64encode(key.sign(_PURPOSE + package.hash_list)).decode(),
        )
        signature = bytes_source(made.model_dump_json(indent=2).encode() + b"\n")
        write_zip(path, {**package.sources(), SIGNATURE: signature}, package.manifest)
    return Publisher(made.key_id, made.public_key)


def _key_id(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()[:32]


def verify(package: Package) -> Publisher | None:
    """Who signed the package; None if nobody did. Raises FormatError for a signature that does not hold."""
    if package.signature is None:
        return None
    ed25519 = _library()
    from cryptography.exceptions import InvalidSignature

    try:
        found = Signature.model_validate_json(package.signature)
        public = base64.b64decode(found.public_key, validate=True)
        key = ed25519.Ed25519PublicKey.from_public_bytes(public)
        if found.key_id != _key_id(public):
            raise InvalidSignature("the key id is not that of the key")
        key.verify(base64.b64decode(found.signature, validate=True), _PURPOSE + package.hash_list)
    except ValidationError as e:
        raise _bad(package, f"{SIGNATURE}: {e.errors()[0]['msg']}") from e
    except (InvalidSignature, binascii.Error, ValueError) as e:
        raise _bad(package, str(e) or "it is not one of these files by this key") from e
    return Publisher(found.key_id, found.public_key)


def _bad(package: Package, why: str) -> FormatError:
    return FormatError(
        f"The signature of {package.path.name} does not hold: {why}.",
        hint="Somebody changed the package. Get it anew from its publisher.",
    )


class KeyChangedError(InvalidInputError):
    """A package is not by the publisher whose key was noted at the first install of the application."""


def known_publisher(home: Path, name: str) -> Publisher | None:
    """The publisher of the application that the first install noted."""
    path = _note(home, name)
    try:
        facts = Signature.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as e:
        raise StoreError(f"{path} is damaged.", hint="Delete it to trust the next publisher of the application.") from e
    return Publisher(facts.key_id, facts.public_key)


def check_publisher(home: Path, name: str, publisher: Publisher | None, trust: str | None = None) -> None:
    """Raises KeyChangedError if the application is known by another key than `publisher`'s and `trust` is not its id.

    `trust`: the id of a key that the caller has compared with what the publisher says elsewhere.
    """
    if trust is not None and (publisher is None or publisher.key_id != trust):
        signed = f"signed with the key {publisher.key_id}" if publisher else "not signed"
        raise KeyChangedError(
            f"{name} is {signed}, not with the key {trust}.", hint="Ask the publisher.", param="trust"
        )
    known = known_publisher(home, name)
    if known is None or trust is not None or (publisher and publisher.public_key == known.public_key):
        return
    way = f" and add --trust {publisher.key_id}" if publisher else f", or delete {_note(home, name)}"
    signed = f"this package with {publisher.key_id}" if publisher else "this package is not signed"
    raise KeyChangedError(
        f"{name} was signed with the key {known.key_id}, {signed}.",
        hint=f"It may be somebody else's. Ask the publisher, over another way, whether the key was changed{way}.",
        param="trust",
    )


def note_publisher(home: Path, name: str, publisher: Publisher) -> None:
    """From now on only this publisher's packages are the application."""
    path = _note(home, name)
    facts = Signature(key_id=publisher.key_id, public_key=publisher.public_key, signature="")
    with write_whole(path) as temporary:
        temporary.write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _note(home: Path, name: str) -> Path:
    return home / "keys" / "publishers" / f"{check_app_name(name)}.json"
