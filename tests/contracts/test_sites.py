"""What every place for a Site promises, and the rows that Weights and Sites read, with a small occupant of each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import (
    Context,
    Gate,
    Loss,
    Method,
    Tap,
    Term,
    arrays,
    describe,
    flatten,
    map_leaves,
    nodes,
    unflatten,
)
from jaxlm.generate.decoding import generate
from jaxlm.io.checkpoint import Checkpoints
from jaxlm.io.lm import LM
from jaxlm.models import model_config
from jaxlm.models.transformer import empty_cache, forward
from jaxlm.nn.layer import Rotary
from jaxlm.nn.stack import canonical_view
from jaxlm.parallel import make_mesh, make_rules, place, shard_tree, shardings
from jaxlm.parallel.batches import to_devices
from jaxlm.train.gradient import accumulate, gradient
from jaxlm.train.optimizer import optimizer
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import create_state, dropout_key, make_step
from tests.contracts import small_sites
from tests.contracts.small_models import noisy, quick
from tests.contracts.small_sites import RowLowRank, Vectors, row_columns_of, with_sites

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "ffn_size": 12}
MODELS = {
    "gpt2": {"max_positions": 16},
    "bert": {"max_positions": 16},
    "qwen2": {"num_kv_heads": 2, "rotary": Rotary(100.0), "window": 3, "window_from": 1},
    "t5": {"relative_buckets": 8, "relative_max_distance": 12},
}
GENERATING = ["gpt2", "qwen2", "t5"]
ROWS, LENGTH = 4, 8
every = pytest.mark.parametrize("family", MODELS)


@functools.cache
def model_of(family: str) -> LM:
    return noisy(model_config(family, **{**SIZES, **MODELS[family]}), scale=0.3)


@functools.cache
def with_occupants(family: str, strength: float = 0.5) -> LM:
    return with_sites(model_of(family), strength)


def batch_of(family: str, rows: int = ROWS) -> dict[str, jax.Array]:
    """Padded on the right, with the columns of the rows."""
    rng = np.random.default_rng(0)
    mask = (np.arange(LENGTH) < np.resize([LENGTH, 3, 6, 1], (rows, 1))).astype(np.int32)
    batch = {"input_ids": rng.integers(1, 24, (rows, LENGTH)), "attention_mask": mask}
    if family == "t5":
        batch["decoder_input_ids"] = rng.integers(1, 24, (rows, 5))
    return {name: jnp.asarray(a, jnp.int32) for name, a in batch.items()} | row_columns_of(rows, LENGTH, 16)


@functools.cache
def _forward(config):
    return quick(lambda params, batch: forward(config, params, batch, taps={Tap("attention", 1), Tap("scores", 0)}))


def outputs(lm: LM, params, batch):
    return jax.tree.map(np.asarray, _forward(lm.config)(params, batch))


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(x - y).max() <= tolerance * max(1.0, np.abs(y).max())


# Every place ---------------------------------------------------------------------------------------------------------


@every
def test_neutral_occupants_change_no_bit(family):
    """Sums with 0, prefixes of length 0."""
    lm, batch = model_of(family), batch_of(family)
    plain, neutral = outputs(lm, lm.params, batch), outputs(lm, with_occupants(family, 0.0).params, batch)
    assert equal(plain, neutral)


@pytest.mark.full("gpt2", "bert")
@every
def test_each_place_is_read_and_gets_gradients(family):
    lm, batch = with_occupants(family), batch_of(family)

    @quick
    def grads(params):
        return jax.grad(lambda p: jnp.sum(jnp.sin(forward(lm.config, p, batch, remat="full")["last_hidden"])))(params)

    plain, both = arrays(grads(lm.params)), arrays(canonical_view(grads(lm.network.run_view(lm.params))))
    added = plain.keys() - arrays(lm.network.abstract()).keys()
    assert {name.split("/")[-1].split(".")[0] for name in added} >= {
        *("after_embed", "kv_prefix", "attention_scores", "after_attention", "after_mlp", "kernel")
    }
    for name, grad in plain.items():
        assert name not in added or np.abs(grad).max() > 0, name
        assert np.abs(grad - both[name]).max() <= 2e-5 * max(1.0, np.abs(grad).max()), name


@every
def test_scanned_equals_unrolled(family):
    lm, batch = with_occupants(family), batch_of(family)
    view = lm.network.run_view(lm.params)
    assert any("layers_0-" in path for path in flatten(view))
    unrolled = outputs(lm, lm.params, batch)
    close(outputs(lm, view, batch), unrolled)
    assert np.abs(unrolled["last_hidden"] - outputs(lm, model_of(family).params, batch)["last_hidden"]).max() > 0.1


@every
def test_step_by_step_equals_the_forward_pass(family):
    """The walk over the layers carries the rows."""
    lm, batch = with_occupants(family), batch_of(family)

    @quick
    def walk(params, batch):
        finished = None
        for side in lm.network.sides():
            stream = lm.network.embed(params, batch, side, finished)
            for path in lm.network.layer_paths(side):
                layer_params = unflatten(
                    {p.removeprefix(f"{path}/"): v for p, v in flatten(params).items() if p.startswith(f"{path}/")}
                )
                stream = lm.network.block(lm.network.layer(path), layer_params, stream)
            finished = lm.network.finish(params, stream, side)
        return finished.x, lm.network.head(params, finished)

    x, head = walk(lm.params, batch)
    whole = outputs(lm, lm.params, batch)
    close((np.asarray(x), np.asarray(head["logits"])), (whole["last_hidden"], whole["logits"]))


@pytest.mark.parametrize("family", ["qwen2", "t5"])
def test_on_a_mesh(family):
    """Rows go to the devices with the batch; what is added is sharded as its components say."""
    lm, batch = with_occupants(family), batch_of(family, 8)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = make_rules({}, lm.axes, mesh)
    view = lm.network.run_view(lm.params)
    specs = shardings(view, lm.axes, mesh, rules, lm.network.sizes())
    named = {name.removesuffix("0-1/attention/kv_prefix.keys"): s.spec for name, s in specs.items()}
    stack = "encoder/layers_" if family == "t5" else "layers_"
    if stack in named:  # a window makes two segments of two layers
        assert named[stack] == jax.sharding.PartitionSpec(None, None, None, "tensor")
    _, spread = to_devices(mesh, rules)({name: np.asarray(a) for name, a in batch.items()})
    assert spread["rows/patches"].sharding.spec == spread["input_ids"].sharding.spec
    ctx = Context(place=place(mesh, rules))
    sharded = quick(lambda p, b: forward(lm.config, p, b, ctx=ctx))(shard_tree(view, specs), spread)
    whole = outputs(lm, lm.params, batch)
    for name in ("last_hidden", "logits"):
        close(np.asarray(sharded[name]), whole[name])


@every
def test_save_and_load(tmp_path, monkeypatch, family):
    for name, cls in small_sites.NODES.items():
        monkeypatch.setitem(nodes(), name, cls)
    lm, batch = with_occupants(family), batch_of(family)
    jaxlm.save(lm, tmp_path)
    again = jaxlm.load(tmp_path)
    assert jax.tree.structure(again.params) == jax.tree.structure(lm.params) and equal(again.params, lm.params)
    assert equal(outputs(again, again.params, batch), outputs(lm, lm.params, batch))
    info = describe(again.params, again.axes)
    first = again.network.layer_paths(again.network.sides()[0])[0]
    assert info[f"{first}/attention/kv_prefix.keys"].axes == (None, None, "kv_heads", "head_dim")
    assert info[f"{first}/after_mlp.down"].axes == ("embed", None)


@pytest.mark.full("t5")
@pytest.mark.parametrize("family", ["qwen2", "t5"])
def test_training_resumes_to_the_bit(tmp_path, family):
    """Two microbatches, which split the columns of the rows too; a step, a checkpoint, and the next one."""
    lm, batch = with_occupants(family), batch_of(family)
    view = lm.network.run_view(lm.params)
    infos = describe(view, lm.axes)
    names = frozenset(name for name, info in infos.items() if info.role == "factor")

    def fn(params, constants, batch, ctx):
        x = forward(lm.config, params, batch, ctx=ctx)["last_hidden"]
        return {"sines": Term(jnp.sum(jnp.sin(x)), jnp.float32(len(x)))}, {}

    loss = Loss(fn)
    tx = optimizer(TrainSettings(steps=4, learning_rate=0.01), 4, {name: infos[name] for name in names})
    grad = accumulate(gradient(loss, names), loss, 2)
    step = quick(make_step(grad, tx, Method(), names, ctx=Context(), largest_norm=1.0))
    first, _ = step(create_state(dropout_key(0), view, {}, tx, names), {}, batch)
    flat, structure = jax.tree.flatten(first)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {str(i): leaf for i, leaf in enumerate(flat)}, {})
    _, restored, _ = checkpoints.restore(
        {str(i): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for i, leaf in enumerate(flat)}
    )
    checkpoints.close()
    resumed = jax.tree.unflatten(structure, [restored[str(i)] for i in range(len(flat))])
    on, again = step(first, {}, batch)[0], step(resumed, {}, batch)[0]
    before, after = arrays(first.params), arrays(on.params)
    assert all(np.array_equal(before[n], after[n]) != (n in names) for n in before)
    assert equal(arrays(again.params), after)


# What they compute ---------------------------------------------------------------------------------------------------


def only(lm: LM, plain: LM, *names: str):
    """The parameters with those occupants alone whose path ends in one of `names`."""
    flat = flatten(plain.params)
    return unflatten(flat | {p: v for p, v in flatten(lm.params).items() if p.endswith(names)})


@every
def test_an_adapter_a_row_is_that_adapter_alone(family):
    lm, plain, batch = with_occupants(family), model_of(family), batch_of(family)
    mixed = outputs(lm, only(lm, plain, "query/kernel"), batch)["last_hidden"]
    for adapter in range(small_sites.ADAPTERS):

        def merged(path, leaf, adapter=adapter):
            return leaf.base + leaf.a[adapter] @ leaf.b[adapter] if isinstance(leaf, RowLowRank) else leaf

        alone = outputs(lm, map_leaves(merged, only(lm, plain, "query/kernel")), batch)["last_hidden"]
        rows = np.asarray(batch["rows/adapter"]) == adapter
        close(mixed[rows], alone[rows])


@every
def test_a_vector_on_every_token_is_another_table(family):
    lm, plain, batch = with_occupants(family), model_of(family), batch_of(family)
    flat = flatten(only(lm, plain, "after_embed"))
    sites = {p: Vectors(v.vectors, jnp.zeros(())) for p, v in flat.items() if p.endswith("after_embed")}
    shared = next(iter(sites.values()))  # both stacks of an encoder-decoder have one table
    mixed = outputs(lm, unflatten(flat | dict.fromkeys(sites, shared)), batch)["last_hidden"]
    table = flatten(plain.params)["embed/tokens/embedding"]
    for adapter in range(small_sites.ADAPTERS):
        other = flatten(plain.params) | {"embed/tokens/embedding": table + shared.vectors[adapter]}
        rows = np.asarray(batch["rows/adapter"]) == adapter
        close(mixed[rows], outputs(lm, unflatten(other), batch)["last_hidden"][rows])


def test_a_parallel_adapter_is_a_wider_mlp():
    """T5's units are relu without bias: those of the adapter are further ones."""
    lm, plain, batch = with_occupants("t5"), model_of("t5"), batch_of("t5")
    adapted = outputs(lm, only(lm, plain, "after_mlp"), batch)
    wide = flatten(plain.params)
    for path, site in flatten(lm.params).items():
        if path.endswith("after_mlp"):
            mlp = f"{path.removesuffix('after_mlp')}mlp"
            wide[f"{mlp}/up/kernel"] = jnp.concatenate([wide[f"{mlp}/up/kernel"], site.down], axis=1)
            wide[f"{mlp}/down/kernel"] = jnp.concatenate([wide[f"{mlp}/down/kernel"], site.up], axis=0)
    wider = lm.replace(config=lm.config.replace(ffn_size=14, decoder_ffn_size=None))
    close(adapted, outputs(wider, unflatten(wide), batch))


