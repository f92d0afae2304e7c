"""What every family promises: both views agree, padding, packing and caching change no token's logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Gate, Tap, arrays, flatten
from jaxlm.generate.decoding import generate, sample
from jaxlm.models import FAMILIES, model_config
from jaxlm.models.transformer import LanguageModel, empty_cache, forward
from jaxlm.nn.layer import Rotary
from jaxlm.nn.stack import canonical_view
from tests.contracts.small_models import noisy, quick

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 23, "hidden_size": 16, "num_layers": 3, "num_heads": 4, "ffn_size": 12}
MODELS = {
    "gpt2": {"max_positions": 16},
    "bert": {"max_positions": 16},
    "roberta": {"max_positions": 16},
    "llama": {"num_kv_heads": 2, "rotary": Rotary(100.0, "llama3", 4.0, 1.0, 4.0, 8)},
    "mistral": {"num_kv_heads": 1, "window": 3},
    "qwen2": {"num_kv_heads": 2, "window": 3, "window_from": 1},
    "t5": {"num_layers": 2, "relative_buckets": 8, "relative_max_distance": 12},
}
GENERATING = ["gpt2", "llama", "mistral", "qwen2", "t5"]
every = pytest.mark.parametrize("family", MODELS)


def test_every_family_is_here():
    assert MODELS.keys() == FAMILIES.keys(), "a new family needs one line in MODELS"


@functools.cache
def network_of(family, **fields):
    """A network, and parameters of which biases and norms are random too."""
    lm = noisy(model_config(family, **{**SIZES, **MODELS[family]}, **fields), scale=0.3)
    return lm.network, lm.params


def ids(seed, *shape):
    return np.random.default_rng(seed).integers(3, 23, shape)


@functools.cache
def _outputs(config, taps):
    return quick(lambda params, batch, key: forward(config, params, batch, taps=taps, ctx=Context(key=key)))


def outputs(network, params, batch, key=None, taps=frozenset()):
    return jax.tree.map(np.asarray, _outputs(network.config, taps)(params, batch, key))


def logits(network, params, batch):
    return outputs(network, params, batch)["logits"]


def close(a, b, tolerance=1e-5):
    assert np.abs(b).max() > 0.2 and np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


# The two views -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "threefry2x32"), ("qwen2", "rbg"), ("t5", "threefry2x32")])
def test_scanned_equals_unrolled_with_the_same_dropout(family, kind):
    network, params = network_of(family, dropout=0.2, attention_dropout=0.3)
    batch = {"input_ids": ids(0, 2, 6)} | ({"decoder_input_ids": ids(1, 2, 5)} if family == "t5" else {})
    key = jax.random.key(1, impl=kind)
    scanned, unrolled = (outputs(network, p, batch, key)["logits"] for p in (network.run_view(params), params))
    close(scanned, unrolled)
    assert np.abs(scanned - logits(network, params, batch)).max() > 0.05, "nothing was dropped"


@functools.cache
def gradients(view, remat):
    network, params = network_of("qwen2", dropout=0.2)
    batch = {"input_ids": ids(0, 2, 6)}

    @quick
    def grads(params):
        fn = lambda p: forward(network.config, p, batch, ctx=Context(key=jax.random.key(1)), remat=remat)["logits"]  # noqa: E731
        return jax.grad(lambda p: jnp.sum(jnp.sin(fn(p))))(params)

    result = canonical_view(grads(network.run_view(params) if view == "run" else params))
    return {name: np.asarray(a) for name, a in arrays(result).items()}


@pytest.mark.parametrize(("view", "remat"), [("run", "none"), ("run", "full"), ("run", "dots")])
def test_gradients_of_views_and_remat_policies(view, remat):
    expected, actual = gradients("canonical", "none"), gradients(view, remat)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert np.abs(value).max() > 0 and np.abs(actual[name] - value).max() <= 1e-5 * max(1, np.abs(value).max()), (
            name
        )


def test_unknown_remat_policy():
    network, params = network_of("gpt2")
    with pytest.raises(ValueError, match="unknown remat policy 'dot'; did you mean 'dots'"):
        network.forward(params, {"input_ids": ids(0, 1, 3)}, remat="dot")


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_taps_are_the_same_in_both_views(family):
    network, params = network_of(family)
    batch = {"input_ids": ids(0, 2, 6)} | ({"decoder_input_ids": ids(1, 2, 5)} if family == "t5" else {})
    sides = ("", "encoder_") if family == "t5" else ("",)
    layers = network.config.num_layers
    wanted = frozenset(Tap(f"{side}hidden", i) for side in sides for i in range(layers + 1))
    sites = ("attention", "scores", "query", "key", "value")
    wanted |= {Tap(f"{side}{site}", i) for side in sides for site in sites for i in range(layers)}
    one, many = (outputs(network, p, batch, taps=wanted)["taps"] for p in (params, network.run_view(params)))
    assert one.keys() == many.keys() == wanted
    for tap in wanted:
        close(many[tap], one[tap])
        if tap.site.endswith("attention"):
            assert np.allclose(one[tap].sum(-1), 1, atol=1e-5) and one[tap].shape[1] == 4
            scores = one[tap._replace(site=tap.site.replace("attention", "scores"))]
            assert np.allclose(jax.nn.softmax(scores), one[tap], atol=1e-6)
    few = frozenset({Tap("hidden", 1), Tap("attention", layers - 1)})
    for view in (network.run_view(params, breaks={1}), network.run_view(params)):
        tapped = outputs(network, view, batch, taps=few)["taps"]
        assert tapped.keys() == few and all(np.allclose(tapped[tap], one[tap], atol=1e-5) for tap in few)
    assert not np.allclose(one[Tap("hidden", 0)], one[Tap("hidden", 1)])
    assert not np.allclose(one[Tap("attention", 0)], one[Tap("attention", 1)])


# Layer by layer ------------------------------------------------------------------------------------------------------


@every
def test_the_walk_through_the_layers_is_the_forward_pass(family):
    network, params = network_of(family)
    mask = (np.arange(8) < np.array([[8], [5]])).astype(np.int32)
    batch = {"input_ids": np.where(mask, ids(0, 2, 8), network.config.pad_token_id or 0), "attention_mask": mask}
    if family == "t5":
        batch |= {"decoder_input_ids": ids(1, 2, 5), "decoder_attention_mask": np.array([[1] * 5, [1] * 3 + [0] * 2])}

    @quick
    def walk(params):
        finished = None
        for side in network.sides():
            stream = network.embed(params, batch, side, finished)
            for path in network.layer_paths(side):
                stack = params[side.removesuffix("/")] if side else params
                stream = network.block(network.layer(path), stack[path.rpartition("/")[2]], stream)
            finished = network.finish(params, stream, side)
        return network.head(params, finished)["logits"], network.valid(finished, "attention/query")

    if family == "llama":  # with a gate of the residual stream, which every part of the network reads
        params = params | {"hidden": Gate(jnp.linspace(0.5, 1.0, 16))}
    walked, valid = walk(params)
    close(np.asarray(walked), logits(network, params, batch), 1e-6)
    assert np.array_equal(valid, batch.get("decoder_attention_mask", mask) > 0)


# Padding and packing -------------------------------------------------------------------------------------------------


@every
def test_padding_changes_no_token(family):
    network, params = network_of(family)
    rng = np.random.default_rng(3)
    mask = (np.arange(8) < np.array([[8], [5], [1]])).astype(np.int32)
    rows = np.where(mask, ids(0, 3, 8), network.config.pad_token_id or 0)
    batch = {"input_ids": rows, "attention_mask": mask}
    # RoBERTa counts positions over what is not padding, so its padding cannot be anything else.
    other = rows if family == "roberta" else np.where(mask, rows, rng.integers(3, 23, rows.shape))
    garbage = {"input_ids": other, "attention_mask": mask}
    if family == "t5":
        batch |= {"decoder_input_ids": ids(1, 3, 5)}
        garbage |= {"decoder_input_ids": ids(1, 3, 5)}
        kept = np.ones((3, 5), bool)
    else:
        kept = mask > 0
    full = logits(network, params, batch)
    close(logits(network, params, garbage)[kept], full[kept])
    short = {n: a[1:2] if n.startswith("decoder") else a[1:2, :5] for n, a in batch.items()}
    alone = logits(network, params, short)
    close(full[1][kept[1]], alone[0][: kept[1].sum()])


@every
def test_packing_changes_no_token(family):
    """Two documents and padding in one row; T5's sides are packed alike."""
    network, params = network_of(family)
    lengths = (3, 4)
    first, second = ids(0, 1, 3), ids(1, 1, 4)
    packed = {
        "input_ids": np.concatenate([first, second, [[1]]], axis=1),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2, 0]]),
        "positions": np.array([[0, 1, 2, 0, 1, 2, 3, 0]]),
    }
    if family == "t5":
        packed |= {
            "decoder_input_ids": ids(2, 1, 5),
            "decoder_segment_ids": np.array([[1, 1, 2, 2, 2]]),
            "decoder_positions": np.array([[0, 1, 0, 1, 2]]),
        }
        lengths = (2, 3)
    together, start = logits(network, params, packed)[0], 0
    for row, length in zip((first, second), lengths, strict=True):
        alone = {"input_ids": row}
        if family == "t5":
            alone["decoder_input_ids"] = packed["decoder_input_ids"][:, start : start + length]
        close(together[start : start + length], logits(network, params, alone)[0])
        start += length


