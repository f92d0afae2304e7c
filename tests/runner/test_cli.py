"""experiments/train.py as people and clusters start it: killed, terminated, and on two hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jaxlm
from jaxlm.core import arrays
from jaxlm.runner import stage
from jaxlm.train.metric_writer import read_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(recipe, tmp_path):
    """`start(workdir, config, **environment)`: a program running that config; what it says goes to `<workdir>.log`."""
    running = []

    def go(workdir: Path, config, **environment: str) -> subprocess.Popen:
        file = tmp_path / "recipe.py"
        file.write_text(
            "from ml_collections import ConfigDict\nfrom jaxlm.runner.config import default_config, overlay\n"
            f"def get_config():\n    config = default_config()\n    overlay(config, {config.to_dict()!r}, 'config')\n"
            "    return config\n"
        )
        command = [sys.executable, "experiments/train.py", f"--config={file}", f"--workdir={workdir}"]
        with Path(f"{workdir}.{len(running)}.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
            )
        running.append(process)
        return process

    yield go
    for process in running:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Until the run has logged a step."""
    lines: list[dict] = []
    while not lines or lines[-1]["step"] < step:
        assert process.poll() is None, f"the run ended with {process.returncode} before step {step}"
        time.sleep(0.01)
        lines = read_lines(workdir / "metrics.jsonl")


def test_a_program_begins_before_anything_slow_is_imported():
    """It may start itself again, for large memory pages."""
    slow = "[name for name in ('jax', 'numpy', 'absl', 'flax') if name in sys.modules]"
    command = [sys.executable, "-c", f"import sys, jaxlm.commands.program; print({slow})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_killed_and_terminated(recipe, start, tmp_path):
    config = recipe(steps=240, log_every=5, checkpoint_every=20)
    whole = stage.run(config, tmp_path / "whole")
    process = start(tmp_path / "run", config)
    wait_for(process, tmp_path / "run", 80)
    process.kill()
    process.wait()
    process = start(tmp_path / "run", config)
    wait_for(process, tmp_path / "run", 150)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    step = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdecimal())
    log = (tmp_path / "run.1.log").read_text()
    assert f"interrupted: step {step} is saved" in log and "resumed from step" in log
    assert "WARNING" not in log and "absl" not in log
    result = stage.run(config, tmp_path / "run")
    assert result["params_sha256"] == whole["params_sha256"]
    steps = [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert sorted({*steps, step}) == sorted({*range(5, 241, 5), step}) and len(steps) == len(set(steps))


def test_two_hosts_equal_one(recipe, start, tmp_path):
    config = recipe(steps=3, log_every=1, eval_every=3)
    config.mesh.update(data=1, fsdp=2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    hosts = [start(tmp_path / "two", config, **cluster, JAX_PROCESS_ID=str(number)) for number in range(2)]
    config = recipe(steps=3, log_every=1, eval_every=3)
    one = stage.run(config, tmp_path / "one")
    assert [host.wait(timeout=120) for host in hosts] == [0, 0]
    two = stage.run(config, tmp_path / "two")  # finished: read back; where it ran does not matter
    assert two["tokens"] == one["tokens"]
    assert two["metrics"]["eval"] == pytest.approx(one["metrics"]["eval"], rel=1e-5)
    before, after = (arrays(jaxlm.load(tmp_path / name / "model").params) for name in ("one", "two"))
    for name, array in before.items():
        if not name.endswith("key/bias"):  # no gradient but rounding, which adam amplifies
            np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-5, err_msg=name)
    written = [(line["step"], line["split"]) for line in read_lines(tmp_path / "two/metrics.jsonl")]
    assert written == [(1, "train"), (2, "train"), (3, "train"), (3, "eval")]
    assert "loss" in (tmp_path / "two.0.log").read_text()
    assert "loss" not in (tmp_path / "two.1.log").read_text()  # only the first host speaks
