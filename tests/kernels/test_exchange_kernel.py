"""Exchanges between processes: each in a thread of its own, all mailboxes in one memory."""

import threading

import pytest
import torch

from llmasos.models.config import ModelConfig
from llmasos.models.layers import Norm
from llmasos.models.parallel import Mailbox, head_rows, words_per_row

pytest.importorskip("triton")

from llmasos.inference.kernels.exchange import GATHER_BLOCK, gather_columns, sum_add_rms_norm
from llmasos.inference.kernels.fused import add_rms_norm

ROWS, WORLD = 6, 3
SIZES = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "context_length": 8}
HEADS = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8}


class Boxes:
    """One box of every process: [reader, writer, ROWS, words]."""

    def __init__(self, words: int, device: torch.device) -> None:
        self.memory = torch.zeros(WORLD, WORLD, ROWS, words, dtype=torch.int64, device=device)
        addresses = [box.data_ptr() for box in self.memory]
        self.of = [
            Mailbox(
                rank=rank,
                rows=ROWS,
                boxes=torch.tensor(addresses, dtype=torch.int64, device=device),
                counts=torch.zeros(ROWS * 8, dtype=torch.int32, device=device),
                memory=self.memory,
            )
            for rank in range(WORLD)
        ]

    def send(self, reader: int, writer: int, part: torch.Tensor, exchange: int) -> None:
        """What the kernel of `writer` sends."""
        data = part.contiguous().view(torch.int32).long() & 0xFFFFFFFF
        self.memory[reader, writer, : len(part)] = data | exchange << 32

    def received(self, reader: int, writer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The values, and the exchange that each word belongs to."""
        words = self.memory[reader, writer]
        return (words & 0xFFFFFFFF).to(torch.uint32).view(torch.int32).view(dtype), words >> 32


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_those_of_the_parts_and_peers_get_ours(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    torch.manual_seed(0)
    width = 46
    norm = Norm(ModelConfig("TinyForCausalLM", "tiny", **SIZES, **HEADS), width).to(device, dtype)
    norm.weight.data.uniform_(0.5, 2)
    for rank in range(WORLD):
        boxes = [Boxes(words_per_row(width, dtype), device) for _ in range(2)]
        for step in range(4):
            which, exchange, num = step % 2, 1 + step // 2, ROWS - step % 2
            parts = torch.randn(WORLD, num, width).to(dtype).to(device)
            for peer in range(WORLD):
                if peer != rank:
                    boxes[which].send(rank, peer, parts[peer], exchange)
            residual = torch.randn(num, width).to(dtype).to(device)
            total = torch.zeros(num, width, device=device)
            for part in parts:
                total += part.float()
            expected_stream = residual.clone()
            expected = add_rms_norm(total.to(dtype), expected_stream, norm, scale=scale)
            out = sum_add_rms_norm(boxes[which].of[rank], parts[rank], residual, norm, scale=scale)
            near = {"atol": 0.04, "rtol": 0.02} if dtype == torch.bfloat16 else {}  # the interpreter cuts it off
            torch.testing.assert_close(residual, expected_stream, **near)
            torch.testing.assert_close(out, expected, **near)
            for peer in range(WORLD):
                if peer != rank:
                    values, exchanges = boxes[which].received(peer, rank, dtype)
                    assert torch.equal(values[:num], parts[rank])
                    assert (exchanges[:num] == exchange).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel that waits for ever would keep a GPU")
def test_nobody_goes_on_before_the_last_word_is_there() -> None:
    torch.manual_seed(0)
    width = 32
    norm = Norm(ModelConfig("TinyForCausalLM", "tiny", **SIZES, **HEADS), width)
    boxes = Boxes(words_per_row(width, torch.float32), torch.device("cpu"))
    parts, residual = torch.randn(WORLD, 2, width), torch.zeros(2, width)
    late = parts[2].clone()
    boxes.send(0, 1, parts[1], 1)
    boxes.send(0, 2, late, 1)
    boxes.memory[0, 2, 1, 5] = 0
    thread = threading.Thread(target=sum_add_rms_norm, args=(boxes.of[0], parts[0], residual, norm))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not residual[1].any()
    boxes.send(0, 2, late, 1)
    thread.join(30)
    torch.testing.assert_close(residual, parts.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [384, 301, 4 * GATHER_BLOCK + 7])
def test_logits_are_gathered_in_order(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    shares = [head_rows(vocab, rank, WORLD) for rank in range(WORLD)]
    starts = torch.tensor([rows.start for rows in shares], dtype=torch.int32, device=device)
    skips = [min(rows.stop, i * len(rows)) - rows.start for i, rows in enumerate(shares)]
    for rank in range(WORLD):
        boxes = Boxes(words_per_row(len(shares[0]), dtype), device)
        for exchange in (1, 2):
            num = 3 - exchange
            parts = torch.randn(WORLD, num, len(shares[0])).to(dtype).to(device)
            for peer in range(WORLD):
                if peer != rank:
                    boxes.send(rank, peer, parts[peer], exchange)
            expected = torch.cat([part[:, skip:] for part, skip in zip(parts, skips, strict=True)], -1)
            out = gather_columns(
                boxes.of[rank], parts[rank], starts, torch.tensor(skips, dtype=torch.int32, device=device), vocab
            )
            assert torch.equal(out, expected)
