"""The command `jaxlm`: its programs, their flags, and the scripts of a clone that are the same programs."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from absl.flags import FLAGS

from jaxlm.commands import PROGRAMS
from jaxlm.commands.recipes import copied, recipes

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {path.stem: path for path in (ROOT / "experiments").glob("*.py")}


def jaxlm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jaxlm", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_every_program_is_a_module_and_all_but_recipes_a_script():
    modules = {path.stem for path in (ROOT / "jaxlm" / "commands").glob("*.py")} - {"__init__", "program"}
    assert modules == PROGRAMS.keys()
    assert SCRIPTS.keys() == PROGRAMS.keys() - {"recipes"}, "a clone has its recipes"
    for name, path in SCRIPTS.items():
        assert f'run("{name}")' in path.read_text()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_programs(arguments):
    done = jaxlm(*arguments)
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in PROGRAMS)


def test_the_list_of_programs_comes_before_anything_slow_is_imported():
    slow = "[name for name in ('jax', 'numpy', 'absl', 'flax') if name in sys.modules]"
    script = f"import sys; sys.argv = ['jaxlm']; from jaxlm.commands import main; main(); print({slow})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stderr


def test_version():
    assert jaxlm("--version").stdout.startswith("jaxlm 0.")


def test_an_unknown_program_names_the_nearest():
    done = jaxlm("trian", "--config=x.py")
    assert done.returncode == 2 and "did you mean 'train'?" in done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_a_program_is_its_docstring_and_its_flags(name):
    before = set(FLAGS)
    program = importlib.import_module(f"jaxlm.commands.{name}")
    assert set(FLAGS) == before, "flags are global, so importing a program defines none"
    done = jaxlm(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"    jaxlm {name}" in program.__doc__ and done.stdout.strip().startswith(program.__doc__.strip())
    assert f"\njaxlm {name}:\n  --" in done.stdout


def test_a_script_takes_the_flags_of_its_program():
    script = subprocess.run([sys.executable, SCRIPTS["train"], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert script.stdout.replace(f"{SCRIPTS['train']}:", "jaxlm train:") == jaxlm("train", "--help").stdout


def test_what_is_left_over_is_an_error():
    done = jaxlm("train", "--config=configs/quickstart.py", "--workdir=unused", "surplus")
    assert done.returncode and "unexpected ['surplus']" in done.stdout + done.stderr


def test_recipes_are_copied_and_never_replaced(tmp_path):
    (tmp_path / "quickstart.py").write_text("mine")
    lines = copied(recipes(), tmp_path)
    assert (tmp_path / "quickstart.py").read_text() == "mine"
    assert sum("left as it is" in line for line in lines) == 1
    names = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py")}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")} == names
    assert (tmp_path / "pretrain/gpt.py").read_bytes() == (ROOT / "configs/pretrain/gpt.py").read_bytes()