def test_an_adapter_in_series_reads_what_the_attention_gives():
    """With an identity in its place and a gate of 2, the sublayer's update is doubled: so is the output projection."""
    plain, batch = model_of("gpt2"), batch_of("gpt2")
    flat = flatten(plain.params)
    gates = {f"layers_{i}/after_{m}": Gate(jnp.full(16, 2.0)) for i in range(2) for m in ("attention", "mlp")}
    doubled = {p: 2 * v for p, v in flat.items() if "attention/output/" in p or "mlp/down/" in p}
    close(outputs(plain, unflatten(flat | gates), batch), outputs(plain, unflatten(flat | doubled), batch))


def test_random_draws_of_two_places_differ():
    """Each place has a key of its own."""
    keys = []

    class Draws(Gate):
        def __call__(self, x, ctx, *inputs):
            keys.append(tuple(np.asarray(jax.random.key_data(ctx.key)).tolist()))
            return x

    lm = model_of("gpt2")
    places = ("after_embed", *(f"layers_{i}/after_{m}" for i in range(2) for m in ("attention", "mlp")))
    flat = flatten(lm.params) | {path: Draws(jnp.ones(())) for path in places}
    forward(lm.config, unflatten(flat), batch_of("gpt2"), ctx=Context(key=jax.random.key(0)))
    assert len(set(keys)) == len(keys) == 5


