"""Where a model goes: the choice of device and dtype, and when low-bit weights stay low-bit."""

import pytest
import torch

from llmasos import devices
from llmasos.devices import place
from llmasos.errors import DeviceError, InvalidInputError


@pytest.fixture(params=[True, False], ids=["bf16", "no-bf16"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: request.param)
    return bool(request.param)


def test_a_cpu_computes_in_what_it_has_and_keeps_low_bit_weights(native: bool) -> None:
    placement = place("cpu")
    assert placement.dtype == (torch.bfloat16 if native else torch.float32)
    assert placement.low_bit


def test_asking_for_float32_by_name_asks_for_full_weights(native: bool) -> None:
    assert not place("cpu", "float32").low_bit
    assert not place("cpu", "float16").low_bit
    assert place("cpu", "bfloat16").low_bit


def test_encoders_are_float32_on_a_cpu_unless_told_otherwise(native: bool) -> None:
    assert (place("cpu", encoder=True).dtype, place("cpu", encoder=True).low_bit) == (torch.float32, False)
    assert place("cpu", "bfloat16", encoder=True).dtype == torch.bfloat16


def test_the_environment_decides_where_the_caller_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_DEVICE", "cpu")
    monkeypatch.setenv("LLMASOS_DTYPE", "float16")
    assert place().dtype == torch.float16
    assert place(dtype="float32").dtype == torch.float32


def test_wrong_names_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="tpu"):
        place("tpu")
    with pytest.raises(InvalidInputError, match="int3"):
        place("cpu", "int3")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="cuda:7"):
            place("cuda:7")


def test_free_memory_is_less_than_all_memory() -> None:
    assert 0 < devices.free_memory() <= devices.total_memory()


def test_a_gpu_without_a_number_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_available", lambda kind: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.pick_device("cuda") == devices.pick_device("rocm") == torch.device("cuda", 0)
    assert devices.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="has 2 GPU"):
        devices.pick_device("cuda:2")
