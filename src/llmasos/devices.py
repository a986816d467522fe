"""Hardware facts: which device and dtype to use, how much memory is free, how many threads to run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.errors import DeviceError, InvalidInputError
from llmasos.settings import settings

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def pick_device(wanted: str | torch.device = "auto") -> torch.device:
    """`auto` takes the first of CUDA (or ROCm), XPU, MPS, CPU that is there. Raises DeviceError for one that is not."""
    import torch

    wanted = str(wanted)
    if wanted == "auto":
        for kind in ("cuda", "xpu", "mps"):
            if _available(kind):
                return torch.device(kind, 0) if kind != "mps" else torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device("cuda" + wanted[4:] if wanted.startswith("rocm") else wanted)
    except RuntimeError:
        raise InvalidInputError(
            f"device={wanted!r} is not known.", hint="Use auto, cpu, cuda, cuda:1, xpu or mps.", param="device"
        ) from None
    if device.type != "cpu" and not _available(device.type):
        raise DeviceError(
            f"device={wanted!r} is not available here.", hint="See `llmasos doctor`, or use device='cpu'."
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise DeviceError(f"device={wanted!r}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0.")
    return device


def _available(kind: str) -> bool:
    import torch

    match kind:
        case "cuda":
            return torch.cuda.is_available()
        case "xpu":
            return torch.xpu.is_available()
        case "mps":
            return torch.backends.mps.is_available()
    return kind == "cpu"


def pick_dtype(wanted: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes it natively, float16 on older GPUs, else float32."""
    import torch

    wanted = str(wanted).removeprefix("torch.")
    if wanted != "auto":
        if wanted not in DTYPES:
            raise InvalidInputError(
                f"dtype={wanted!r} is not known.", hint=f"Use auto, {', '.join(DTYPES)}.", param="dtype"
            )
        chosen: torch.dtype = getattr(torch, wanted)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    if device.type == "xpu":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


@dataclass(frozen=True)
class Placement:
    """Where and how a model computes."""

    device: torch.device
    dtype: torch.dtype
    low_bit: bool
    """GGUF's low-bit weights stay low-bit: they are read faster than decoded ones. Not where full weights were asked
    for by naming float32."""


def place(
    device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", *, encoder: bool = False
) -> Placement:
    """The device and dtype of a model; "auto" also reads LLMASOS_DEVICE and LLMASOS_DTYPE."""
    import torch

    defaults = settings()
    where = pick_device(defaults.device if device == "auto" else device)
    wanted = defaults.dtype if dtype == "auto" else dtype
    on_cpu = where.type == "cpu"
    if wanted == "auto" and on_cpu and encoder:
        return Placement(where, torch.float32, False)  # small, and embeddings are compared in their fourth digit
    chosen = pick_dtype(wanted, where)
    return Placement(where, chosen, on_cpu and (wanted == "auto" or chosen == torch.bfloat16))


def cpu_has_bf16() -> bool:
    """Does this CPU multiply bfloat16 natively (AVX-512 BF16, AMX, Arm BF16)? Without it float32 is faster."""
    flags = _cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a new model could take on `device`: free GPU memory, or what the system and its cgroup still give."""
    kind = device if isinstance(device, str) else device.type
    if kind.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return min([psutil.virtual_memory().available, *_cgroup_headroom()])


def total_memory(device: torch.device | str = "cpu") -> int:
    """Bytes of memory that the device has."""
    kind = device if isinstance(device, str) else device.type
    if kind.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[1]
    import psutil

    return int(psutil.virtual_memory().total)


def _cgroup_headroom() -> list[int]:
    """Limit minus use of this process's cgroup (containers); empty where there is none."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), (root / "memory.current").read_text().strip()
        cached = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [] if limit == "max" else [max(0, int(limit) - int(used) + int(cached.get("inactive_file", 0)))]


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Processors' worth of time that this process's cgroup grants (`docker run --cpus`); empty where it sets no limit.

    More threads than that are stopped together, again and again."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return [max(1, int(quota) // int(period))]
    except (OSError, ValueError):  # no cgroup, or "max"
        return []


def set_threads(wanted: int = 0) -> int:
    """Threads for CPU kernels: `wanted`, or one per physical core that this process and its cgroup may use. Returns
    the number."""
    import psutil
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = min([usable, *_cgroup_cpus()])
    number = wanted or min(usable, psutil.cpu_count(logical=False) or usable)
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)
    return number


def describe() -> dict[str, Any]:
    """Facts for `llmasos doctor`: CPU, memory, accelerators, the chosen device and dtype."""
    import platform

    import psutil
    import torch

    placement = place()
    gpus = [
        {"name": torch.cuda.get_device_name(i), "memory": torch.cuda.get_device_properties(i).total_memory}
        for i in range(torch.cuda.device_count())
    ]
    return {
        "machine": platform.machine(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": cpu_has_bf16(),
        "memory_total": total_memory(),
        "memory_free": free_memory(),
        "gpus": gpus,
        "torch": torch.__version__,
        "device": str(placement.device),
        "dtype": str(placement.dtype).removeprefix("torch."),
    }
