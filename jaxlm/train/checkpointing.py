"""What a run saves: its state to resume from, the best model so far, and recent models to average."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxlm.core import call
from jaxlm.train.settings import TrainSettings
from jaxlm.train.step import TrainState


@dataclass
class Progress:
    """What a run knows besides its arrays; saved with every checkpoint.

    `seconds` are those of training, `waited_seconds` the part of them in which it waited for a batch; `compile_seconds`
    come on top, in which it waited for the compiler.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    waited_seconds: float = 0.0
    skipped: int = 0
    last_eval_step: int = 0
    best_value: float | None = None
    best_step: int = 0
    evals_since_best: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def should_stop(self, settings: TrainSettings) -> bool:
        """Whether early stopping has had enough."""
        return 0 < settings.patience <= self.evals_since_best


class Store(Protocol):
    """Checkpoints in one place: flat `{name: array}` with JSON metadata, by step."""

    def save(self, step: int, state: dict[str, jax.Array], metadata: dict) -> None: ...
    def restore(
        self, target: dict[str, jax.ShapeDtypeStruct], step: int | None = None
    ) -> tuple[int, dict[str, jax.Array], dict] | None: ...
    def steps(self) -> list[int]: ...
    def rewind(self, step: int) -> None: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Stores:
    """The checkpoints of a run.

    `best` and `recent` are written before `latest` and keep one more than they need: a run that is cut off between the
    two, and goes back to the state before, still finds what belongs to it.

    Attributes:
      shapes: of a state as it is saved, ShapeDtypeStructs: without the padding that the mesh of this run asks for, so
        that another mesh can restore it.
      latest: whole states, to resume from.
      best: the model at the best evaluation.
      recent: the models of the last regular checkpoints, to average; `None` where nothing is averaged.
    """

    shapes: TrainState
    latest: Store
    best: Store
    recent: Store | None = None

    def resume(self, state: TrainState, shardings: Any) -> tuple[TrainState, Progress] | None:
        """The newest sound state in the shape of `state`, placed as `shardings` say; later checkpoints are removed."""
        restored = self.latest.restore(flatten(targets(self.shapes, state, shardings)))
        step, arrays, metadata = restored or (0, {}, {"progress": {}})
        progress = call(Progress, metadata["progress"], "the progress in the checkpoint")
        self.latest.rewind(step)
        self.best.rewind(progress.best_step)
        if self.recent is not None:
            self.recent.rewind(step)
        return (padded(unflatten(state, arrays), state, shardings), progress) if restored else None

    def save(self, number: int, state: TrainState, progress: Progress) -> None:
        """A state to resume from."""
        self.latest.save(number, flatten(stripped(state, self.shapes)), {"progress": vars(progress)})

    def save_model(self, store: Store, number: int, state: TrainState) -> None:
        """The model in `state`, into `best` or `recent`; the state it replaces must be on disk before."""
        self.latest.wait()
        store.save(number, flatten(stripped(_model(state), _model(self.shapes))), {})

    def restore_model(self, store: Store, number: int, state: TrainState, shardings: Any) -> TrainState:
        """`state` with the model that `save_model` left.

        Raises:
          FileNotFoundError, ValueError: when it is missing or damaged.
        """
        store.wait()
        like, placement = _model(state), _model(shardings)
        restored = store.restore(flatten(targets(_model(self.shapes), like, placement)), number)
        assert restored is not None
        return state.replace(**padded(unflatten(like, restored[1]), like, placement))

    def close(self) -> None:
        """Finishes what is being written."""
        with contextlib.ExitStack() as stack:
            for store in filter(None, (self.latest, self.best, self.recent)):
                stack.callback(store.close)


def _model(state: Any) -> dict[str, Any]:
    """The parts of a state (or of its shapes or shardings) that make the model."""
    return {"params": state.params, "method": state.method}


def stripped(tree: Any, shapes: Any) -> Any:
    """The beginning of every array, as large as `shapes` say."""

    def strip(array: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return array if array.shape == shape.shape else jax.lax.slice(array, [0] * array.ndim, shape.shape)

    return jax.tree.map(strip, tree, shapes)


def padded(tree: Any, like: Any, shardings: Any) -> Any:
    """The inverse of `stripped`: zeros up to the shapes of `like`."""

    def pad(array: jax.Array, wanted: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        if array.shape == wanted.shape:
            return array
        widths = [(0, after - before) for before, after in zip(array.shape, wanted.shape, strict=True)]
        return jax.jit(jnp.pad, static_argnums=1, out_shardings=sharding)(array, tuple(widths))

    return jax.tree.map(pad, tree, like, shardings)


def targets(shapes: Any, like: Any, shardings: Any) -> Any:
    """`shapes` with the placement of `like`; a dimension that is padded there may not divide, so it is whole here."""

    def target(shape: jax.ShapeDtypeStruct, array: jax.Array, sharding: Any) -> jax.ShapeDtypeStruct:
        if shape.shape != array.shape:
            axes = [*sharding.spec, *(None,) * (array.ndim - len(sharding.spec))]
            kept = [axis if a == b else None for axis, a, b in zip(axes, shape.shape, array.shape, strict=True)]
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.P(*kept))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(target, shapes, like, shardings)


def flatten(tree: Any) -> dict[str, Any]:
    """`{path: array}` of any tree, by jax's own path strings."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(template: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[jax.tree_util.keystr(path)], template)
