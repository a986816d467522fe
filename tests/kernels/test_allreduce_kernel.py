"""Sums over processes, one of them played by the test: its flags are set, its part lies beside ours."""

import pytest
import torch

from llmasos.models.config import ModelConfig
from llmasos.models.layers import Norm
from llmasos.models.parallel import Windows

pytest.importorskip("triton")

from llmasos.inference.kernels.allreduce import sum_add_rms_norm
from llmasos.inference.kernels.fused import add_rms_norm

ROWS, WORLD = 6, 3
SIZES = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "context_length": 8}
HEADS = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8}


def windows(
    device: torch.device, width: int, dtype: torch.dtype, rank: int
) -> tuple[Windows, list[torch.Tensor], list[torch.Tensor]]:
    """Of one process, with the parts and flags of all: those that its peers set are large, as if they were ahead."""
    parts = [torch.randn(WORLD, ROWS, width).to(dtype).to(device) for _ in range(2)]
    flags = [torch.zeros(WORLD, ROWS, WORLD, dtype=torch.int32, device=device) for _ in range(2)]
    for flag in flags:
        flag[rank] = 1000
        flag[rank, :, rank] = 0

    def addresses(tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor([part.data_ptr() for part in tensor], dtype=torch.int64, device=device)

    made = Windows(
        rank=rank,
        parts=[part[rank] for part in parts],
        buffers=[addresses(part) for part in parts],
        flags=[addresses(flag) for flag in flags],
        counts=[torch.zeros(ROWS, dtype=torch.int32, device=device) for _ in range(2)],
    )
    return made, parts, flags


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_are_those_of_the_parts_and_peers_are_told(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    torch.manual_seed(0)
    width = 48
    norm = Norm(ModelConfig("TinyForCausalLM", "tiny", **SIZES, **HEADS), width).to(device, dtype)
    for rank in range(WORLD):
        ours, parts, flags = windows(device, width, dtype, rank)
        for step in range(4):
            which = step % 2
            residual = torch.randn(ROWS - step % 2, width).to(dtype).to(device)
            total = sum(part.float() for part in parts[which]).to(dtype)[: len(residual)]
            expected_stream = residual.clone()
            expected = add_rms_norm(total, expected_stream, norm, scale=scale)
            out = sum_add_rms_norm(ours, which, residual, norm, scale=scale)
            torch.testing.assert_close(residual, expected_stream)
            torch.testing.assert_close(out, expected)
            told = [flags[which][peer, : len(residual), rank] for peer in range(WORLD) if peer != rank]
            assert all((t == 1 + step // 2).all() for t in told)
