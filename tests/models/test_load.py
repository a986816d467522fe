"""Loading: what a checkpoint holds too much, too little or in the wrong shape is said, never swallowed."""

import errno
import json
import logging
import os
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from family_equality import edit_weights

from llmasos import devices
from llmasos.errors import (
    FormatError,
    InvalidInputError,
    PickleRefusedError,
    UnknownArchitectureError,
    UnsupportedError,
)
from llmasos.models import load as loading
from llmasos.models import lowbit, weights
from llmasos.models.load import _Filler, gguf_in, load_model, round_q4, write_atomically
from llmasos.models.lowbit import MANY_TOKENS, Int4Linear, Int8Linear, PackedLinear
from tiny import write_tiny_model


def test_a_clean_checkpoint_loads_without_a_word(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_model(tiny_model, device="cpu")
    assert not caplog.records


def test_leftover_tensors_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edit_weights(folder, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    with caplog.at_level(logging.WARNING, "llmasos"):
        load_model(folder, device="cpu")
    assert "holds 1 tensors" in caplog.text
    assert "q_proj.bias" in caplog.text


def test_a_tied_head_that_is_stored_twice_is_no_leftover(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edit_weights(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    load_model(folder, device="cpu")
    assert not caplog.records


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(folder, lambda t: t | {name: torch.ones(3, 3)})
    with pytest.raises(FormatError, match=r"down_proj.*\[3, 3\].*\[32, 64\]"):
        load_model(folder, device="cpu")
    edit_weights(folder, lambda t: {k: v for k, v in t.items() if k != name})
    with pytest.raises(FormatError, match=r"no tensor 'model.layers.1.mlp.down_proj.weight'"):
        load_model(folder, device="cpu")


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    with pytest.raises(UnknownArchitectureError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        load_model(folder, device="cpu")


def test_a_folder_with_pickles_only_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(PickleRefusedError, match="safetensors"):
        load_model(folder, device="cpu")


def test_several_gguf_files_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InvalidInputError, match=r"a\.gguf, b\.gguf"):
        gguf_in(tmp_path)


def press_ctrl_c() -> None:
    """As a terminal does: whatever thread runs, the first one hears of it."""
    assert threading.main_thread().ident is not None
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.mark.parametrize("options", [{}, {"quantization": "int4", "dtype": "bfloat16"}])
def test_ctrl_c_while_weights_are_read_waits_for_no_other_weight(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    read = _Filler._read
    seen: list[str] = []

    def interrupted(self: _Filler, name: str) -> torch.Tensor:
        seen.append(name)
        press_ctrl_c()
        assert self.stop.wait(60)
        return read(self, name)

    monkeypatch.setattr(_Filler, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(tiny_model, device="cpu", **options)
    assert len(seen) == 1
    assert not [one.name for one in threading.enumerate() if one.name.startswith("llmasos-load")]


def test_ctrl_c_while_weights_are_made_up_waits_for_no_other_weight(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = weights.own_part
    seen: list[str] = []

    def interrupted(name: str, *rest: Any) -> torch.Tensor | None:
        seen.append(name)
        press_ctrl_c()
        assert stops[0].wait(60)
        return own(name, *rest)

    stops: list[threading.Event] = []
    passing = loading._in_passing_thread
    monkeypatch.setattr(loading, "_in_passing_thread", lambda work, stop: (stops.append(stop), passing(work, stop)))
    monkeypatch.setattr(weights, "own_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(tiny_model, device="cpu", load_format="dummy")
    assert len(seen) == 1


def test_a_matrix_rounded_in_pieces_is_the_one_rounded_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"device": "cpu", "dtype": "bfloat16", "quantization": "int4"}
    whole = dict(load_model(tiny_model, **options).module.named_buffers())
    monkeypatch.setattr(loading, "ROUNDED_ROWS", 16)
    parts = dict(load_model(tiny_model, **options).module.named_buffers())
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, MANY_TOKENS, MANY_TOKENS + 9])
@pytest.mark.parametrize("bits", [4, 8])
def test_low_bit_layers_multiply_by_their_decoded_weight(bits: int, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight, bias = torch.randn(48, 64, generator=generator) * 0.1, torch.randn(48, generator=generator).to(dtype)
    layer = Int4Linear([round_q4(weight)], bias) if bits == 4 else Int8Linear(weight, bias)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    assert layer(x).dtype == dtype
    expected = x.float() @ layer.dequantize().float().T + bias.float()
    torch.testing.assert_close(layer(x).float(), expected, atol=3e-2, rtol=2e-2)
    rounding = (layer.dequantize().float() - weight).abs().max()
    # half a step of the widest group, and bfloat16's own rounding of the result
    step = (weight.view(48, -1, 32).amax(-1) - weight.view(48, -1, 32).amin(-1)).max() / 15 if bits == 4 else 0.5 / 127
    assert rounding <= step * 0.55 + 2e-3


@pytest.mark.skipif(
    not PackedLinear.fits(PackedLinear.WIDEST, torch.bfloat16), reason="oneDNN packs no bfloat16 on this CPU"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_packed_layer_multiplies_by_its_weight_row_by_row(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(48, PackedLinear.WIDEST, generator=generator) * 0.1).bfloat16()
    layer = PackedLinear(weight, None)
    assert torch.equal(layer.dequantize(), weight)
    x = torch.randn(MANY_TOKENS, PackedLinear.WIDEST, generator=generator).bfloat16().to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), x.float() @ weight.float().T, atol=3e-2, rtol=2e-2)
    if devices.cpu_has_bf16():
        assert all(torch.equal(layer(x[:n]), y[:n]) for n in (1, 2, 9, 16))


def test_rows_packed_in_portions_are_those_packed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = round_q4(torch.randn(3 * 64 + 16, 64, generator=torch.Generator().manual_seed(0)))
    whole = Int4Linear([blocks], None)
    monkeypatch.setattr(lowbit, "PACKED_ROWS", 64)
    assert torch.equal(Int4Linear([blocks], None).packed, whole.packed)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_layers_of_a_width_without_kernel_stay_as_they_are(tmp_path: Path, quantization: str) -> None:
    """torch's int8 kernel reads beyond rows that are no multiple of 16."""
    folder = write_tiny_model(tmp_path / "m", intermediate_size=72)
    module = load_model(folder, device="cpu", dtype="bfloat16", quantization=quantization).module
    assert isinstance(module.layers[0].mlp.down, torch.nn.Linear)
    assert not isinstance(module.layers[0].mlp.up, torch.nn.Linear)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_misshapen_tensor_is_named_whatever_is_made_of_it(tmp_path: Path, quantization: str) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edit_weights(folder, lambda t: t | {"model.layers.1.mlp.down_proj.weight": torch.ones(32, 128)})
    with pytest.raises(FormatError, match=r"down_proj.*\[32, 128\].*\[32, 64\]"):
        load_model(folder, device="cpu", dtype="bfloat16", quantization=quantization)


def test_weights_quantised_by_another_scheme_are_refused(tmp_path: Path) -> None:
    """Such tensors may have the right names and shapes and mean something only together with their scales."""
    folder = write_tiny_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="fp8"):
        load_model(folder, device="cpu")
    folder = write_tiny_model(tmp_path / "int8")
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(folder, lambda t: t | {name: t[name].mul(20).to(torch.int8)})
    for quantization in ("none", "int8"):
        with pytest.raises(UnsupportedError, match=r"down_proj.*int8"):
            load_model(folder, device="cpu", quantization=quantization)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounding_runs_with_and_without_bfloat16(
    tiny_model: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for native in (True, False):
        monkeypatch.setattr(devices, "cpu_has_bf16", lambda native=native: native)
        model = load_model(tiny_model, device="cpu", quantization=quantization)
        assert model.module.dtype == (torch.bfloat16 if native else torch.float32)
        assert any(isinstance(m, Int4Linear | Int8Linear) for m in model.module.modules())
    with pytest.raises(UnsupportedError, match='dtype="bfloat16"'):
        load_model(tiny_model, device="cpu", quantization=quantization, dtype="float16")


def test_torch_s_own_devices_and_dtypes_are_taken(tiny_model: Path) -> None:
    module = load_model(tiny_model, device=torch.device("cpu"), dtype=torch.float16).module
    assert (module.device.type, module.dtype) == ("cpu", torch.float16)


@pytest.mark.parametrize(("text", "cpus"), [("200000 100000", [2]), ("50000 100000", [1]), ("max 100000", [])])
def test_a_cgroup_limits_the_threads(tmp_path: Path, text: str, cpus: list[int]) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert devices._cgroup_cpus(tmp_path) == cpus
    assert devices._cgroup_cpus(tmp_path / "none") == []


def test_loading_leaves_no_helpers_of_parallel_kernels_behind(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They belong to the thread that ran the kernels, and slow down those of the thread that runs the model."""
    fill, seen = loading._Filler.fill, []

    def watched(self: loading._Filler, *given: Any) -> None:
        seen.append(threading.current_thread())
        fill(self, *given)

    monkeypatch.setattr(loading._Filler, "fill", watched)
    load_model(tiny_model, device="cpu")
    assert [thread.is_alive() for thread in seen] == [False]


@pytest.mark.parametrize("folders", ["synced", "refused"])  # file systems differ in that
def test_a_text_is_on_the_disk_before_it_has_its_name_and_its_name_after_that(
    folders: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    replace = os.replace

    def fsync(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        done.append(tmp_path.name if is_folder else os.pread(handle, 99, 0))
        if is_folder and folders == "refused":
            raise OSError(errno.EINVAL, "Invalid argument")

    def moved(old: Path, new: Path) -> None:
        done.append(new.name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", moved)
    for text in ("first", "second"):
        write_atomically(tmp_path / "facts.json", text)
        assert done == [text.encode(), "facts.json", tmp_path.name]
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"facts.json": text}
        done.clear()


def test_a_text_that_the_disk_does_not_take_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "facts.json", "first")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "facts.json", "second")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"facts.json": "first"}


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_some_layers_alone_are_a_model(load_format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny_model(tmp_path / "model", num_hidden_layers=4)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "load_format": load_format}
    parts: list[str] = []
    whole = load_model(folder, **options).module
    some = load_model(folder, **options, layers=(0, 3), ready=lambda _, part: parts.append(part))
    assert some.config.num_layers == len(some.module.layers) == 2 and not caplog.records
    if load_format == "auto":
        assert parts == ["layers.0", "layers.1", ""]
        for name, parameter in some.module.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name.replace("layers.1.", "layers.3.")))
    some.save_pretrained(tmp_path / "some")
    assert load_model(tmp_path / "some", device="cpu").config.num_layers == 2


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (-1, 0), (0, 2)])
def test_layers_that_a_model_has_not_are_refused(tiny_model: Path, layers: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="are not some of the 2 layers") as caught:
        load_model(tiny_model, device="cpu", layers=layers)
    assert "0 to 1" in caught.value.hint
