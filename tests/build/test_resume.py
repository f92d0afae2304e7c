"""A run that was cut off, however, ends with the very bits of one that was not."""

import os
import signal
from pathlib import Path

import pytest

from jaxlm.build import assembly, stage
from jaxlm.train.interruption import Interrupted
from jaxlm.train.journal import read_lines

MAGNITUDE = {"name": "magnitude", "sparsity": 0.5, "begin": 2, "end": 9, "every": 3}
STRUCTURED = {"name": "structured", "heads": 0.5, "ffn": 0.5, "begin": 2, "end": 9, "every": 3}

VARIANTS = {
    "averaging": {"grad_accum": 2, "average_last": 2},
    "pruning": {"methods": (MAGNITUDE, STRUCTURED)},
    "selecting": {"select": "loss", "eval_every": 3, "patience": 1, "learning_rate": 3.0, "schedule": "constant"},
}


class Cut(BaseException):
    """Stands for a process that is gone."""


@pytest.fixture
def cut_at(monkeypatch):
    """`cut_at(step, act)`: before that step the process gets `act`."""
    original = assembly.prefetch

    def use(step: int, act) -> None:
        class Feed(original):
            def __init__(self, batches, start, stop, **options):
                super().__init__(batches, start, stop, **options)
                self.number = start

            def __next__(self):
                self.number += 1
                if self.number == step:
                    act()
                return super().__next__()

        monkeypatch.setattr(assembly, "prefetch", Feed)

    return use


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def vanish() -> None:
    raise Cut


def damage(checkpoint: Path) -> None:
    """Flips bits in the middle of its arrays."""
    file = max((file for file in checkpoint.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8] = bytes(8 * [0x5A])
    file.write_bytes(content)


def scalars(workdir: Path) -> list[tuple[int, str]]:
    """Step and split of the lines of metrics.jsonl."""
    return [(line["step"], line["split"]) for line in read_lines(workdir / "metrics.jsonl")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bit_for_bit(variant, recipe, tmp_path, cut_at, monkeypatch):
    config, run = recipe(), tmp_path / "run"
    config.update(methods=VARIANTS[variant].get("methods", ()))
    config.train.update({k: v for k, v in VARIANTS[variant].items() if k != "methods"})
    whole = stage.run(config, tmp_path / "whole")

    cut_at(6, terminate)  # SIGTERM where an evaluation and no checkpoint is due
    with pytest.raises(Interrupted) as interrupted:
        stage.run(config, run)
    assert interrupted.value.code == 143 and (run / "checkpoints/6").exists()
    cut_at(7, vanish)  # before anything else is saved
    with pytest.raises(Cut):
        stage.run(config, run)
    cut_at(10, vanish)
    with pytest.raises(Cut):
        stage.run(config, run)
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    damage(newest)
    cut_at(0, vanish)
    with monkeypatch.context() as patch, pytest.warns(match=rf"checkpoint {newest.name} .* is damaged"):
        patch.setattr(stage, "measure", lambda *_: vanish())  # training is over, its result not yet written
        with pytest.raises(Cut):
            stage.run(config, run)
    result = stage.run(config, run)

    assert result["params_sha256"] == whole["params_sha256"]
    assert result["metrics"]["eval"] == whole["metrics"]["eval"]
    assert all(result[name] == whole[name] for name in ("steps", "tokens", "skipped_updates"))
    extra = {(6, "train")}  # SIGTERM is a step to log at
    assert [k for k in scalars(run) if k not in extra] == [k for k in scalars(tmp_path / "whole") if k not in extra]
    assert len(scalars(run)) == len(set(scalars(run)))
    if variant == "selecting":
        assert whole["steps"] < config.train.steps  # stopped early, and stayed so


def test_a_finished_run_returns_at_once(recipe, tmp_path, monkeypatch):
    pass