def test_a_window_is_the_brute_force_mask():
    """Token i sees i-2..i: logits depend on exactly the tokens that three windows in a row can reach."""
    network, params = network_of("mistral")
    row = ids(0, 1, 12)
    base = logits(network, params, {"input_ids": row})[0]
    for j in (0, 4):
        changed = row.copy()
        changed[0, j] = 3 + (row[0, j] - 2) % 20
        moved = np.abs(logits(network, params, {"input_ids": changed})[0] - base).max(-1) > 1e-6
        assert np.flatnonzero(moved).tolist() == list(range(j, min(j + 3 * 2 + 1, 12)))


# Decoding ------------------------------------------------------------------------------------------------------------


@functools.cache
def _generate(config, new, stop=None):
    return quick(lambda params, batch: generate(config, params, batch, jax.random.key(0), new_tokens=new, stop=stop))


@pytest.mark.parametrize(("family", "view"), [("gpt2", "canonical"), *((family, "run") for family in GENERATING)])
def test_cached_decoding_equals_the_full_forward(family, view):
    """Greedy, prompts padded on the left; every choice is that of the full forward pass over the unpadded row."""
    network, params = network_of(family)
    held = network.run_view(params) if view == "run" else params
    lengths, new = (6, 2, 4), 5
    mask = (np.arange(6) >= 6 - np.array(lengths)[:, None]).astype(np.int32)
    if family == "t5":
        mask = mask[:, ::-1].copy()
    prompt = np.where(mask, ids(5, 3, 6), 0)
    batch = {"input_ids": jnp.asarray(prompt), "attention_mask": jnp.asarray(mask)}
    tokens = np.asarray(_generate(network.config, new)(held, batch))
    assert tokens.shape == (3, new) and len(set(tokens.ravel().tolist())) > 2
    if family == "t5":
        full = {**batch, "decoder_input_ids": np.concatenate([np.zeros((3, 1), int), tokens[:, :-1]], axis=1)}
        assert np.array_equal(logits(network, params, full).argmax(-1), tokens)
        return
    rows = np.zeros((3, 6 + new), int)
    for i, length in enumerate(lengths):
        rows[i, : length + new] = np.concatenate([prompt[i, 6 - length :], tokens[i]])
    chosen = logits(network, params, {"input_ids": rows}).argmax(-1)
    for i, length in enumerate(lengths):
        assert np.array_equal(chosen[i, length - 1 : length + new - 1], tokens[i])


