"""The method: which terms there are, what they weigh, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import Context, Loss, Tap, Term
from jaxlm.io.lm import LM
from jaxlm.losses.soft_targets import mean_logits, mixture_logits, response, top_answers
from jaxlm.methods.distill.method import distill
from jaxlm.methods.distill.teacher import CachedTeacher, DistillConfig, Teacher
from jaxlm.models import model_config

LABELS = jnp.array([[1, -100, 3], [-100, -100, -100]])
BATCH = {
    "input_ids": jnp.ones((2, 3), jnp.int32),
    "labels": LABELS,
    "attention_mask": jnp.array([[1, 1, 0], [1, 0, 0]]),
}


def student_of(params=None, axes=None, **fields):
    """A student that holds these parameters alone: `init` reads the sizes, and adds projections."""
    config = model_config("gpt2", vocab_size=7, hidden_size=4, num_layers=2, num_heads=1, max_positions=8, **fields)
    return LM(config, params or {}, axes=axes or {})


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def fixed_teacher(logits, hidden, width=4, **fields):
    """Gives these logits and states, whatever the batch; a hidden state is `hidden` plus its depth."""

    def forward(params, batch, taps):
        other = {"scores": draw(5, 2, 2, 3, 3), **{name: draw(6, 2, 3, 2, 2) for name in ("query", "key", "value")}}
        taps = {tap: hidden + tap.depth if tap.site == "hidden" else other[tap.site] + tap.depth for tap in taps}
        return {"logits": logits, "taps": taps}

    return Teacher(forward, {}, 4, width, **fields)


def base_loss(logits, hidden):
    term = Term(jnp.float32(5), jnp.float32(2), 2.0)
    taps = {Tap("hidden", i): hidden for i in range(3)} | {Tap("scores", i): draw(7, 2, 2, 3, 3) for i in range(2)}
    taps |= {Tap(name, i): draw(8, 2, 3, 2, 2) for name in ("query", "key", "value") for i in range(2)}
    return Loss(lambda params, constants, batch, ctx: ({"cross_entropy": term}, {"logits": logits, "taps": taps}))


def terms_of(method, logits, hidden, batch=BATCH, count=1):
    params = method.init(jax.random.key(0), student_of()).lm.params
    loss = method.loss(base_loss(logits, hidden))
    return loss.fn(params, {"teachers": ({},) * count}, batch, Context())[0], loss.taps


HIDDEN = jnp.zeros((2, 3, 4))
T, S = draw(0, 2, 3, 7), draw(1, 2, 3, 7)


def test_terms_and_coefficients():
    """(1 - α) on what was there, α on the answers, a kind's coefficient shared by its pairs; filler counts not."""
    config = DistillConfig(fixed_teacher(T, HIDDEN), temperature=4.0, hidden=6.0, attention=2.0, relations=3.0)
    terms, taps = terms_of(distill([config], alpha=0.3), S, HIDDEN)
    assert taps == {Tap("hidden", i) for i in range(3)} | {Tap("scores", 0), Tap("scores", 1)} | {
        Tap(name, 1) for name in ("query", "key", "value")
    }
    assert np.isclose(terms["cross_entropy"].coefficient, 0.7 * 2)
    assert terms["response"].coefficient == 0.3 and terms["response"].weight == 2
    assert np.isclose(terms["response"].sum, response(T, S, LABELS >= 0, 4.0).sum)
    # pairs (0, 0), (1, 2), (2, 4): the fixed teacher's states are its depth, the student's zero
    pairs = ("0_0", "1_2", "2_4")
    assert [float(terms[f"hidden_{pair}"].sum) for pair in pairs] == [0.0, 2 * 4.0, 2 * 16.0]
    assert {terms[f"hidden_{pair}"].coefficient for pair in pairs} == {2.0}
    assert [terms[f"attention_{pair}"].coefficient for pair in pairs[1:]] == [1.0, 1.0]
    relations = [f"{name}_relation_2_4" for name in ("query", "key", "value")]
    assert [terms[name].coefficient for name in relations] == [1.0] * 3
    assert len(terms) == 2 + 3 + 2 + 3
    assert {float(t.weight) for name, t in terms.items() if name not in ("cross_entropy", "response")} == {2.0}


