"""Every option of the server, each written once with its help in both languages.

Flags of `llmasos serve`, keys of `serve.toml`, variables `LLMASOS_SERVE_<OPTION>` and the documents' table come from
the fields of `ServeConfig`. Precedence: flag, variable, file, default. Light: loads neither torch nor FastAPI.

Sizes are bytes, written as a number or as `32MiB`, `8GB`; durations are seconds, written as a number or as `90s`, `5m`,
`2h`, and `forever`.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from llmasos.errors import InvalidInputError, NotFoundError
from llmasos.inference.config import EngineConfig
from llmasos.settings import LOG_LEVELS, serve_variables, settings

FILE_NAME = "serve.toml"
DEFAULT_PORT = 8000
KEEP_ALIVE = 300.0
_VARIABLE = "LLMASOS_SERVE_"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]i?)?b?", re.IGNORECASE)
_SIZE_UNITS = {
    "": 1,
    **{u: 1000**i for i, u in enumerate("kmgt", 1)},
    **{f"{u}i": 1024**i for i, u in enumerate("kmgt", 1)},
}
_SPAN = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")

_EXAMPLES = {"name=path": "poems=./poems-lora", "device=size": "cpu=16GiB"}

Kind = Literal["text", "number", "switch", "size", "span", "words", "sizes", "names", "engine", "models"]
"""How an option is written: `words` is a list; `sizes` and `names` are tables of sizes and texts by name."""


def _option(
    default: Any,
    kind: Kind,
    help: str,
    zh: str,
    *,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
    least: int = 0,
    most: int | None = None,
) -> Any:
    metadata = {"kind": kind, "help": help, "zh": zh, "flag": flag, "choices": choices, "least": least, "most": most}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelOptions:
    """What holds for one model: a `[model.NAME]` table of the file. None: as for all."""

    reference: str = _option("", "text", "what to load; default: the table's own name", "要加载的模型；默认：表名本身")
    device: str | None = _option(
        None, "text", "auto, cpu, cuda, cuda:1, mps or xpu", "auto、cpu、cuda、cuda:1、mps 或 xpu"
    )
    dtype: str | None = _option(
        None, "text", "auto, float32, bfloat16 or float16", "auto、float32、bfloat16 或 float16"
    )
    quantization: str | None = _option(None, "text", "auto, none, int8 or int4", "auto、none、int8 或 int4")
    replicas: int | None = _option(None, "number", "how many copies of it run", "同时运行的份数", least=1, most=64)
    pin: bool = _option(False, "switch", "keep it whatever else is asked for", "始终保留，不因其他请求而卸载")
    keep_alive: float | None = _option(
        None, "span", "unload it this long after its last request", "最后一次请求之后多久卸载"
    )
    adapters: Mapping[str, str] = _option({}, "names", "LoRA adapters by name", "LoRA 适配器：名称与路径")
    engine: Mapping[str, Any] = _option({}, "engine", "options of its engine", "引擎选项")


@dataclass(frozen=True)
class ServeConfig:
    """The resolved options of a server. `ServeConfig.read` makes it from flags, variables and file."""

    models: tuple[str, ...] = _option(
        (),
        "words",
        "models to load at the start; default: every installed one, when it is first asked for",
        "启动时加载的模型；默认：所有已安装的模型，首次请求时加载",
    )
    host: str = _option("127.0.0.1", "text", "address to listen on", "监听地址")
    port: int = _option(
        DEFAULT_PORT, "number", "port to listen on; 0: any free one", "监听端口；0 表示任意空闲端口", most=65535
    )
    insecure: bool = _option(
        False,
        "switch",
        "let everybody in who can reach the address, without a key",
        "允许所有能访问该地址的人使用，不要求密钥",
    )
    require_key: bool = _option(
        False, "switch", "ask for a key on this machine's own address, too", "在本机地址上也要求密钥"
    )
    cors_origins: tuple[str, ...] = _option(
        (),
        "words",
        "web origin whose pages may ask this server, such as https://example.com; several times",
        "允许其网页访问本服务的来源，例如 https://example.com；可多次给出",
        flag="cors_origin",
    )
    device: str = _option("auto", "text", "auto, cpu, cuda, cuda:1, mps or xpu", "auto、cpu、cuda、cuda:1、mps 或 xpu")
    dtype: str = _option("auto", "text", "auto, float32, bfloat16 or float16", "auto、float32、bfloat16 或 float16")
    quantization: str = _option("auto", "text", "auto, none, int8 or int4", "auto、none、int8 或 int4")
    memory: Mapping[str, int] = _option(
        {},
        "sizes",
        "device=size that models may take together, such as cpu=16GiB; several times; default: what is free",
        "各设备上模型合计可用的内存，例如 cpu=16GiB；可多次给出；默认：空闲内存",
    )
    keep_alive: float | None = _option(
        None,
        "span",
        "unload a model this long after its last request: 90s, 5m, forever; default: 5m, but never the models named at "
        "the start",
        "模型最后一次请求之后多久卸载：90s、5m、forever；默认 5m，但启动时指名的模型一直保留",
    )
    replicas: int = _option(
        1, "number", "how many copies of each model run", "每个模型同时运行的份数", least=1, most=64
    )
    max_waiting: int = _option(
        256,
        "number",
        "requests of a model that may wait beyond those that run; more are refused",
        "每个模型在运行之外可等待的请求数；超出则拒绝",
        most=1_000_000,
    )
    max_body: int = _option(32 * 2**20, "size", "the largest body of a request", "请求正文的上限", least=1024)
    max_upload: int = _option(100 * 2**30, "size", "the largest uploaded file", "上传文件的上限", least=1024)
    max_stored: int = _option(
        100 * 2**30, "size", "all files together that one key may store", "每个密钥可存放文件的总大小", least=1024
    )
    drain: float = _option(
        10.0,
        "span",
        "requests in flight get this long when the server is stopped",
        "停止服务时，未完成的请求可继续的时间",
    )
    database: str = _option(
        "",
        "text",
        "sqlite:////path or postgresql://user:password@host/name; default: LLMASOS_DATABASE, else in the home",
        "sqlite:////路径 或 postgresql://用户:密码@主机/库名；默认：LLMASOS_DATABASE，否则在主目录",
    )
    log_format: str = _option(
        "text",
        "text",
        "text or json, one line per event on standard error",
        "text 或 json，每个事件一行，写到标准错误",
        choices=("text", "json"),
    )
    log_level: str = _option(
        "info",
        "text",
        "debug, info, warning or error; info has a line per request",
        "debug、info、warning 或 error；info 每个请求一行",
        choices=LOG_LEVELS,
    )
    telemetry: str = _option(
        "",
        "text",
        "URL of an OpenTelemetry collector (OTLP over HTTP) that gets a span per request",
        "OpenTelemetry 收集器的 URL（OTLP over HTTP），每个请求发送一个 span",
    )
    adapters: Mapping[str, str] = _option(
        {},
        "names",
        "name=path of a LoRA adapter to serve as a model; several times",
        "要作为模型提供服务的 LoRA 适配器，写作 名称=路径；可多次给出",
        flag="adapter",
    )
    enable_lora_loading: bool = _option(
        False,
        "switch",
        "let clients load adapters from any path that they name",
        "允许客户端从其指定的任意路径加载适配器",
    )
    engine: Mapping[str, Any] = _option({}, "engine", "options of every model's engine", "各模型引擎的选项")
    model: Mapping[str, ModelOptions] = _option({}, "models", "options of one model, by name", "单个模型的选项，按名称")

    @classmethod
    def of(cls, **options: Any) -> ServeConfig:
        """From a program's values, by field; neither file nor variables are read. Raises InvalidInputError."""
        _check_keys(options, set(_FIELDS), "serve()")
        return cls(**{name: _value(_FIELDS[name].metadata, raw, name) for name, raw in options.items()})

    @classmethod
    def read(
        cls,
        flags: Mapping[str, Any] | None = None,
        *,
        path: str | Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> ServeConfig:
        """`flags` are values by field, as typed. `path`: the file; by default `serve.toml` in the home, if it is there.

        Raises InvalidInputError that names the file, variable or flag and the key, NotFoundError without such a file.
        """
        values: dict[str, Any] = {}
        for name, (where, raw) in _file(path).items():
            values[name] = _value(_FIELDS[name].metadata, raw, where)
        variables = serve_variables(environ)
        for name, option in _FIELDS.items():
            if option.metadata["kind"] in _IN_FILE_ONLY or not (raw := variables.pop(_VARIABLE + name.upper(), "")):
                continue
            values[name] = _value(option.metadata, _split(raw, option.metadata["kind"]), _VARIABLE + name.upper())
        if variables:
            raise InvalidInputError(
                f"There is no option for {min(variables)}.",
                hint="The variables are LLMASOS_SERVE_ and the name of an option: `llmasos serve --help`.",
                param=min(variables),
            )
        for name, raw in (flags or {}).items():
            metadata = _FIELDS[name].metadata
            values[name] = _value(metadata, raw, flag_of(name))
        return cls(**values)

    def keep_alive_of(self, name: str) -> float:
        """Seconds that the model stays after its last request."""
        own = self.model[name].keep_alive if name in self.model else None
        if own is None:
            own = self.keep_alive
        return own if own is not None else math.inf if name in self.models else KEEP_ALIVE

    def options_of(self, name: str) -> ModelOptions:
        """What holds for the model served as `name`: its own options over those for all."""
        own = self.model.get(name, ModelOptions())
        return ModelOptions(
            reference=own.reference or name,
            device=own.device or self.device,
            dtype=own.dtype or self.dtype,
            quantization=own.quantization or self.quantization,
            replicas=own.replicas or self.replicas,
            pin=own.pin,
            keep_alive=self.keep_alive_of(name),
            adapters={**(self.adapters if name in self.models else {}), **own.adapters},
            engine={**self.engine, **own.engine},
        )


_FIELDS = {option.name: option for option in fields(ServeConfig)}
_IN_FILE_ONLY = ("engine", "models")


@dataclass(frozen=True)
class Flag:
    """One option as the command line has it: `name` of the Python parameter, `field` of ServeConfig."""

    name: str
    field: str
    kind: Kind
    help: Mapping[str, str]
    choices: tuple[str, ...]
    default: Any

    @property
    def is_repeated(self) -> bool:
        return self.kind in ("words", "sizes", "names")


def flags() -> list[Flag]:
    """The options that are flags: all but the models, which are arguments, and what only a file can hold."""
    return [
        Flag(
            metadata["flag"] or name,
            name,
            metadata["kind"],
            {"en": metadata["help"], "zh": metadata["zh"]},
            metadata["choices"],
            default_text(name),
        )
        for name, metadata in ((name, option.metadata) for name, option in _FIELDS.items())
        if name != "models" and metadata["kind"] not in _IN_FILE_ONLY
    ]


def help_of(name: str, language: str) -> str:
    text: str = _FIELDS[name].metadata["zh" if language == "zh" else "help"]
    return text


def flag_of(name: str) -> str:
    return f"--{(_FIELDS[name].metadata['flag'] or name).replace('_', '-')}"


def default_text(name: str) -> str:
    """An option's default as it would be written."""
    option = _FIELDS[name]
    kind, value = option.metadata["kind"], cast(Any, option.default)
    if kind in ("words", "sizes", "names", "switch", *_IN_FILE_ONLY):
        return ""
    if value is None:
        return ""
    return size_text(value) if kind == "size" else span_text(value) if kind == "span" else str(value)


def parse_size(text: str | int) -> int:
    """Bytes of `1048576`, `1MiB` or `1.5 GB`. Raises ValueError."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError
    return int(float(match[1]) * _SIZE_UNITS[(match[2] or "").lower()])


def size_text(num: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num and num % factor == 0:
            return f"{num // factor}{unit}"
    return str(num)


def parse_span(text: str | float) -> float:
    """Seconds of `300`, `5m`, `1h30m`; infinity of `forever`, or of a negative number, as Ollama has it. Raises
    ValueError."""
    text = str(text).strip().lower()
    if text == "forever" or re.fullmatch(r"-\d+(\.\d+)?[hms]?", text):
        return math.inf
    match = _SPAN.fullmatch(text)
    if match is None or not text:
        raise ValueError
    return sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))


def span_text(seconds: float) -> str:
    if math.isinf(seconds):
        return "forever"
    return f"{seconds / 60:.12g}m" if seconds and seconds % 60 == 0 else f"{seconds:.12g}s"


def _file(path: str | Path | None) -> dict[str, tuple[str, Any]]:
    """Known keys of the file with their values, and where each stands, for messages."""
    file = settings().home / FILE_NAME if path is None else Path(path).expanduser()
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if path is None:
            return {}
        raise NotFoundError(f"There is no file {str(file)!r}.", hint="`--config` takes a TOML file.") from None
    except OSError as e:
        raise InvalidInputError(f"{file} could not be read: {e.strerror or e}.", param="config") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InvalidInputError(f"{file} is not valid TOML: {e}.", hint="Correct or delete the file.") from e
    _check_keys(data, set(_FIELDS), str(file))
    return {name: (f"{file}: {name}", raw) for name, raw in data.items()}


def _check_keys(data: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(data) - known):
        raise InvalidInputError(
            f"{where} has the unknown key {unknown[0]!r}.", hint=f"Known: {', '.join(sorted(known))}.", param=unknown[0]
        )


def _split(raw: str, kind: Kind) -> Any:
    """What a variable's text says: lists are separated by commas, switches and numbers are words."""
    if kind in ("words", "sizes", "names"):
        return tuple(part.strip() for part in raw.split(",") if part.strip())
    if kind == "switch":
        return {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }.get(raw.lower(), raw)
    if kind == "number" and re.fullmatch(r"\d{1,12}", raw):
        return int(raw)
    return raw


def _value(metadata: Mapping[str, Any], raw: Any, where: str) -> Any:
    """`raw` checked and converted. Raises InvalidInputError that begins with `where`."""
    kind: Kind = metadata["kind"]
    match kind:
        case "text":
            return _text(metadata, raw, where)
        case "switch":
            if not isinstance(raw, bool):
                raise _wrong(where, raw, "true or false")
            return raw
        case "number":
            if isinstance(raw, bool) or not isinstance(raw, int):
                raise _wrong(where, raw, "a whole number")
            least, most = metadata["least"], metadata["most"]
            if raw < least or (most is not None and raw > most):
                raise _wrong(
                    where, raw, f"a whole number of at least {least}" if most is None else f"from {least} to {most}"
                )
            return raw
        case "size":
            return _parsed(parse_size, raw, where, "a size such as 32MiB", metadata["least"])
        case "span":
            return _parsed(parse_span, raw, where, "a time such as 90s, 5m or forever", 0)
        case "words":
            if not isinstance(raw, list | tuple) or not all(isinstance(word, str) and word for word in raw):
                raise _wrong(where, raw, "a list of texts")
            return tuple(raw)
        case "sizes":
            table = _table(raw, where, "device=size")
            return {k: _parsed(parse_size, v, f"{where}: {k}", "a size such as 8GiB", 0) for k, v in table.items()}
        case "names":
            table = _table(raw, where, "name=path")
            for name, path in table.items():
                if not isinstance(path, str | Path) or not str(path):
                    raise _wrong(f"{where}: {name}", path, "a path")
            return {name: str(path) for name, path in table.items()}
        case "engine":
            return _engine(raw, where)
        case "models":
            return {name: _model(one, f"{where}.{name}") for name, one in _dict(raw, where).items()}


def _text(metadata: Mapping[str, Any], raw: Any, where: str) -> str:
    if not isinstance(raw, str):
        raise _wrong(where, raw, "a text")
    if metadata["choices"] and raw not in metadata["choices"]:
        raise _wrong(where, raw, " or ".join(metadata["choices"]))
    return raw


def _parsed(parse: Any, raw: Any, where: str, what: str, least: float) -> Any:
    try:
        if isinstance(raw, bool) or not isinstance(raw, str | int | float):
            raise ValueError
        value = parse(raw)
    except ValueError:
        raise _wrong(where, raw, what) from None
    if value < least:
        raise _wrong(where, raw, f"at least {least}")
    return value


def _table(raw: Any, where: str, form: str) -> dict[str, Any]:
    """A table, or a list of `name=value`."""
    if not isinstance(raw, list | tuple):
        return _dict(raw, where)
    found: dict[str, Any] = {}
    for text in raw:
        name, _, value = str(text).partition("=")
        if not name or not value:
            example = f"{where} {_EXAMPLES[form]}" if where.startswith("--") else _EXAMPLES[form]
            raise InvalidInputError(
                f"{where} {text!r} is not {form}.", hint=f"For example: {example}", param=where.removeprefix("--")
            )
        found[name] = value
    return found


def _dict(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise _wrong(where, raw, "a table")
    return dict(raw)


def _engine(raw: Any, where: str) -> dict[str, Any]:
    table = _dict(raw, where)
    _check_keys(table, {f.name for f in fields(EngineConfig)}, where)
    options = dict(table)
    if isinstance(speculative := options.get("speculative"), Mapping):
        from llmasos.inference.speculate import SpeculativeConfig

        _check_keys(speculative, {f.name for f in fields(SpeculativeConfig)}, f"{where}.speculative")
        options["speculative"] = SpeculativeConfig(**speculative)
    try:
        EngineConfig.of(**options)
    except InvalidInputError as e:
        raise InvalidInputError(f"{where}: {e.message}", hint=e.hint, param=e.param) from e
    return options


def _model(raw: Any, where: str) -> ModelOptions:
    table, known = _dict(raw, where), {option.name: option for option in fields(ModelOptions)}
    _check_keys(table, set(known), where)
    return ModelOptions(**{k: _value(known[k].metadata, v, f"{where}: {k}") for k, v in table.items()})


def _wrong(where: str, raw: Any, what: str) -> InvalidInputError:
    return InvalidInputError(f"{where} can't be {raw!r}: it takes {what}.", param=where.removeprefix("--"))
