"""An array on disk holds what was appended; a streamed corpus gives the ids and batches of one in memory."""

import errno
import gc
import tempfile

import numpy as np
import pytest

from jaxlm.data import Examples, Ragged, bucketed, encode, in_order, load_tokenizer, packed, packed_examples, read
from jaxlm.data import encoding as module
from jaxlm.data.disk_array import DiskArray
from jaxlm.data.packing import join
from jaxlm.data.ragged import offsets_of


@pytest.fixture(scope="module")
def texts():
    """Documents of many lengths, the empty one and characters of several bytes among them."""
    documents = [record["text"][: 37 * i] for i, record in enumerate(read("python", "stdlib[:40]"))]
    return [*documents, "", "naïve café, 你好 \U0001f600", "", ""]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return load_tokenizer("bpe:600", texts)


def mapped(array: np.ndarray) -> bool:
    """Whether an array's memory is a file's."""
    while isinstance(array, np.ndarray):
        array = array.base
    return type(array.obj if isinstance(array, memoryview) else array).__name__ == "mmap"


def test_an_array_is_what_was_appended():
    disk_array, parts = DiskArray(np.uint16), [np.arange(5), np.arange(0), np.array([65535]), np.arange(100)[::-2]]
    assert disk_array.array().tolist() == [] and disk_array.array().dtype == np.uint16
    for part in parts:
        disk_array.append(part)
    array = disk_array.array()
    assert array.tolist() == np.concatenate(parts).tolist() and array.dtype == np.uint16
    del disk_array
    gc.collect()
    assert array[5] == 65535 and mapped(array) and not array.flags.writeable


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    disk_array = DiskArray(np.int32)
    disk_array.append(np.arange(1000))
    assert disk_array.array()[-1] == 999 and not list(tmp_path.iterdir())


def test_a_full_disk_is_named(monkeypatch, tokenizer):
    class Full:
        """Takes three bytes, then nothing."""

        taken = 0

        def write(self, data) -> int:
            if self.taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.taken = min(3, len(data))
            return self.taken

        def seek(self, *_) -> int:
            return self.taken

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=r"No space left.*holds 3 bytes.*TMPDIR") as caught:
        encode(tokenizer, ["some text"])
    assert caught.value.errno == errno.ENOSPC and repr(tempfile.gettempdir()) in str(caught.value)


@pytest.mark.parametrize(("chunk", "characters"), [(1024, 1 << 20), (1, 1 << 20), (7, 1 << 20), (1024, 1), (5, 2000)])
def test_streamed_equals_one_by_one(texts, tokenizer, monkeypatch, chunk, characters):
    monkeypatch.setattr(module, "CHARACTERS", characters)
    expected = [[3, *tokenizer(text)["input_ids"], 4, 5] for text in texts]
    got = encode(tokenizer, iter(texts), before=[3], after=[4, 5], chunk=chunk)
    assert [row.tolist() for row in got.ids] == expected
    assert mapped(got.ids.values) and got.ids.values.dtype == np.uint16
    assert not got.types.values.any() and (got.words.values == -1).all()


def test_chunks_are_bounded_by_number_and_by_characters(monkeypatch):
    monkeypatch.setattr(module, "CHARACTERS", 10)
    assert list(module.chunks(["aaaa"] * 7, 100)) == [["aaaa"] * 3, ["aaaa"] * 3, ["aaaa"]]
    assert list(module.chunks([""] * 5, 2)) == [["", ""], ["", ""], [""]]
    assert list(module.chunks([["aaaa"] * 3, ("a", "b")], 9)) == [[["aaaa"] * 3], [("a", "b")]]
    assert list(module.chunks([], 9)) == []


def test_no_more_than_a_chunk_is_read_ahead(tokenizer):
    read_so_far = 0

    def stream():
        nonlocal read_so_far
        for read_so_far in range(1, 101):
            yield "text" if read_so_far < 21 else None

    with pytest.raises(ValueError, match="texts 20 to 29: None"):
        encode(tokenizer, stream(), chunk=10)
    assert read_so_far == 30


