"""The command `jaxlm`: one program a module, which is imported only when it is asked for."""

import sys

PROGRAMS = {
    "recipes": "copy the recipes into a folder, to read, run and edit",
    "train": "train one model, or operate on one, as a config says",
    "pipeline": "run the stages of a config in order, and report on their models",
    "search": "sweep how strongly a method is applied, and report the Pareto front",
    "evaluate": "measure a model directory on the data of a config",
    "convert": "convert a model directory: transformers' layout or ours, another dtype",
    "inspect": "list every array of a run: shape, axes, sharding, what trains and decays",
    "plan": "ask the TPU compiler whether a training step fits a slice",
    "cache_teacher": "write the answers of a config's teachers to files",
    "reproduce": "run configs/reproduce, and rewrite the tables of docs/results.md",
}
"""Every program by its module here, and what it does."""

HELP = {"-h", "-help", "--help", "help"}


def main() -> None:
    """`jaxlm PROGRAM [flags]`."""
    name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in HELP:
        width = max(map(len, PROGRAMS))
        print("usage: jaxlm PROGRAM [flags]; jaxlm PROGRAM --help lists the flags of one\n")
        print("\n".join(f"  {program:{width}}  {what}" for program, what in PROGRAMS.items()))
    elif name == "--version":
        from importlib.metadata import version

        print(f"jaxlm {version('jaxlm')}")
    elif name not in PROGRAMS:
        from jaxlm.core.lookup import nearest  # takes jax with it

        print(f"jaxlm: there is no program {name!r}; {nearest(name, PROGRAMS)}", file=sys.stderr)
        sys.exit(2)
    else:
        from jaxlm.commands.program import run

        sys.argv = [f"jaxlm {name}", *arguments]
        run(name)
