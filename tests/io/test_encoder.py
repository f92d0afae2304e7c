"""The real encoder on real sentences, against torch; and what is made from it, read by transformers."""

import csv

import numpy as np
import pytest

import jaxlm

pytestmark = [pytest.mark.encoder, pytest.mark.torch, pytest.mark.slow]


def mean_pooled(hidden, mask):
    weights = mask[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


@pytest.mark.data
def test_embeddings_of_real_sentences(encoder_path, data_path, tmp_path):
    import torch
    from transformers import AutoModel

    with open(data_path / "sst2" / "dev.tsv", encoding="utf-8") as file:
        texts = [row[0] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][:100]
    assert len(texts) == 100
    lm = jaxlm.load(encoder_path)
    batch = dict(lm.tokenizer(texts, padding=True, return_tensors="np"))
    ours = mean_pooled(np.asarray(lm.apply(lm.params, batch)["last_hidden"]), batch["attention_mask"])

    assert jaxlm.save(lm, tmp_path) is None
    for directory in (encoder_path, tmp_path):
        model, info = AutoModel.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            outputs = model.eval()(**{name: torch.tensor(value) for name, value in batch.items()})
        theirs = mean_pooled(outputs.last_hidden_state.numpy(), batch["attention_mask"])
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        assert ((ours * theirs).sum(1) / norms).min() >= 0.99999


def test_a_tagger_made_from_the_encoder_loads_in_transformers(encoder_path, tmp_path):
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    lm = jaxlm.load(encoder_path, head="token", labels=["O", "B-person", "I-person"])
    assert jaxlm.save(lm, tmp_path) is None
    model, info = AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "O", 1: "B-person", 2: "I-person"}
    batch = dict(AutoTokenizer.from_pretrained(tmp_path)(["Ada met Alan ."], return_tensors="np"))
    with torch.no_grad():
        theirs = model.eval()(**{name: torch.tensor(value) for name, value in batch.items()}).logits.numpy()
    ours = lm.apply(lm.params, batch)["logits"]
    assert np.abs(ours - theirs).max() <= 1e-4
