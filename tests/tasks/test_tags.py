"""Names of things are counted as the scheme of their tags says, in results and in reports alike."""

import json

import numpy as np
import pytest
from seqeval.metrics import classification_report
from seqeval.scheme import BILOU, IOB2, IOBES, Entities

from jaxlm.data.settings import DataSettings
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.evaluate.evaluator import Score, example_columns, result_metrics
from jaxlm.tasks import TASKS, BatchPredictions
from jaxlm.tasks.tags import scheme_of

SCHEMES = {
    "iob": "B-X I-X O B-X B-Y I-Y",
    "bilou": "B-X L-X O U-X B-Y L-Y",
    "iobes": "B-X E-X O S-X B-Y E-Y",
    "bmewo": "B_X E_X o W_X B_Y E_Y",
    "suffix": "X-B X-I O X-B Y-B Y-I",
    "suffix with singles": "X_B X_E O X_S Y_B Y_E",
    "lower case": "b-X i-X o b-X b-Y i-Y",
}
SPANS = {("X", 0, 1), ("X", 3, 3), ("Y", 4, 5)}


def names_in(tags: list[str], scheme) -> set[tuple[str, int, int]]:
    from seqeval.metrics.sequence_labeling import get_entities

    return set(get_entities(scheme.standard(tags)))


@pytest.mark.parametrize("tags", SCHEMES.values(), ids=SCHEMES)
def test_the_same_names_in_every_scheme(tags):
    assert names_in(tags.split(), scheme_of(tags.split())) == SPANS


@pytest.mark.parametrize(("strict", "letters"), [(IOB2, "BI"), (IOBES, "BIES"), (BILOU, "BILU")])
def test_names_are_those_of_seqevals_strict_reading_where_tags_are_well_formed(strict, letters):
    draw = np.random.default_rng(0)
    inside, last, single = letters[1], letters[2:3] or "I", letters[3:] or "B"
    for _ in range(50):
        tags: list[str] = []
        for _ in range(4):
            kind, length = draw.choice(["PER", "creative-work"]), draw.integers(1, 5)
            name = ["B", *inside * (length - 2), last] if length > 1 else [single]
            tags += [f"{position}-{kind}" for position in name] + ["O"] * draw.integers(0, 2)
        wanted = {(e.tag, e.start, e.end - 1) for e in Entities([tags], strict).entities[0]}
        assert names_in(tags, scheme_of(tags)) == wanted


@pytest.mark.parametrize(
    ("names", "scheme"),
    [
        (("B", "M", "E", "S"), "letter"),
        (("B", "I", "O"), "letter"),
        (("a", "b", "i", "n", "v"), "flat"),  # parts of speech, of which some are letters of schemes too
        (("I-PER", "O"), "prefix"),
        (("U-PER", "O"), "prefix"),
        (("B-S", "I-S", "O"), "prefix"),
        (("NOUN", "X", "S"), "flat"),
        (("person-actor", "art-film", "O"), "flat"),
        (("E-mail", "phone", "O"), "flat"),
        (("hepatitis-A", "hepatitis-B", "O"), "flat"),
        (("X", "[CLS]", "O", "B-PER", "I-PER"), "prefix"),
        (("O",), "flat"),
    ],
)
def test_schemes_of_sets_of_names(names, scheme):
    assert scheme_of(names).name == scheme


def test_words_of_segmented_chinese():
    assert names_in(list("BMESSBE"), scheme_of("BMES")) == {
        ("word", 0, 2),
        ("word", 3, 3),
        ("word", 4, 4),
        ("word", 5, 6),
    }


def score(true: list[str], predicted: list[str], labels: tuple[str, ...]) -> tuple[Score, float]:
    """Metrics and table of the result, and F1 of what a report stores."""
    true_ids, predicted_ids = (
        np.array([[labels.index(tag) for tag in tags.split()] for tags in rows], np.int32) for rows in (true, predicted)
    )
    spec, facts = TASKS["token"].evaluation, {"truncated_words": 3}
    read = {"predicted": predicted_ids, "nats": np.ones(len(true), np.float32)}
    predictions = [BatchPredictions(read, None, {"labels": true_ids}, labels)]
    columns = example_columns(spec, predictions)
    metrics = result_metrics(spec, columns, len(labels), facts)
    f1 = spec.compared[0].over(spec.reported(columns), len(labels))
    return Score(metrics, lambda: spec.table(predictions, facts)), f1


def test_flat_tags_are_names_by_their_whole_tag():
    labels = ("art-other", "building-other", "person-other", "O")
    result, reported = score(
        ["person-other person-other O art-other"], ["person-other person-other O building-other"], labels
    )
    assert result.metrics["f1"] == reported == 0.5
    result, reported = score(["person-other building-other O"], ["building-other building-other O"], labels)
    assert result.metrics["f1"] == reported == 0.0  # two names, of which the guess makes one


def test_scores_of_bilou_are_those_of_its_names():
    labels = ("B-X", "I-X", "L-X", "O", "U-X")
    true, predicted = ["U-X U-X O O", "B-X I-X L-X O"], ["U-X O U-X O", "B-X I-X L-X U-X"]
    result, reported = score(true, predicted, labels)
    assert (result.metrics["precision"], result.metrics["recall"]) == (0.5, pytest.approx(2 / 3))
    assert result.metrics["f1"] == pytest.approx(4 / 7) and reported == pytest.approx(4 / 7)
    iob = [
        [tags.split() for tags in rows]
        for rows in (["B-X B-X O O", "B-X I-X I-X O"], ["B-X O B-X O", "B-X I-X I-X B-X"])
    ]
    assert classification_report(*iob, digits=4) in result.report


def test_unread_words_stand_beside_the_score():
    result, _ = score(["B-X O"], ["B-X O"], ("B-X", "O"))
    assert result.metrics["unread_words"] == 3
    assert "unread words (beyond max_length, or without pieces), not counted above: 3" in result.report


def test_tags_of_two_kinds_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    tokenizer = load_tokenizer("character", ["ab"])

    def prepare(tags, labels):
        path.write_text(json.dumps({"tokens": ["a"] * len(tags), "tags": tags}))
        settings = DataSettings(format="jsonl", train=str(path))
        return TASKS["token"].prepare(settings.source("train"), tokenizer, labels, settings)

    labels = ("B-PER", "I-PER", "NOUN", "O")
    with pytest.raises(ValueError, match=r"a\.jsonl: tags of two kinds, B-PER say .*, NOUN do not"):
        prepare(["B-PER", "NOUN", "O"], labels)
    for tags in (["B-PER", "I-PER", "O"], ["O"]):  # a model may have further classes
        assert len(prepare(tags, labels).examples) == 1
