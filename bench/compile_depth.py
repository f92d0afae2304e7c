"""Seconds that the training step of a GPT takes to compile, by depth: layers are scanned, so depth should cost nothing.

  python bench/compile_depth.py [--layers 6 48] [--width=256] [--rounds=3]

Depths are compiled in turn, `rounds` times each, without the persistent cache; the last line is the ratio of the
medians of the deepest and the shallowest, at most 1.5 by design. Nothing is allocated: shapes are enough.
"""

import argparse
import os
import statistics
import time


def seconds(layers: int, width: int) -> tuple[float, float]:
    """To trace and lower the step, and to compile it."""
    import jax

    from jaxlm.build.config import default_config
    from jaxlm.build.outline import outline
    from jaxlm.parallel import make_mesh
    from jaxlm.train.step import dropout_key

    config = default_config()
    config.data.update(max_length=128, tokenizer="bpe:4096")
    config.model.update(family="gpt2", num_layers=layers, hidden_size=width, num_heads=4, dropout=0.1)
    config.train.update(batch_size=8)
    jax.clear_caches()
    run = outline(config, make_mesh({}, jax.devices()[:1]))
    plan = run.blueprint
    place = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)  # noqa: E731
    shapes = jax.eval_shape(plan.create, dropout_key(0), plan.params, run.adapted.state)
    state = jax.tree.map(place, shapes, plan.placement)
    began = time.perf_counter()
    lowered = jax.jit(plan.step, donate_argnums=0, out_shardings=(plan.placement, None)).lower(state, {}, run.batch)
    between = time.perf_counter()
    lowered.compile()
    return between - began, time.perf_counter() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 48])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    seconds(2, options.width)  # what is slow only once
    taken: dict[int, list[tuple[float, float]]] = {layers: [] for layers in options.layers}
    for _ in range(options.rounds):
        for layers in options.layers:
            taken[layers].append(seconds(layers, options.width))
    print(f"{'layers':>8} {'trace':>8} {'compile':>8} {'together':>9}   seconds, medians of {options.rounds}")
    together = {}
    for layers, rounds in taken.items():
        trace, compiling = (statistics.median(column) for column in zip(*rounds, strict=True))
        together[layers] = statistics.median(sum(each) for each in rounds)
        print(f"{layers:8} {trace:8.2f} {compiling:8.2f} {together[layers]:9.2f}")
    shallow, deep = min(together), max(together)
    print(f"{deep} layers take {together[deep] / together[shallow]:.2f} times as long as {shallow}")


if __name__ == "__main__":
    main()
