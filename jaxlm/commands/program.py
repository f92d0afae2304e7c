"""How every program begins: in large memory pages, with its flags read; help is no error.

Nothing slow is imported before a function needs it: `large_pages` starts the program a second time.
"""

import gc
import importlib
import os
import sys
from pathlib import Path
from typing import Any

HELP = {"-h", "-help", "--help", "-helpfull", "--helpfull", "-helpshort", "--helpshort", "-helpxml", "--helpxml", "-?"}


def run(name: str) -> None:
    """Runs `main()` of a module of `jaxlm.commands` with the flags of its `define_flags()`.

    Flags are absl's, and so global: only those of the program that runs are defined. What is left over on the command
    line is a usage error. absl ends with 1 after it has printed a help page; shells and build tools take that for a
    failure, so it is 0 here.
    """
    large_pages()
    from absl import app

    program = importlib.import_module(f"jaxlm.commands.{name}")
    define_flags(program)

    def call(arguments: list[str]) -> None:
        if arguments[1:]:
            raise app.UsageError(f"unexpected {arguments[1:]}; options are written --config.a.b=value")
        program.main()

    try:
        app.run(call)
    except SystemExit as end:
        if HELP & set(sys.argv[1:]):
            sys.exit(0)
        raise end


def define_flags(program: Any) -> None:
    """Defines a program's flags, and lets `--help` show them below its docstring.

    absl shows the docstring of the module that was started, and the flags that were defined there.
    """
    from absl.flags import FLAGS

    others = set(FLAGS)
    program.define_flags()
    for flag in set(FLAGS) - others:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[flag])
    sys.modules["__main__"].__doc__ = program.__doc__


def define_config(text: str = "The recipe, a Python file with get_config().") -> None:
    """The flag that names a recipe; its fields are flags too: `--config.train.steps=10`."""
    from absl import flags
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, text)
    flags.mark_flag_as_required("config")


def large_pages() -> None:
    """Starts the program again with large pages for large allocations, where the C library is glibc; once.

    XLA's CPU back end takes the memory of every step anew. In pages of 4 KiB the kernel then spends a quarter of a
    training step on handing it out; in pages of 2 MiB next to nothing. The setting is read when a process starts, hence
    the second start, before anything slow is imported. One that is there already is left as it is.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def start() -> None:
    """What a program that computes does first: joins the other hosts, if any, and turns on jax's compile cache.

    The cache lies where `JAX_COMPILATION_CACHE_DIR` says, by default in the user's cache directory.

    Tracing makes many objects and next to no garbage. Python's collector, which by default comes every 700 objects and
    looks again and again at all that was imported, takes a third of that time; so it is told to come less often.
    """
    import jax
    from absl import logging

    from jaxlm.parallel import initialize

    gc.set_threshold(50_000, 20, 20)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "jaxlm" / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # the many small ones take seconds together
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    logging.set_verbosity(logging.WARNING)
    initialize()
