"""What the benchmark scripts share: the default model's file, llama.cpp for comparison, one JSON line at the end."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
LLAMA_CPP = "llama-cpp-python==0.3.36"


def model_file(name: str = MODEL) -> Path:
    """The GGUF file of an installed or fetchable model."""
    from llmasos.models.load import gguf_in
    from llmasos.store import ensure

    return gguf_in(ensure(name))


def cache_folder() -> Path:
    from llmasos.settings import settings

    folder = settings().home / "cache" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def llama_cpp(program: str) -> Path:
    """llama.cpp's own `llama-bench` or `llama-server`: LLAMA_BENCH or LLAMA_SERVER names one, else it is built from the
    source package (a few minutes)."""
    if given := os.environ.get(program.upper().replace("-", "_")):
        return Path(given)
    built = cache_folder() / program
    if built.exists():
        return built
    print(f"building {program} from {LLAMA_CPP} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", scratch, LLAMA_CPP], check=True, stdout=sys.stderr)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        source = next(Path(scratch).glob("*/vendor/llama.cpp"))
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "BUILD_SHARED_LIBS": "OFF",
            "LLAMA_CURL": "OFF",
            "LLAMA_BUILD_TESTS": "OFF",
            "LLAMA_USE_PREBUILT_UI": "OFF",
        }
        flags = [f"-D{name}={value}" for name, value in options.items()]
        build = Path(scratch) / "build"
        subprocess.run(["cmake", "-S", source, "-B", build, *flags], check=True, stdout=sys.stderr)
        make = ["cmake", "--build", build, "--target", program, "-j", str(os.cpu_count())]
        subprocess.run(make, check=True, stdout=sys.stderr)
        shutil.copy2(build / "bin" / program, built)
    return built


def report(**facts: Any) -> None:
    """The line that a run ends with."""
    import torch

    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({**facts, **machine}))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
