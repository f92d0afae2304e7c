"""Meshes: sizes, errors, and the start of several processes."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm.parallel import DEFAULT_MESH, make_mesh, mesh_sizes
from jaxlm.parallel.mesh import _in_cluster


def test_sizes_are_filled_in():
    assert mesh_sizes({"data": 1, "fsdp": -1, "tensor": 2}, 8) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert mesh_sizes({"tensor": 8}, 8) == {"tensor": 8}
    assert mesh_sizes(DEFAULT_MESH, 1) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert list(mesh_sizes({"stage": 2, "data": -1, "expert": 2}, 8).items()) == [
        ("stage", 2),
        ("data", 2),
        ("expert", 2),
    ]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"tensors": 2}, "tensors=2 does not fit 8 devices"),
        ({"data": 0}, "size 0"),
        ({"data": -2}, "size -2"),
        ({"data": -1, "fsdp": -1}, "data and fsdp are both -1"),
        ({"data": 3, "fsdp": -1}, "does not fit 8 devices"),
        ({"data": 2, "tensor": 2}, "product must be 8"),
    ],
)
def test_errors(shape, message):
    with pytest.raises(ValueError, match=message):
        mesh_sizes(shape, 8)


def test_mesh_is_automatic_and_covers_all_devices():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    assert set(mesh.devices.flat) == set(jax.devices())
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert make_mesh({}, jax.devices()[:1]).size == 1


def test_axes_are_any_names_in_their_order():
    """The first is the slowest: its neighbours are farthest apart."""
    mesh = make_mesh({"stage": 2, "data": 2, "expert": 2})
    assert mesh.axis_names == ("stage", "data", "expert")
    default = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert np.array_equal(mesh.devices, default.devices)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # inside sbatch, outside srun: one process
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_clusters_are_recognised(environment, expected):
    assert _in_cluster(environment) is expected


# The results go to files: the collectives' library writes to stdout from other threads, into the middle of a line.
PROGRAM = """
import sys
import jax, numpy as np
from jaxlm.parallel import initialize, make_mesh
from jaxlm.parallel.batches import to_devices
number = initialize()
mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 2})
_, batch = to_devices(mesh, {"batch": ("data", "fsdp")})({"input_ids": np.full((4, 3), number + 1, np.float32)})
ids = batch["input_ids"]
total = jax.jit(lambda x: x.sum())(ids)
with open(f"{sys.argv[1]}/{number}", "w") as f:
    print(initialize(), len(jax.devices()), jax.process_count(), ids.shape, float(total), file=f)
"""


def test_two_processes_share_a_batch(tmp_path):
    """Each gives its two of the four rows: 6 · 1 + 6 · 2."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    common = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    common["JAX_NUM_CPU_DEVICES"] = "4"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env={**os.environ, **common, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for i, (process, error) in enumerate(zip(processes, errors, strict=True)):
        assert process.returncode == 0, error
        assert (tmp_path / str(i)).read_text() == f"{i} 8 2 (4, 3) 18.0\n"


def test_an_incomplete_environment_is_refused():
    env = {**os.environ, "JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_PROCESS_ID": "0", "JAX_PLATFORMS": "cpu"}
    program = "from jaxlm.parallel import initialize; initialize()"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert "JAX_NUM_PROCESSES must be a number" in done.stderr