# Decoding ------------------------------------------------------------------------------------------------------------


@functools.cache
def _step(config):
    return quick(lambda params, batch, cache: forward(config, params, batch, cache=cache))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", GENERATING)
def test_every_step_of_decoding_equals_the_full_forward(family, padding):
    """Prompts of 5, 2 and 1 tokens padded to 5, then three tokens one by one."""
    lm, rows, prompt, length = with_occupants(family), 3, 5, 8
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(1, 24, (rows, length)), jnp.int32)
    mask = np.arange(prompt) >= prompt - np.array([[5], [2], [1]])
    mask = mask[:, ::-1] if padding == "right" else mask
    mask = np.concatenate([mask, np.ones((rows, 3), bool)], axis=1).astype(np.int32)
    columns = row_columns_of(rows, length, 16)
    if family == "t5":
        source = {"input_ids": ids[:, :prompt], "attention_mask": jnp.asarray(mask[:, :prompt])}
        name, mask, pieces, extra = "decoder_input_ids", np.ones_like(mask), (1,) * length, source
        full = extra | {name: ids}
    else:
        name, pieces, extra = "input_ids", (prompt, 1, 1, 1), {}
        full = {name: ids, "attention_mask": mask, "positions": np.maximum(np.cumsum(mask, 1) - 1, 0)}
    expected = outputs(lm, lm.params, {n: jnp.asarray(a) for n, a in full.items()} | columns)["logits"]
    params = lm.network.run_view(lm.params)
    cache, start = empty_cache(lm.config, params, rows, length, source=prompt), 0
    for piece in pieces:
        batch = extra | {name: ids[:, start : start + piece]} | columns
        if family != "t5":
            batch["attention_mask"] = jnp.asarray(mask[:, start : start + piece])
        out = _step(lm.config)(params, batch, cache)
        real = mask[:, start : start + piece] > 0
        close(np.asarray(out["logits"])[real], expected[:, start : start + piece][real])
        cache, extra, start = out["cache"], {}, start + piece


