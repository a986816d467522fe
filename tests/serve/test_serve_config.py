"""The server's options: where they come from, what wrong ones say."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.errors import InvalidInputError, NotFoundError
from llmasos.serve.config import (
    ModelOptions,
    ServeConfig,
    default_text,
    flag_of,
    flags,
    parse_size,
    parse_span,
    size_text,
    span_text,
)


def read(text: str, tmp_path: Path, flags: dict[str, object] | None = None, **environ: str) -> ServeConfig:
    file = tmp_path / "serve.toml"
    file.write_text(text, encoding="utf-8")
    return ServeConfig.read(flags, path=file, environ=environ)


def test_a_flag_goes_before_a_variable_before_the_file_before_the_default(tmp_path: Path) -> None:
    text = 'port = 1\nhost = "localhost"\nmax_waiting = 7\n'
    config = read(text, tmp_path, {"port": 3}, LLMASOS_SERVE_PORT="2", LLMASOS_SERVE_HOST="::1")
    assert (config.port, config.host, config.max_waiting, config.replicas) == (3, "::1", 7, 1)


def test_without_a_path_the_file_in_the_home_counts_if_it_is_there(home: Path) -> None:
    assert ServeConfig.read(environ={}) == ServeConfig()
    home.mkdir()
    (home / "serve.toml").write_text("port = 9")
    assert ServeConfig.read(environ={}).port == 9


def test_every_option_can_be_written_in_the_file(tmp_path: Path) -> None:
    text = """
        models = ["a", "b"]
        host = "0.0.0.0"
        port = 80
        insecure = true
        require_key = true
        cors_origins = ["https://example.com"]
        device = "cpu"
        dtype = "float32"
        quantization = "int8"
        keep_alive = "forever"
        replicas = 2
        max_waiting = 3
        max_body = "1MiB"
        max_upload = 2048
        max_stored = "1GiB"
        drain = "1m30s"
        database = "postgresql://u:p@h/n"
        log_format = "json"
        log_level = "error"
        telemetry = "http://127.0.0.1:4318"
        enable_lora_loading = true

        [memory]
        cpu = "8GiB"
        "cuda:0" = 40000000000

        [adapters]
        poems = "./poems"

        [engine]
        max_num_seqs = 4

        [model.b]
        reference = "qwen3-0.6b"
        device = "cuda:0"
        pin = true
        keep_alive = 0
        engine = { max_model_len = 512 }
    """
    config = read(text, tmp_path)
    same = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) == getattr(ServeConfig(), f.name)]
    assert same == []
    assert (config.keep_alive, config.drain, config.max_body) == (math.inf, 90.0, 2**20)
    assert config.memory == {"cpu": 8 * 2**30, "cuda:0": 40_000_000_000}
    assert config.options_of("b") == ModelOptions(
        reference="qwen3-0.6b",
        device="cuda:0",
        dtype="float32",
        quantization="int8",
        replicas=2,
        pin=True,
        keep_alive=0.0,
        adapters={"poems": "./poems"},
        engine={"max_num_seqs": 4, "max_model_len": 512},
    )
    assert config.options_of("a").reference == "a"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colour = 1", "unknown key 'colour'"),
        ("port = '80'", "serve.toml: port can't be '80': it takes a whole number"),
        ("port = true", "port can't be True"),
        ("port = 70000", "from 0 to 65535"),
        ("host = 1", "host can't be 1: it takes a text"),
        ("insecure = 'yes'", "true or false"),
        ("models = 'a'", "models can't be 'a': it takes a list of texts"),
        ("models = ['']", "a list of texts"),
        ("max_body = 'big'", "a size such as 32MiB"),
        ("max_body = 1", "at least 1024"),
        ("keep_alive = 'soon'", "a time such as"),
        ("keep_alive = true", "a time such as"),
        ("replicas = 0", "from 1 to 64"),
        ("log_format = 'xml'", "text or json"),
        ("memory = {cpu = 'x'}", "memory: cpu can't be 'x'"),
        ("adapters = {a = 1}", "adapters: a can't be 1"),
        ("engine = {max_num_seqs = 0}", "engine: max_num_seqs=0"),
        ("engine = {colour = 1}", "engine has the unknown key 'colour'"),
        ("engine = {speculative = {colour = 1}}", "speculative has the unknown key 'colour'"),
        ("engine = 1", "engine can't be 1: it takes a table"),
        ("[model.a]\ncolour = 1", "model.a has the unknown key 'colour'"),
        ("[model.a]\nengine = {page_size = 3}", "model.a: engine: page_size=3"),
        ("model = {a = 1}", "model.a can't be 1"),
        ("port = ", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(text, tmp_path)
    assert says in caught.value.message and "serve.toml" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("LLMASOS_SERVE_PORT", "many", "LLMASOS_SERVE_PORT can't be 'many'"),
        ("LLMASOS_SERVE_INSECURE", "maybe", "true or false"),
        ("LLMASOS_SERVE_MEMORY", "8GiB", "LLMASOS_SERVE_MEMORY '8GiB' is not device=size"),
        ("LLMASOS_SERVE_COLOUR", "red", "no option for LLMASOS_SERVE_COLOUR"),
        ("LLMASOS_SERVE_ENGINE", "x", "no option for LLMASOS_SERVE_ENGINE"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, says: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ServeConfig.read(environ={name: value})
    assert says in caught.value.message


def test_variables_are_read_as_people_write_them() -> None:
    config = ServeConfig.read(
        environ={
            "LLMASOS_SERVE_MODELS": "a, b",
            "LLMASOS_SERVE_INSECURE": "on",
            "LLMASOS_SERVE_MEMORY": "cpu=1GiB,cuda:0=2GB",
            "LLMASOS_SERVE_KEEP_ALIVE": "-1",
            "LLMASOS_SERVE_PORT": "",
        }
    )
    assert (config.models, config.insecure, config.keep_alive, config.port) == (("a", "b"), True, math.inf, 8000)
    assert config.memory == {"cpu": 2**30, "cuda:0": 2 * 10**9}


def test_a_file_that_is_not_there_is_an_error_only_if_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.toml"):
        ServeConfig.read(path=tmp_path / "none.toml", environ={})
    with pytest.raises(InvalidInputError, match="could not be read"):
        ServeConfig.read(path=tmp_path, environ={})


def test_a_wrong_flag_is_named_as_it_was_typed() -> None:
    with pytest.raises(InvalidInputError, match="--keep-alive can't be 'x'"):
        ServeConfig.read({"keep_alive": "x"}, environ={})
    with pytest.raises(InvalidInputError, match=r"--adapter '\./mine' is not name=path"):
        ServeConfig.read({"adapters": ("./mine",)}, environ={})


def test_every_option_is_a_flag_explained_in_both_languages() -> None:
    in_file_only = {"engine", "model"}
    found = {flag.field for flag in flags()}
    assert found == {f.name for f in dataclasses.fields(ServeConfig)} - in_file_only - {"models"}
    for flag in flags():
        assert flag.help["en"] and any("\u4e00" <= c <= "\u9fff" or c == "、" for c in flag.help["zh"]), flag.name
    assert flag_of("adapters") == "--adapter" and default_text("drain") == "10s"
    assert default_text("max_body") == "32MiB" and default_text("keep_alive") == ""


def test_models_named_at_the_start_stay_unless_it_is_said_otherwise() -> None:
    config = ServeConfig.of(models=["a", "b"], model={"b": {"keep_alive": "1m"}})
    assert [config.keep_alive_of(name) for name in "abc"] == [math.inf, 60.0, 300.0]
    assert ServeConfig.of(models=["a"], keep_alive=7).keep_alive_of("a") == 7.0
    with pytest.raises(InvalidInputError, match="unknown key 'colour'"):
        ServeConfig.of(colour=1)


@given(st.integers(min_value=0, max_value=2**50))
def test_sizes_are_read_as_they_are_written(num: int) -> None:
    assert parse_size(size_text(num)) == parse_size(str(num)) == num


@given(st.one_of(st.integers(min_value=0, max_value=10**7).map(float), st.just(math.inf)))
def test_times_are_read_as_they_are_written(seconds: float) -> None:
    assert parse_span(span_text(seconds)) == seconds


@given(st.text(max_size=12))
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    for parse in (parse_size, parse_span):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0


def test_the_options_load_neither_torch_nor_a_web_framework() -> None:
    code = "import llmasos.serve.config, sys; sys.exit(any(m in sys.modules for m in ('torch', 'fastapi', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