@pytest.mark.parametrize("family", ["gpt2", "mistral", "t5"])
def test_cached_logits_piece_by_piece(family):
    network, params = network_of(family)
    row = ids(7, 2, 6)
    name, extra = ("decoder_input_ids", {"input_ids": ids(8, 2, 4)}) if family == "t5" else ("input_ids", {})
    full = logits(network, params, {**extra, name: row})
    cache = empty_cache(network.config, params, 2, 6, source=4)
    step = quick(lambda params, batch, cache: forward(network.config, params, batch, cache=cache))
    start = 0
    for length in (3, 1, 1, 1):
        out = step(params, {**extra, name: row[:, start : start + length]}, cache)
        close(np.asarray(out["logits"]), full[:, start : start + length])
        cache, extra, start = out["cache"], {}, start + length
    assert cache["length"].tolist() == [6, 6]


def test_after_stop_a_row_repeats_it():
    network, params = network_of("gpt2")
    batch = {"input_ids": jnp.asarray(ids(5, 3, 6))}
    free = np.asarray(_generate(network.config, 6)(params, batch))
    stop = int(free[0, 2])
    held = np.asarray(_generate(network.config, 6, stop)(params, batch))
    for before, after in zip(free, held, strict=True):
        at = np.flatnonzero(before == stop)
        end = at[0] if len(at) else 6
        assert np.array_equal(after[:end], before[:end]) and (after[end:] == stop).all()
    assert (held[0, 3:] == stop).all()


