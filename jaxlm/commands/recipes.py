"""Copies the recipes into a folder of yours, where they are there to read, run and edit.

    jaxlm recipes
    jaxlm pipeline --config=configs/quickstart.py --workdir=runs/quickstart

A file that is there already is left as it is.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import files
from pathlib import Path

from absl import flags
from absl.flags import FLAGS

CLONE = Path(__file__).resolve().parents[2]
SHARED = "share/jaxlm/configs/"
"""Where an installed package lays them, below the environment's folder: `data-files` in pyproject.toml."""


def define_flags() -> None:
    flags.DEFINE_string("to", "configs", "The folder, made where it is missing.")


def main() -> None:
    for line in copied(recipes(), Path(FLAGS.to)):
        print(line)


def recipes() -> dict[str, Path]:
    """Every recipe by its path below configs/: those of the clone that runs, else those of the installed package."""
    if (CLONE / "pyproject.toml").is_file():
        folder = CLONE / "configs"
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    installed = {path.as_posix().partition(SHARED)[2]: Path(str(path.locate())) for path in files("jaxlm") or ()}
    return {name: path for name, path in sorted(installed.items()) if name.endswith(".py")}


def copied(recipes: Mapping[str, Path], folder: Path) -> list[str]:
    """Copies what is not there yet, and says of every recipe what was done."""
    lines = []
    for name, path in recipes.items():
        target = folder / name
        if target.exists():
            lines.append(f"{target}: is there, left as it is")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        lines.append(f"{target}: written")
    return lines
