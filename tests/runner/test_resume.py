"""A run that was cut off, however, ends with the very bits of one that was not."""

import signal
from pathlib import Path

import pytest

from jaxlm.runner import stage, trainer
from jaxlm.train.loop import Run
from jaxlm.train.metric_writer import read_lines
from jaxlm.train.preemption import Interrupted

pytestmark = pytest.mark.slow

MAGNITUDE = {"name": "magnitude", "sparsity": 0.5, "begin": 2, "end": 9, "every": 3}
STRUCTURED = {"name": "structured", "heads": 0.5, "ffn": 0.5, "begin": 2, "end": 9, "every": 3}
MOVEMENT = {"name": "movement", "sparsity": 0.5, "begin": 2, "end": 9, "every": 3}

VARIANTS = {
    "averaging": {"grad_accum": 2, "average_last": 2},
    "pruning": {"methods": (MAGNITUDE, STRUCTURED)},
    "movement in shared layers": {"methods": (MOVEMENT,), "model": {"layer_map": (0, 0)}},
    "selecting": {"select": "loss", "eval_every": 3, "patience": 1},
}


def gone(*_) -> None:
    raise ConnectionAbortedError


def damage(checkpoint: Path) -> None:
    """Flips bits in the middle of its arrays."""
    file = max((file for file in checkpoint.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8] = bytes(8 * [0x5A])
    file.write_bytes(content)


def scalars(workdir: Path) -> list[tuple[int, str]]:
    """Step and split of the lines of metrics.jsonl."""
    return [(line["step"], line["split"]) for line in read_lines(workdir / "metrics.jsonl")]


@pytest.fixture
def best_at_6(monkeypatch) -> None:
    """Evaluation during training finds step 6 the best."""

    def run(**fields) -> Run:
        return Run(**fields | {"evaluate": lambda state: {"loss": abs(int(state.step) - 6.0)}})

    monkeypatch.setattr(trainer, "Run", run)


@pytest.mark.full("movement in shared layers", "selecting")
@pytest.mark.usefixtures("best_at_6")
@pytest.mark.parametrize("variant", VARIANTS)
def test_bit_for_bit(variant, recipe, tmp_path, cut_at, monkeypatch):
    config, run = recipe(), tmp_path / "run"
    config.update(methods=VARIANTS[variant].get("methods", ()))
    config.model.update(VARIANTS[variant].get("model", {}))
    config.train.update({k: v for k, v in VARIANTS[variant].items() if k not in ("methods", "model")})
    whole = stage.run(config, tmp_path / "whole")

    cut_at(6, signal.SIGTERM)  # SIGTERM where an evaluation and no checkpoint is due
    with pytest.raises(Interrupted) as interrupted:
        stage.run(config, run)
    assert interrupted.value.code == 143 and (run / "checkpoints/6").exists()
    cut_at(7)  # before anything else is saved
    with pytest.raises(ConnectionAbortedError):
        stage.run(config, run)
    cut_at(9)
    with pytest.raises(ConnectionAbortedError):
        stage.run(config, run)
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    damage(newest)
    cut_at(None)
    with monkeypatch.context() as patch, pytest.warns(match=rf"checkpoint {newest.name} .* is damaged"):
        patch.setattr(stage, "measure", gone)  # training is over, its result not yet written
        with pytest.raises(ConnectionAbortedError):
            stage.run(config, run)
    result = stage.run(config, run)

    assert result["params_sha256"] == whole["params_sha256"]
    assert result["metrics"]["eval"] == whole["metrics"]["eval"]
    assert all(result[name] == whole[name] for name in ("steps", "tokens", "skipped_updates"))
    extra = {(6, "train")}  # SIGTERM is a step to log at
    assert [k for k in scalars(run) if k not in extra] == [k for k in scalars(tmp_path / "whole") if k not in extra]
    assert len(scalars(run)) == len(set(scalars(run)))
    if variant == "selecting":
        assert whole["steps"] == 9  # stopped early, and stayed so
        assert (run / "best/6").exists()
