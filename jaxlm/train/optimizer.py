"""Optimizers by name over flat dicts `{array name: array}`, with decay and learning rates by path rule."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.core import ArrayInfo, check_rules, first_match, is_stacked, lookup
from jaxlm.train.settings import TrainSettings


def schedule(settings: TrainSettings, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate by step: linear warm-up, then the named decay.

    With warm-up w and n steps, at step t ≥ w and p = (t - w)/(n - w): `linear` 1 - p(1 - f), `cosine`
    f + (1 - f)(1 + cos πp)/2, `constant` 1, `inverse_sqrt` sqrt(w/t); all times the peak, f the final share.
    """
    peak, f = settings.learning_rate, settings.final_learning_rate
    w = settings.warmup_steps(steps)
    shapes: dict[str, Callable[[Any, Any], Any]] = {
        "linear": lambda p, t: 1 - p * (1 - f),
        "cosine": lambda p, t: f + (1 - f) * 0.5 * (1 + jnp.cos(jnp.pi * p)),
        "constant": lambda p, t: jnp.ones_like(p),
        "inverse_sqrt": lambda p, t: jnp.sqrt(max(w, 1) / jnp.maximum(t, 1)),
    }
    shape = lookup(shapes, settings.schedule, "schedule")

    def rate(count: jax.Array) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((t - w) / max(steps - w, 1), 0.0, 1.0)
        return peak * jnp.where(t < w, (t + 1) / max(w, 1), shape(progress, t))

    return rate


def _adam(s: TrainSettings) -> optax.GradientTransformation:
    return optax.scale_by_adam(s.b1, s.b2, s.eps)


def _lion(s: TrainSettings) -> optax.GradientTransformation:
    return optax.scale_by_lion(s.b1, s.b2)


def _sgd(s: TrainSettings) -> optax.GradientTransformation:
    return optax.trace(decay=s.b1) if s.b1 else optax.identity()


def _adafactor(s: TrainSettings) -> optax.GradientTransformation:
    return over_layers(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)))


OPTIMIZERS = {"adamw": _adam, "lion": _lion, "sgd": _sgd, "adafactor": _adafactor}


def over_layers(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation whose mathematics spans a whole array to every layer of a stacked one apart."""

    def by_layer(function, name, *trees):
        return (jax.vmap(function) if is_stacked(name) else function)(*trees)

    def init(params):
        return {name: by_layer(inner.init, name, p) for name, p in params.items()}

    def update(updates, state, params=None):
        done = {name: by_layer(inner.update, name, u, state[name], params[name]) for name, u in updates.items()}
        return {n: d[0] for n, d in done.items()}, {n: d[1] for n, d in done.items()}

    return optax.GradientTransformation(init, update)


def decays(info: ArrayInfo, settings: TrainSettings) -> bool:
    """Whether weight decay acts: by rule, else on matrices (kernels, embeddings, factors), never on scales."""
    if info.role not in ("base", "factor"):
        return False
    matrix = re.search(r"(kernel|embedding)$", info.path) is not None
    return first_match(settings.rules("decay"), info.path, info.role, default=matrix)


def learning_rate_factor(info: ArrayInfo, settings: TrainSettings, shape: tuple[int, ...]) -> Any:
    """Factor on the learning rate: one number, or for stacked layers one a layer, `[layers, 1, …]`."""
    rules = settings.rules("learning_rates")
    segment = re.search(r"layers_(\d+)-(\d+)", info.name)
    if not rules or segment is None:
        return first_match(rules, info.path, info.role, 1.0)
    layers = range(int(segment[1]), int(segment[2]) + 1)
    paths = [re.sub(r"layers_\d+", f"layers_{i}", info.path, count=1) for i in layers]
    factors = jnp.array([first_match(rules, path, info.role, 1.0) for path in paths], jnp.float32)
    return factors.reshape(-1, *(1,) * (len(shape) - 1))


def optimizer(settings: TrainSettings, steps: int, infos: Mapping[str, ArrayInfo]) -> optax.GradientTransformation:
    """The optimizer of a run, over `{name: array}` of the trained arrays.

    Args:
      settings: `config.train`.
      steps: updates of the whole run.
      infos: of the trained arrays; the rules are checked against them.
    """
    for field in ("decay", "learning_rates"):
        check_rules(settings.rules(field), _each_layer(infos.values()), f"config.train.{field}")
    rate = schedule(settings, steps)

    def decay(updates, state, params):
        return {
            n: u + settings.weight_decay * params[n] if decays(infos[n], settings) else u for n, u in updates.items()
        }, state

    def scale(updates, state, params):
        now = rate(state.count)
        new = {n: -now * learning_rate_factor(infos[n], settings, u.shape) * u for n, u in updates.items()}
        return new, optax.ScaleByScheduleState(count=state.count + 1)

    stages = [lookup(OPTIMIZERS, settings.optimizer, "optimizer")(settings)]
    if settings.weight_decay:
        stages.append(optax.GradientTransformation(lambda params: optax.EmptyState(), decay))
    stages.append(
        optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), scale)
    )
    return optax.chain(*stages)


def _each_layer(infos: Iterable[ArrayInfo]) -> Iterator[ArrayInfo]:
    """The arrays of a run view as rules see them: those of a segment once a layer."""
    for info in infos:
        segment = re.search(r"layers_(\d+)-(\d+)", info.name)
        for number in range(int(segment[1]), int(segment[2]) + 1) if segment else ():
            yield info._replace(path=re.sub(r"layers_\d+", f"layers_{number}", info.path, count=1))
        if segment is None:
            yield info


def moments(state: Any, names: frozenset[str]) -> list[dict[str, jax.Array]]:
    """The parts of an optimizer state that mirror the parameters by name (Adam has two), in order."""
    return [part for part in jax.tree.leaves(state, is_leaf=lambda x: _mirrors(x, names)) if _mirrors(part, names)]


def with_moments(state: Any, names: frozenset[str], new: list[dict[str, jax.Array]]) -> Any:
    """`state` with its mirrors replaced."""
    remaining = iter(new)
    return jax.tree.map(
        lambda part: next(remaining) if _mirrors(part, names) else part, state, is_leaf=lambda x: _mirrors(x, names)
    )


def _mirrors(part: Any, names: frozenset[str]) -> bool:
    return isinstance(part, dict) and part.keys() == names and not any(isinstance(v, tuple) for v in part.values())
