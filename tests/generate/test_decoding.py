"""Generation with a cache gives the tokens that transformers gives, wherever a prompt has its padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.generate.decoding import generate, stop_ids
from jaxlm.models import model_config
from jaxlm.models.network import Network

pytestmark = pytest.mark.slow

SMALL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def models():
    import transformers as hf

    plain = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **SMALL)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(sliding_window=4, **plain, **SMALL)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5, **SMALL)),
    }


@pytest.mark.torch
@pytest.mark.parametrize("family", ["gpt2", "mistral", "t5"])
def test_greedy(tmp_path, family):
    import torch

    torch.manual_seed(0)
    model = models()[family]().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    lm = jaxlm.load(tmp_path)

    ids = np.random.default_rng(0).integers(1, 61, (3, 7))
    mask = (np.arange(7) >= np.array([[0], [3], [5]])).astype(int)
    if family == "t5":
        mask = mask[:, ::-1].copy()  # an encoder's prompt is padded on the right
    ids = np.where(mask, ids, 0)
    prompt = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    theirs = model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=True).numpy()
    ours = np.asarray(lm.generate({"input_ids": ids, "attention_mask": mask}, new_tokens=8))
    assert np.array_equal(ours, theirs[:, -8:])
    if family == "t5":
        return
    right, holes = (np.zeros_like(mask) for _ in range(2))
    for row, size in enumerate(mask.sum(1)):
        right[row, :size] = 1
        holes[row, np.sort(np.random.default_rng(row).permutation(7)[:size])] = 1
    for real in (right, holes):
        moved = np.full_like(ids, 60)
        moved[real == 1] = ids[mask == 1]
        ours = np.asarray(lm.generate({"input_ids": moved, "attention_mask": real}, new_tokens=8))
        assert np.array_equal(ours, theirs[:, -8:])


CONFIG = model_config("llama", vocab_size=29, hidden_size=16, num_layers=1, num_heads=2, tie_embeddings=False)
PROMPT = {"input_ids": np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])}
NEW = 6


@functools.cache
def params():
    return Network(CONFIG).init(jax.random.key(1))


def written(stop=None, batch=PROMPT, **options):
    """What a random model writes, at a temperature at which it repeats itself little."""
    key = jax.random.key(0)
    tokens = generate(CONFIG, params(), batch, key, new_tokens=NEW, temperature=2.0, stop=stop, **options)
    return np.asarray(tokens)


def test_a_row_repeats_the_first_end_that_it_meets():
    free = written()
    several = [int(free[0, 2]), int(free[1, 1])]
    expected = free.copy()
    for row in expected:
        met = np.flatnonzero(np.isin(row, several))
        if len(met):
            row[met[0] :] = row[met[0]]
    assert (expected[0] != free[0]).any() and (expected[1] != free[1]).any()
    for stop in (
        several,
        tuple(several),
        np.array(several),
        jnp.array(several),
        {*several},
        [np.int32(several[0]), *several],
    ):
        assert np.array_equal(written(stop), expected)
    one = written(np.int64(several[0]))
    assert np.array_equal(one, written([several[0]])) and not np.array_equal(one, expected)
    assert np.array_equal(written(()), free) and np.array_equal(written([]), free)


@pytest.mark.parametrize("stop", ["a", ["a"], -1, 29, [1, 29], 1.5, True, [None], {"eos_token_id": 2}, np.array([[1]])])
def test_a_stop_that_is_no_id_is_refused(stop):
    with pytest.raises(ValueError, match=r"stop .* is no id of a token; give one id from 0 to 28"):
        stop_ids(stop, 29)


def test_nothing_to_write_is_refused():
    with pytest.raises(ValueError, match="new_tokens 0: at least 1"):
        generate(CONFIG, params(), PROMPT, jax.random.key(0), new_tokens=0)


def test_of_a_packed_row_the_last_document_goes_on():
    """As it would alone; the decoder's side of a batch is no prompt."""
    alone = {"input_ids": np.array([[3, 4]])}
    row = {"input_ids": np.array([[5, 1, 3, 4, 0]]), "segment_ids": np.array([[1, 1, 2, 2, 0]])}
    assert np.array_equal(written(batch=row | {"positions": np.array([[0, 1, 0, 1, 0]])}), written(batch=alone))


