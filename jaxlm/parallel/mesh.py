"""The mesh: named axes over all devices, and the initialization of a multi-host run."""

import math
import os
from collections.abc import Mapping, Sequence

import jax
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

DEFAULT_MESH = {"data": -1, "fsdp": 1, "tensor": 1}
"""Axes and sizes of a run that sets none. Slowest to fastest: neighbours in `tensor` exchange activations in every
layer, so they are closest together."""


def initialize() -> int:
    """Initializes jax.distributed if the run has several processes, and returns the index of this process.

    Call it before anything else uses a device. The cluster is read from the environment: `JAX_COORDINATOR_ADDRESS`
    with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, a Slurm step, Open MPI, or the hosts of a TPU slice. A single
    process does nothing.

    Raises:
      ValueError: when `JAX_COORDINATOR_ADDRESS` is set without the other two.
    """
    if not jax.distributed.is_initialized():
        if "JAX_COORDINATOR_ADDRESS" in os.environ:
            count, number = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
            jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
        elif _in_cluster(os.environ):
            jax.distributed.initialize()
        elif _may_be_compute_engine(os.environ):
            try:
                jax.distributed.initialize()
            except ValueError as error:  # jax found no cluster: a single TPU host
                logging.info("running on this host alone: %s", error)
    return jax.process_index()


def _number(name: str) -> int:
    if not os.environ.get(name, "").isdecimal():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, so {name} must be a number, not {os.environ.get(name)!r}")
    return int(os.environ[name])


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the process belongs to a group that jax recognises."""
    if any(int(environment.get(name, 1)) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    if any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")):
        return True
    return "MEGASCALE_COORDINATOR_ADDRESS" in environment


def _may_be_compute_engine(environment: Mapping[str, str]) -> bool:
    """Whether this is a TPU machine (jax sets the first variable there) whose metadata server may list other hosts."""
    return environment.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environment


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
      shape: size of each axis by its name, slowest to fastest; one may be -1: the remaining devices. `None` is
        `DEFAULT_MESH`.
      devices: by default every device of the run. Their order follows the interconnect if it is known.

    Raises:
      ValueError: for a size that is not positive, more than one -1, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(DEFAULT_MESH if shape is None else shape, len(devices))
    names, auto = tuple(sizes), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(tuple(sizes.values()), names, axis_types=auto, devices=devices)
    except NotImplementedError:  # a TPU torus whose dimensions must be split to give these sizes
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(grid, names, axis_types=auto)


def mesh_sizes(shape: Mapping[str, int], devices: int) -> dict[str, int]:
    """Size of every mesh axis, -1 replaced by the remaining devices.

    >>> mesh_sizes({"fsdp": -1, "tensor": 2}, devices=8)
    {'fsdp': 4, 'tensor': 2}
    """
    for name, size in shape.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name} has size {size}; use a positive number, or -1 for all other devices")
    sizes = dict(shape)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh axes {' and '.join(open_axes)} are both -1; at most one can be filled in")
    product = math.prod(size for size in sizes.values() if size != -1)
    if devices % product or (not open_axes and product != devices):
        text = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"a mesh of {text} does not fit {devices} devices; their product must be {devices}")
    return sizes | dict.fromkeys(open_axes, devices // product)
