"""What a directory says besides its network: what goes on, in which ids, and what does not."""

import json

import jax
import pytest
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

import jaxlm
from jaxlm.io.carried import GENERATION_KEYS, for_tokenizer
from jaxlm.io.lm import LM
from jaxlm.models import model_config


def tokenizer(*words: str, end: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0], eos_token=end)


def small() -> LM:
    config = model_config("llama", vocab_size=11, hidden_size=16, num_layers=1, num_heads=2)
    return LM.initialize(config, jax.random.key(0))


def test_transformers_knows_every_key_of_a_generation_config():
    assert set(GENERATION_KEYS) <= vars(GenerationConfig()).keys()


@pytest.mark.parametrize("native", [False, True])
def test_both_layouts_carry_the_same_and_no_code(native, tmp_path):
    carried = {
        "eos_token_id": [2, 5],
        "max_position_embeddings": 64,
        "generation": {"eos_token_id": [2, 5], "top_p": 0.9},
    }
    jaxlm.save(small().replace(carried=carried), tmp_path / "a", native=native)
    for name in ("config.json", "jaxlm.json", "generation_config.json"):
        content = json.loads((tmp_path / "a" / name).read_text())
        hostile = {"auto_map": {"AutoModel": "evil.Model"}, "custom_generate": "evil"}
        content |= hostile
        if "carried" in content:
            content["carried"] |= hostile
        (tmp_path / "a" / name).write_text(json.dumps(content))
    lm = jaxlm.load(tmp_path / "a")
    assert lm.carried == carried and lm.end_ids == (2, 5)
    jaxlm.save(lm, tmp_path / "b")
    written = "".join(file.read_text() for file in (tmp_path / "b").glob("*.json"))
    assert "evil" not in written and "auto_map" not in written
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == carried["generation"]
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == [2, 5]
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == [2, 5]


def test_ids_that_are_none_are_refused_with_the_file(tmp_path):
    jaxlm.save(small(), tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config.json.*eos_token_id: expected an id .* found '</s>'"):
        jaxlm.load(tmp_path / "a")


def test_another_tokenizer_takes_the_ids_of_the_tokens_it_knows():
    before, now = tokenizer("?", "a", "</s>", "<end>", end="</s>"), tokenizer("?", "<end>", "a", end="<end>")
    carried = {"eos_token_id": [2, 3], "bos_token_id": 2, "tokenizer_class": "X", "generation": {"eos_token_id": 3}}
    expected = {"eos_token_id": [1], "unk_token_id": 0, "tokenizer_class": "X", "generation": {"eos_token_id": 1}}
    assert for_tokenizer(carried, before, now) == expected
    assert for_tokenizer(carried, before, before)["eos_token_id"] == [2, 3]  # the model's list, not the one of </s>
    assert "forced_bos_token_id" not in for_tokenizer({"forced_bos_token_id": -1}, before, now)
    assert for_tokenizer({}, None, now) == {"eos_token_id": 1, "unk_token_id": 0}
