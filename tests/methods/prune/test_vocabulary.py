"""Vocabulary trimming: the corpus keeps its pieces, kept tokens their logits, and the tokenizer survives saving."""

import json

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.core import Quantized, SurgeryContext, flatten, map_leaves
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.io.lm import LM
from jaxlm.methods.prune.vocabulary import merge_ranks, merges_of, trim_vocabulary, trimmed, used_ids
from jaxlm.models import model_config

pytestmark = pytest.mark.slow

CORPUS = ["the film is a joy, unaffected and naïve!", "a dull and weary plot", "we laughed 3.5 times in this film"] * 3
OTHER = ["zebras crossing quickly over many other animals, over and over again", "nothing of this is in the corpus"] * 9
CONTEXT = SurgeryContext(read_texts=lambda split: CORPUS)
KINDS = ("wordpiece:200", "bpe:420", "unigram")


def tokenizer_of(kind):
    """A tokenizer that knows more than the corpus needs."""
    if kind != "unigram":
        return load_tokenizer(kind, CORPUS + OTHER)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    inner.train_from_iterator(
        CORPUS + OTHER, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def lm_with(tokenizer, family="gpt2", **fields):
    """A model with more rows than tokens, as padded tables have."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 8, "vocab_size": len(tokenizer) + 5}
    if family != "t5":
        sizes["max_positions"] = 64
    config = model_config(family, **sizes, pad_token_id=tokenizer.pad_token_id, **fields)
    lm = LM.initialize(config, jax.random.key(0), tokenizer)
    noise = lambda _, a: 0.5 * jax.random.normal(jax.random.key(a.size), a.shape)  # noqa: E731
    return lm.replace(params=map_leaves(noise, lm.params))


def trim(kind, family="gpt2", **fields):
    """A model, and the same with the vocabulary of the corpus."""
    lm = lm_with(tokenizer_of(kind), family, **fields)
    return lm, trim_vocabulary(lm, CONTEXT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {}),
        ("gpt2", {"tie_embeddings": False}),
        ("bert", {}),
        ("roberta", {}),
        ("t5", {"decoder_start_token_id": 0}),
    ],
)
def test_pieces_and_logits_stay(kind, family, fields, tmp_path):
    lm, small = trim(kind, family, **fields)
    tokenizer, short = lm.tokenizer, small.tokenizer
    assert small.config.vocab_size == len(short) < len(tokenizer)
    assert {path: leaf.shape for path, leaf in flatten(small.params).items()} == {
        path: leaf.shape for path, leaf in flatten(small.network.abstract()).items()
    }
    for text in CORPUS:
        assert short.tokenize(text) == tokenizer.tokenize(text)

    def logits(lm):
        ids = np.array([lm.tokenizer(CORPUS[0]).input_ids])
        batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
        return np.asarray(lm.network.forward(lm.params, batch)["logits"])

    new, old = logits(small), logits(lm)
    old_ids = [tokenizer.convert_tokens_to_ids(token) for token in short.convert_ids_to_tokens(range(len(short)))]
    assert np.abs(old).max() > 0.1 and np.allclose(new, old[..., old_ids], atol=1e-6)
    jaxlm.save(small, tmp_path / "model")
    again = jaxlm.load(tmp_path / "model")
    assert again.config == small.config and again.tokenizer.get_vocab() == short.get_vocab()
    for text in CORPUS + OTHER:
        assert again.tokenizer(text).input_ids == short(text).input_ids
    assert again.tokenizer.decode(short(CORPUS[1]).input_ids, skip_special_tokens=True) == tokenizer.decode(
        tokenizer(CORPUS[1]).input_ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_stay_and_other_text_is_spelled(kind):
    lm, small = trim(kind)
    tokenizer, short = lm.tokenizer, small.tokenizer
    assert short.all_special_tokens == tokenizer.all_special_tokens
    assert small.config.pad_token_id == short.pad_token_id == short.convert_tokens_to_ids(tokenizer.pad_token)
    for text in OTHER[:2]:
        assert len(short.tokenize(text)) > len(tokenizer.tokenize(text)), "in smaller pieces"
        assert short.unk_token_id is None or short.unk_token_id not in short(text).input_ids


def test_merges_that_the_corpus_never_needs_go():
    tokenizer = tokenizer_of("bpe:420")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    _, short = trimmed(state, used_ids(tokenizer, CORPUS), alphabet=True)
    assert len(short["model"]["merges"]) < len(state["model"]["merges"])
    ranks = merge_ranks(state["model"])
    for piece in {piece for text in CORPUS for piece in tokenizer.tokenize(text)}:
        assert not merges_of(piece, ranks) or "".join(merges_of(piece, ranks)[-1]) == piece


def test_without_the_alphabet_only_what_is_used_stays():
    tokenizer = tokenizer_of("wordpiece:200")
    lm = lm_with(tokenizer)
    used_alone, with_alphabet = (
        trim_vocabulary(lm, CONTEXT, alphabet=alphabet).config.vocab_size for alphabet in (False, True)
    )
    used = used_ids(tokenizer, CORPUS) | set(tokenizer.all_special_ids)
    assert used_alone == len(used) < with_alphabet


def test_trimming_twice_changes_nothing():
    _, small = trim("bpe:420")
    again = trim_vocabulary(small, CONTEXT)
    assert again.config == small.config and again.tokenizer.get_vocab() == small.tokenizer.get_vocab()
    table = "embed/tokens/embedding"
    assert np.array_equal(flatten(again.params)[table], flatten(small.params)[table])


def test_codes_are_cut_with_their_scales():
    lm = lm_with(tokenizer_of("bpe:420"))
    quantize = lambda path, leaf: Quantized.of(leaf, channel=-2) if path == "embed/tokens/embedding" else leaf  # noqa: E731
    small = trim_vocabulary(lm.replace(params=map_leaves(quantize, lm.params)), CONTEXT)
    table = small.params["embed"]["tokens"]["embedding"]
    assert table.codes.shape == (small.config.vocab_size, 16) and table.scale.shape == (small.config.vocab_size, 1)


@pytest.mark.encoder
def test_a_real_tokenizer(encoder_path, tmp_path):
    lm = jaxlm.load(encoder_path)
    small = trim_vocabulary(lm, CONTEXT)
    assert small.config.vocab_size < 2100
    jaxlm.save(small, tmp_path / "model")
    again = jaxlm.load(tmp_path / "model")
    assert again.tokenizer.tokenize(CORPUS[0]) == lm.tokenizer.tokenize(CORPUS[0])
    batches = [{"input_ids": np.array([t(CORPUS[0]).input_ids])} for t in (again.tokenizer, lm.tokenizer)]
    hidden = [m.apply(m.params, batch)["last_hidden"] for m, batch in zip((again, lm), batches, strict=True)]
    assert np.array_equal(hidden[0], hidden[1])


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_model_without_tokenizer_is_refused():
    lm = lm_with(tokenizer_of("bpe:420")).replace(tokenizer_source=None)
    with pytest.raises(ValueError, match="trim_vocabulary: the model has no tokenizer"):
        trim_vocabulary(lm, CONTEXT)


def test_an_empty_corpus_is_refused():
    lm = lm_with(tokenizer_of("bpe:420"))
    with pytest.raises(ValueError, match="the split 'train' has no text"):
        trim_vocabulary(lm, SurgeryContext(read_texts=lambda split: []))


def test_marked_word_ends_are_refused():
    state = json.loads(tokenizer_of("bpe:420").backend_tokenizer.to_str())
    state["model"]["end_of_word_suffix"] = "</w>"
    with pytest.raises(ValueError, match="mark the inside or the end of a word"):
        trimmed(state, {1, 2}, True)


def test_a_tokenizer_that_would_split_otherwise_is_noticed(monkeypatch):
    monkeypatch.setattr("jaxlm.methods.prune.vocabulary.merges_of", lambda piece, ranks: [])
    with pytest.raises(ValueError, match="splits 'the film"):
        trim("bpe:420")
