"""Writes the answers of the teachers of a config, on a machine where they fit; training then needs the files only.

    jaxlm cache_teacher --config=student.py

The recipe is that of the student, with `{"cache": {"directory": DIR, "top_k": 64}}` in its entry of `config.losses`.
Training with the same data finds the directory and does not ask again; where the entry names no `teacher` beside its
`cache`, none is loaded. (Training writes a cache that is not there by itself: this is for doing it elsewhere.)
"""

from absl.flags import FLAGS

from jaxlm.commands.program import define_config, start


def define_flags() -> None:
    define_config()


def main() -> None:
    import jax

    from jaxlm.runner.teachers import cache_teachers

    start()
    for cache in cache_teachers(FLAGS.config):
        if not jax.process_index():
            print(f"{cache['directory']}: {cache['tokens']} answers, {cache['bytes_per_token']} bytes each")