def test_samples_are_weighed_in_every_term():
    """A row of weight 2 is twice in sums and weights, a row of weight 0 not at all."""
    batch = BATCH | {"labels": jnp.array([[1, 2, 3], [4, 5, 6]]), "attention_mask": jnp.ones((2, 3), jnp.int32)}
    config = DistillConfig(fixed_teacher(T, HIDDEN), hidden=1.0, attention=1.0, relations=1.0, sample_weight="weight")
    method = distill([config])
    weighted = [
        terms_of(method, S, HIDDEN, batch | {"weight": jnp.array(w)})[0] for w in ([1.0, 0.0], [0.0, 1.0], [2.0, 0.5])
    ]
    for name in weighted[0].keys() - {"cross_entropy"}:
        first, second, both = (terms[name] for terms in weighted)
        assert np.isclose(both.sum, 2 * first.sum + 0.5 * second.sum, rtol=1e-5) and both.weight == 7.5
    with pytest.raises(ValueError, match=r"sample_weight 'weights' is no column .* did you mean 'weight'"):
        misspelt = DistillConfig(fixed_teacher(T, HIDDEN), sample_weight="weights")
        terms_of(distill([misspelt]), S, HIDDEN, batch | {"weight": jnp.ones(2)})


def test_nothing_ignored_has_influence():
    """Logits where labels are ignored, states at padding and filler rows: NaN changes no value and no gradient."""
    real = np.array([[1, 1, 0], [0, 0, 0]])[..., None]
    labelled = np.asarray(LABELS >= 0)[..., None]
    student_hidden, teacher_hidden = draw(2, 2, 3, 4), jnp.ones((2, 3, 6))
    with_nan = lambda x, mask: jnp.where(mask, x, jnp.nan)  # noqa: E731
    results = []
    for teacher, logits, hidden in (
        (fixed_teacher(T, teacher_hidden, 6), S, student_hidden),
        (
            fixed_teacher(with_nan(T, labelled), with_nan(teacher_hidden, real), 6),
            with_nan(S, labelled),
            with_nan(student_hidden, real),
        ),
    ):
        method = distill([DistillConfig(teacher, hidden=1.0)])
        params = method.init(jax.random.key(0), student_of()).lm.params

        def total(params, logits, hidden, method=method):
            terms, _ = method.loss(base_loss(logits, hidden)).fn(params, {"teachers": ({},)}, BATCH, Context())
            return sum(t.coefficient * t.sum for t in terms.values())

        results.append(jax.value_and_grad(total, (0, 1, 2))(params, logits, hidden))
    assert results[0][0] == results[1][0]
    assert jax.tree.all(jax.tree.map(np.array_equal, results[0][1], results[1][1]))


