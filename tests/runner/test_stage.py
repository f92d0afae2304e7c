"""A stage from config to result: what it writes, what it refuses and how it says so."""

import errno
import json

import jax
import pytest

import jaxlm
from jaxlm.io.fingerprint import params_sha256
from jaxlm.io.safetensors import open_tensors
from jaxlm.runner import stage
from jaxlm.runner.run_setup import prepare_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Directories of finished runs, by name."""
    return {}


@pytest.fixture
def trained(recipe, finished, tmp_path_factory):
    """A finished run: `(config, workdir, result)`."""
    if not finished:
        config, workdir = recipe(eval_every=6), tmp_path_factory.mktemp("trained")
        config.data.test = config.data.eval
        finished["run"] = config, workdir, stage.run(config, workdir)
    return finished["run"]


def test_result(trained):
    config, workdir, result = trained
    assert json.loads((workdir / "result.json").read_text()) == result
    setup = prepare_run(config, splits=("train",))
    batches = setup.task.batches(setup.splits["train"], setup.lm.tokenizer, setup.data, 8, config.seed)
    assert result["steps"] == 12
    assert result["tokens"] == sum(int((batches(step)["segment_ids"] > 0).sum()) for step in range(12))
    assert result["metrics"].keys() == {"train", "eval", "test"}
    assert result["metrics"]["eval"] == result["metrics"]["test"]
    for name in ("tokens_per_second", "train_seconds", "compile_seconds", "peak_memory_bytes", "seconds"):
        assert result[name] > 0
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["train_seconds"], rel=0.05)
    versions = json.loads((workdir / "versions.json").read_text())
    assert versions["packages"]["jax"] == jax.__version__ and versions.keys() >= {"commit", "python", "devices"}


def test_the_model_is_what_was_hashed_and_measured(trained):
    config, workdir, result = trained
    lm = jaxlm.load(workdir / "model")
    assert params_sha256(lm.params) == result["params_sha256"]
    config = config.copy_and_resolve_references()
    config.model.update(init=str(workdir / "model"), **dict.fromkeys(("num_layers", "num_heads", "dropout")))
    setup = prepare_run(config, splits=("eval",), info=pytest.fail)
    measured = stage.measure(setup, setup.lm, workdir)
    assert measured["metrics"]["eval"] == result["metrics"]["eval"]


def test_layouts(trained, tmp_path):
    """Zeros take little room in jaxlm's own layout; a model that transformers lacks may lie beside a copy for it."""
    config, workdir, _ = trained
    config = config.copy_and_resolve_references()
    config.model.update(init=str(workdir / "model"), **dict.fromkeys(("num_layers", "num_heads", "dropout")))
    config.train.steps = 0

    def written(layout, *surgery):
        config.update(layout=layout, surgery=surgery)
        stage.run(config, tmp_path / layout)
        return tmp_path / layout / "model"

    def size(model):
        return sum(file.stat().st_size for file in model.glob("*.safetensors"))

    zeros = ({"name": "magnitude", "sparsity": 0.9}, {"name": "bake"})
    assert size(written("native", *zeros)) < 0.5 * size(written("transformers", *zeros))
    assert jaxlm.load(tmp_path / "native" / "model").params.keys() == jaxlm.load(workdir / "model").params.keys()
    assert (written("padded", {"name": "prune", "heads": 0.5}) / "transformers" / "model.safetensors").exists()
    config.layout = "dense"
    with pytest.raises(ValueError, match=r"layout.*'dense'"):
        stage.run(config, tmp_path / "dense")


def test_a_run_may_keep_only_what_it_added(trained, tmp_path):
    config, workdir, _ = trained
    config = config.copy_and_resolve_references()
    config.model.update(init=str(workdir / "model"), **dict.fromkeys(("num_layers", "num_heads", "dropout")))
    config.update(layout="adapter", methods=({"name": "lora", "rank": 2, "also_train": "final_norm/.*"},))
    with pytest.raises(ValueError, match=r"baking folds what the methods add.*config.bake = False"):
        stage.run(config, tmp_path / "run")
    config.bake = False
    result = stage.run(config, tmp_path / "run")
    stored = open_tensors(tmp_path / "run" / "model")
    updated = [f"layers_{i}/attention/{name}/kernel" for i in (0, 1) for name in ("query", "value")]
    expected = {f"{path}.{factor}" for path in updated for factor in "ab"}
    assert stored.keys() == expected | {"final_norm/scale", "final_norm/bias"}
    lm = jaxlm.load(tmp_path / "run" / "model")
    assert params_sha256(lm.params) == result["params_sha256"]
    assert lm.tokenizer.get_vocab() == jaxlm.load(workdir / "model").tokenizer.get_vocab()
    config.model.init = ""
    with pytest.raises(ValueError, match=r"config.model.init, which is empty"):
        stage.run(config, tmp_path / "fresh")


def test_a_finished_run_returns_at_once(trained, monkeypatch):
    config, workdir, result = trained
    monkeypatch.setattr(stage, "prepare_run", pytest.fail)
    assert stage.run(config, workdir) == result


