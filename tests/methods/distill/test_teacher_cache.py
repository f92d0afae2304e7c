"""A teacher's answers on disk: found by content, exact, refused when they are another's."""

import json

import numpy as np
import pytest

from jaxlm.data.loader import Batches, bucketed, packed
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.methods.distill.teacher_cache import Cache, CacheSettings, Layout, row_digests, write_cache

FINGERPRINT = {"data": "a" * 64, "packing": {"max_length": 8}, "tokenizer": "b", "teacher": "c"}
LAYOUT = Layout(3, (1.0, 2.0), "float32", 50)


def texts(rows=11):
    rng = np.random.default_rng(0)
    return Ragged.of([rng.integers(1, 50, n) for n in rng.integers(1, 8, rows)])


def examples():
    ids = texts()
    return Examples({"input_ids": ids, "labels": np.arange(len(ids), dtype=np.int32) % 3})


def answer(batch):
    """A teacher whose answers are a function of the tokens alone."""
    ids = batch["input_ids"] if batch["labels"].ndim > 1 else batch["input_ids"][:, 0]
    top = (ids[..., None] + np.arange(3)) % 50
    return {"ids": top, "logits": -np.float32(top) / 7, "logsumexp": np.stack([ids, 2 * ids], -1).astype(np.float32)}


def write(directory, batches, steps, layout=LAYOUT, asked=None):
    def ask(batch):
        if asked is not None:
            asked.append(batch)
        return answer(batch)

    made_for = {"steps": steps, "seed": 0, "batch_size": 4}
    write_cache(directory, FINGERPRINT, layout, batches, made_for, ask)
    return Cache(directory)


def sentences(seed=0, batch_size=4, bucket=4):
    return bucketed(examples(), batch_size, seed, lengths=range(bucket, 9, bucket))


def documents(seed=0):
    return packed(texts(), 2, seed, length=8)


def check(batch):
    """The columns of a batch are the teacher's answers where a label counts, and 0 elsewhere."""
    labelled = batch["labels"] != -100
    for part, expected in answer(batch).items():
        column = batch[f"teacher_0_{part}"]
        assert np.array_equal(column[labelled], expected[labelled]) and not column[~labelled].any()
        assert column.shape == expected.shape


def test_any_order_batch_size_and_padding_finds_the_rows(tmp_path):
    """Examples are asked about once, whatever the epoch; another seed, batch size and bucket reads the same cache."""
    asked = []
    cache = write(tmp_path / "cache", sentences(), 9, asked=asked)
    assert len(asked) == 3 and cache.facts["rows"] == cache.facts["tokens"] == 11
    for batches in (sentences(), sentences(seed=7), sentences(batch_size=3, bucket=8)):
        with_answers = cache.attach(batches, "teacher_0")
        for step in range(6):
            check(with_answers(step))
    assert with_answers.kinds == batches.kinds and with_answers.steps_per_epoch == batches.steps_per_epoch


def test_packed_rows_are_those_of_a_seed(tmp_path):
    """Every step's own rows, pure in the step; another seed cuts elsewhere and is refused, by the first batch."""
    cache = write(tmp_path / "cache", documents(), 12)
    with_answers = cache.attach(documents(), "teacher_0")
    for step in (3, 0, 11, 3):
        check(with_answers(step))
    cache.check(documents(), 12)
    for batches, steps in ((documents(seed=1), 12), (documents(), 40)):
        with pytest.raises(ValueError, match=r"do not cover this row; they were written for steps 12, seed 0"):
            cache.check(batches, steps)


def test_shapes_are_known_without_rows(tmp_path):
    cache = write(tmp_path / "cache", documents(), 2)
    empty, real = (cache.attach(documents(), "teacher_0")(step) for step in (-1, 0))
    assert {n: (a.shape, a.dtype) for n, a in empty.items()} == {n: (a.shape, a.dtype) for n, a in real.items()}


def test_labels_of_every_kind(tmp_path):
    """Positions without a label are not stored; rows without any are not asked about."""
    batch = {
        "input_ids": np.array([[3, 4, 5], [6, 7, 0], [0, 0, 0]]),
        "attention_mask": np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
        "labels": np.array([[-100, 4, -100], [9, -100, -100], [-100] * 3]),
    }
    cache = write(tmp_path / "cache", Batches(lambda step: batch, 1), 1)
    assert cache.facts["rows"] == 2 and cache.facts["tokens"] == 2
    check(cache.attach(Batches(lambda step: batch, 1), "teacher_0")(0))


def test_its_size_is_what_lies_on_disk(tmp_path):
    cache = write(tmp_path / "cache", documents(), 4)
    size = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir() if file.name != "cache.json")
    assert cache.facts["bytes"] == size
    assert cache.facts["bytes_per_token"] == round(size / cache.facts["tokens"], 2)
    assert LAYOUT.record.itemsize == 3 * 2 + 3 * 4 + 2 * 4
    assert Layout(64, (1.0, 2.0), "float16", 100_000).record.itemsize == 64 * 6 + 8


def test_half_precision_is_relative(tmp_path):
    half = Layout(3, (1.0, 2.0), "float16", 50)
    cache = write(tmp_path / "cache", documents(), 2, half)
    batch = cache.attach(documents(), "teacher_0")(0)
    labelled = batch["labels"] != -100
    assert batch["teacher_0_logits"].dtype == np.float16
    assert np.allclose(batch["teacher_0_logits"][labelled], answer(batch)["logits"][labelled], rtol=1e-3)


@pytest.mark.parametrize("name", FINGERPRINT)
def test_another_fingerprint_is_refused_by_name(tmp_path, name):
    cache = write(tmp_path / "cache", documents(), 1)
    cache.check_same(FINGERPRINT)
    cache.check_same({n: v for n, v in FINGERPRINT.items() if n != "teacher"})
    with pytest.raises(ValueError, match=rf"another {name} \({name}: .* there, other now\)"):
        cache.check_same(FINGERPRINT | {name: "other"})


def test_what_was_cut_off_is_written_anew(tmp_path):
    def gone(step):
        if step == 2:
            raise ConnectionAbortedError
        return documents()(step)

    with pytest.raises(ConnectionAbortedError):
        write(tmp_path / "cache", Batches(gone, 3), 3)
    with pytest.raises(FileNotFoundError, match="no teacher's answers"):
        Cache(tmp_path / "cache")
    cache = write(tmp_path / "cache", documents(), 3)
    assert json.loads((tmp_path / "cache/cache.json").read_text())["made_for"]["steps"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    cache.check(documents(), 3)


def test_digests_tell_rows_apart():
    one = {"input_ids": np.array([[1, 2, 0]]), "attention_mask": np.array([[1, 1, 0]]), "labels": np.array([4])}
    same = {"input_ids": np.array([[1, 2]]), "attention_mask": np.array([[1, 1]]), "labels": np.array([4])}
    assert row_digests(one) == row_digests(same)
    for name, value in (("input_ids", [[1, 3]]), ("labels", [5]), ("attention_mask", [[1, 0]])):
        assert row_digests(same | {name: np.array(value)}) != row_digests(same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "keeps no answer"),
        ({"dtype": "int8"}, "known: float16, float32"),
        ({"temperatures": (0.0,)}, "positive"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CacheSettings("somewhere", **options)
