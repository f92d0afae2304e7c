"""One small occupant of every place that a Weight or a Site may take, and of the columns `rows/…` that they read."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from jaxlm.core import LM, Axes, Component, Context, Prefix, Site, Tokens, Weight, flatten, matmul, unflatten

ADAPTERS, PATCHES, RANK, PREFIX = 3, 4, 2, 2
HEADS = ("kv_heads", "head_dim")


class RowLowRank(Weight):
    """`W + a_i b_i` for the rows of adapter i: LoRA, with an adapter a row."""

    base: jax.Array  # [in, out]
    a: jax.Array  # [adapters, in, rank]
    b: jax.Array  # [adapters, rank, out]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def materialize(self) -> jax.Array:
        return self.base

    def dot(self, x: jax.Array, ctx: Context, dtype: DTypeLike | None = None):
        a, b = (factor[ctx.rows["adapter"]].astype(x.dtype) for factor in (self.a, self.b))
        return matmul(x, self.base, dtype) + jnp.einsum("nli,nir,nro->nlo", x, a, b)

    def components(self, axes: Axes) -> dict[str, Component]:
        return {
            "base": Component(axes, "base"),
            "a": Component((None, axes[0], None), "factor"),
            "b": Component((None, None, axes[1]), "factor"),
        }


class Vectors(Site):
    """At `after_embed`: a vector of the row's adapter on every token, and of a token's patch on those that have one."""

    vectors: jax.Array  # [adapters, hidden]
    scale: jax.Array

    def __call__(self, x: jax.Array, ctx: Context, tokens: Tokens):
        patches = ctx.rows["patches"]
        order = jnp.broadcast_to(tokens.order, tokens.segments.shape)[..., None]
        patch = jnp.take_along_axis(patches, order, axis=1, mode="fill", fill_value=0)
        return x + self.vectors[ctx.rows["adapter"]][:, None] + self.scale * patch

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"vectors": Component((None, *axes), "factor"), "scale": Component((), "factor")}


class RowPrefix(Site):
    """At `kv_prefix`: keys and values of the row's adapter."""

    keys: jax.Array  # [adapters, length, kv_heads, head_dim]
    values: jax.Array  # [adapters, length, kv_heads, head_dim]

    def __call__(self, ctx: Context) -> Prefix:
        adapter = ctx.rows["adapter"]
        return Prefix(self.keys[adapter], self.values[adapter])

    def components(self, axes: Axes) -> dict[str, Component]:
        return {name: Component((None, None, *axes), "factor") for name in ("keys", "values")}


class Distances(Site):
    """At `attention_scores`: `-slope · |distance|` a head, and `strength` where the row's `visible` is 0."""

    slopes: jax.Array  # [heads]
    strength: jax.Array

    def __call__(self, queries: Tokens, keys: Tokens, ctx: Context) -> jax.Array:
        distance = jnp.abs(queries.positions[:, :, None] - keys.positions[:, None, :])
        order_q, order_k = (jnp.broadcast_to(t.order, t.segments.shape) for t in (queries, keys))
        rows = jnp.arange(len(order_q))[:, None, None]
        visible = ctx.rows["visible"].at[rows, order_q[:, :, None], order_k[:, None, :]].get(mode="fill", fill_value=1)
        hidden = self.strength * (1 - visible)
        return hidden[:, None] - self.slopes[:, None, None] * distance[:, None]

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"slopes": Component(axes, "factor"), "strength": Component((), "factor")}


class Bottleneck(Site):
    """After a sublayer: `y + relu(h d) u`, where h is `y`, or what the sublayer read."""

    down: jax.Array  # [hidden, rank]
    up: jax.Array  # [rank, hidden]
    parallel: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, y: jax.Array, ctx: Context, x: jax.Array):
        return y + jax.nn.relu((x if self.parallel else y) @ self.down) @ self.up

    def components(self, axes: Axes) -> dict[str, Component]:
        return {"down": Component((*axes, None), "factor"), "up": Component((None, *axes), "factor")}


OCCUPANTS = (RowLowRank, Vectors, RowPrefix, Distances, Bottleneck)
NODES = {cls.__name__: f"tests.contracts.small_sites:{cls.__name__}" for cls in OCCUPANTS}


def with_sites(lm: LM, strength: float) -> LM:
    """The model with an occupant at every place; at strength 0 they are neutral, and prefixes are empty."""
    flat, axes, config, number = flatten(lm.params), dict(lm.axes), lm.config, iter(range(1000))

    def normal(*shape: int) -> jax.Array:
        return strength * jax.random.normal(jax.random.key(next(number)), shape)

    def sit(path: str, node: Site | Weight, names: Axes) -> None:
        flat[path], axes[path] = node, axes.get(path, names)

    width, prefix = config.hidden_size, PREFIX if strength else 0
    for side in lm.network.sides():
        sit(f"{side}after_embed", Vectors(normal(ADAPTERS, width), jnp.float32(strength)), ("embed",))
        for path in lm.network.layer_paths(side):
            layer = lm.network.layer(path)
            kernel = flat[f"{path}/attention/query/kernel"]
            a, b = normal(ADAPTERS, kernel.shape[0], RANK), normal(ADAPTERS, RANK, kernel.shape[1])
            sit(f"{path}/attention/query/kernel", RowLowRank(kernel, a, b), ())
            crosses = ["cross_attention"] if layer.cross_heads else []
            for module in ["attention", *crosses]:
                heads = layer.cross_heads if module in crosses else layer.kv_heads
                shape = (ADAPTERS, prefix, heads, layer.head_dim)
                sit(f"{path}/{module}/kv_prefix", RowPrefix(normal(*shape), normal(*shape)), HEADS)
                queries = heads if module in crosses else layer.heads
                scores = Distances(jnp.abs(normal(queries)), jnp.float32(-9.0 * strength))
                sit(f"{path}/{module}/attention_scores", scores, ("heads",))
            for module in ["attention", *crosses, "mlp"]:
                bottleneck = Bottleneck(normal(width, RANK), normal(RANK, width), parallel=module == "mlp")
                sit(f"{path}/after_{module}", bottleneck, ("embed",))
    return lm.replace(params=unflatten(flat), axes=axes)


def row_columns_of(rows: int, length: int, width: int) -> dict[str, jax.Array]:
    """Columns for a batch: adapters, patches of the first tokens, and which tokens of the row see each other."""
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "rows/adapter": jnp.arange(rows) % ADAPTERS,
        "rows/patches": jax.random.normal(keys[0], (rows, PATCHES, width)),
        "rows/visible": jax.random.bernoulli(keys[1], 0.7, (rows, length, length)).astype(jnp.float32),
    }
