"""What a program that computes does first: join the cluster, and keep compiled programs for the next start."""

import os
from pathlib import Path


def start() -> None:
    """Joins the other hosts, if any, and turns on jax's persistent compile cache.

    The cache lies where `JAX_COMPILATION_CACHE_DIR` says, by default in the user's cache directory.
    """
    import jax
    from absl import logging

    from jaxlm.parallel import initialize

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "jaxlm" / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # the many small ones take seconds together
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    logging.set_verbosity(logging.WARNING)
    initialize()
