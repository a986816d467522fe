"""A whole server from its options: what it serves under which names, what its service manager hears, how it stops."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from llmasos.errors import InvalidInputError, NotFoundError, ServerError, UnsupportedError
from llmasos.serve.config import ModelOptions, ServeConfig
from llmasos.serve.service import _Service, named_models, serve, spec_of

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from fake_llm import FakeLLM
from llmasos.serve import serve
serve(["a"], port=0, load=FakeLLM, on_ready=lambda url: print(url, flush=True))
print("stopped", flush=True)
"""


def test_a_path_is_served_under_its_last_part_and_a_table_under_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.touch()
    config = ServeConfig.of(
        models=[str(file), "helper", "gpt2"],
        model={"helper": {"reference": "all-minilm-l6-v2", "device": "cpu"}},
        engine={"max_num_seqs": 2},
    )
    found = named_models(config)
    assert {name: model.reference for name, model in found.items()} == {
        "mine": str(file),
        "helper": "all-minilm-l6-v2",
        "gpt2": "gpt2",
    }
    spec = spec_of("helper", found["helper"])
    assert (spec.device, spec.dtype, dict(spec.engine)) == ("cpu", "auto", {"max_num_seqs": 2})
    assert found["gpt2"].keep_alive == math.inf


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"models": ["a", "a"]}, "'a'"),
        ({"models": ["a", "b"], "adapters": {"x": "y"}}, "several are served"),
        ({"adapters": {"x": "y"}}, "several are served"),
        ({"models": ["a"], "adapters": {"a": "y"}}, "own name"),
        ({"models": ["openai:gpt-4.1"]}, "already behind an API"),
        ({"models": ["m"], "model": {"m": {"reference": "openai:gpt-4.1"}}}, "already behind an API"),
    ],
)
def test_what_can_not_be_served_is_said_first(options: dict[str, object], says: str) -> None:
    with pytest.raises((InvalidInputError, UnsupportedError), match=says):
        named_models(ServeConfig.of(**options))


def test_a_program_can_name_models_by_a_mapping_and_wrong_options_are_named() -> None:
    with pytest.raises(InvalidInputError, match="unknown key 'colour'"):
        serve(["a"], colour=1)
    with pytest.raises(ServerError, match="keys are required"):
        serve({"a": "gpt2"}, host="0.0.0.0")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), NotFoundError("no such model")])
async def test_whatever_keeps_a_named_model_from_loading_stops_the_server_and_is_said(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Host:
        async def load(self, name: str) -> None:
            raise error

    ready: list[str] = []
    service = _Service(ServeConfig.of(models=["a"]), {"a": ModelOptions("a")}, lambda: ready.append("ready"))
    service._host = Host()  # type: ignore[assignment]
    service.stop.watch(server := SimpleNamespace(should_exit=False))  # type: ignore[arg-type]
    await service._begin()
    assert server.should_exit and not ready
    if isinstance(error, NotFoundError):
        assert service.failure is error and not caplog.records
    else:
        assert isinstance(service.failure, ServerError) and service.failure.message == "RuntimeError: a bug"
        assert caplog.records[0].exc_info


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="service managers of this kind are Unix's")
def test_the_service_manager_hears_of_start_and_stop_and_followers_of_logs_do_not_hold_it_up(tmp_path: Path) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(30)
    environ = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip().removesuffix("/v1")
        assert manager.recv(200) == b"READY=1\nSTATUS=ready"
        heard, begun = [], threading.Event()

        def follow() -> None:
            with httpx.stream("GET", f"{url}/llmasos/v1/logs?follow=true", timeout=60) as lines:
                for line in lines.iter_lines():
                    heard.append(line)
                    begun.set()

        following = threading.Thread(target=follow)
        following.start()
        assert begun.wait(20)
        server.send_signal(signal.SIGHUP)
        assert manager.recv(200) == b"STOPPING=1"
        out, err = server.communicate(timeout=30)
        following.join(20)
    manager.close()
    assert (server.returncode, out.strip()) == (0, "stopped") and "Traceback" not in err, err
    assert "stopping" not in "".join(heard)  # it was ended in order, not cut off with an error
