"""Shared fixtures: an empty home for every test, and tiny random models that are made once per session."""

import gc
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from databases import database, database_url, postgres, postgres_url
from tiny import write_tiny_model

__all__ = ["database", "database_url", "postgres", "postgres_url"]

if not torch.cuda.is_available():
    # read when triton is imported: kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

# how long an example takes says how busy the machine is; fixtures of examples are made new by the examples themselves
settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("house")

# models this small only wait for each other's threads
os.environ["LLMASOS_THREADS"] = "1"

# a job in the background of a script ignores Ctrl-C, one under nohup SIGHUP, and both hand that on to their children;
# tests here send these signals
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """What was imported stays: garbage collections need not look at it again before every test."""
    gc.collect()
    gc.freeze()


SEED = int(os.environ.get("LLMASOS_TEST_SEED", "0"))
"""Another one draws other weights and inputs, and ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE rounds as another CPU
does: tolerances must hold for each."""


@pytest.fixture(autouse=True)
def drawn() -> None:
    """What a test draws does not depend on the tests before it, nor on chance."""
    random.seed(SEED), np.random.seed(SEED), torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test has a home folder of its own and no way out."""
    folder = tmp_path / "home"
    for name in (
        "LLMasOS_HOME",
        "LLMASOS_DEVICE",
        "LLMASOS_DTYPE",
        "LLMASOS_LANG",
        "LLMASOS_OFFLINE",
        "LLMASOS_DATABASE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMASOS_HOME", str(folder))
    monkeypatch.setenv("LLMASOS_LANG", "en")
    yield folder


@pytest.fixture
def rows_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter a row of a product has the same bits wherever it stands in a tile, as on a GPU: with
    numpy's product of whole tiles that is so on some CPUs only."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def by_row(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        found = np.matmul(a.data[..., :, None, :], b.data[..., None, :, :], dtype=d.data.dtype)[..., 0, :]
        return interpreter.TensorHandle(found + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", by_row)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random chat model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_llm(tiny_model: Path):  # type: ignore[no-untyped-def]
    """A tiny random chat model in memory, float32: `LLM` with every method; context 256."""
    from llmasos.inference.llm import LLM
    from llmasos.models.load import load_model

    with LLM(load_model(tiny_model, device="cpu", dtype="float32"), name="tiny") as llm:
        yield llm
