"""A profiler trace of chosen steps."""

from pathlib import Path
from typing import Any

import jax


class Profile:
    """Traces `steps` steps from step `first` on into `path`, for TensorBoard's profiler; none for 0."""

    def __init__(self, path: Path, first: int, steps: int) -> None:
        self.path, self.first, self.steps, self.open = path, first, steps, False

    def at(self, number: int, state: Any) -> None:
        """Starts before the first chosen step and stops after the last, once the devices have done it."""
        if self.steps and number == self.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.path))
            self.open = True
        if self.open and number == self.first + self.steps:
            jax.block_until_ready(state)
            self.__exit__()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.open:
            jax.profiler.stop_trace()
            self.open = False
