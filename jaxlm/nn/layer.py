"""The structure of a Transformer layer in all families: sizes, norms, biases, positions."""

import typing
from dataclasses import dataclass

from jaxlm.core import check_fields, nearest

SCALINGS = ("default", "linear", "llama3")
NORMS = ("layer", "rms")


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: base `theta`, and the scaling that long-context models apply to its frequencies.

    Attributes:
      theta: base of the geometric series of frequencies.
      scaling: `default`, `linear` (frequencies divided by `factor`) or `llama3` (only the low ones divided).
      factor, low_freq_factor, high_freq_factor, original_max_positions: parameters of the scaling.

    Raises:
      ValueError: for a value that its field cannot have; the message names the field.
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        check_fields(self, typing.get_type_hints(Rotary))
        if self.scaling not in SCALINGS:
            raise ValueError(f"unknown scaling {self.scaling!r} of rotary positions; {nearest(self.scaling, SCALINGS)}")
        for name in ("theta", "factor", "original_max_positions"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} of rotary positions must be above 0")
        if self.low_freq_factor == self.high_freq_factor:
            raise ValueError(f"low_freq_factor and high_freq_factor must differ, both are {self.low_freq_factor}")


@dataclass(frozen=True)
class Layer:
    """Structure of one layer. Layers with equal values (and equal parameter trees) are stacked and scanned.

    Attributes:
      hidden: width of the residual stream.
      kv_heads: key/value heads; q_per_kv: query heads that share each of them; head_dim: width of a head.
      cross_heads: heads of the cross-attention (decoder layers of an encoder-decoder), else 0.
      ffn: hidden units of the feed-forward network; gated: `act(x gate) * (x up)` instead of `act(x up)`.
      activation: `gelu` (erf), `gelu_tanh`, `relu`, `silu` or `tanh`.
      norm: `layer` (with bias), or `rms` (without mean and bias); norm_eps: its ε; pre_norm: norms before the sublayers
        (GPT-2, Llama, T5) or after the residual sum (BERT).
      qkv_bias, output_bias, mlp_bias: which projections add a bias.
      causal: a token attends to itself and what precedes it; window: to at most this many tokens, itself included.
      rotary: rotary positions; scale_scores: divide attention scores by sqrt(head_dim) (T5 does not).
      position_heads: columns of the shared relative-position table that the heads use (T5 after pruning), else `None`.
      dropout: on embeddings' and sublayers' outputs; attention_dropout: on attention probabilities.
    """

    hidden: int
    kv_heads: int
    q_per_kv: int
    head_dim: int
    ffn: int
    cross_heads: int = 0
    gated: bool = False
    activation: str = "gelu"
    norm: str = "layer"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    causal: bool = True
    window: int | None = None
    rotary: Rotary | None = None
    scale_scores: bool = True
    position_heads: tuple[int, ...] | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.q_per_kv
