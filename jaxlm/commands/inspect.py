"""Lists every array of a config's training run: name, shape, axis names, sharding, whether it trains and decays.

    jaxlm inspect --config=configs/pretrain/gpt.py:small --config.mesh.fsdp=4 --devices=8

Nothing is allocated and no data are read. Consecutive layers of equal structure are one array, as in the run itself.
"""

import os

from absl import flags
from absl.flags import FLAGS

from jaxlm.commands.program import define_config


def define_flags() -> None:
    define_config()
    flags.DEFINE_integer("devices", 0, "Pretend to have so many devices; 0: those that are here.")


def main() -> None:
    if FLAGS.devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if FLAGS.devices:
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    from rich.console import Console
    from rich.table import Table

    from jaxlm.core import arrays, describe
    from jaxlm.parallel import make_mesh
    from jaxlm.runner.config import mesh_shape
    from jaxlm.runner.dry_run import dry_run
    from jaxlm.train.optimizer import decays

    config = FLAGS.config
    mesh = make_mesh(mesh_shape(config))
    dry = dry_run(config, mesh)
    values, shardings = arrays(dry.step.params), arrays(dry.step.placement.params)
    table = Table("array", "shape", "axes", "sharding", "role", "trains", "decays", box=None, header_style="bold")
    for name, info in describe(dry.step.params, dry.start.lm.axes).items():
        trains = name in dry.step.trained
        names = ["·".join(n for n in a if n) if isinstance(a, tuple) else a or "-" for a in info.axes or ()]
        table.add_row(
            name,
            " × ".join(map(str, values[name].shape)),
            " ".join(names),
            str(shardings[name].spec).removeprefix("PartitionSpec"),
            info.role,
            "yes" if trains else "no",
            "yes" if trains and decays(info, dry.setup.training) else "no",
        )
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    console.print(table)
    total = sum(v.size for v in values.values())
    trained = sum(values[name].size for name in dry.step.trained)
    mesh_text = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    console.print(f"{total:,} entries, {trained:,} ({trained / total:.2%}) train; mesh {mesh_text}", highlight=False)
