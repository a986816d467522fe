"""QLoRA: the codes are the papers', gradients those of the decoded weight, a step LoRA's over it, memory less."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmasos.errors import InvalidInputError, UnsupportedError
from llmasos.models.load import LoadedModel, load_model
from llmasos.models.lora import linear_layers
from llmasos.train.codes import DYNAMIC, NF4, Code
from llmasos.train.lora import LoraOptions, add_lora, lora_layers, merge_lora, save_adapter
from llmasos.train.lowbit import KINDS, PIECE, FrozenLinear, Kind, frozen_bytes
from llmasos.train.model import Placed, Trainee
from tiny import write_tiny_model

CPU = torch.device("cpu")
OPTIONS: list[dict[str, Any]] = [{}, {"dora": True}, {"rslora": True}, {"targets": ("q_proj", "down_proj")}]


class Batch:
    """Two sequences of random tokens, all trained but their ends."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.lengths = [13, 30]
        self.tokens = torch.randint(5, 250, (43,), generator=draw)
        self.labels = self.tokens.roll(-1)
        self.labels[[12, 42]] = -100
        self.positions = torch.cat([torch.arange(n) for n in self.lengths])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def load(folder: Path, kind: Kind | None) -> LoadedModel:
    linear = None if kind is None else partial(FrozenLinear, kind=kind)
    return load_model(folder, device="cpu", dtype="float32", quantization="none", linear=linear)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_the_nf4_code_book_is_the_papers_quantiles() -> None:
    """Section 3 and appendix E: quantiles of a normal distribution, eight below 0 and nine above, 0 among them."""
    edge = torch.tensor(0.9677083)  # the mean of 1 - 1/30 and 1 - 1/32
    below = torch.special.ndtri(torch.linspace(float(edge), 0.5, 8))[:-1]
    above = torch.special.ndtri(torch.linspace(float(edge), 0.5, 9))[:-1]
    values = torch.cat([-below, torch.zeros(1), above]).sort().values
    torch.testing.assert_close(torch.tensor(NF4), values / values.abs().max(), rtol=0, atol=1e-6)


def test_dynamic_maps_have_seven_decades_and_both_ends() -> None:
    signed, unsigned = torch.tensor(DYNAMIC[True]), torch.tensor(DYNAMIC[False])
    assert len(signed) == len(unsigned) == 256 and signed.unique().numel() == 256
    assert signed.max() == unsigned.max() == 1.0 and 0.0 in signed and unsigned.min() == 0.0
    assert float(signed[signed > 0].min()) == pytest.approx(5.5e-7, rel=1e-4)
    assert float(unsigned[unsigned > 0].min()) == pytest.approx(3.25e-7, rel=1e-4)
    for decade in range(7):  # each holds twice as many values as the one before
        inside = (unsigned > 10.0 ** (decade - 7) * 1.0001) & (unsigned < 10.0 ** (decade - 6) * 0.9999)
        assert int(inside.sum()) == 2 ** (decade + 1)


@pytest.mark.parametrize("values", [DYNAMIC[True], DYNAMIC[False], NF4])
def test_nearest_is_the_nearest(values: tuple[float, ...]) -> None:
    code, draw = Code.of(values, CPU), torch.Generator().manual_seed(0)
    middles = code.middles[:-1]
    numbers = torch.rand(50_000, generator=draw) * 10 ** -(torch.rand(50_000, generator=draw) * 9)
    edges = [torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0)]
    x = torch.cat([numbers, code.values, middles, *edges, torch.tensor([0.0, 1.0, 1e-40])])
    x = torch.cat([x, -x]).clamp(values[0], 1.0).view(2, -1)
    expected = torch.bucketize(x, middles)  # a search; the lower one in the middle of two
    assert torch.equal(code.nearest(x), expected.to(torch.uint8))
    assert (x.double() - code.values[expected].double()).abs().max() < 0.16


def plain_nf4(weight: Tensor) -> Tensor:
    """The definition, one number after the other."""
    flat = weight.flatten()
    blocks = [flat[at : at + 64] for at in range(0, len(flat), 64)]
    scales = torch.stack([block.abs().max() for block in blocks])
    code = torch.tensor(DYNAMIC[True])
    mean = scales.mean()
    coded = []
    for at in range(0, len(scales), 256):
        part = scales[at : at + 256] - mean
        top = part.abs().max()
        coded += [code[(part[i] / top - code).abs().argmin()] * top + mean for i in range(len(part))]
    table = torch.tensor(NF4)
    out = [
        table[(block[:, None] / scale - table).abs().argmin(1)] * own
        for block, scale, own in zip(blocks, scales, coded, strict=True)
    ]
    return torch.cat(out).view(weight.shape)


