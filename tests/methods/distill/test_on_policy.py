"""What the student writes: prompts kept, labels ignored, the teacher's positions marked, ends respected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.methods.distill.on_policy import on_policy

STOP = 9
BATCH = {
    "input_ids": jnp.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0]]),
    "segment_ids": jnp.array([[1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]),
    "positions": jnp.array([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0], [0, 0, 0, 0, 0, 0]]),
    "labels": jnp.array([[2, -100, 4, 5, 6, -100], [2, 3, 4, -100, -100, -100], [-100] * 6]),
}
WRITTEN = jnp.array([[7, STOP, STOP], [7, 8, 7], [7, 7, 7]])


def test_a_row_goes_on_in_the_students_words():
    """The running document is the prompt; after the stop there is nothing; filler stays filler."""
    prompts = {}

    def generate(params, batch, key, new_tokens):
        prompts.update(batch)
        assert new_tokens == 3
        return WRITTEN

    batch = on_policy(generate, ends=(STOP,), encoder_decoder=False, prompt=3)({}, BATCH, jax.random.key(0))
    assert prompts["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 0]]
    assert prompts["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3], [0, 0, 0]]
    assert batch["input_ids"][:2].tolist() == [[1, 2, 3, 7, STOP, STOP], [1, 2, 3, 7, 8, 7]]
    assert batch["segment_ids"][:2].tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["positions"][:2].tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]
    assert (batch["labels"] == -100).all()
    assert batch["distill_mask"].tolist() == [
        [False, False, True, True, False, False],
        [False, False, True, True, True, False],
        [False] * 6,
    ]
    for name, value in BATCH.items():
        assert np.array_equal(batch[name][2], value[2]) and batch[name].dtype == value.dtype


@pytest.mark.parametrize(("ends", "real"), [((STOP, 8), [2, 3, 1]), ((8,), [4, 3, 1]), ((), [4, 4, 1])])
def test_a_text_is_over_at_the_first_of_its_ends(ends, real):
    """Of several, or of none."""
    written = jnp.array([[7, STOP, 7, 7], [7, 7, 8, STOP], [7, 7, 7, 7]])
    generate = lambda params, batch, key, new_tokens: written  # noqa: E731
    batch = on_policy(generate, ends=ends, encoder_decoder=False, prompt=2)({}, BATCH, jax.random.key(0))
    assert (batch["segment_ids"][:2, 2:] > 0).sum(1).tolist() == real[:2]


def test_an_encoder_decoder_answers_its_source():
    batch = {
        "input_ids": jnp.ones((2, 4), jnp.int32),
        "attention_mask": jnp.ones((2, 4), jnp.int32),
        "decoder_input_ids": jnp.array([[0, 5, 6], [0, 0, 0]]),
        "decoder_attention_mask": jnp.array([[1, 1, 1], [1, 0, 0]]),
        "labels": jnp.array([[5, 6, STOP], [-100] * 3]),
    }
    generate = lambda params, batch, key, n: WRITTEN[:2, :n]  # noqa: E731
    new = on_policy(generate, ends=(STOP,), encoder_decoder=True)({}, batch, jax.random.key(0))
    assert new["decoder_input_ids"].tolist() == [[0, 7, STOP], [0, 0, 0]]
    assert new["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert new["distill_mask"].tolist() == [[True, True, False], [False] * 3]
    assert np.array_equal(new["input_ids"], batch["input_ids"])


def test_the_students_share_of_the_steps():
    generate = lambda params, batch, key, n: jnp.broadcast_to(params["token"], (3, n))  # noqa: E731
    write = jax.jit(on_policy(generate, ends=(STOP,), encoder_decoder=False, prompt=3, share=0.5))
    batches = [write({"token": jnp.int32(7)}, BATCH, jax.random.key(i)) for i in range(40)]
    by_student = [bool((batch["input_ids"][0, 3:] == 7).all()) for batch in batches]
    assert 10 <= sum(by_student) <= 30
    data = batches[by_student.index(False)]
    assert all(np.array_equal(data[name], value) for name, value in BATCH.items())
    assert np.array_equal(data["distill_mask"], BATCH["labels"] != -100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share must be above 0"),
        ({"prompt": 0}, "at least 1"),
        ({"prompt": 6}, "leaves nothing to write"),
    ],
)
def test_what_leaves_nothing_to_write_is_refused(options, message):
    generate = lambda params, batch, key, n: WRITTEN  # noqa: E731
    with pytest.raises(ValueError, match=message):
        on_policy(generate, ends=(STOP,), encoder_decoder=False, **options)({}, BATCH, jax.random.key(0))
