"""Every recipe under configs/: at full size its shapes and shardings resolve, and tiny it trains and resumes.

Recipes are found, not listed: a new file is tested as it is. Where a recipe has sizes, shapes are checked for each.
"""

import dataclasses
import importlib.util
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from jaxlm.core import NoData, arrays, chain
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.io.lm import LM
from jaxlm.io.pretrained import retarget, save
from jaxlm.models import model_config
from jaxlm.models.network import Network
from jaxlm.parallel import make_mesh
from jaxlm.runner import dry_run, labels, registry, stage
from jaxlm.runner.config import default_config, plain
from jaxlm.runner.dry_run import NOMINAL_STEPS, init_on_shapes, perform_on_shapes, prepare_dry_run
from jaxlm.runner.pipeline import stage_config
from jaxlm.runner.run_setup import Operation, apply_surgery
from jaxlm.runner.sharded_step import ShardedStep, sharded_step
from jaxlm.runner.teachers import TeacherPool, loss_methods
from jaxlm.tasks import Task

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SENTENCES = ("the film is a joy", "a dull and weary plot", "we laughed a lot", "nothing works in this sad film") * 12


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A file and its argument: what stands behind --config."""

    path: Path
    size: str | None

    def __str__(self) -> str:
        name = str(self.path.relative_to(CONFIGS))
        return name if self.size is None else f"{name}:{self.size}"

    def config(self) -> ConfigDict:
        get_config = module(self.path).get_config
        return get_config() if self.size is None else get_config(self.size)


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def recipes() -> list[Recipe]:
    paths = sorted(path for path in CONFIGS.rglob("*.py") if "get_config" in path.read_text())
    return [Recipe(path, size) for path in paths for size in getattr(module(path), "SIZES", (None,))]


every_size = pytest.mark.parametrize("recipe", recipes(), ids=str)
every_recipe = pytest.mark.parametrize(
    "recipe", [Recipe(path, None) for path in dict.fromkeys(r.path for r in recipes())], ids=str
)


def stages(config: ConfigDict, directory_of: Callable[[str], Path]) -> Iterator[tuple[str, ConfigDict]]:
    """The stages of a pipeline, each with its name and its own config; a recipe of one stage is its only one."""
    done: dict[str, Path] = {}
    for entry in plain(config.stages):
        yield entry["name"], stage_config(config, entry, done)
        done[entry["name"]] = directory_of(entry["name"])
    if not config.stages:
        yield "only", config


@every_recipe
def test_opens_with_its_command_and_hardware(recipe: Recipe):
    text = module(recipe.path).__doc__ or ""
    name = recipe.path.relative_to(CONFIGS.parent)
    config = recipe.config()
    program = "search" if config.search.vary else "pipeline" if config.stages else "train"
    assert f"python experiments/{program}.py --config={name}" in text
    assert "Hardware" in text or "CPU cores" in text
    assert "RESULT" not in text


# -- full size --------------------------------------------------------------------------------------------------------

ENCODER = {"hidden_size": 384, "num_layers": 6, "num_heads": 12, "ffn_size": 1536, "vocab_size": 30522}
"""What recipes that start from a pretrained encoder are measured with."""
CHARACTERS = 68
"""How many tokens a tokenizer of characters has."""


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, LM]:
    """Models of stages by their directory, as shapes, for `jaxlm.runner` to load; any other directory has `ENCODER`."""
    models: dict[str, LM] = {}

    def load(directory: str, head: str, labels: Sequence[str] | None, regression: bool) -> LM:
        lm = models.get(directory)
        config = retarget(model_config("bert", **ENCODER) if lm is None else lm.config, head, labels, regression)
        return LM(config, Network(config).abstract()) if lm is None or config != lm.config else lm

    def stored_classes(directory: str, task: Task) -> tuple[str, ...]:
        return models[directory].config.labels if directory in models else ()

    monkeypatch.setattr(dry_run, "load_abstract", load)
    monkeypatch.setattr(labels, "stored_classes", stored_classes)
    return models


def without_data(name: str, operation: Operation, lm: LM) -> LM:
    """An entry of `config.surgery` on shapes; what reads data, which are not here at full size, is left out."""
    try:
        return perform_on_shapes(name, operation, lm)
    except NoData:
        return lm


def full_stage(config: ConfigDict, stored: dict[str, LM]) -> tuple[LM, ShardedStep]:
    """The model of a stage after surgery, and its step over eight devices."""
    if not (config.model.init or config.data.tokenizer):
        config.model.init = "ENCODER"
    if config.data.tokenizer == "character":
        config.model.vocab_size = CHARACTERS
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    setup = apply_surgery(prepare_dry_run(config, mesh), without_data)
    teachers = TeacherPool(setup, lambda directory: stored.get(directory, setup.lm))
    method = chain([*map(registry.method, setup.config["methods"]), *loss_methods(setup.config["losses"], teachers)])
    start = init_on_shapes(method, jax.random.key(0), setup.lm)
    return setup.lm, sharded_step(setup, method, start, NOMINAL_STEPS)


def total_and_held(step: ShardedStep) -> tuple[int, int]:
    """Bytes of all parameters in training, and of those that one device holds."""
    values, placement = arrays(step.params), arrays(step.placement.params)
    assert placement.keys() == values.keys()
    size = lambda shape, name: math.prod(shape) * values[name].dtype.itemsize  # noqa: E731
    total = sum(size(value.shape, name) for name, value in values.items())
    return total, sum(size(placement[name].shard_shape(value.shape), name) for name, value in values.items())


@pytest.mark.full("reproduce/gpt.py", "reproduce/sst2.py", "prune_in_steps.py")
@every_size
def test_full_size_shards_over_eight_devices(
    recipe: Recipe, stored: dict[str, LM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # a table of times that is measured here is no table of this machine
    for name, config in stages(recipe.config(), lambda name: Path(name)):
        lm, step = full_stage(config, stored)
        stored[str(Path(name) / "model")] = lm
        total, held = total_and_held(step)
        most = 0.6 if any("svd" in entry["name"] for entry in config.surgery) else 0.4  # a rank is not shared out
        assert held < most * total, f"{name}: a quarter each over fsdp and tensor, but for vectors"


# -- tiny -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile() -> Iterator[None]:
    """Two steps of a tiny model: what counts is the time of compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data in every format, and the model directory that recipes name by default."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "data.text").write_text("\n\n".join(SENTENCES))
    (root / "data.tsv").write_text("".join(f"{text}\t{i % 2}\n" for i, text in enumerate(SENTENCES)))
    tags = {"film": "B-work", "plot": "I-work"}
    words = [[f"{word}\t{tags.get(word, 'O')}\n" for word in text.split()] for text in SENTENCES]
    (root / "data.conll").write_text("\n".join("".join(rows) for rows in words))
    for kind in ("text", "tsv", "conll"):  # nothing is calibrated on what it is measured on
        shutil.copy(root / f"data.{kind}", root / f"held.{kind}")
    tokenizer = load_tokenizer("wordpiece:120", SENTENCES)
    structure = model_config(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_layers=6,
        num_heads=3,
        ffn_size=16,
        max_positions=16,
        dropout=0.1,
        head="sequence",
        labels=("0", "1"),
    )
    save(LM.initialize(structure, jax.random.key(0), tokenizer), root / "runs" / "sequence" / "model")
    return root


