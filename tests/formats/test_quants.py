"""Our decoders equal the gguf package's, bit for bit where numbers are numbers."""

import gguf
import numpy as np
import pytest
import torch

from llmasos.errors import FormatError, UnsupportedError
from llmasos.formats.quants import BLOCK, FOUR_BIT, dequantize, unpack_q4
from llmasos.formats.types import GGML_TYPES

# Where float16 scales lie in a block.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(dtype: str, rows: int, per_row: int, seed: int = 0) -> np.ndarray:
    """Random bytes; only scales that would be infinite or not a number get another exponent."""
    size = BLOCK[dtype][1]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, per_row, size), dtype=np.uint8)
    for at in HALVES[dtype]:
        high = blocks[..., at + 1]
        blocks[..., at + 1] = np.where(high & 0x7C == 0x7C, high & 0xBF, high)
    return blocks.reshape(rows, -1)


def reference(dtype: str, blocks: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype])


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    return np.array_equal(ours.numpy().view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("dtype", BLOCK)
def test_random_blocks_decode_as_the_reference_does(dtype: str) -> None:
    blocks = random_blocks(dtype, rows=37, per_row=5)
    assert same_bits(dequantize(dtype, torch.from_numpy(blocks)), reference(dtype, blocks))


@pytest.mark.parametrize("dtype", BLOCK)
def test_decoding_in_pieces_equals_decoding_at_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.from_numpy(random_blocks(dtype, rows=3, per_row=7, seed=1))
    whole = dequantize(dtype, blocks)
    monkeypatch.setattr("llmasos.formats.quants._ELEMENTS_AT_ONCE", 4 * BLOCK[dtype][0])
    assert torch.equal(dequantize(dtype, blocks), whole)


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_numbers_come_back_close_and_as_the_reference_has_them(dtype: str) -> None:
    values = np.random.default_rng(2).standard_normal((8, 96), dtype=np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype])
    decoded = dequantize(dtype, torch.from_numpy(blocks))
    assert same_bits(decoded, reference(dtype, blocks))
    assert np.abs(decoded.numpy() - values).max() < 0.6


def test_leading_dimensions_are_kept_and_one_block_is_enough() -> None:
    blocks = torch.from_numpy(random_blocks("Q4_K", rows=6, per_row=2))
    decoded = dequantize("Q4_K", blocks.view(2, 3, -1))
    assert decoded.shape == (2, 3, 512)
    assert torch.equal(dequantize("Q4_K", blocks[0, :144]), decoded[0, 0, :256])
    assert dequantize("Q4_K", blocks[:0]).shape == (0, 512)


def test_rows_that_are_not_contiguous_decode_alike() -> None:
    blocks = torch.from_numpy(random_blocks("Q8_0", rows=4, per_row=6))
    assert torch.equal(dequantize("Q8_0", blocks[::2, 34:102]), dequantize("Q8_0", blocks)[::2, 32:96])


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float64])
def test_another_output_dtype_is_the_float32_result_rounded_once(out: torch.dtype) -> None:
    blocks = torch.from_numpy(random_blocks("Q6_K", rows=3, per_row=2))
    decoded = dequantize("Q6_K", blocks, out=out)
    assert decoded.dtype == out
    assert torch.equal(decoded, dequantize("Q6_K", blocks).to(out))


@pytest.mark.parametrize("dtype", FOUR_BIT)
def test_unpacked_four_bit_rows_multiply_back_to_the_decoded_ones(dtype: str) -> None:
    blocks = torch.from_numpy(random_blocks(dtype, rows=6, per_row=4)).view(2, 3, -1)
    width = 4 * BLOCK[dtype][0]
    q, d, m = unpack_q4(dtype, blocks)
    assert q.dtype == torch.uint8 and int(q.max()) == 15
    assert q.shape == (2, 3, width) and d.shape == m.shape == (2, 3, width // 32)
    weights = q.float().view(2, 3, -1, 32) * d[..., None] + m[..., None]
    assert torch.equal(weights.view(2, 3, width), dequantize(dtype, blocks))


def test_a_type_without_a_decoder_is_named() -> None:
    with pytest.raises(UnsupportedError, match="IQ2_XXS"):
        dequantize("IQ2_XXS", torch.zeros(66, dtype=torch.uint8))


def test_a_row_that_is_no_whole_number_of_blocks_is_refused() -> None:
    with pytest.raises(FormatError, match="35 bytes"):
        dequantize("Q8_0", torch.zeros(2, 35, dtype=torch.uint8))


def test_the_table_of_block_types_agrees_with_the_gguf_package() -> None:
    theirs = {t.value: (t.name, *size) for t, size in gguf.GGML_QUANT_SIZES.items() if t.value in GGML_TYPES}
    assert len(theirs) > 20
    assert {n: (t.name, t.block_size, t.type_size) for n, t in GGML_TYPES.items() if n in theirs} == theirs