@pytest.mark.parametrize("shape", [(96, 128), (7, 24), (300, 64)])
def test_nf4_with_double_quantisation_is_its_definition(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    torch.testing.assert_close(FrozenLinear(weight, None, "nf4").dequantize(), plain_nf4(weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_near_their_weights_and_take_the_bytes_that_are_said(kind: Kind) -> None:
    weight = matrix(256, 192)
    layer = FrozenLinear(weight, None, kind)
    error = (layer.dequantize() - weight).norm() / weight.norm()
    assert float(error) < {"nf4": 0.1, "int4": 0.09, "int8": 0.01}[kind]
    bits = 8 * layer.nbytes / weight.numel()
    assert bits < {"nf4": 4.7, "int4": 5.01, "int8": 8.2}[kind]
    big = frozen_bytes(kind, 4096, 4096)
    assert 8 * big / 4096**2 < {"nf4": 4.13, "int4": 5.0001, "int8": 8.01}[kind]
    for rows, columns in ((256, 192), (7, 24), (1, 1)):
        assert FrozenLinear(matrix(rows, columns), None, kind).nbytes == frozen_bytes(kind, rows, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_larger_than_a_piece_are_coded_alike(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmasos.train import lowbit

    weight = matrix(520, 192)
    whole = FrozenLinear(weight, None, kind)
    monkeypatch.setattr(lowbit, "PIECE", 64 * 256)
    assert weight.numel() > lowbit.PIECE and PIECE % (64 * 256) == 0
    apart = FrozenLinear(weight, None, kind)
    for ours, theirs in zip(whole.buffers(), apart.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(whole.dequantize(), apart.dequantize())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -0.3])
def test_weights_all_alike_stay_what_they_are(kind: Kind, value: float) -> None:
    layer = FrozenLinear(torch.full((8, 64), value), None, kind)
    torch.testing.assert_close(layer.dequantize(), torch.full((8, 64), value), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_the_decoded_weight(kind: Kind, bias: bool) -> None:
    layer = FrozenLinear(matrix(48, 40), torch.randn(48) if bias else None, kind)
    x, again = (matrix(9, 40, 5).requires_grad_() for _ in range(2))
    ours = layer(x)
    theirs = torch.nn.functional.linear(again, layer.dequantize(), layer.bias)
    assert torch.equal(ours, theirs)
    outer = matrix(9, 48, 6)
    ours.backward(outer)
    theirs.backward(outer)
    assert x.grad is not None and again.grad is not None and torch.equal(x.grad, again.grad)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_keeps_no_decoded_weight_for_the_way_back(kind: Kind) -> None:
    layer = FrozenLinear(matrix(128, 256), None, kind)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(matrix(4, 256).requires_grad_())
    assert sum(t.nbytes for t in kept) <= layer.nbytes + 4 * 256 * 4


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="not known"):
        FrozenLinear(matrix(4, 4), None, "fp3")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_in_few_bits_and_the_rest_is_not(kind: Kind, folder: Path) -> None:
    model = load(folder, kind)
    layers = linear_layers(model.module)
    assert len(layers) == 8 and all(type(layer) is FrozenLinear for layer in layers.values())
    assert type(model.module.head) is nn.Linear and model.module.embed.weight.dtype == torch.float32
    full = load(folder, None)

    def held(module: nn.Module) -> int:
        return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))

    per_weight = {"nf4": 5 / 8, "int4": 5 / 8, "int8": 9 / 8}[kind]  # tiny layers: scales of scales and tables count
    tables = 8 * 3072 + 8 * 260 if kind == "nf4" else 0
    assert held(model.module.layers) < held(full.module.layers) / 4 * per_weight + tables + 8 * 512
    dummy = load_model(
        folder, device="cpu", dtype="float32", load_format="dummy", linear=partial(FrozenLinear, kind=kind)
    )
    assert all(type(layer) is FrozenLinear for layer in linear_layers(dummy.module).values())


def decoded(model: LoadedModel) -> None:
    """The same numbers as plain layers."""
    for name, layer in linear_layers(model.module).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data = layer.dequantize()
        if layer.bias is not None:
            plain.bias.data = layer.bias.data
        model.module.set_submodule(name, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_qlora_is_loras_over_the_decoded_weights(
    kind: Kind, options: dict[str, Any], recompute: bool, folder: Path, tmp_path: Path
) -> None:
    low, full = load(folder, kind), load(folder, kind)
    decoded(full)
    losses = []
    for model in (low, full):
        torch.manual_seed(0)
        add_lora(model, LoraOptions(r=4, **options))
        for _, layer in lora_layers(model.module):
            nn.init.normal_(layer.b, std=0.1)
        trainee = Trainee(model.module, dtype=torch.float32, recompute=recompute)
        placed = Placed.of(Batch(), CPU)
        trained = [p for p in model.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-4)
        for _ in range(2):
            loss = trainee.loss(placed) / len(placed)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    save_adapter(low, tmp_path / "low")
    save_adapter(full, tmp_path / "full")
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("low", "full"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert json.loads((tmp_path / "low" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("options", OPTIONS)
def test_a_merged_qlora_is_a_plain_model_that_computes_the_same(
    options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    model = load(folder, "nf4")
    with pytest.raises(UnsupportedError, match="low-bit"):
        model.save_pretrained(tmp_path / "unmerged")
    add_lora(model, LoraOptions(r=4, **options))
    for _, layer in lora_layers(model.module):
        nn.init.normal_(layer.b, std=0.1)
    placed = Placed.of(Batch(), CPU)
    with torch.no_grad():
        before = Trainee(model.module, dtype=torch.float32).loss(placed)
    merge_lora(model)
    with torch.no_grad():
        after = Trainee(model.module, dtype=torch.float32).loss(placed)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    saved = load(tmp_path / "merged", None)
    with torch.no_grad():
        torch.testing.assert_close(Trainee(saved.module, dtype=torch.float32).loss(placed), after)


def test_layers_made_for_answering_cannot_be_trained_beside(folder: Path) -> None:
    model = load_model(folder, device="cpu", dtype="bfloat16", quantization="int8")
    with pytest.raises(UnsupportedError, match="qlora"):
        add_lora(model, LoraOptions())


def write_gguf(path: Path) -> Path:
    """A llama of two layers with matrices in Q4_1, as llama.cpp's converter names and writes them."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"context_length": 128, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 256, "rope.dimension_count": 16}
    for name, value in sizes.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    block = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    block |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,)}
    shapes = {"token_embd": (256, 64), "output_norm": (64,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    kind = gguf.GGMLQuantizationType.Q4_1
    for at, (name, shape) in enumerate(shapes.items()):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(at)) * 0.3
        coded = len(shape) == 2
        data = gguf.quants.quantize(values.numpy(), kind) if coded else (values * 0 + 1).numpy()
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind if coded else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [None, "nf4", "int4"])
def test_training_begins_from_gguf(kind: Kind | None, tmp_path: Path) -> None:
    """Low-bit weights for answering are decoded, or coded anew for training; int4 is Q4_1's own layout."""
    path = write_gguf(tmp_path / "model.gguf")
    linear = None if kind is None else partial(FrozenLinear, kind=kind)
    given = {"device": "cpu", "dtype": "float32", "quantization": "none", "with_tokenizer": False}
    model, full = load_model(path, linear=linear, **given), load_model(path, **given)  # type: ignore[arg-type]
    placed = Placed.of(Batch(), CPU)
    with torch.no_grad():
        expected = Trainee(full.module, dtype=torch.float32).loss(placed)
    assert len(add_lora(model, LoraOptions(r=4))) == 8
    trainee = Trainee(model.module, dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = trainee.loss(placed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(float(expected), rel=0.05 if kind == "nf4" else 1e-3)
    assert losses[-1] < 0.9 * losses[0]
    merge_lora(model)
    model.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        merged = Trainee(model.module, dtype=torch.float32).loss(placed)
        again = load_model(tmp_path / "merged", **given)  # type: ignore[arg-type]
        torch.testing.assert_close(
            Trainee(again.module, dtype=torch.float32).loss(placed), merged, rtol=1e-4, atol=1e-3
        )