def test_the_head_reads_one_token_of_a_prompt():
    """No logits of the whole prompt, which of a long one and a large vocabulary would take the most memory of all."""
    program = str(
        jax.make_jaxpr(lambda p, b: generate(CONFIG, p, b, jax.random.key(0), new_tokens=NEW))(params(), PROMPT)
    )
    assert "f32[3,1,29]" in program and "[3,4,29]" not in program and "f32[3,4,16]" in program


@functools.cache
def language_model(**carried):
    tokenizer = load_tokenizer("character", ["abcdefghijklmnopqrstuvwxyz"])
    assert len(tokenizer) == CONFIG.vocab_size
    return jaxlm.LM(CONFIG, params(), tokenizer, carried=carried)


def sampled(lm, **options):
    return np.asarray(lm.generate(PROMPT, new_tokens=NEW, key=jax.random.key(0), temperature=2.0, **options))


def test_strings_end_a_row_where_they_are_complete():
    """A string may span tokens; a row that holds none goes on; ids beside strings do what they do alone."""
    lm = language_model()
    free = sampled(lm, stop=())
    text = [lm.tokenizer.decode(row) for row in free]
    string = text[0][1:3]
    pad = lm.tokenizer.pad_token_id
    ends = [row.find(string) + len(string) if string in row else NEW for row in text]
    assert ends[0] == 3 and NEW in ends
    expected = np.where(np.arange(NEW) < np.array(ends)[:, None], free, pad)
    assert np.array_equal(sampled(lm, stop=string), expected)
    assert np.array_equal(sampled(lm, stop=["not there", string]), expected)
    mixed = sampled(lm, stop=[string, int(free[1, 0])])
    assert np.array_equal(mixed[0], expected[0]) and (mixed[1] == free[1, 0]).all()


def test_the_model_says_what_ends_its_texts():
    free = sampled(language_model(), stop=())
    ends = (int(free[0, 1]), int(free[1, 0]))
    lm = jaxlm.LM(
        CONFIG,
        params(),
        language_model().tokenizer,
        carried={"generation": {"eos_token_id": [*ends, 29]}, "eos_token_id": 4},
    )
    assert lm.end_ids == ends  # the generation config before the config, ids of the vocabulary only
    assert np.array_equal(sampled(lm), written(ends)) and not np.array_equal(sampled(lm), free)
    assert jaxlm.LM(CONFIG, params(), lm.tokenizer, carried={"eos_token_id": 4}).end_ids == (4,)
    assert jaxlm.LM(CONFIG, params(), lm.tokenizer).end_ids == (lm.tokenizer.eos_token_id,)
    assert jaxlm.LM(CONFIG, params()).end_ids == ()


def test_what_cannot_be_generated_from_is_refused():
    lm, bare = language_model(), jaxlm.LM(CONFIG, params())
    mask = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]])
    with pytest.raises(ValueError, match="row 1 of the prompts has no token"):
        lm.generate(PROMPT | {"attention_mask": mask}, new_tokens=1)
    with pytest.raises(ValueError, match="row 0 of the prompts has no token"):
        lm.generate({"input_ids": np.zeros((1, 0), int)}, new_tokens=1)
    with pytest.raises(ValueError, match=r"stop .*no tokenizer to decode"):
        bare.generate(PROMPT, new_tokens=1, stop="a")
    with pytest.raises(ValueError, match=r"stop .*an empty string ends nothing"):
        lm.generate(PROMPT, new_tokens=1, stop=["a", ""])
    with pytest.raises(ValueError, match=r"stop .* is no id"):
        lm.generate(PROMPT, new_tokens=1, stop=["a", 77])