@pytest.mark.parametrize("family", GENERATING)
def test_generation_passes_the_rows_on(family):
    """Rows together are what each is alone, with its columns; other columns give other texts."""
    lm, batch = with_occupants(family), batch_of(family)
    batch.pop("decoder_input_ids", None)
    write = quick(lambda batch: generate(lm.config, lm.params, batch, jax.random.key(0), new_tokens=4))
    together = np.asarray(write(batch))
    for i in range(ROWS):
        assert np.array_equal(np.asarray(write({name: a[i : i + 1] for name, a in batch.items()}))[0], together[i])
    others = write(batch | {"rows/adapter": (batch["rows/adapter"] + 1) % small_sites.ADAPTERS})
    assert not np.array_equal(others, together)
    assert np.array_equal(lm.generate(batch, new_tokens=4, stop=()), together)


@pytest.mark.parametrize("family", GENERATING)
def test_rows_in_one_cache_begin_where_they_like(family):
    """Two rows that have read 4 and 2 tokens take the next steps together, as each does alone."""
    lm = with_occupants(family)
    ids = jnp.asarray(np.random.default_rng(2).integers(1, 24, (2, 7)), jnp.int32)
    name = "decoder_input_ids" if family == "t5" else "input_ids"
    columns = row_columns_of(2, 7, 16)
    alone = []
    for i, read in enumerate((4, 2)):
        row = {n: a[i : i + 1] for n, a in columns.items()}
        cache = empty_cache(lm.config, lm.params, 1, 7, source=3)
        source = {"input_ids": ids[i : i + 1, :3]} if family == "t5" else {}
        cache = _step(lm.config)(lm.params, source | {name: ids[i : i + 1, :read]} | row, cache)["cache"]
        alone.append((row, cache, read))
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(cache for _, cache, _ in alone))
    assert both["length"].tolist() == [4, 2]
    for step in range(3):
        token = jnp.stack([ids[i, read + step] for i, (*_, read) in enumerate(alone)])[:, None]
        out = _step(lm.config)(lm.params, {name: token} | columns, both)
        both = out["cache"]
        for i, (row, cache, read) in enumerate(alone):
            single = _step(lm.config)(lm.params, {name: token[i : i + 1]} | row, cache)
            close(np.asarray(out["logits"])[i], np.asarray(single["logits"])[0])
            alone[i] = (row, single["cache"], read)
