"""Trained tokenizers are deterministic, lossless where they should be, and survive saving; encoding agrees with
transformers."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from jaxlm.data import encode, load_tokenizer, padding_id, read, sentinel_ids

KINDS = ("bpe:600", "wordpiece:600", "character")


@pytest.fixture(scope="module")
def texts():
    return [record["text"][:3000] for record in read("python", "stdlib[:5%]")] + ["naïve café, 你好 <b>"]


@pytest.fixture(scope="module")
def tokenizers(texts):
    return {kind: load_tokenizer(kind, texts) for kind in KINDS}


def test_sizes_and_special_tokens(tokenizers):
    assert [len(tokenizers[kind]) for kind in KINDS[:2]] == [600, 600]
    for kind, tokenizer in tokenizers.items():
        assert tokenizer.is_fast and tokenizer.pad_token_id is not None
        assert tokenizer.pad_token_id != tokenizer.eos_token_id, kind
    bert = tokenizers["wordpiece:600"]
    assert bert.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    pair = bert("some text", "more")
    assert pair["input_ids"][0] == 2 and pair["input_ids"].count(3) == 2 and pair["input_ids"][-1] == 3
    assert pair["token_type_ids"] == sorted(pair["token_type_ids"]) and pair["token_type_ids"][-1] == 1


def test_decoding_gives_the_text_back(tokenizers, texts):
    for kind in ("bpe:600", "character"):
        tokenizer = tokenizers[kind]
        for text in texts[::7] + texts[-1:]:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    unseen = "Ω≈ \U0001f600\n\t"
    assert tokenizers["bpe:600"].decode(tokenizers["bpe:600"](unseen)["input_ids"]) == unseen
    unknown = tokenizers["character"]("Ω")["input_ids"]
    assert unknown == [tokenizers["character"].unk_token_id]


def test_one_id_a_character(tokenizers, texts):
    ids = encode(tokenizers["character"], texts).ids
    assert ids.lengths.tolist() == [len(text) for text in texts]


def test_training_is_deterministic_across_processes(tokenizers):
    program = """
import hashlib, sys
from jaxlm.data import load_tokenizer, read
texts = [record["text"][:3000] for record in read("python", "stdlib[:5%]")] + ["naïve café, 你好 <b>"]
for kind in sys.argv[1:]:
    print(hashlib.sha256(load_tokenizer(kind, texts).backend_tokenizer.to_str().encode()).hexdigest())