# Projections ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("projection", "width", "names"),
    [
        ("shared", 4, []),
        ("shared", 6, ["projection"]),
        ("layer", 4, ["projection_1_1", "projection_2_4"]),
        ("layer", 6, ["projection_1_1", "projection_2_4"]),
    ],
)
def test_projections(projection, width, names):
    """One for all pairs where widths differ, or one a pair; the identity at first where widths are equal; not baked."""
    hidden = jnp.ones((2, 3, width))
    config = DistillConfig(fixed_teacher(T, hidden, width), hidden=1.0, layers=((1, 1), (2, 4)), projection=projection)
    method = distill([config])
    student = student_of({"embed": {"kernel": jnp.ones(1)}}, {"embed/kernel": (None,)})
    lm = method.init(jax.random.key(0), student).lm
    kernels = lm.params.get("distill", {}).get("teacher_0", {})
    assert sorted(kernels) == names
    for name in names:
        assert kernels[name]["kernel"].shape == (4, width)
        assert lm.axes[f"distill/teacher_0/{name}/kernel"] == ("embed", None)
        assert width != 4 or np.array_equal(kernels[name]["kernel"], np.eye(4))
    student_hidden = draw(1, 2, 3, 4)
    terms = method.loss(base_loss(S, student_hidden)).fn(lm.params, {"teachers": ({},)}, BATCH, Context())[0]
    kernel = kernels[names[-1]]["kernel"] if names else jnp.eye(4)
    expected = ((hidden + 4 - student_hidden @ kernel) ** 2).mean(-1)[0, :2].sum()
    assert np.isclose(terms["hidden_2_4"].sum, expected, rtol=1e-5)
    baked = method.bake(lm, {})
    assert baked.params.keys() == {"embed"} and baked.axes == student.axes


# Several teachers ----------------------------------------------------------------------------------------------------


def two(one=None, other=None, **shared):
    return [
        DistillConfig(fixed_teacher(T, HIDDEN), **{**shared, **(one or {})}),
        DistillConfig(fixed_teacher(draw(9, 2, 3, 7), HIDDEN + 1), **{**shared, **(other or {})}),
    ]


def total(terms):
    return sum(t.coefficient * t.sum for t in terms.values())


@pytest.mark.parametrize("combine", ["divergences", "probabilities", "logits"])
def test_weights_of_one_and_nothing_are_the_first_alone(combine):
    alone = distill(two({"weight": 1.0}, hidden=1.0)[:1], alpha=0.7)
    both = distill(two({"weight": 1.0}, {"weight": 0.0}, hidden=1.0), alpha=0.7, combine=combine)
    expected = total(terms_of(alone, S, HIDDEN)[0])
    assert np.isclose(total(terms_of(both, S, HIDDEN, count=2)[0]), expected, rtol=1e-6)


def test_two_teachers_each_with_its_own():
    configs = two({"weight": 0.25, "hidden": 2.0}, {"weight": 0.75, "temperature": 1.0, "divergence": "reverse"})
    terms, _ = terms_of(distill(configs, alpha=0.5), S, HIDDEN, count=2)
    kinds = {
        "teacher_0_response",
        "teacher_1_response",
        *(f"teacher_0_hidden_{pair}" for pair in ("0_0", "1_2", "2_4")),
    }
    assert terms.keys() == {"cross_entropy"} | kinds
    assert terms["teacher_0_response"].coefficient == 0.125 and terms["teacher_1_response"].coefficient == 0.375
    assert np.isclose(terms["teacher_0_hidden_1_2"].coefficient, 0.25 * 2 / 3)


def test_teachers_averaged_before_one_divergence():
    configs = two({"weight": 0.25}, {"weight": 0.75})
    logits = [config.teacher.forward({}, BATCH, ())["logits"] for config in configs]
    for combine, mean in (
        ("probabilities", mixture_logits(logits, (0.25, 0.75), 2.0)),
        ("logits", mean_logits(logits, (0.25, 0.75))),
    ):
        terms, _ = terms_of(distill(configs, alpha=1.0, combine=combine), S, HIDDEN, count=2)
        assert terms.keys() == {"cross_entropy", "response"} and terms["response"].coefficient == 1.0
        assert np.isclose(terms["response"].sum, response(mean, S, LABELS >= 0).sum, rtol=1e-5)


def test_tables_of_unequal_length_share_their_tokens():
    """A teacher whose table has rows beyond the tokenizer: they are no answers, on neither side."""
    longer = jnp.concatenate([T, 9 * jnp.ones((2, 3, 2))], axis=-1)
    config = DistillConfig(fixed_teacher(longer, HIDDEN, classes=6))
    terms, _ = terms_of(distill([config]), S, HIDDEN)
    assert np.isclose(terms["response"].sum, response(T[..., :6], S[..., :6], LABELS >= 0).sum, rtol=1e-6)