def metaspace(texts, normalizer=None):
    """As in many models that were trained with SentencePiece."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="?"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if normalizer else "always")
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["?"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


@pytest.mark.parametrize("kind", ["bpe:600", "wordpiece:400", "character", "metaspace", "prefixed"])
def test_a_long_text_in_pieces_equals_the_whole(texts, tokenizer, monkeypatch, kind):
    from tokenizers import normalizers

    if kind in ("metaspace", "prefixed"):
        tokenizer = metaspace(texts, normalizers.Prepend("_") if kind == "prefixed" else None)
    elif kind != "bpe:600":
        tokenizer = load_tokenizer(kind, texts)
    monkeypatch.setattr(module, "LONG", 50)
    monkeypatch.setattr(module, "CHARACTERS", 300)  # a text may end in another chunk than it began
    backend = tokenizer.backend_tokenizer
    counts = [len(module.pieces(backend, text)) for text in texts]
    assert max(counts) == 1 if kind == "prefixed" else max(counts) > 10  # one that marks beginnings cannot be cut
    assert all("".join(module.pieces(backend, text)) == text for text in texts)
    got = encode(tokenizer, texts, special_tokens=False, before=[1, 2], after=[3], chunk=4).ids
    assert len(got) == len(texts)
    for row, text in zip(got, texts, strict=True):
        assert row.tolist() == [1, 2, *tokenizer(text, add_special_tokens=False)["input_ids"], 3]


def test_the_frame_is_what_a_tokenizer_adds(texts, tokenizer):
    bert = load_tokenizer("wordpiece:400", texts)
    assert module.special_tokens_around(bert) == (
        [bert.cls_token_id],
        [bert.sep_token_id],
    ) and module.special_tokens_around(tokenizer) == ([], [])
    first, last = module.special_tokens_around(bert)
    framed = encode(bert, texts, special_tokens=False, before=first, after=last).ids
    assert np.array_equal(framed.values, encode(bert, texts).ids.values)


def test_pairs_and_words_of_streamed_rows(texts, monkeypatch):
    tokenizer = load_tokenizer("wordpiece:300", texts)
    pairs = [(text[:50], text[50:90]) for text in texts]
    whole, streamed = (encode(tokenizer, pairs, before=[9], chunk=chunk) for chunk in (1024, 3))
    sentences = [text.split()[:20] for text in texts]
    words = [encode(tokenizer, sentences, words=True, after=[9], chunk=chunk) for chunk in (1024, 3)]
    for at_once, in_chunks in ((whole, streamed), words):
        for column in range(3):
            assert np.array_equal(at_once[column].values, in_chunks[column].values)
            assert np.array_equal(at_once[column].offsets, in_chunks[column].offsets)
    assert streamed.types[5][0] == 0 and streamed.types[5][-1] == 1
    for row, sentence in zip(words[1].words, sentences, strict=True):
        assert row[row >= 0].tolist() == list(range(len(sentence))) and row[-1] == -1


def both(texts, tokenizer) -> tuple[Ragged, Ragged]:
    """The same documents mapped from a file, and as int32 in memory."""
    ids = encode(tokenizer, texts, special_tokens=False, after=[0]).ids
    return ids, Ragged(ids.values.astype(np.int32), ids.offsets)


def test_mapped_values_make_the_batches_of_values_in_memory(texts, tokenizer):
    kinds = {
        "joined": lambda ids: packed(ids, 4, 1, length=32),
        "in order": lambda ids: packed(ids, 4, None, length=32, pad_id=7),
        "whole": lambda ids: packed_examples(Examples({"input_ids": ids, "labels": ids}), 2, 0, length=2000),
        "bucketed": lambda ids: bucketed(Examples({"input_ids": ids, "labels": ids}), 3, 0, lengths=(500, 2000)),
        "evaluated": lambda ids: in_order(Examples({"input_ids": ids}), 3, lengths=(2000,)),
    }
    for name, make in kinds.items():
        stored, memory = map(make, both(texts, tokenizer))
        assert stored.steps_per_epoch == memory.steps_per_epoch
        for step in range(-1, stored.steps_per_epoch + 1):
            batch, expected = stored(step), memory(step)
            assert batch.keys() == expected.keys()
            for column in batch:
                assert batch[column].dtype == expected[column].dtype == np.int32, (name, column)
                assert np.array_equal(batch[column], expected[column]), (name, column)


def test_mapped_values_in_ragged_operations(texts, tokenizer):
    stored, memory = both(texts, tokenizer)
    rows = np.array([5, -1, 0, 5])
    assert np.array_equal(stored.padded(rows, 900, -100), memory.padded(rows, 900, -100))
    assert join(stored, 32, np.arange(9)[::-1]).values is stored.values
    narrow, wide = (Examples({"input_ids": column}).fingerprint() for column in (stored, memory))
    assert narrow == wide


def test_a_fingerprint_does_not_depend_on_its_parts(monkeypatch):
    values = np.arange(1000, dtype=np.int32)
    examples = Examples({"input_ids": Ragged(values, offsets_of([400, 600])), "label": np.arange(2.0)})
    whole = examples.fingerprint()
    monkeypatch.setattr("jaxlm.data.ragged._PART", 7)
    assert examples.fingerprint() == whole
    assert whole.startswith("74dab89e38061e9f")  # caches of a teacher's answers know their data by it