"""
    runs = {subprocess.run([sys.executable, "-c", program, *KINDS], capture_output=True, check=True).stdout}
    digests = [hashlib.sha256(tokenizers[kind].backend_tokenizer.to_str().encode()).hexdigest() for kind in KINDS]
    assert runs == {("\n".join(digests) + "\n").encode()}


def test_training_streams(texts, tokenizers):
    class Stream:
        """Yields texts anew on every pass, and holds none."""

        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(texts)

    for kind in KINDS:
        stream = Stream()
        again = load_tokenizer(kind, stream)
        assert again.backend_tokenizer.to_str() == tokenizers[kind].backend_tokenizer.to_str() and stream.passes > 1


def test_saved_and_loaded(tokenizers, texts, tmp_path):
    for kind, tokenizer in tokenizers.items():
        folder = str(tmp_path / kind.partition(":")[0])
        tokenizer.save_pretrained(folder)
        again = load_tokenizer(folder)
        for text in texts[:5]:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        for name in ("pad_token_id", "eos_token_id", "cls_token_id", "mask_token_id", "unk_token_id"):
            assert getattr(again, name) == getattr(tokenizer, name)


def test_sentinels(texts, tokenizers):
    for kind in KINDS:
        tokenizer = load_tokenizer(kind, texts, sentinels=3)
        ids = sentinel_ids(tokenizer)
        assert ids.dtype == np.int32 and tokenizer.convert_ids_to_tokens(ids) == [f"<extra_id_{i}>" for i in range(3)]
        assert set(ids.tolist()) <= set(tokenizer.all_special_ids)
        assert kind == "character" or len(tokenizer) == 600
        assert ids[1] in tokenizer("a<extra_id_1>b")["input_ids"]
    with pytest.raises(ValueError, match="<extra_id_0>"):
        sentinel_ids(tokenizers["bpe:600"])


@pytest.mark.parametrize(("max_length", "side"), [(None, "right"), (12, "right"), (12, "left")])
def test_encode_equals_transformers(tokenizers, texts, monkeypatch, max_length, side):
    tokenizer = tokenizers["wordpiece:600"]
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    short = [text[:200] for text in texts[:20]]
    pairs = list(zip(short, [*short[1:], "a"], strict=True))
    for inputs in (short, pairs):
        got = encode(tokenizer, inputs, max_length=max_length, chunk=7)
        for i, one in enumerate(inputs):
            arguments = one if isinstance(one, tuple) else (one,)
            expected = tokenizer(*arguments, truncation=max_length is not None, max_length=max_length)
            assert got.ids[i].tolist() == expected["input_ids"] and got.types[i].tolist() == expected["token_type_ids"]
    bare = encode(tokenizer, short, special_tokens=False)
    assert bare.ids[0].tolist() == tokenizer(short[0], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["wordpiece:600", "bpe:600"])
def test_words_equal_transformers(texts, tokenizers, tmp_path, kind):
    tokenizer = tokenizers[kind]
    sentences = [text.split()[:30] for text in texts[:20]]
    got = encode(tokenizer, sentences, words=True, max_length=40)
    if kind.startswith("bpe"):  # transformers asks for this switch, without which words would run together
        from tokenizers import pre_tokenizers

        tokenizer.save_pretrained(str(tmp_path))
        tokenizer = load_tokenizer(str(tmp_path))
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for i, sentence in enumerate(sentences):
        expected = tokenizer(sentence, is_split_into_words=True, truncation=True, max_length=40)
        words = expected.word_ids()
        first = [-1 if w is None or w == before else w for before, w in zip([None, *words], words, strict=False)]
        assert got.ids[i].tolist() == expected["input_ids"] and got.words[i].tolist() == first


@pytest.mark.parametrize(
    ("text", "least"), [("a b", 3), (["a", "b"], 3), (("a b", "c d"), 5)], ids=["text", "words", "pair"]
)
def test_a_length_without_room_for_text_is_refused(tokenizers, text, least):
    """Beside [CLS] and [SEP], and the tokens added to every row; the message names the least length."""
    tokenizer, words = tokenizers["wordpiece:600"], isinstance(text, list)
    for length in (-1, 0, 1, least - 1):
        with pytest.raises(ValueError, match=rf"config.data.max_length = {length} .*at least {least}"):
            encode(tokenizer, [text], max_length=length, words=words)
        with pytest.raises(ValueError, match=rf"config.data.max_length = {length + 1} .*at least {least + 1}"):
            encode(tokenizer, [text], max_length=length, words=words, after=[0])
    assert encode(tokenizer, [text], max_length=least, words=words).ids.lengths.tolist() == [least]
    with pytest.raises(ValueError, match="max_length = 1 leaves no room for text beside 1 special tokens"):
        encode(tokenizer, ["a"], max_length=0, special_tokens=False, after=[3])


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizers):
    backend = tokenizers["wordpiece:600"].backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    before = backend.truncation, backend.padding
    assert encode(tokenizers["wordpiece:600"], ["a b c d e f g h"]).ids.lengths.tolist() == [10]
    assert (backend.truncation, backend.padding) == before
    backend.no_truncation()
    backend.no_padding()
    assert encode(tokenizers["wordpiece:600"], []).ids.lengths.tolist() == []


def test_what_is_no_text_is_named(tokenizers):
    tokenizer = tokenizers["wordpiece:600"]
    with pytest.raises(ValueError, match="texts 2 to 3: None is NoneType, not a string"):
        encode(tokenizer, ["a", "b", "c", None], chunk=2)
    with pytest.raises(ValueError, match="texts 0 to 1: 5 is int, not a string"):
        encode(tokenizer, [("a", "b"), ("c", 5)])


def test_padding_id(tokenizers):
    for tokenizer in tokenizers.values():
        assert padding_id(tokenizer) == tokenizer.pad_token_id

    class Bare:
        pad_token_id, eos_token_id = None, 7

    assert padding_id(Bare()) == 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpee:600", "did you mean 'bpe'"),
        ("bpe", "write 'bpe:SIZE'"),
        ("bpe:many", "write 'bpe:SIZE'"),
        ("character:9", "or 'character'"),
        ("bpe:100", "at least 258"),
        ("wordpiece:9", "too small"),
    ],
)
def test_malformed_specs(texts, spec, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(spec, texts)


def test_nothing_to_train_on_or_to_load(tmp_path):
    for texts in (None, [], [""]):
        with pytest.raises(ValueError, match="needs texts"):
            load_tokenizer("bpe:600", texts)
    with pytest.raises(ValueError, match="several times; give a list, not an iterator"):
        load_tokenizer("bpe:600", iter(["a"]))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(OSError, match="no readable tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.encoder
def test_pretrained_directory(encoder_path):
    tokenizer = load_tokenizer(str(encoder_path))
    assert encode(tokenizer, ["Hello world!"]).ids[0].tolist() == tokenizer("Hello world!")["input_ids"]