def test_another_config_is_refused_field_by_field(trained, recipe):
    _, workdir, _ = trained
    config = recipe(eval_every=6, learning_rate=2e-3)
    config.data.test = config.data.eval
    with pytest.raises(ValueError, match=r"another config:\n  config.train.learning_rate: 0.001 there, 0.002 now\n"):
        stage.run(config, workdir)


def test_a_config_that_does_not_work_leaves_nothing_behind(recipe, tmp_path):
    config = recipe()
    config.data.train = str(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        stage.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_training_at_all(trained, recipe, tmp_path):
    _, workdir, result = trained
    config = recipe(steps=0)
    config.data.tokenizer = ""
    config.model.update(init=str(workdir / "model"), **dict.fromkeys(("num_layers", "num_heads", "hidden_size")))
    config.model.update(dict.fromkeys(("family", "max_positions", "dropout")))
    untrained = stage.run(config, tmp_path)
    assert untrained["params_sha256"] == result["params_sha256"]
    assert untrained.keys() == result.keys() and untrained["tokens_per_second"] == 0


def refused(**changes):
    def change(config, folder):
        for name, value in changes.items():
            section, _, field = name.partition("__")
            value = value.format(folder=folder) if isinstance(value, str) else value
            (config[section].update({field: value}) if field else config.update({section: value}))

    return change


REFUSED = {
    r"config.train.weight_decay = -1.0: must not be negative": refused(train__weight_decay=-1.0),
    r"config.train.batch_size = 0: must be at least 1": refused(train__batch_size=0),
    r"config.train.grad_accum = 3: does not divide batch_size 8": refused(train__grad_accum=3),
    r"config.train.b1 = 1.0": refused(train__b1=1.0),
    r"config.train.remat = 'some': known: none, dots, full": refused(train__remat="some"),
    r"config.train.select = 'loss' needs config.data.eval": refused(
        train__select="loss", train__eval_every=2, data__eval=""
    ),
    r"early stopping needs config.train.select": refused(train__patience=2),
    r"early stopping needs config.train.eval_every": refused(train__patience=2, train__select="loss"),
    r"config.train.select = 'loss' already decides": refused(train__average_last=2, train__select="loss"),
    r"unknown optimizer 'adam'; did you mean 'adamw'\?": refused(train__optimizer="adam"),
    r"unknown schedule 'cosin'; did you mean 'cosine'\?": refused(train__schedule="cosin"),
    r"unknown task 'casual'; did you mean 'causal'\?": refused(task="casual"),
    r"unknown data format 'txt'": refused(data__format="txt"),
    r"config.data.train is empty": refused(data__train=""),
    r"empty.txt.* holds no usable row": refused(data__train="{folder}/empty.txt"),
    r"no tokenizer: set config.data.tokenizer": refused(data__tokenizer=""),
    r"the tokenizer has \d+ tokens beyond the 5 rows of the model's table": refused(model__vocab_size=5),
    r"config.data.max_length = 64, but the model has 32 positions": refused(data__max_length=64),
    r"profile_from = 99: the run has only 12 steps": refused(train__profile_from=99, train__profile_steps=2),
    r"config.train.trainable.*'.\*nothing.\*'": refused(train__trainable=((".*nothing.*", True),)),
    r"nothing trains": refused(train__trainable=((".*", False),)),
    r"unknown entry of config.methods 'lorra'; did you mean 'lora'\?": refused(methods=({"name": "lorra"},)),
    r"a mesh of .*tensor=3 does not fit": refused(mesh={"data": 1, "fsdp": 1, "tensor": 3}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, recipe, tmp_path):
    (tmp_path / "empty.txt").touch()
    config = recipe()
    REFUSED[message](config, tmp_path)
    with pytest.raises(ValueError, match=message):
        stage.run(config, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_unknown_fields_of_a_recipe(recipe):
    config = recipe()
    for section, field, nearest in (("train", "stepps", "steps"), ("model", "hiden_size", "hidden_size")):
        with pytest.raises(AttributeError, match=f"no field '{field}' here; did you mean '{nearest}'"):
            setattr(config[section], field, 1)
    config.sharding.embed = "tensor"  # axis names are not ours to list


def test_a_batch_that_does_not_divide_over_the_devices(recipe, tmp_path, devices):
    devices(8)
    with pytest.raises(ValueError, match=r"12 rows does not divide over the 8 devices.*batch_size a multiple of 8"):
        stage.run(recipe(batch_size=12), tmp_path)


def test_a_teacher_must_speak_the_same_language(trained, recipe, tmp_path):
    _, workdir, _ = trained
    config = recipe()
    config.losses = ({"name": "distill", "teacher": str(workdir / "model")},)
    config.data.tokenizer = "bpe:300"
    with pytest.raises(ValueError, match=r"teacher .* has another tokenizer; .*choose a teacher of the same tokenizer"):
        stage.run(config, tmp_path)


def test_a_full_disk_says_what_to_do(recipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(stage, "train", full)
    with pytest.raises(OSError, match=r"the disk of .* is full .*free some space and give the same command again"):
        stage.run(recipe(), tmp_path)
