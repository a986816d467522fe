"""Names of files that may stand in a package: such that every platform keeps them apart and inside their folder."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

MAX_PART, MAX_PATH = 200, 400  # bytes of UTF-8
RESERVED_FILES = ("files.sha256", "signature.json", "installed.json")
"""Written by the packer, the signer and the installer."""

_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_DEVICES |= {f"{port}{i}" for port in ("com", "lpt") for i in "123456789¹²³"}


def problem_of_names(names: Iterable[str]) -> str:
    """What is wrong with the first bad one, as a sentence; empty if all are good."""
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        if problem := _problem(name):
            return f"The package has a file {_shown(name)}: {problem}."
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            if seen[key] == name:
                return f"The package has the file {_shown(name)} twice."
            return f"The package has {_shown(seen[key])} and {_shown(name)}, which are one file on some systems."
        seen[key] = name
        parts, real = key.split("/"), name.split("/")
        for i in range(1, len(parts)):
            above, spelled = "/".join(parts[:i]), "/".join(real[:i])
            if folders.setdefault(above, spelled) != spelled:
                return (
                    f"The package has the folders {_shown(folders[above])} and {_shown(spelled)}, "
                    "which are one on some systems."
                )
    both = next((key for key in folders if key in seen), None)
    return f"The package has {_shown(seen[both])} as a file and as a folder." if both is not None else ""


def _problem(name: str) -> str:
    parts = name.split("/")
    if name.startswith("/"):
        return "its path is absolute"
    if len(name) > 1 and name[1] == ":":
        return "its path begins with a drive"
    if "\\" in name:
        return "it has a backslash, which is a separator on some systems"
    if ".." in parts:
        return "its path leads out of the folder"
    if name.endswith("/"):
        return "it is an entry for a folder"
    if "" in parts or "." in parts:
        return "its path has an empty part"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name):
        return "its name has a control character"
    if any(c in '<>:"|?*' for c in name):
        return 'its name has one of < > : " | ? *'
    if any(part.endswith((".", " ")) or part.startswith(" ") for part in parts):
        return "a part of its path begins or ends with a space, or ends with a dot"
    if any(part.split(".")[0].rstrip().lower() in _DEVICES for part in parts):
        return "it is the name of a device on some systems"
    if unicodedata.normalize("NFC", name) != name:
        return "its name is not in Unicode's composed form (NFC)"
    if len(name.encode()) > MAX_PATH or any(len(part.encode()) > MAX_PART for part in parts):
        return f"its path is longer than {MAX_PATH} bytes, or a part of it longer than {MAX_PART}"
    return ""


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else f"{name[:100]}…")
