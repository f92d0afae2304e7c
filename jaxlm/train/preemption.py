"""Signals that end a run early, without cutting a step in two."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came; the state is saved. Exit code 143."""


class PreemptionFlag:
    """Turns SIGTERM and SIGINT into a flag while training, so that a step is never cut in two.

    A second signal acts at once. On several hosts, jax's preemption service listens to SIGTERM and lets all of them
    stop at the same step.
    """

    def __init__(self) -> None:
        self.came = False
        self.previous: dict[int, Any] = {}

    def at(self, number: int) -> bool:
        """Whether to stop after step `number`."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(number)
        return self.came

    def __enter__(self) -> "PreemptionFlag":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        self.came = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