def tiny(config: ConfigDict, data_root: Path) -> ConfigDict:
    """The recipe with a small model, little data and two steps; what it is a recipe for stays."""
    if config.data.tokenizer:
        smallest = {"bpe": "bpe:300", "wordpiece": "wordpiece:120", "character": "character"}
        config.data.tokenizer = smallest[config.data.tokenizer.partition(":")[0]]
    elif config.model.init in ("", "ENCODER"):
        config.model.init = "runs/sequence/model"
    if not config.model.init:
        config.model.update({"hidden_size": 12, "num_heads": 3, "num_kv_heads": None, "ffn_size": 16})
        config.model.max_positions = min(config.model.max_positions or 0, 16)
        config.model.num_layers = min(config.model.num_layers, 4)
    if config.data.format == "python":
        config.data.format = "text"
    config.data.max_length = 16
    for split in ("train", "eval", "test"):
        config.data[split] = str(data_root / f"{'data' if split == 'train' else 'held'}.{config.data.format}")
    train = config.train
    train.warmup = min(train.warmup, 0.5)
    train.batch_size = 16
    train.grad_accum = min(train.grad_accum, 2)
    trains = train.steps or train.epochs or not config.stages  # stages of a pipeline may be without
    train.steps, train.epochs, train.checkpoint_every = 2 if trains else 0, 0.0, 1
    for entry in config.stages:
        for method in entry.get("methods", ()):
            if "length" in method:
                method["length"] = 16
        for surgery in entry.get("surgery", ()):
            if surgery["name"] == "mixed_precision":
                surgery["budget"] = 0.5  # vectors are more of a tiny model
        if "data" in entry:
            assert entry["data"].keys() <= {"unlabelled", "unlabelled_format", "unlabelled_columns"}
            entry["data"] = {"unlabelled": str(data_root / "data.text"), "unlabelled_format": "text"}
        if "train" in entry:
            steps = min(entry["train"].get("steps", 2), 2)
            entry["train"] = {**entry["train"], "steps": steps, "epochs": 0.0, "checkpoint_every": 1}
    return config


def cut_off(workdir: Path) -> None:
    """Leaves a finished run as it was after its first step."""
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "model")
    shutil.rmtree(workdir / "checkpoints" / "2")


# The many stages under reproduce/ are of kinds that the other recipes have one of each; `make test-full` runs all.
@pytest.mark.full("prune_in_steps.py", "distill.py", "prune.py", "finetune/token.py", "pretrain/bert.py")
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(path, None)
        for path in dict.fromkeys(r.path for r in recipes())
        if path.parent.name != "reproduce" or os.environ.get("JAXLM_FULL")
    ],
    ids=str,
)
def test_tiny_trains_and_resumes(
    recipe: Recipe, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(data_root)
    for name, config in stages(tiny(recipe.config(), data_root), lambda name: tmp_path / name):
        result = stage.run(config, tmp_path / name, name)
        assert result["steps"] == config.train.steps
        assert {"eval", "test"} <= result["metrics"].keys()
        assert all(math.isfinite(value) for value in result["metrics"]["test"].values())
        if result["steps"] == 0:
            continue
        cut_off(tmp_path / name)
        capsys.readouterr()
        again = stage.run(config, tmp_path / name, name)
        assert "resumed from step 1" in capsys.readouterr().err
        assert again["params_sha256"] == result["params_sha256"]
        assert again["metrics"]["test"] == result["metrics"]["test"]


def test_unknown_sizes_name_the_known():
    for recipe in recipes():
        if recipe.size is not None:
            with pytest.raises(ValueError, match=re.escape(recipe.size)):
                module(recipe.path).get_config("enormous")


def test_every_field_of_a_recipe_is_one_of_the_default():
    known = default_config()
    for recipe in recipes():
        config = recipe.config()
        assert config.keys() == known.keys(), str(recipe)
        for section in ("model", "data", "train"):
            assert config[section].keys() == known[section].keys(), f"{recipe}: {section}"
