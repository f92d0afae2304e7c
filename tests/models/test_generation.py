"""Greedy generation with a cache gives the tokens that transformers gives, prompts padded on the left."""

import numpy as np
import pytest

import jaxlm

pytestmark = pytest.mark.torch

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
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    theirs = model.generate(**given, max_new_tokens=8, do_sample=False, use_cache=True).numpy()
    ours = np.asarray(lm.generate({"input_ids": ids, "attention_mask": mask}, new_tokens=8))
    assert np.array_equal(ours, theirs[:, -8:])