# A cached teacher ----------------------------------------------------------------------------------------------------


def test_a_cached_teacher_answers_from_the_batch():
    answers = top_answers(T, 7, (1.0, 2.0))
    batch = BATCH | {f"teacher_0_{part}": value for part, value in answers.items()}
    cached = DistillConfig(CachedTeacher("teacher_0", (1.0, 2.0), 7))
    terms, taps = terms_of(distill([cached]), S, HIDDEN, batch)
    live, _ = terms_of(distill([DistillConfig(fixed_teacher(T, HIDDEN))]), S, HIDDEN)
    assert terms.keys() == live.keys() and not taps
    assert np.isclose(terms["response"].sum, live["response"].sum, rtol=1e-5)


# What is refused -----------------------------------------------------------------------------------------------------

CACHED = CachedTeacher("teacher_0", (1.0, 2.0), 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "forwards"}, "did you mean 'forward'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"hidden": -1.0}, "hidden must not be negative"),
        ({"projection": "layers"}, "projection 'layers'; did you mean 'layer'"),
        ({"attention_on": "score"}, "attention_on 'score'; did you mean 'scores'"),
        ({"heads": "all"}, "unknown heads 'all'"),
        ({"relation_of": ("queries",)}, "relations of 'queries'; did you mean 'query'"),
        ({"teacher": CACHED, "hidden": 1.0}, "a cache holds a teacher's answers only"),
        ({"teacher": CACHED, "temperature": 4.0}, "at the temperatures 1.0, 2.0, not 4.0"),
    ],
)
def test_configs_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**{"teacher": fixed_teacher(0, 0), **options})


@pytest.mark.parametrize(
    ("configs", "options", "message"),
    [
        ([], {}, "nothing to learn from"),
        (two({"weight": 0.5}), {}, "1 of 2 teachers have a weight"),
        (two({"weight": 0.5}, {"weight": 0.4}), {}, "0.5, 0.4 sum to 0.9, not to 1"),
        (two(), {"alpha": 1.5}, "alpha must lie between"),
        (two(), {"combine": "logit"}, "did you mean 'logits'"),
        (two({"temperature": 4.0}), {"combine": "logits"}, "there is one divergence"),
        ([DistillConfig(CACHED)], {"combine": "logits"}, "caches keep other tokens"),
        ([DistillConfig(CACHED)], {"on_policy": lambda *_: {}}, "not to what the student writes"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(configs, options, message):
    with pytest.raises(ValueError, match=message):
        distill(configs, **options)


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({}, {"head": "sequence", "regression": True}, "regression has one output"),
        ({"attention": 1.0, "layers": ((0, 0),)}, {}, "embeddings have no attention"),
        ({"hidden": 1.0, "layers": ((3, 4),)}, {}, r"\(3, 4\) does not exist"),
    ],
)
def test_what_the_student_has_not_is_refused(options, fields, message):
    with pytest.raises(ValueError, match=message):
        distill([DistillConfig(fixed_teacher(0, 0), **options)]).init(jax.random.key(0), student_of(**fields))


def test_a_regression_may_learn_hidden_states():
    method = distill([DistillConfig(fixed_teacher(0, 0), hidden=1.0)], alpha=0.0)
    method.init(jax.random.key(0), student_of(head="sequence", regression=True))


def test_hidden_states_of_an_encoder_decoder_are_refused():
    student = LM(model_config("t5", vocab_size=7, hidden_size=8, num_layers=1), {})
    with pytest.raises(ValueError, match="encoder-decoder"):
        distill([DistillConfig(fixed_teacher(0, 0), hidden=1.0)]).init(jax.random.key(0), student)
    distill([DistillConfig(fixed_teacher(0, 0))]).init(jax.random.key(0), student)
