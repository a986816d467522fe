"""Processes of a run: this one is the first rank, and the others are begun by it; or all of them by torchrun."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from llmasos.devices import set_threads
from llmasos.errors import InvalidInputError, LLMasOSError
from llmasos.settings import settings
from llmasos.train.config import TrainConfig, how_to_resume
from llmasos.train.parallel.ranks import COLLECTIVE, PATIENCE, LostRankError, Ranks

BEGIN = timedelta(minutes=3)
"""Until all processes are there."""
END_SECONDS = 60.0
"""A process that has nothing left to do may take this long to end."""


@contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks of a run: `config.gpus` processes, of which this one begins all others; those that torchrun began; or
    just this one.

    Raises InvalidInputError for more GPUs than there are, LostRankError for processes that do not begin."""
    if dist.is_available() and dist.is_initialized():
        yield _of_group(config)
        return
    if "LLMASOS_TRAIN_STORE" in os.environ:
        with _group(config, int(os.environ["LLMASOS_TRAIN_STORE"])):
            yield _of_group(config)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _init(config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None)
        atexit.register(_leave)  # the same processes may have another run to do
        yield _of_group(config)
        return
    number = config.gpus or 1
    if number == 1:
        if config.tensor_parallel_size > 1:
            raise InvalidInputError(
                f"tensor_parallel_size={config.tensor_parallel_size} needs as many processes.",
                hint=f"Set gpus={config.tensor_parallel_size}.",
                param="tensor_parallel_size",
            )
        yield Ranks()
        return
    if number % config.tensor_parallel_size:
        raise InvalidInputError(
            f"{number} processes cannot be split into groups of {config.tensor_parallel_size}.",
            hint="Make gpus a multiple of tensor_parallel_size.",
            param="tensor_parallel_size",
        )
    there = torch.cuda.device_count()
    said = settings().device if config.device == "auto" else config.device
    if said.startswith(("auto", "cuda")) and number > there:
        raise InvalidInputError(
            f"gpus={number}, and there are {there or 'none'}.",
            hint=f"Use gpus={max(1, there)}; device=cpu divides the work over processes of the CPU.",
            param="gpus",
        )
    with _launched(config, number):
        yield _of_group(config)


def begins() -> bool:
    """Whether this process is the run's only one or its first."""
    is_rank = "LLMASOS_TRAIN_STORE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return not is_rank or os.environ.get("RANK", "0") == "0"


def regrouped(config: TrainConfig) -> Ranks:
    """The same processes, spread as the plan says."""
    return _of_group(config) if dist.is_available() and dist.is_initialized() else Ranks()


def device_type(config: TrainConfig) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device.split(":")[0]


def _of_group(config: TrainConfig) -> Ranks:
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return Ranks.of_group(
        config.parallel, config.tensor_parallel_size, device_type(config), local_rank=local_rank, local_size=local_size
    )


@contextmanager
def _group(config: TrainConfig, port: int) -> Iterator[None]:
    """Join the first rank, which waits at `port`."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _init(config, rank, size, TCPStore("127.0.0.1", port, size, False, timeout=BEGIN))
    try:
        yield
    finally:
        _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _init(config: TrainConfig, rank: int, size: int, store: TCPStore | None) -> None:
    on_gpu = device_type(config) == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank if store else -1,
        world_size=size if store else -1,
        timeout=COLLECTIVE if on_gpu else PATIENCE,
    )


@contextmanager
def _launched(config: TrainConfig, number: int) -> Iterator[None]:
    store = TCPStore("127.0.0.1", 0, number, True, wait_for_workers=False, timeout=BEGIN)
    before = torch.get_num_threads()
    share = _shared_threads(number)
    os.environ.update(share)  # whatever sets threads in this process later, too
    others = [_begin(config, rank, number, store.port) for rank in range(1, number)]
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(others, is_over), daemon=True).start()
    failed = True
    try:
        try:
            _init(config, 0, number, store)
        except (RuntimeError, dist.DistError) as e:
            codes = [other.poll() for other in others]
            raise LostRankError(f"The run's processes did not all begin (exit codes {codes}): {e}") from e
        yield
        failed = False
    except Exception as e:
        gone = _gone(others, 5.0) if isinstance(e, LostRankError) else _gone(others, 0.0)
        if not gone or (isinstance(e, LLMasOSError) and not isinstance(e, LostRankError)):
            raise
        raise LostRankError(f"{gone} The others cannot go on without it.", hint=how_to_resume(config.name)) from e
    finally:
        is_over.set()
        for name in share:
            del os.environ[name]
        torch.set_num_threads(before)
        _leave()
        for other in others:
            _end(other, 1.0 if failed else END_SECONDS)


def _shared_threads(number: int) -> dict[str, str]:
    """What tells a process to use its share of the cores. Nothing where somebody has said how many threads a process
    has."""
    if "OMP_NUM_THREADS" in os.environ or settings().threads:
        return {}
    each = max(1, set_threads() // number)
    torch.set_num_threads(each)
    return {"OMP_NUM_THREADS": str(each), "LLMASOS_THREADS": str(each)}


def _begin(config: TrainConfig, rank: int, number: int, port: int) -> subprocess.Popen[bytes]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    own |= {"LLMASOS_TRAIN_STORE": port}
    words = [
        sys.executable,
        "-m",
        "llmasos.train.worker",
        config.model_dump_json(by_alias=True, exclude_unset=True),
    ]
    return subprocess.Popen(
        words, env={**os.environ, **{k: str(v) for k, v in own.items()}}, stdin=subprocess.PIPE, stdout=2
    )


def _gone(others: list[subprocess.Popen[bytes]], seconds: float) -> str:
    """How processes ended that should not have, in words; waits for one."""
    until = time.monotonic() + seconds
    while not any(other.poll() for other in others) and time.monotonic() < until:
        time.sleep(0.05)
    codes = {rank: code for rank, other in enumerate(others, 1) if (code := other.poll())}
    return " ".join(
        f"Process {rank} of {len(others) + 1} "
        + (f"was killed ({signal.Signals(-code).name})." if code < 0 else f"ended with exit code {code}.")
        for rank, code in codes.items()
    )


def _end(other: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        other.wait(seconds)
    except subprocess.TimeoutExpired:
        other.kill()
        other.wait()
    finally:
        if other.stdin is not None:
            other.stdin.close()


def _watch(others: list[subprocess.Popen[bytes]], is_over: threading.Event) -> None:
    """GPUs wait for one that is gone until they are told; gloo sees it by itself."""
    while not is_over.wait(1.0):
        if any(other.poll() for other in others):
            abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
            if not is_over.wait(10.0) and abort is not None and dist.is_initialized() and torch.cuda.is_available():
                abort()
            return
