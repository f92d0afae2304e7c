"""Contexts, terms, declarations, and the registry's errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Gate, Parameter, Term, add_terms, call, dim, initialize, lookup, total, visit
from jaxlm.core.parameter import abstract, axis_names, axis_sizes


def test_keys_differ_by_name_and_number():
    ctx = Context(key=jax.random.key(0))
    keys = [ctx, ctx.at("a"), ctx.at("b"), ctx.at(0), ctx.at(1), ctx.at("a").at("b"), ctx.at("b").at("a")]
    assert len({tuple(jax.random.key_data(c.key).tolist()) for c in keys}) == len(keys)
    same = jax.jit(lambda n: ctx.at(n).key)(jnp.int32(3))
    assert (jax.random.key_data(same) == jax.random.key_data(ctx.at(3).key)).all()
    assert Context().at("a").key is None


def test_terms_are_divided_once():
    a = {"ce": Term(jnp.float32(6), jnp.float32(3)), "x": Term(jnp.float32(1), jnp.float32(1), 0.5)}
    b = {"ce": Term(jnp.float32(2), jnp.float32(1)), "y": Term(jnp.float32(7), jnp.float32(2))}
    both = add_terms(a, b)
    assert {n: (float(t.sum), float(t.weight), t.coefficient) for n, t in both.items()} == {
        "ce": (8, 4, 1),
        "x": (1, 1, 0.5),
        "y": (7, 2, 1),
    }
    weights = {n: t.weight for n, t in both.items()}
    assert float(total(both, weights)) == 2 + 0.5 + 3.5 and float(both["ce"].mean) == 2
    assert float(Term(jnp.float32(0), jnp.float32(0)).mean) == 0 and float(total({}, {})) == 0


def test_a_site_is_read_where_it_is():
    x = jnp.arange(6.0).reshape(2, 3)
    assert visit({}, "gate", x, Context()) is x
    assert visit({"gate": Gate(jnp.array([1.0, 0.0, 1.0]))}, "gate", x, Context()).tolist() == [[0, 0, 2], [3, 0, 5]]


def test_declarations():
    query = Parameter((dim(embed=4), dim(heads=2, head_dim=3)), std=2.0)
    spec = {"q": {"kernel": query}, "s": Parameter((dim(embed=4),), constant=1.0)}
    assert axis_names(spec) == {"q/kernel": ("embed", ("heads", "head_dim")), "s": ("embed",)}
    assert axis_sizes(spec)["q/kernel"] == ((4,), (2, 3)) and abstract(spec)["q"]["kernel"].shape == (4, 6)
    fresh = initialize(jax.random.key(0), spec)
    alone = initialize(jax.random.key(0), {"q": spec["q"]})
    assert (fresh["s"] == 1).all() and np.array_equal(fresh["q"]["kernel"], alone["q"]["kernel"])


# Registry ------------------------------------------------------------------------------------------------------------


def named(params, *, rank, alpha=1.0):
    return params, rank, alpha


def test_call_passes_keywords():
    assert call(named, {"rank": 4}, "lora", params="p") == ("p", 4, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rnak": 4}, "lora has no option 'rnak'; did you mean 'rank'"),
        ({"alpha": 2.0}, "lora needs rank"),
        ({"rank": 1, "params": 3}, "lora has no option 'params'"),
    ],
)
def test_call_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(named, arguments, "lora", params="p")


def test_lookup_names_the_nearest_or_all():
    with pytest.raises(ValueError, match="unknown method 'magnitud'; did you mean 'magnitude'"):
        lookup({"magnitude": 1, "lora": 2}, "magnitud", "method")
    with pytest.raises(ValueError, match="known: lora, magnitude"):
        lookup({"magnitude": 1, "lora": 2}, "zzz", "method")
