"""Peak memory of reading, converting and writing a model of more than 1 GB, made on the fly.

  python bench/convert_memory.py [--layers=8] [--keep=DIR]

Each operation runs in a process of its own. `extra` is the peak of its resident memory less what is resident after the
imports; `allowed` is the model in the target dtype plus twice its largest tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turns import memory

OPERATIONS = (
    ("load", None),
    ("load", "bfloat16"),
    ("convert", None),
    ("convert", "bfloat16"),
    ("load and save", None),
)


def make(directory: Path, layers: int) -> None:
    """A random Llama in transformers' layout, written one tensor at a time."""
    import numpy as np

    from jaxlm.core import flatten, unflatten
    from jaxlm.io.lm import LM
    from jaxlm.io.model_directory import write_model
    from jaxlm.io.safetensors import Tensor
    from jaxlm.models import model_config
    from jaxlm.models.network import Network

    config = model_config(
        "llama", vocab_size=32000, hidden_size=2048, ffn_size=5504, num_layers=layers, num_heads=16, num_kv_heads=8
    )
    rng = np.random.default_rng(0)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, np.dtype(np.float32), lambda dtype=None: rng.standard_normal(shape, np.float32))

    params = {path: tensor(parameter.shape) for path, parameter in flatten(Network(config).spec).items()}
    write_model(directory, LM(config, unflatten(params)))


def measure(operation: str, dtype: str | None, source: Path, target: Path) -> dict[str, float]:
    """Runs one operation in this process."""
    import jax.numpy as jnp

    import jaxlm
    from jaxlm.core import arrays
    from jaxlm.io.model_directory import cast, open_model, write_model

    base = memory("VmRSS")
    started = time.perf_counter()
    wanted = None if dtype is None else jnp.dtype(dtype)
    stored = open_model(source)
    stored = stored if wanted is None else cast(stored, wanted)
    sizes = [tensor.nbytes for tensor in arrays(stored.params).values()]
    if operation == "convert":
        write_model(target, stored)
    else:
        lm = jaxlm.load(source, dtype=wanted)
        if operation == "load and save":
            jaxlm.save(lm, target)
    seconds = time.perf_counter() - started
    peak = memory("VmHWM")
    return {"model": sum(sizes), "largest": max(sizes), "extra": peak - base, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="layers of 42 million parameters (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="directory for the models (default: a temporary one)")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        operation, dtype, source, target = options.one
        print(json.dumps(measure(operation, dtype or None, Path(source), Path(target))))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.keep or Path(temporary)
        make(directory / "source", options.layers)
        print(f"{'operation':<24}{'model MB':>10}{'largest MB':>12}{'extra MB':>10}{'allowed MB':>12}{'seconds':>9}")
        for operation, dtype in OPERATIONS:
            one = [operation, dtype or "", str(directory / "source"), str(directory / "target")]
            done = subprocess.run([sys.executable, __file__, "--one", *one], check=True, capture_output=True, text=True)
            taken = json.loads(done.stdout.splitlines()[-1])
            allowed = taken["model"] + 2 * taken["largest"]
            failed += taken["extra"] > allowed
            numbers = [taken["model"], taken["largest"], taken["extra"], allowed]
            model, largest, extra, limit = (f"{number / 1e6:.0f}" for number in numbers)
            name = f"{operation} {dtype or ''}"
            print(f"{name:<24}{model:>10}{largest:>12}{extra:>10}{limit:>12}{taken['seconds']:>9.1f}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
