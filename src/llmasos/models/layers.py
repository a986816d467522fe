"""The pieces of a transformer block: norms, rotary positions, MLP, linear layers.

T = packed tokens, D = model width, R = rotating dimensions of a head. Norms and rotations compute in float32 and return
the input's dtype, as Hugging Face's models do.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmasos.models.config import Activation, ModelConfig, RopeScaling

FEW_TOKENS = 16
"""Up to here a layer costs its kernel launches, not its arithmetic; and a token and its drafts, if they are no more,
are rounded as each of them alone (with low-bit weights), so that drafts don't change the text."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary scalings whose frequencies change with the length of a sequence."""


def activate(x: Tensor, kind: Activation) -> Tensor:
    match kind:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return _gelu_tanh(x)
        case "gelu_quick":
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # (1 + tanh z) / 2 = sigmoid 2z: a compiler's tanh takes longer than reading and writing x
    y = x.float()
    return (y * torch.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))).to(x.dtype)


class Norm(nn.Module):
    """LayerNorm, RMSNorm (arXiv:1910.07467) or LayerNorm without parameters (OLMo), over the last dimension."""

    def __init__(self, config: ModelConfig, width: int, *, heads: int = 0) -> None:
        super().__init__()
        self.kind, self.eps, self.width = config.norm, config.norm_eps, width
        self.unit_offset, self.late_rounding = config.norm_unit_offset, config.norm_late_rounding
        self.few_tokens = FEW_TOKENS
        shape = (heads, width) if heads else (width,)
        self.weight = None if self.kind == "nonparametric" else nn.Parameter(torch.ones(shape))
        # norms of single heads have no bias (StableLM)
        has_bias = self.kind == "layernorm" and config.norm_bias and not heads
        self.bias = nn.Parameter(torch.zeros(shape)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return self._rms(x)
        if self.weight is None or self.weight.dim() == 1:
            weight, bias = self.weight, self.bias
            if weight is None:  # OLMo computes the statistics in float32
                return F.layer_norm(x.float(), (self.width,), eps=self.eps).to(x.dtype)
            return F.layer_norm(x, (self.width,), weight, bias, self.eps)
        return (F.layer_norm(x.float(), (self.width,), eps=self.eps) * self.weight).to(x.dtype)

    def _rms(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        if x.shape[0] <= self.few_tokens and not (self.unit_offset or self.late_rounding):
            # (x, -x) has mean 0 and x's mean square as its variance: LayerNorm's one kernel instead of six
            both = F.layer_norm(torch.cat([x, -x], -1), (2 * self.width,), eps=self.eps)
            return both[..., : self.width] * self.weight
        values = x.float()
        scale = torch.rsqrt(values.square().mean(-1, keepdim=True).add_(self.eps))
        if self.unit_offset:
            return (values * scale * (1.0 + self.weight.float())).to(x.dtype)
        if self.late_rounding:
            return (values * scale * self.weight).to(x.dtype)
        return (values * scale).to(x.dtype) * self.weight


class Rope:
    """Rotary positions (arXiv:2104.09864): cosine and sine tables that grow with the positions asked for."""

    def __init__(self, dim: int, theta: float, interleaved: bool, scaling: RopeScaling | None, context: int) -> None:
        self.dim, self.theta, self.interleaved = dim, theta, interleaved
        self.scaling, self.context = scaling, context
        self._trained = (scaling.original_context or context) if scaling is not None else 0
        self._kind = scaling.kind if scaling is not None else ""
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._prepared: dict[tuple[torch.device, torch.dtype], int] = {}
        self._frequencies: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._factor = 1.0
        self._neighbours: dict[torch.device, Tensor] = {}

    def prepare(self, length: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the tables of positions below `length`. From then on the caller answers for asking no further, and a
        GPU is not waited for to find out."""
        key = (device, dtype)
        if self.interleaved:
            self._partners(device)
        if self._kind not in LENGTH_DEPENDENT and length > self._prepared.get(key, 0):
            self._grow(key, length)
            self._prepared[key] = length

    def whole(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The tables themselves once they are prepared, [positions, R] each, for kernels that look positions up."""
        cos, sin = self._tables[device, dtype]
        return cos[:, 0], sin[:, 0]

    def tables(self, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines for positions [T], each [T, 1, R].

        `lengths` [T] are the tokens that each token's sequence has, for frequencies that depend on it; without them,
        positions that go up by one belong to one sequence, whole from its start. Either way a sequence turns the same
        alone and packed with others."""
        if self._kind in LENGTH_DEPENDENT:
            lengths = _run_ends(positions) if lengths is None else lengths
            return self._cos_sin(positions.float()[:, None] * self._inverse_for(lengths), dtype)
        key = (positions.device, dtype)
        if key not in self._prepared or positions.device.type == "cpu":
            end = int(positions.max()) + 1
            if key not in self._tables or self._tables[key][0].shape[0] < end:
                self._grow(key, max(256, 1 << (end - 1).bit_length()))
        cos, sin = self._tables[key]
        return cos[positions], sin[positions]

    def _grow(self, key: tuple[torch.device, torch.dtype], length: int) -> None:
        device, dtype = key
        # tables outlive this call: made in inference mode, they could not serve a backward pass later
        with torch.inference_mode(False):
            inverse = self._constants(device)[0]
            self._tables[key] = self._cos_sin(torch.outer(torch.arange(length, device=device).float(), inverse), dtype)

    def _inverse_for(self, lengths: Tensor) -> Tensor:
        """Inverse frequencies of tokens whose sequences have `lengths` tokens, [T, R/2]; no wait for the device."""
        short, long = self._constants(lengths.device)
        if self._kind == "dynamic":
            assert self.scaling is not None
            base = _dynamic_base(self.dim, self.theta, self.scaling.factor, self._trained, lengths.double())
            long = 1.0 / base.float()[:, None] ** long
        return torch.where(lengths[:, None] > self._trained, long, short)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inverse frequencies within the trained context; those beyond it (longrope) or their exponents (dynamic)."""
        if device not in self._frequencies:
            with torch.inference_mode(False):
                shape = self.dim, self.theta, self.scaling, self.context
                short, self._factor = rope_frequencies(*shape)
                long = (
                    rope_frequencies(*shape, self._trained + 1)[0] if self._kind == "longrope" else _exponents(self.dim)
                )
                self._frequencies[device] = short.to(device), long.to(device)
        return self._frequencies[device]

    def _cos_sin(self, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """angles [T, R/2] in float32, whatever the model's dtype -> cosines and signed sines, [T, 1, R]."""
        cos, sin = angles.cos() * self._factor, angles.sin() * self._factor
        # each dimension meets its partner times sine, negative for the first of a pair
        if self.interleaved:
            cos, sin = torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)
        else:
            cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return cos[:, None].to(dtype), sin[:, None].to(dtype)

    def _partners(self, device: torch.device) -> Tensor:
        """The neighbour that each dimension of a pair turns with, [R]."""
        if device not in self._neighbours:
            self._neighbours[device] = torch.arange(self.dim, device=device) ^ 1
        return self._neighbours[device]

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, H, D]; the first R of D dimensions rotate. Rounds where Hugging Face's models round."""
        cos, sin = tables
        part = x if self.dim == x.shape[-1] else x[..., : self.dim]
        partner = part.index_select(-1, self._partners(x.device)) if self.interleaved else part.roll(self.dim // 2, -1)
        out = (part * cos).add_(partner * sin).to(x.dtype)
        return out if self.dim == x.shape[-1] else torch.cat([out, x[..., self.dim :]], -1)


def stretched_from(config: ModelConfig) -> int:
    """Tokens from which on a sequence turns by other frequencies (dynamic, longrope); 0: it never does.

    Keys that were cached before that point no longer fit the queries after it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in LENGTH_DEPENDENT:
        return 0
    return scaling.original_context or config.context_length


def rope_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, context: int, stretched_to: int = 0
) -> tuple[Tensor, float]:
    """Inverse frequencies [R/2] and the factor on cosines and sines.

    `stretched_to` is the sequence length when it exceeds the trained context (dynamic and longrope), else 0. Formulas:
    YaRN arXiv:2309.00071 §3; LongRoPE arXiv:2402.13753; llama3 and dynamic as in Hugging Face's modeling_rope_utils.
    """
    exponent = _exponents(dim)
    inverse = 1.0 / (theta**exponent)
    if scaling is None:
        return inverse, 1.0
    match scaling.kind:
        case "linear":
            return inverse / scaling.factor, 1.0
        case "dynamic":
            if stretched_to:
                trained = scaling.original_context or context
                base = _dynamic_base(dim, theta, scaling.factor, trained, torch.tensor(stretched_to).double())
                inverse = 1.0 / (base.float() ** exponent)
            return inverse, 1.0
        case "llama3":
            return _llama3(inverse, scaling), 1.0
        case "yarn":
            return _yarn(inverse, dim, theta, scaling, context)
        case "longrope":
            return _longrope(exponent, theta, scaling, context, stretched_to)


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64).float() / dim


def _dynamic_base(dim: int, theta: float, factor: float, trained: int, length: Tensor) -> Tensor:
    return theta * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))


def _run_ends(positions: Tensor) -> Tensor:
    """One more than the last position of the run of consecutive positions that each position is part of, [T]."""
    breaks = positions.diff() != 1
    lasts = F.pad(breaks, (0, 1), value=True).nonzero()[:, 0]
    return positions[lasts][F.pad(breaks.cumsum(0), (1, 0))] + 1


def _llama3(inverse: Tensor, s: RopeScaling) -> Tensor:
    wavelength = 2 * math.pi / inverse
    smooth = (s.original_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    mixed = (1 - smooth) * inverse / s.factor + smooth * inverse
    long, short = (
        wavelength > s.original_context / s.low_freq_factor,
        wavelength < s.original_context / s.high_freq_factor,
    )
    return torch.where(long, inverse / s.factor, torch.where(short, inverse, mixed))


def _yarn(inverse: Tensor, dim: int, theta: float, s: RopeScaling, context: int) -> tuple[Tensor, float]:
    trained = s.original_context or context

    def mscale(scale: float, m: float) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    factor = s.attention_factor
    if factor is None:
        both = s.mscale and s.mscale_all_dim
        factor = mscale(s.factor, s.mscale) / mscale(s.factor, s.mscale_all_dim) if both else mscale(s.factor, 1.0)

    def dimension(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2).float() - low) / width).clamp(0, 1)
    return inverse / s.factor * ramp + inverse * (1 - ramp), factor


def _longrope(exponent: Tensor, theta: float, s: RopeScaling, context: int, stretched_to: int) -> tuple[Tensor, float]:
    factors = torch.tensor(s.long_factor if stretched_to else s.short_factor)
    factor = s.attention_factor
    if factor is None:
        trained = s.original_context or context
        factor = 1.0 if s.factor <= 1 else math.sqrt(1 + math.log(s.factor) / math.log(trained))
    return 1.0 / (factors * theta**exponent), factor


def embedding(num: int, width: int) -> nn.Embedding:
    """A table whose content is left to loading or training. nn.Embedding's own initialisation, run on the meta device,
    imports torch's whole compiler: a second and 75 MB."""
    return nn.Embedding.from_pretrained(torch.empty(num, width), freeze=False)


class MLP(nn.Module):
    """down(act(gate) · up), or down(act(up)) where the family has no gate. Gate and up are stored as one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation, self.gated = config.activation, config.gated
        wide = config.intermediate_size * (2 if config.gated else 1)
        self.up = nn.Linear(config.hidden_size, wide, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activated(self.up(x)))
        return out

    def activated(self, wide: Tensor) -> Tensor:
        """What `down` reads of what `up` wrote."""
        if not self.gated:
            return activate(wide, self.activation)
        gate, up = wide.chunk(2, -1)
        return activate(gate, self.activation) * up
