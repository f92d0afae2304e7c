"""ModelConfig: one flat description for every family; per-layer sizes are part of it."""

import dataclasses
import reprlib
import typing
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from jaxlm.core import checked, nearest
from jaxlm.models.heads import HEADS
from jaxlm.nn.dense import ACTIVATIONS
from jaxlm.nn.layer import NORMS, Layer, Rotary

Sizes = Any
"""One size, or one per layer; always a tuple once the config exists."""
MAX_LAYERS, MAX_SIZE = 1_000, 1 << 24
"""No model reaches these: larger numbers are mistakes, and would cost memory and hours before they showed."""
LIMITS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, MAX_SIZE),
    "num_layers": (1, MAX_LAYERS),
    "num_decoder_layers": (0, MAX_LAYERS),
    "head_dim": (1, MAX_SIZE),
    "window": (1, MAX_SIZE),
    "window_from": (0, MAX_LAYERS),
    "norm_eps": (0, 1),
}
"""Smallest and largest value of a field; other numbers lie between 0 and MAX_SIZE."""
RATES = ("dropout", "attention_dropout", "head_dropout")
CHOICES: dict[str, Collection[str]] = {
    "norm": NORMS,
    "activation": ACTIVATIONS,
    "head": HEADS,
    "pooling": ("first", "last"),
}
"""Valid names of a field."""


