"""Writes the answers of the teachers of a config, on a machine where they fit; training then needs the files only.

    python experiments/cache_teacher.py --config=student.py

The recipe is that of the student, with `{"cache": {"directory": DIR, "top_k": 64}}` in its entry of `config.losses`.
Training with the same data finds the directory and does not ask again; where the entry names no `teacher` beside its
`cache`, none is loaded. (Training writes a cache that is not there by itself: this is for doing it elsewhere.)
"""

from absl import flags
from ml_collections import config_flags

from jaxlm.runner.cli import run, start

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, a Python file with get_config().")
flags.mark_flags_as_required(["config"])


def main() -> None:
    import jax

    from jaxlm.runner.teachers import cache_teachers

    start()
    for cache in cache_teachers(CONFIG.value):
        if not jax.process_index():
            print(f"{cache['directory']}: {cache['tokens']} answers, {cache['bytes_per_token']} bytes each")


if __name__ == "__main__":
    run(main)
