"""The head socket: a head that jaxlm does not have is one entry of HEADS, and one line for a family that names it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core import NO_DATA, Context, arrays, dim, flatten
from jaxlm.methods.quantize.round_to_nearest import quantize
from jaxlm.models import FAMILIES, model_config
from jaxlm.models.family import NotExpressible, config_to_hf, named
from jaxlm.models.heads import HEADS, Head
from jaxlm.models.network import Network
from jaxlm.nn.dense import dense, dense_spec
from jaxlm.parallel import make_mesh, make_rules, place, shard_tree, shardings

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "ffn_size": 48, "max_positions": 32}


def span_spec(config):
    """Where an answer starts and ends."""
    return {"ends": dense_spec(dim(embed=config.hidden_size), dim(ends=2), True, config.init_std)}


def span(config, params, x, segments, ctx):
    """`start_logits` and `end_logits` `[batch, length]`, the lowest number at padding."""
    logits = dense(params["head"]["ends"], x, ctx.at("ends"), jnp.float32)
    start, end = jnp.moveaxis(jnp.where(segments[..., None] > 0, logits, jnp.finfo(jnp.float32).min), -1, 0)
    return {"start_logits": start, "end_logits": end}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(HEADS, "span", Head(span_spec, span, per_token=True))


@pytest.fixture
def named_by_bert(monkeypatch):
    bert = FAMILIES["bert"]
    heads = {**bert.heads, "span": named("qa_outputs", "head/ends")}
    classes = {**bert.architectures, "BertForQuestionAnswering": {"head": "span"}}
    monkeypatch.setitem(FAMILIES, "bert", bert._replace(heads=heads, architectures=classes))


def model(family="bert", **fields):
    config = model_config(family, **SIZES, **fields)
    return jaxlm.LM(config, Network(config).init(jax.random.key(0)))


def batch():
    ids = np.random.default_rng(0).integers(3, 61, (4, 9)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": (np.arange(9) < np.array([[9], [5], [7], [2]])).astype(np.int32)}


def same(a, b):
    """Equal configs and equal arrays of equal names."""
    first, second = arrays(a.params), arrays(b.params)
    return a.config == b.config and first.keys() == second.keys() and all((first[n] == second[n]).all() for n in first)


def test_under_jit_scan_and_gradient():
    lm = model(head="span")
    plain = lm.apply(lm.params, batch())
    assert plain["start_logits"].shape == (4, 9) and "logits" not in plain
    run = lm.network.run_view(lm.params)
    scanned = jax.jit(lm.apply)(run, batch())
    np.testing.assert_allclose(scanned["end_logits"], plain["end_logits"], rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda p: jax.nn.logsumexp(lm.apply(p, batch())["end_logits"], axis=1).sum())(run)
    assert np.abs(grads["head"]["ends"]["kernel"]).max() > 0


def test_on_a_mesh():
    lm, mesh = model(head="span"), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = make_rules({}, lm.axes, mesh)
    run = lm.network.run_view(lm.params)
    sharded = shard_tree(run, shardings(run, lm.axes, mesh, rules, lm.network.sizes()))
    ctx = Context(place=place(mesh, rules))
    outputs = jax.jit(lambda p, b: lm.network.forward(p, b, ctx=ctx)["start_logits"])(sharded, batch())
    np.testing.assert_allclose(outputs, lm.apply(lm.params, batch())["start_logits"], rtol=1e-5, atol=1e-5)


def test_without_a_class_in_transformers_it_is_saved_in_our_layout(tmp_path):
    lm = model(head="span")
    with pytest.raises(NotExpressible, match="no bert with the head 'span'; its heads are masked, sequence, token, po"):
        config_to_hf(FAMILIES["bert"], lm.config)
    assert "head 'span'" in jaxlm.save(lm, tmp_path)
    assert same(jaxlm.load(tmp_path), lm)


def test_a_new_head_on_a_stored_body(tmp_path):
    stored = model(head="pooled")
    jaxlm.save(stored, tmp_path)
    lm = jaxlm.load(tmp_path, head="span", key=jax.random.key(1))
    assert set(lm.fresh) == {"head/ends/kernel", "head/ends/bias"}
    assert set(lm.dropped) == {"head/pooler/kernel", "head/pooler/bias"}
    before, after = flatten(stored.params), flatten(lm.params)
    assert all((before[path] == after[path]).all() for path in before.keys() & after.keys())
    with pytest.raises(ValueError, match="labels and regression are for a sequence or token head, this one is 'span'"):
        jaxlm.load(tmp_path, head="span", labels=["a"])


def test_surgery_and_saving_of_what_it_leaves(tmp_path):
    lm = quantize(model(head="span"), NO_DATA)
    assert type(lm.params["head"]["ends"]["kernel"]).__name__ == "Quantized"
    jaxlm.save(lm, tmp_path)
    assert same(jaxlm.load(tmp_path), lm)


@pytest.mark.torch
def test_with_one_it_is_transformers(parity, named_by_bert):
    import transformers

    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    lm = parity(transformers.BertForQuestionAnswering(config), ours="start_logits", theirs="start_logits")
    assert lm.config.head == "span" and set(lm.params["head"]) == {"ends"}


def test_unknown_heads_are_errors_that_name_the_nearest():
    with pytest.raises(ValueError, match="unknown head 'spam'; did you mean 'span'"):
        model(head="spam")
