"""Plan: what a model costs in bytes to download, on disk and in memory, before anything is downloaded.

Weights are counted from the tensors in the file headers, as `models.load` keeps them; keys and values from the
configuration: layers x 2 x kv_heads x head_dim x tokens x concurrency x bytes per element, where a sliding-window layer
never keeps more tokens than its window. What runs besides (activations, logits, allocator) is an estimate and called
so. The Python process itself is not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmasos import devices
from llmasos.errors import InvalidInputError, LLMasOSError, NetworkError, NotFoundError, OfflineError
from llmasos.store.catalog import Resolved, existing
from llmasos.store.headers import Facts, opener, read_facts, read_tensors
from llmasos.store.library import Library, files_at
from llmasos.store.listings import check_sources, list_source
from llmasos.store.pull import DISK_MARGIN, disk_free, size
from llmasos.store.transfer import UnsupportedRange

if TYPE_CHECKING:
    from llmasos.formats.types import TensorInfo
    from llmasos.models.config import ModelConfig

DEFAULT_CONTEXT = 4096  # tokens, or the model's context if that is shorter
CHUNK = 512  # prompt tokens that run through the model at once, for the estimate of activations
MARGIN = 0.05  # of weights and cache, for the allocator

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
# Constants that old checkpoints store beside the weights: causal masks, rotary tables, position numbers.
_CONSTANTS = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|inv_freq|position_ids|token_type_ids)$")

_UNROUNDED = re.compile(r"embed|wte|wpe|lm_head|norm")


@dataclass(frozen=True)
class PlannedFile:
    path: str
    size: int | None


@dataclass(frozen=True)
class Plan:
    """All sizes in bytes, contexts in tokens. `memory_bytes` = weights + KV cache + activations.

    `max_context` is the largest context that fits at this concurrency, at most the model's own; 0 if none does.
    """

    ref: str
    name: str
    source: str
    installed: bool
    architecture: str
    format: str
    licence: str | None
    notice: str | None
    files: tuple[PlannedFile, ...]
    download_bytes: int
    disk_bytes: int
    disk_free: int
    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    memory_free: int
    device: str
    dtype: str
    context: int
    context_length: int
    max_context: int
    concurrency: int

    @property
    def memory_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.activation_bytes

    @property
    def fits_disk(self) -> bool:
        return self.installed or self.disk_bytes + DISK_MARGIN <= self.disk_free

    @property
    def fits_memory(self) -> bool:
        return self.memory_bytes <= self.memory_free

    @property
    def fits(self) -> bool:
        return self.fits_disk and self.fits_memory

    @property
    def verdict(self) -> str:
        """One line for people: what it needs against what is free, and what would fit."""
        memory = f"{size(self.memory_bytes)} of {size(self.memory_free)} free memory on {self.device}"
        if not self.fits_disk:
            return f"Does not fit on the disk: needs {size(self.disk_bytes)}, {size(self.disk_free)} are free."
        if self.fits_memory:
            return f"Fits: needs {memory}, context up to {self.max_context} tokens."
        if self.max_context:
            return f"Does not fit: needs {memory}; a context of {self.max_context} tokens would."
        return f"Does not fit: needs {memory}; choose a smaller model or quantisation."


def plan(
    ref: str | Path, *, context: int | None = None, concurrency: int = 1, device: str = "auto", dtype: str = "auto"
) -> Plan:
    """What running `ref` would take, read from headers here or, by ranged requests, where it would come from.

    `context` in tokens per request (default: the model's, at most 4096); `concurrency` requests at once. Raises the
    errors of `pull` that can be known without the weights, and InvalidInputError for a context beyond the model's.
    """
    if concurrency < 1 or (context is not None and context < 1):
        raise InvalidInputError(
            f"A plan for {context} tokens and {concurrency} requests makes no sense.", hint="Both must be at least 1."
        )
    library = Library()
    resolved = library.resolve(ref)
    found = _local(ref, resolved, library) or _remote(resolved)
    config = found.facts.config
    placement = devices.place(device, dtype, encoder=config.is_encoder)
    context = context or min(config.context_length, DEFAULT_CONTEXT)
    if context > config.context_length:
        raise InvalidInputError(
            f"{resolved.name} has a context of {config.context_length} tokens; {context} were asked for.",
            hint=f"Ask for at most {config.context_length}.",
            param="context",
        )
    memory_free = devices.free_memory(placement.device)
    width = placement.dtype.itemsize
    weights = _weights(found, placement)
    activations = activation_bytes(config, weights, context, concurrency, width)

    def fits(tokens: int) -> bool:
        cache = kv_cache_bytes(config, tokens, concurrency, width)
        return weights + cache + activation_bytes(config, weights, tokens, concurrency, width) <= memory_free

    entry = resolved.entry
    return Plan(
        ref=str(ref),
        name=resolved.name,
        source=found.source,
        installed=found.installed,
        architecture=config.architecture,
        format=found.facts.format,
        licence=entry.licence if entry else found.licence,
        notice=entry.notice if entry else None,
        files=found.files,
        download_bytes=found.download_bytes,
        disk_bytes=found.disk_bytes,
        disk_free=disk_free(library.home),
        weights_bytes=weights,
        kv_cache_bytes=kv_cache_bytes(config, context, concurrency, width),
        activation_bytes=activations,
        memory_free=memory_free,
        device=str(placement.device),
        dtype=str(placement.dtype).removeprefix("torch."),
        context=context,
        context_length=config.context_length,
        max_context=_largest(config.context_length, fits),
        concurrency=concurrency,
    )


def planned_weights(
    ref: str | Path, *, device: str = "auto", dtype: str = "auto", quantization: str = "auto"
) -> tuple[ModelConfig, int]:
    """The configuration of `ref` and the bytes of its weights once loaded, read from headers as in `plan`."""
    library = Library()
    resolved = library.resolve(ref)
    found = _local(ref, resolved, library) or _remote(resolved)
    config = found.facts.config
    return config, _weights(found, devices.place(device, dtype, encoder=config.is_encoder), quantization)


def _weights(found: _Found, placement: devices.Placement, quantization: str = "auto") -> int:
    width = placement.dtype.itemsize
    if found.facts.format == "gguf":
        low_bit = placement.low_bit and quantization != "none"
        return gguf_weights_bytes(found.tensors, found.facts.config, width, low_bit=low_bit)
    return weights_bytes(found.tensors, width) - saved_bytes(found.tensors, width, quantization)


def saved_bytes(tensors: Sequence[TensorInfo], width: int, quantization: str) -> int:
    """Bytes that rounding the linear layers on loading saves; embeddings and the head stay."""
    from llmasos.models.lowbit import GROUP

    linear = [t for t in tensors if t.dtype in _FLOATS and len(t.shape) == 2 and not _UNROUNDED.search(t.name)]
    elements = sum(math.prod(t.shape) for t in linear)
    kept = {"int8": elements, "int4": elements // 2 + elements // GROUP * 4}.get(quantization, elements * width)
    return elements * width - kept


def weights_bytes(tensors: Sequence[TensorInfo], width: int) -> int:
    """Bytes of safetensors' weights once loaded with `width` bytes per element; packed types stay as they are."""
    weights = [tensor for tensor in tensors if not _CONSTANTS.search(tensor.name)]
    return sum(math.prod(t.shape) * width if t.dtype in _FLOATS else t.nbytes for t in weights)


def gguf_weights_bytes(tensors: Sequence[TensorInfo], config: ModelConfig, width: int, *, low_bit: bool) -> int:
    """Bytes of a GGUF file's weights once loaded: copies of `width` bytes per element or low-bit ones, and those parts
    of the mapped file that are used again (blocks of embeddings and 4-bit layers)."""
    import torch

    from llmasos.models.lowbit import FOUR_BIT, GROUP, Int4Linear, PackedLinear

    tied = not config.is_encoder and all(tensor.name != "output.weight" for tensor in tensors)
    total = 0
    for tensor in tensors:
        elements = math.prod(tensor.shape)
        if not low_bit or tensor.dtype in _FLOATS:
            total += elements * width
            continue
        four = tensor.dtype in FOUR_BIT and Int4Linear.fits(elements // tensor.shape[-1], tensor.shape[-1])
        embedding = tensor.name == "token_embd.weight"
        head = tensor.name == "output.weight" or (tied and embedding)
        if four:
            linear = elements // 2 + elements // GROUP * 4  # with scale and minimum of each group
        else:
            packed = head and width == 2 and PackedLinear.fits(tensor.shape[-1], torch.bfloat16)
            linear = elements * 2 if packed else elements
        total += tensor.nbytes if four or embedding else 0
        total += linear if tied or not embedding else 0
    return total


def kv_cache_bytes(config: ModelConfig, context: int, concurrency: int, width: int) -> int:
    """Bytes of keys and values for `concurrency` requests of `context` tokens; none for an encoder."""
    if config.is_encoder:
        return 0
    tokens = sum(min(context, config.window(layer) or context) for layer in range(config.num_layers))
    return tokens * 2 * config.num_kv_heads * config.head_dim * width * concurrency


def activation_bytes(config: ModelConfig, weights: int, context: int, concurrency: int, width: int) -> int:
    """An estimate of all that is neither weights nor cache: a chunk's widest layer, logits in float32, a margin."""
    rows = min(context, CHUNK)
    layer = rows * (4 * config.hidden_size + 3 * config.intermediate_size) * max(width, 4)
    scores = config.num_heads * rows * min(context, CHUNK) * 4
    logits = concurrency * config.vocab_size * 4
    cache = kv_cache_bytes(config, context, concurrency, width)
    return layer + scores + logits + math.ceil(MARGIN * (weights + cache))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n ≤ `most` with `fits(n)`, by bisection: need grows with the context."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class _Found:
    """A model whose headers have been read, here or elsewhere."""

    source: str
    installed: bool
    licence: str | None
    files: tuple[PlannedFile, ...]
    download_bytes: int
    disk_bytes: int
    facts: Facts
    tensors: list[TensorInfo]


def _local(ref: str | Path, resolved: Resolved, library: Library) -> _Found | None:
    """A model of this machine: installed, or at a path."""
    licence: str | None = None
    if library.has(str(ref)):
        card = library.get(str(ref))
        path, source, licence = library.path(str(ref)), card.source, card.licence
    elif resolved.sources[0].kind == "file":
        path = existing(resolved.sources[0].path)
        source = str(path)
    else:
        return None
    folder = path if path.is_dir() else path.parent
    names = files_at(path)
    facts = read_facts(names, opener(folder))
    files = tuple(PlannedFile(name, (folder / name).stat().st_size) for name in names)
    return _Found(source, True, licence, files, 0, 0, facts, read_tensors(facts, opener(folder)))


def _remote(resolved: Resolved) -> _Found:
    """The first source that answers."""
    check_sources(resolved.sources)
    reasons: list[tuple[str, LLMasOSError]] = []
    for source in resolved.sources:
        try:
            listing = list_source(source, resolved.entry, lambda message: None)
            if not listing.files:
                raise UnsupportedRange(
                    f"{source.text} cannot be looked into before it is downloaded: its server sends no ranges."
                )
            facts = read_facts([file.path for file in listing.files], listing.open)
            tensors = read_tensors(facts, listing.open)
        except (NetworkError, NotFoundError) as e:
            reasons.append((source.text, e))
            continue
        files = tuple(PlannedFile(file.path, file.size) for file in listing.files)
        download, disk = listing.download_bytes or 0, listing.disk_bytes or 0
        return _Found(listing.source, False, listing.licence, files, download, disk, facts, tensors)
    if len(reasons) == 1 or all(isinstance(error, OfflineError) for _, error in reasons):
        raise reasons[0][1]
    if unseen := [error for _, error in reasons if isinstance(error, UnsupportedRange)]:
        raise unseen[0]  # `pull` can do without a plan
    raise NetworkError(
        f"{resolved.name} could not be planned from any source: "
        + " ".join(f"[{source}] {error.message}" for source, error in reasons),
        hint="Check the connection: `llmasos doctor`.",
    )
