"""One check for every family: a random model of transformers, read, compared, written and read by both sides."""

import functools
import zlib

import jax
import numpy as np
import pytest

import jaxlm

TOLERANCE = 1e-4


def randomize(model, seed):
    """Random values everywhere, biases and norms too, so that no parameter can be mistaken for another."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            mean = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
            parameter.copy_(mean * name.endswith("weight") + 0.15 * noise)
    return model.eval()


def random_batch(config, rng, rows, length, holes):
    """Ids, a mask with padding on the right or with holes, and token types where the model has them."""
    ids = rng.integers(3, config.vocab_size, (rows, length))
    if holes:
        mask = (rng.random((rows, length)) < 0.7).astype(np.int32)
        mask[:, 0] = 1
    else:
        mask = (np.arange(length) < rng.integers(1, length + 1, rows)[:, None]).astype(np.int32)
        mask[0] = 1
    batch = {"input_ids": np.where(mask, ids, config.pad_token_id or 0), "attention_mask": mask}
    if config.type_vocab_size > 1:
        batch["token_type_ids"] = rng.integers(0, config.type_vocab_size, (rows, length))
    if config.encoder_decoder:
        batch["decoder_input_ids"] = rng.integers(3, config.vocab_size, (rows, length - 2))
    return batch


def torch_outputs(model, batch):
    """What transformers computes, as numpy arrays."""
    import torch

    with torch.no_grad():
        outputs = model(**{name: torch.tensor(value, dtype=torch.long) for name, value in batch.items()})
    return {name: value.numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}


@functools.cache
def _jitted(config):
    # Compilation takes most of the time here, so it does not optimize.
    return jax.jit(jaxlm.LM(config, {}).apply, compiler_options={"xla_backend_optimization_level": 0})


def outputs_of(lm, batch):
    """What jaxlm computes, in the run view; models of equal config share one compilation."""
    outputs = _jitted(lm.config)(lm.network.run_view(lm.params), batch)
    return {name: np.asarray(value) for name, value in outputs.items() if name != "taps"}


def difference(ours, theirs, mask):
    """Largest difference of the logits, at tokens where they are a token's."""
    delta = np.abs(ours - theirs)
    if delta.shape[:2] == mask.shape:
        delta = delta[mask > 0]
    return delta.max()


@pytest.fixture
def parity(tmp_path):
    """`parity(model)`: compares with jaxlm, both ways; returns the loaded LM."""

    def check(model, seed=0, ours="logits", theirs="logits"):
        randomize(model, seed)
        model.save_pretrained(tmp_path / "theirs")
        lm = jaxlm.load(tmp_path / "theirs")
        rng = np.random.default_rng(zlib.crc32(repr((seed, lm.config)).encode()))
        shape = {"rows": int(rng.integers(2, 5)), "length": int(rng.integers(6, 15))}
        for holes in (True, False) if lm.config.pooling == "first" or lm.config.head != "sequence" else (False,):
            batch = random_batch(lm.config, rng, **shape, holes=holes)
            mask = np.ones_like(batch["decoder_input_ids"]) if lm.config.encoder_decoder else batch["attention_mask"]
            expected = torch_outputs(model, batch)
            assert np.abs(expected[theirs]).max() > 0.1
            assert difference(outputs_of(lm, batch)[ours], expected[theirs], mask) <= TOLERANCE

        assert jaxlm.save(lm, tmp_path / "ours") is None
        again = jaxlm.load(tmp_path / "ours")
        assert again.config == lm.config
        assert jax.tree.structure(again.params) == jax.tree.structure(lm.params)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, lm.params)))

        exported, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        assert np.array_equal(torch_outputs(exported.eval(), batch)[theirs], expected[theirs])
        return lm

    return check
