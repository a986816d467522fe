"""What a model will take, told from its headers, in a process of its own (`spare`): the server needs no torch.

Weights are counted as `store.plan` counts them, pages as the engine divides them, activations for a full pass of the
engine, or of an encoder. What the process takes before it has a model is measured: this one imports the same. All are
bytes. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.inference.config import EngineConfig
    from llmasos.inference.rank import Sizes
    from llmasos.models.config import ModelConfig

CUDA_CONTEXT = 700_000_000
"""What a process holds of a GPU beside its tensors: CUDA's context, kernels, cuBLAS's workspace, graphs."""
CPU_TOKENS = 32_768
"""Tokens that a model's pages on a CPU hold at most, if one context is not longer, where max_num_seqs is not given: 16
completions of 2048, and it computes no more at once in useful time. What is set aside here no other model may have, and
a cache of prefixes fills all of it in time."""
ROUNDS = 3
"""Copies of a pass's logits in float32 that sampling has at once."""


@dataclass(frozen=True)
class Forecast:
    """Bytes. `device` is a kind (cpu, cuda, mps, xpu) or, where one was asked for, that one (cuda:1). Weights,
    activations and pages are those of one of `num_ranks` devices. `devices`: memory of every accelerator there is, and
    `uuids` their names for NVML."""

    device: str
    num_ranks: int
    process: int
    context: int
    weights: int
    activations: int
    least_pages: int
    most_pages: int
    num_context: int
    devices: dict[str, int]
    uuids: dict[str, str]


def forecast(
    reference: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    load_format: str = "auto",
    engine: dict[str, Any] | None = None,
) -> Forecast:
    """Raises what `store.plan` does, and InvalidInputError for options that contradict the model."""
    from llmasos.devices import place
    from llmasos.inference.config import EngineConfig
    from llmasos.inference.embed import BATCH_TOKENS
    from llmasos.inference.rank import resolve
    from llmasos.models.parallel import shard_config
    from llmasos.store.plan import planned_weights

    options = EngineConfig.of(**(engine or {}))
    if load_format == "dummy":
        config, elements = _made_up(reference)
        weights = elements * place(device, dtype, encoder=config.is_encoder).dtype.itemsize
    else:
        config, weights = planned_weights(reference, device=device, dtype=dtype, quantization=quantization)
    placement = place(device, dtype, encoder=config.is_encoder)
    width, ranks = placement.dtype.itemsize, options.tensor_parallel_size
    own = shard_config(config, ranks) if ranks > 1 else config
    least = most = tokens = 0
    rows = BATCH_TOKENS  # an encoder's passes are no steps of the engine
    if not config.is_encoder:
        sizes = resolve(own, options, placement.device, placement.dtype)
        contexts: float = sizes.max_num_seqs
        if placement.device.type == "cpu" and "max_num_seqs" not in (engine or {}):
            contexts = min(contexts, max(1.0, CPU_TOKENS / sizes.max_model_len))
        least, most = _pages(sizes, contexts)
        tokens, rows = sizes.max_model_len, sizes.max_num_batched_tokens
    on_gpu = placement.device.type == "cuda"
    named = device not in ("auto", placement.device.type)
    devices, uuids = _accelerators()
    return Forecast(
        device=str(placement.device) if named else placement.device.type,
        num_ranks=ranks,
        process=_process_bytes(),
        context=CUDA_CONTEXT if on_gpu else 0,
        weights=weights // ranks,
        activations=_activations(own, rows, options, width, fused=on_gpu),
        least_pages=least,
        most_pages=most,
        num_context=tokens,
        devices=devices,
        uuids=uuids,
    )


def _made_up(folder: str) -> tuple[ModelConfig, int]:
    """The configuration in a folder without weights, and the numbers that its model consists of."""
    import torch

    from llmasos.models.decoder import Decoder
    from llmasos.models.encoder import Encoder
    from llmasos.models.load import read_config

    config = read_config(Path(folder))
    with torch.device("meta"):
        module = Encoder(config) if config.is_encoder else Decoder(config)
    return config, sum(p.numel() for p in module.parameters())


def _pages(sizes: Sizes, num_contexts: float) -> tuple[int, int]:
    """Bytes of the pages for one whole context, and for several."""
    from llmasos.inference.rank import page_needs

    _, least, further = page_needs(sizes)
    return least, least + int(further * (num_contexts - 1))


def _activations(config: ModelConfig, rows: int, options: EngineConfig, width: int, *, fused: bool) -> int:
    """The widest layer of a full pass, its scores where no kernel keeps them on the chip, and the logits."""
    layer = rows * (4 * config.hidden_size + 3 * config.intermediate_size) * (width if fused else max(width, 4))
    scores = 0 if fused else config.num_heads * min(rows, 512) * min(config.context_length, 512) * 4
    logits = 0 if config.is_encoder else ROUNDS * min(options.max_num_seqs, rows) * config.vocab_size * 4
    return layer + scores + logits


def _process_bytes() -> int:
    import psutil

    import llmasos.inference.build
    import llmasos.inference.embed
    import llmasos.inference.llm
    import llmasos.inference.loop  # noqa: F401  # what a model's process has in memory

    return int(psutil.Process().memory_info().rss)


def _accelerators() -> tuple[dict[str, int], dict[str, str]]:
    import torch

    devices, uuids = {}, {}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            devices[f"cuda:{i}"] = int(properties.total_memory)
            uuids[f"cuda:{i}"] = f"GPU-{properties.uuid}"
    elif torch.xpu.is_available():
        devices |= {f"xpu:{i}": _xpu_memory(i) for i in range(torch.xpu.device_count())}
    elif torch.backends.mps.is_available():
        devices["mps"] = int(torch.mps.recommended_max_memory())
    return devices, uuids


def _xpu_memory(index: int) -> int:
    import torch

    return int(torch.xpu.get_device_properties(index).total_memory)