def draws(**options):
    values = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.06, 0.04]))
    tokens = sample(jax.random.key(0), jnp.broadcast_to(values, (4000, 5)), **options)
    return np.bincount(np.asarray(tokens), minlength=5) / 4000


def test_sampling_keeps_what_it_should():
    assert draws(temperature=0.0).tolist() == [1, 0, 0, 0, 0]
    assert np.allclose(draws(), [0.4, 0.3, 0.2, 0.06, 0.04], atol=0.03)
    assert np.allclose(draws(temperature=0.5), np.square([0.4, 0.3, 0.2, 0.06, 0.04]) / 0.2952, atol=0.03)
    assert np.allclose(draws(top_k=2), [4 / 7, 3 / 7, 0, 0, 0], atol=0.03)
    assert np.allclose(draws(top_k=99), draws(), atol=0)
    # the smallest set that reaches p: 0.4 + 0.3 reaches 0.65 and 0.7 just about; 0.75 needs the third
    assert np.allclose(draws(top_p=0.65), [4 / 7, 3 / 7, 0, 0, 0], atol=0.03)
    assert np.allclose(draws(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0, 0], atol=0.03)
    assert np.allclose(draws(top_p=0.3), [1, 0, 0, 0, 0])
    # top-k first, then the share of what is left: 4/9 + 3/9 reaches 0.7
    assert np.allclose(draws(top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0, 0], atol=0.03)


# The linen shell -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_linen_shell_is_the_pure_network(family):
    network, params = network_of(family)
    batch = {"input_ids": ids(0, 1, 4)} | ({"decoder_input_ids": ids(1, 1, 3)} if family == "t5" else {})
    shell = LanguageModel(network.config)
    init = quick(lambda key: shell.init(key, batch)["params"])
    variables, again = init(jax.random.key(4)), init(jax.random.key(4))
    shapes = {path: leaf.shape for path, leaf in flatten(network.abstract()).items()}
    assert {path: leaf.shape for path, leaf in flatten(variables).items()} == shapes
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), variables, again))
    assert np.array_equal(quick(shell.apply)({"params": params}, batch)["logits"], logits(network, params, batch))


def test_a_fresh_network_has_the_declared_distribution():
    network, _ = network_of("gpt2")
    fresh = flatten(network.init(jax.random.key(0)))
    assert np.isclose(np.std(fresh["embed/tokens/embedding"]), 0.02, rtol=0.15)
    assert np.isclose(np.std(fresh["layers_0/mlp/down/kernel"]), 0.02 / np.sqrt(6), rtol=0.25)
    assert (fresh["final_norm/scale"] == 1).all() and not np.asarray(fresh["layers_1/mlp/up/bias"]).any()
    assert not np.array_equal(fresh["layers_0/mlp/up/kernel"], fresh["layers_1/mlp/up/kernel"])
