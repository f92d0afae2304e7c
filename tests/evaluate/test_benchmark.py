"""A model's own writing in a report: begun as its tokenizer begins texts, ended where the model ends them."""

import jax
import numpy as np
import pytest

from jaxlm.data.settings import DataSettings
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.evaluate.benchmark import NEW_TOKENS, RunnableModel, Trial, prompt_ids, write_sample
from jaxlm.evaluate.settings import ReportSettings
from jaxlm.io.lm import LM
from jaxlm.models import model_config

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def begun(tokenizer):
    """The tokenizer with a begin and an end token that it puts around every text by itself."""
    from tokenizers import processors

    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def test_a_prompt_has_the_tokenizers_own_special_tokens():
    """Those behind a text only where an encoder reads it whole: a text that goes on has not ended."""
    plain, own = load_tokenizer("character", [LETTERS]), begun(load_tokenizer("character", [LETTERS]))
    letters, end = plain.convert_tokens_to_ids(["a", "b"]), own.eos_token_id
    for whole in (False, True):
        assert prompt_ids(plain, "ab", whole) == letters
    assert prompt_ids(own, "ab", False) == [end, *letters] and prompt_ids(own, "ab", True) == [end, *letters, end]
    assert prompt_ids(own, "", False) == []


@pytest.fixture(scope="module")
def sample():
    """`carried ends -> what is shown`, of one random model."""
    tokenizer = begun(load_tokenizer("character", [LETTERS]))
    config = model_config("gpt2", vocab_size=len(tokenizer), hidden_size=16, num_layers=1, num_heads=2)
    trial = Trial("causal", DataSettings(eval="nowhere"), ReportSettings(prompt="the cat"))
    fresh = LM.initialize(config, jax.random.key(0), tokenizer)
    random = fresh.replace(params=jax.tree.map(lambda a: 9 * a, fresh.params))

    def shown(ends):
        lm = random.replace(carried={"generation": {"eos_token_id": ends}})
        return write_sample(RunnableModel(lm, lm.network.run_view(lm.params), None), trial)

    return tokenizer, shown


def test_a_sample_ends_before_the_first_end_token(sample):
    tokenizer, shown = sample
    free, pace = shown([])
    letters = [letter for letter in dict.fromkeys(free) if letter in LETTERS]
    assert len(letters) > 4 and pace > 0 and len(free) <= NEW_TOKENS
    ends = letters[2:4]
    text, pace = shown(tokenizer.convert_tokens_to_ids(ends))
    first = np.flatnonzero([letter in ends for letter in free])[0]
    assert text == free[:first] and first > 0 and pace > 0