@dataclass(frozen=True)
class ModelConfig:
    """Structure of a network. A size may be one number, or one per layer as after structured pruning.

    Attributes:
      family: `gpt2`, `bert`, `roberta`, `llama`, `mistral`, `qwen2` or `t5`.
      vocab_size: rows of the token table; hidden_size: width of the residual stream.
      num_layers: layers of the stack (of a T5's encoder); num_heads: query heads; num_kv_heads: key/value heads, by
        default `num_heads`; head_dim: width of a head, by default `hidden_size / num_heads`; ffn_size: units of the
        FFN, by default `4 hidden_size`.
      num_decoder_layers: layers of a T5's decoder, 0 for none; decoder_num_heads, cross_num_heads, decoder_ffn_size:
        heads and units of the decoder's layers, by default those of the encoder.
      layer_map, decoder_layer_map: number of the stored layer whose parameters each layer of the stack uses,
        `(0, 0, 1, 1)` for four layers with two sets of parameters; `None`: no sharing. Layers that share parameters
        have equal sizes.
      max_positions: longest row, 0 where positions have no table; position_offset: first row used (2 in RoBERTa,
        which counts positions over tokens that are not `pad_token_id`).
      type_vocab_size: token types (BERT), 0 for none.
      relative_buckets, relative_max_distance: T5's relative positions, 0 for none; position_heads,
        decoder_position_heads: columns of the relative positions' table that each layer's remaining heads use.
      rotary: rotary positions, or `None`.
      norm: `layer` (with bias), or `rms` (without mean and bias); norm_eps: ε of the norms; pre_norm: norms before the
        sublayers (GPT-2, Llama, T5) or after the residual sum (BERT); embed_norm: one more behind the embeddings;
        final_norm: one more behind the last layer.
      activation: of the FFN: `gelu` (erf), `gelu_tanh`, `relu`, `silu` or `tanh`; gated: `act(x gate) * (x up)`
        instead of `act(x up)`.
      qkv_bias, output_bias, mlp_bias: whether query, key and value, the attention's output, and the FFN add a bias.
      scale_scores: divide attention scores by sqrt(head_dim) (T5 does not).
      causal: a token attends to itself and what precedes it; window: to at most this many tokens, itself included;
        window_from: first layer that has the window.
      tie_embeddings: the output projection is the token table; scale_head: hidden states times hidden_size^-0.5 before
        it (T5).
      head: one of HEADS; pooling: token that a sequence head reads, `first` or `last`; pooler: that token passes a
        tanh layer; next_sentence: the masked head also predicts the next sentence.
      labels: names of the classes of a sequence or token head; regression: the sequence head predicts one number.
      pad_token_id: id that HF configs carry; decoder_start_token_id: first decoder input of a T5.
      dropout, attention_dropout, head_dropout: dropout rates.
      init_std: standard deviation of initial kernels and tables.

    Raises:
      ValueError: for a value of another type, out of bounds, unknown, or that contradicts another field; the message
        names the field.
    """

    family: str
    vocab_size: int = 0
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: Sizes = 4
    num_kv_heads: Sizes = None
    head_dim: int | None = None
    ffn_size: Sizes = None
    num_decoder_layers: int = 0
    decoder_num_heads: Sizes = None
    cross_num_heads: Sizes = None
    decoder_ffn_size: Sizes = None
    layer_map: tuple[int, ...] | None = None
    decoder_layer_map: tuple[int, ...] | None = None
    max_positions: int = 0
    position_offset: int = 0
    type_vocab_size: int = 0
    relative_buckets: int = 0
    relative_max_distance: int = 128
    position_heads: tuple[tuple[int, ...], ...] | None = None
    decoder_position_heads: tuple[tuple[int, ...], ...] | None = None
    rotary: Rotary | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    embed_norm: bool = False
    final_norm: bool = True
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    scale_scores: bool = True
    causal: bool = True
    window: int | None = None
    window_from: int = 0
    tie_embeddings: bool = True
    scale_head: bool = False
    head: str = "causal"
    pooling: str = "last"
    pooler: bool = False
    next_sentence: bool = False
    labels: tuple[str, ...] = ()
    regression: bool = False
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        # Every field by itself.
        for field in dataclasses.fields(self):
            put(field.name, check_field(field.name, getattr(self, field.name), field.name))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; {nearest(getattr(self, name), choices)}")
        self._check_labels()
        # Sizes of the encoder, or of the only stack: one per layer.
        heads = self._per_layer("num_heads", self.num_heads, self.num_layers)
        if self.head_dim is None:
            if not heads[0] or self.hidden_size % heads[0]:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_heads {heads[0]}; set head_dim"
                )
            put("head_dim", self.hidden_size // heads[0])
        kv_heads = self._per_layer("num_kv_heads", _if_none(self.num_kv_heads, heads), self.num_layers)
        for i, (h, kv) in enumerate(zip(heads, kv_heads, strict=True)):
            if (kv == 0 and h) or (kv and h % kv):
                raise ValueError(f"layer {i}: num_heads {h} is not a multiple of num_kv_heads {kv}")
        put("num_heads", heads)
        put("num_kv_heads", kv_heads)
        put("ffn_size", self._per_layer("ffn_size", _if_none(self.ffn_size, 4 * self.hidden_size), self.num_layers))
        # Sizes of the decoder, by default those of the encoder.
        if self.num_decoder_layers:
            for name, default in (
                ("decoder_num_heads", heads),
                ("cross_num_heads", heads),
                ("decoder_ffn_size", self.ffn_size),
            ):
                value = _if_none(getattr(self, name), default[0] if len(set(default)) == 1 else default)
                put(name, self._per_layer(name, value, self.num_decoder_layers))
        # What depends on the sizes.
        self._check_map("layer_map", self.num_layers, "num_heads", "num_kv_heads", "ffn_size")
        self._check_map(
            "decoder_layer_map", self.num_decoder_layers, "decoder_num_heads", "cross_num_heads", "decoder_ffn_size"
        )
        self._check_positions()

    def _check_labels(self) -> None:
        """Class names must differ, and a regression has none."""
        counts = Counter(self.labels)
        if len(counts) < len(self.labels):
            name, count = counts.most_common(1)[0]
            raise ValueError(f"labels: {count} classes have the name {name!r}, each needs its own")
        if self.regression and self.labels:
            raise ValueError(f"regression predicts one number, but there are labels: {reprlib.repr(self.labels)}")

    def _check_positions(self) -> None:
        """Rotary positions need an even width; relative ones enough buckets, and a column of the table per head."""
        if self.rotary is not None and self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"rotary positions rotate pairs of numbers, so head_dim must be even, not {self.head_dim}")
        buckets, distance = self.relative_buckets, self.relative_max_distance
        if buckets and (buckets < 4 or distance <= buckets // 2):
            raise ValueError(
                f"relative_buckets {buckets} must be 0 or at least 4, and relative_max_distance {distance} above half "
                "of it"
            )
        for name, heads in (
            ("position_heads", self.num_heads),
            ("decoder_position_heads", self.decoder_num_heads),
        ):
            columns = getattr(self, name)
            if columns is not None and tuple(map(len, columns)) != heads:
                raise ValueError(f"{name} needs a column for each head of each layer, {heads}")

    def _check_map(self, name: str, layers: int, *sizes: str) -> None:
        """Checks a map of shared layers; one without sharing becomes `None`."""
        layer_map = getattr(self, name)
        if layer_map is None:
            return
        if len(layer_map) != layers or list(dict.fromkeys(layer_map)) != list(range(len(set(layer_map)))):
            raise ValueError(
                f"{name} {layer_map} must name a stored layer for each of {layers} layers, numbered from 0 in the "
                "order of their first use"
            )
        for i, stored in enumerate(layer_map):
            first = layer_map.index(stored)
            for field in sizes:
                size, first_size = getattr(self, field)[i], getattr(self, field)[first]
                if size != first_size:
                    raise ValueError(
                        f"{name}: layers {first} and {i} share their parameters, but {field} is {first_size} and {size}"
                    )
        if layer_map == tuple(range(layers)):
            object.__setattr__(self, name, None)

    def stored_layers(self, decoder: bool = False) -> tuple[int, ...]:
        """For every stored layer, the first layer of the stack that uses it.

        >>> ModelConfig("gpt2", num_layers=4, layer_map=(0, 0, 1, 0)).stored_layers()
        (0, 2)
        """
        owners = self.owners(decoder)
        return tuple(owners.index(n) for n in sorted(set(owners)))

    def owners(self, decoder: bool = False) -> tuple[int, ...]:
        """For every layer of the stack, the number of the stored layer that it uses."""
        if decoder:
            return self.decoder_layer_map or tuple(range(self.num_decoder_layers))
        return self.layer_map or tuple(range(self.num_layers))

    @staticmethod
    def _per_layer(name: str, value: Sizes, layers: int) -> tuple[int, ...]:
        if isinstance(value, int):
            return (value,) * layers
        if len(value) != layers:
            raise ValueError(f"{name} lists {len(value)} sizes for {layers} layers; give one, or one per layer")
        return tuple(value)

    @property
    def num_labels(self) -> int:
        """Outputs of a sequence or token head."""
        return 1 if self.regression else len(self.labels)

    @property
    def encoder_decoder(self) -> bool:
        return self.num_decoder_layers > 0

    def layers(self) -> tuple[Layer, ...]:
        """Structure of the stack (of the encoder, for an encoder-decoder)."""
        return tuple(
            self._layer(
                kv_heads=kv,
                q_per_kv=h // kv if kv else 1,
                ffn=f,
                causal=self.causal and not self.encoder_decoder,
                window=self.window if i >= self.window_from else None,
                position_heads=self.position_heads[i] if self.position_heads else None,
            )
            for i, (h, kv, f) in enumerate(zip(self.num_heads, self.num_kv_heads, self.ffn_size, strict=True))
        )

    def decoder_layers(self) -> tuple[Layer, ...]:
        """Structure of the decoder of an encoder-decoder."""
        sizes = zip(self.decoder_num_heads, self.cross_num_heads, self.decoder_ffn_size, strict=True)
        return tuple(
            self._layer(
                kv_heads=h,
                q_per_kv=1,
                ffn=f,
                cross_heads=c,
                causal=True,
                position_heads=self.decoder_position_heads[i] if self.decoder_position_heads else None,
            )
            for i, (h, c, f) in enumerate(sizes)
        )

    def _layer(self, **sizes: Any) -> Layer:
        """A layer of these sizes; its other fields are those of the config that have the same name."""
        shared = {f.name for f in dataclasses.fields(Layer)} & {f.name for f in dataclasses.fields(self)} - sizes.keys()
        return Layer(hidden=self.hidden_size, **{name: getattr(self, name) for name in shared}, **sizes)

    def to_json(self) -> dict[str, Any]:
        """Plain values; sizes that are equal in all layers as one number."""
        values = dataclasses.asdict(self)
        for name in (
            "num_heads",
            "num_kv_heads",
            "ffn_size",
            "decoder_num_heads",
            "cross_num_heads",
            "decoder_ffn_size",
        ):
            sizes = values[name]
            if sizes and len(set(sizes)) == 1:
                values[name] = sizes[0]
        return values

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


SIZES = int | tuple[int, ...]
KINDS = {name: SIZES | None if hint is Any else hint for name, hint in typing.get_type_hints(ModelConfig).items()}
KINDS["num_heads"] = SIZES
"""Type of every field."""


def check_field(name: str, value: Any, what: str) -> Any:
    """A value of the field `name`, of its type and within its bounds, lists as tuples.

    >>> check_field("num_layers", 12, "num_hidden_layers")
    12

    Args:
      what: what an error message calls the value: its key in the file it comes from.

    Raises:
      ValueError: `num_hidden_layers: expected a whole number, found 'x'`.
    """
    value = checked(value, KINDS[name], what)
    if name in RATES and not 0 <= value < 1:
        raise ValueError(f"{what} {value} must be in [0, 1)")
    low, high = LIMITS.get(name, (0, MAX_SIZE))
    for number in _numbers(value):
        if not low <= number <= high:
            raise ValueError(f"{what} {reprlib.repr(number)} must be from {low} to {high}")
    return value


def _numbers(value: Any) -> list[int | float]:
    """The numbers in a field, those of all layers."""
    if isinstance(value, tuple):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _if_none(value: Any, default: Any) -> Any:
    """`default` for `None`, and for no other value: 0 heads are a size."""
    return default if value is None else value
