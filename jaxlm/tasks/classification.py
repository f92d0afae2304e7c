"""Classification and regression of whole texts, and of the words of a sentence."""

import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Terms
from jaxlm.data.encoding import encode
from jaxlm.data.loader import Batches, bucketed, in_order, packed_examples
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Record, Source, Unusable
from jaxlm.data.tokenizer import padding_id
from jaxlm.losses.cross_entropy import IGNORED, cross_entropy, log_likelihood, squared_error
from jaxlm.tasks.metrics import (
    accuracy,
    correlation,
    entity_f1,
    entity_precision,
    entity_recall,
    example_loss,
    macro_f1,
    matthews,
    mean_squared_error,
    pearson,
    spearman,
    word_accuracy,
    word_loss,
)
from jaxlm.tasks.tags import scheme_of
from jaxlm.tasks.task import (
    OPTIONAL,
    PADDED,
    Batch,
    BatchPredictions,
    Column,
    EvalSpec,
    Outputs,
    Prepared,
    Task,
    column,
    number_of,
    only,
    sample_weights,
    text_of,
    texts_of,
    weight_of,
)

HEADERS = frozenset(("label", "labels", "class", "category", "tag", "tags", "sentiment", "target", "text", "sentence"))
"""Names of columns, that a class hardly has."""
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def padded_batches(
    prepared: Prepared, tokenizer: Any, settings: DataSettings, batch_size: int, seed: int | None
) -> Batches:
    """Rows of similar length, padded to the smallest bucket; with `pack`, several examples in a row for training."""
    examples, pad = prepared.examples, padding_id(tokenizer)
    if settings.pack and seed is not None:
        return packed_examples(examples, batch_size, seed, length=settings.max_length, pad_id=pad)
    lengths = prepared.buckets(settings)
    if seed is None:
        return in_order(examples, batch_size, lengths=lengths, pad_id=pad)
    return bucketed(examples, batch_size, seed, lengths=lengths, pad_id=pad)


# -- whole texts ------------------------------------------------------------------------------------------------------


def names_of(settings: DataSettings) -> tuple[str, ...]:
    """What the numbers in the data stand for, where the config says it."""
    return tuple(map(str, settings.labels or ()))


def named(value: Any, field: str, names: Sequence[str]) -> str:
    """The name of a class as a field says it: numbers are names too (1.0 is what pandas makes of 1), or stand for some.

    >>> named("pos", "label", ()), named(1.0, "label", ()), named(1, "label", ("neg", "pos")), named("0", "label", "0")
    ('pos', '1', 'pos', '0')

    Args:
      names: what numbers stand for, in order; a number that is itself among them stands for itself.

    Raises:
      Unusable: for what is neither text nor a number, blank, or beyond the names.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise Unusable(f"the {field} {reprlib.repr(value)} is {type(value).__name__}, not the name of a class")
    name = str(value)
    if not name.strip():
        raise Unusable(f"the {field} is blank")
    if not names or name in names or not _INTEGER.fullmatch(name):
        return name
    if not 0 <= int(name) < len(names):
        raise Unusable(f"the {field} {name} is beyond the {len(names)} names of config.data.labels")
    return names[int(name)]


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names once each, sorted; as numbers where all of them are.

    >>> natural_order(["10", "2", "1"]), natural_order(["b", "10", "2"])
    (('1', '2', '10'), ('10', '2', 'b'))
    """
    unique = sorted(set(names))
    return tuple(sorted(unique, key=int) if all(map(_INTEGER.fullmatch, unique)) else unique)


def unnamed(labels: Sequence[str]) -> bool:
    """Whether classes have only the numbers that transformers gives those without names.

    >>> unnamed(("LABEL_0", "LABEL_1")), unnamed(("neg", "pos"))
    (True, False)
    """
    return list(labels) == [f"LABEL_{i}" for i in range(len(labels))]


def numbers_of(labels: Sequence[str]) -> dict[str, int]:
    """The output of each class by name; where classes have no names, also by its number.

    >>> numbers_of(("neg", "pos")), numbers_of(("LABEL_0",))
    ({'neg': 0, 'pos': 1}, {'LABEL_0': 0, '0': 0})
    """
    numbers = {name: i for i, name in enumerate(labels)}
    return numbers | {str(i): i for i in range(len(labels))} if unnamed(labels) else numbers


def unknown(names: Iterable[str], field: str, labels: Sequence[str]) -> Unusable:
    """What to raise for classes that are not among those to learn or to predict."""
    names = natural_order(names)
    known = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    numbers = any(map(_INTEGER.fullmatch, names))
    hint = "; where numbers stand for names, set config.data.labels to these in order" if numbers else ""
    return Unusable(f"{field} {', '.join(map(repr, names[:8]))} is not among the classes ({known}){hint}")


def unlikely(counts: Sequence[int], labels: Sequence[str], field: str, rows: int) -> tuple[str, ...]:
    """What to say of classes that occur once, and read like a header or are among a thousand rows or more.

    >>> unlikely([500, 1], ["pos", "Label"], "label", 501)
    ("the class 'Label' occurs once, and reads like a header: is a line with the names of columns read as a row?",)

    Args:
      counts: how often each class occurs; field: where classes stand; rows: how many there are.
    """
    notices = []
    for name, count in zip(labels, counts, strict=True):
        if count == 1 and name.strip().lower() in HEADERS | {field}:
            notices.append(
                f"the class {name!r} occurs once, and reads like a header: is a line with the names of columns read "
                f"as a row?"
            )
        elif count == 1 and rows >= 1000:
            notices.append(f"the class {name!r} occurs once among {rows} rows: is it misspelt, or not a class?")
    return tuple(notices)


def labelled_text(record: Record, source: Source, names: Sequence[str]) -> tuple[tuple[str, ...], str, float | None]:
    """`text` (and `text_pair`), the class of `label`, and the weight."""
    texts = texts_of(record, source)
    return texts, named(column(record, "label", source), "label", names), weight_of(record, source)


def text_labels(source: Source) -> tuple[str, ...]:
    """The classes of the training data, sorted."""
    rows = source.usable(lambda record: labelled_text(record, source, ()), OPTIONAL)
    return natural_order(label for _, label, _ in rows)


def labelled_texts(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """`text` (and `text_pair`) with the class of `label`; one that is not among `labels` is a bad row."""
    numbers = numbers_of(labels)

    def read(record: Record) -> tuple[tuple[str, ...], int, float | None]:
        texts, label, weight = labelled_text(record, source, names_of(settings))
        if label not in numbers:
            raise unknown([label], "label", labels)
        return texts, numbers[label], weight

    texts, classes, weights = zip(*source.usable(read, OPTIONAL), strict=True)
    columns = {"labels": np.array(classes, np.int32)} | sample_weights(weights)
    notices = unlikely(np.bincount(columns["labels"], minlength=len(labels)).tolist(), labels, "label", len(texts))
    return Prepared(Examples(_inputs(texts, tokenizer, settings) | columns), {}, notices=notices)


def rated_texts(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """`text` (and `text_pair`) with the number in `label`."""
    rows = source.usable(
        lambda record: (texts_of(record, source), number_of(record, "label", source), weight_of(record, source)),
        OPTIONAL,
    )
    texts, targets, weights = zip(*rows, strict=True)
    columns = {"labels": np.array(targets, np.float32)} | sample_weights(weights)
    return Prepared(Examples(_inputs(texts, tokenizer, settings) | columns), {})


def unlabelled_texts(source: Source, tokenizer: Any, settings: DataSettings) -> Examples:
    """`text` (and `text_pair`) without labels, on which a teacher's predictions are learned."""
    rows = source.usable(lambda record: (texts_of(record, source), weight_of(record, source)), OPTIONAL)
    texts, weights = zip(*rows, strict=True)
    inputs = _inputs(texts, tokenizer, settings)
    return Examples(inputs | {"distill_mask": np.ones(len(texts), np.int32)} | sample_weights(weights))


def _inputs(texts: Sequence[tuple[str, ...]], tokenizer: Any, settings: DataSettings) -> dict[str, Any]:
    """The columns that a model reads of texts, or of pairs of them."""
    paired = len(texts[0]) == 2
    encoded = encode(tokenizer, texts if paired else [t[0] for t in texts], max_length=settings.max_length)
    return {"input_ids": encoded.ids} | ({"token_type_ids": encoded.types} if paired else {})


def class_loss(outputs: Outputs, batch: Batch) -> Terms:
    """Cross-entropy an example (or a labelled word)."""
    return {"cross_entropy": cross_entropy(outputs["logits"], batch["labels"])}


def class_read(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """Nats a row, float32 `[rows]`, and the likeliest class of every example (or word), int32 as the labels."""
    logits = outputs["logits"]
    likelihood, _ = log_likelihood(logits, batch["labels"])
    return {"nats": -likelihood.reshape(len(likelihood), -1).sum(axis=1), "predicted": jnp.argmax(logits, axis=-1)}


def class_examples(predictions: BatchPredictions) -> dict[str, np.ndarray]:
    """Every text: its class, the predicted one, its nats, and whether the teacher predicts the same."""
    true, predicted, teacher = predictions.batch["labels"], predictions.read["predicted"], predictions.teacher
    labelled = true != IGNORED
    columns = {"true": true, "predicted": predicted, "nats": predictions.read["nats"]}
    if teacher is not None:
        agreed = (predicted == teacher["predicted"]).astype(np.int32)
        columns |= {"agreed": agreed, "compared": np.ones_like(agreed)}
    return {name: values[labelled] for name, values in columns.items()}


def class_table(predictions: Sequence[BatchPredictions], facts: Mapping[str, int]) -> str:
    """scikit-learn's report of every class."""
    true = np.concatenate([batch.batch["labels"] for batch in predictions])
    predicted = np.concatenate([batch.read["predicted"] for batch in predictions])
    labelled = true != IGNORED
    return class_report(true[labelled], predicted[labelled], predictions[0].labels) if labelled.any() else ""


def class_report(true: np.ndarray, predicted: np.ndarray, labels: tuple[str, ...]) -> str:
    """scikit-learn's report of the classes that occur in truth or prediction."""
    from sklearn.metrics import classification_report

    occur = np.union1d(true, predicted)
    names = [labels[i] for i in occur]
    return classification_report(true, predicted, labels=occur, target_names=names, digits=4, zero_division=0)


def rating_loss(outputs: Outputs, batch: Batch) -> Terms:
    """Squared error an example."""
    return {"squared_error": squared_error(outputs["logits"][:, 0], batch["labels"])}


def rating_read(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """The predicted number, float32 `[rows]`."""
    return {"predicted": outputs["logits"][:, 0]}


def rating_examples(predictions: BatchPredictions) -> dict[str, np.ndarray]:
    """Every text: its number, the predicted one, and the teacher's."""
    true, teacher = predictions.batch["labels"], predictions.teacher
    columns = {"true": true, "predicted": predictions.read["predicted"]}
    columns |= {} if teacher is None else {"teacher": teacher["predicted"]}
    return {name: values[~np.isnan(true)] for name, values in columns.items()}


# -- words of a sentence ----------------------------------------------------------------------------------------------


def words_of(record: Record, source: Source) -> list[str]:
    """The field `tokens`, a list of words; some of them may be empty."""
    words = column(record, "tokens", source)
    if not isinstance(words, list):
        raise Unusable(f"the tokens {reprlib.repr(words)} are {type(words).__name__}, not a list")
    strange = [word for word in words if not isinstance(word, str)]
    if strange:
        raise Unusable(f"the token {reprlib.repr(strange[0])} is {type(strange[0]).__name__}, not a string")
    if not any(word.strip() for word in words):
        raise Unusable("the tokens are blank")
    return words


def labelled_sentence(
    record: Record, source: Source, names: Sequence[str]
) -> tuple[list[str], list[str], float | None]:
    """`tokens`, as many `tags`, and the weight."""
    words, tags = words_of(record, source), column(record, "tags", source)
    if not isinstance(tags, list):
        raise Unusable(f"the tags {reprlib.repr(tags)} are {type(tags).__name__}, not a list")
    if len(words) != len(tags):
        raise Unusable(f"{len(words)} tokens, but {len(tags)} tags")
    if not names and any(isinstance(tag, int | float) and math.isfinite(tag) for tag in tags):
        raise Unusable("tags that are numbers: set config.data.labels to their names in order")
    return words, [named(tag, "tag", names) for tag in tags], weight_of(record, source)


def word_labels(source: Source) -> tuple[str, ...]:
    """The tags of the training data, sorted."""
    rows = source.usable(lambda record: labelled_sentence(record, source, ()), ("weight",))
    return natural_order(tag for _, tags, _ in rows for tag in tags)


def labelled_words(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """`tokens` with the tag of each on its first piece; how many words have none that is read, `truncated_words`.

    Raises:
      ValueError: for tags some of which say a position (`B-PER`) and some none, besides `O`.
    """
    numbers = numbers_of(labels)

    def read(record: Record) -> tuple[list[str], np.ndarray, float | None]:
        words, tags, weight = labelled_sentence(record, source, names_of(settings))
        if not numbers.keys() >= set(tags):
            raise unknown(set(tags) - numbers.keys(), "tag", labels)
        return words, np.array([numbers[tag] for tag in tags], np.int32), weight

    sentences, tags, weights = zip(*source.usable(read, ("weight",)), strict=True)
    all_tags = np.concatenate(tags)
    counts = np.bincount(all_tags, minlength=len(labels)).tolist()
    refuse_mixed([name for name, count in zip(labels, counts, strict=True) if count], labels, source)
    encoded = encode(tokenizer, sentences, words=True, max_length=settings.max_length)
    values = np.full(len(encoded.ids.values), IGNORED, np.int32)
    first = encoded.words.values >= 0
    row_of = np.repeat(np.arange(len(tags)), encoded.ids.lengths)[first]
    starts = Ragged.of(tags).offsets
    values[first] = all_tags[starts[row_of] + encoded.words.values[first]]
    columns: dict[str, Any] = {"input_ids": encoded.ids, "labels": Ragged(values, encoded.ids.offsets)}
    facts = {"truncated_words": int(starts[-1] - first.sum())}
    notices = unlikely(counts, labels, "tags", len(tags))
    return Prepared(Examples(columns | sample_weights(weights)), facts, notices=notices)


def refuse_mixed(tags: Sequence[str], labels: Sequence[str], source: Source) -> None:
    """Raises ValueError where some of the tags in the data say a position and others do not.

    A model may have further ones (`X`, `[CLS]`), which are no part of a name.
    """
    scheme = scheme_of(labels)
    strangers = scheme.strangers(tags)
    positions = [tag for tag in tags if scheme.read(tag)]
    if strangers and positions:
        raise ValueError(
            f"{source.location}: tags of two kinds, {', '.join(positions[:4])} say where a name begins and ends, "
            f"{', '.join(strangers[:4])} do not; beside the first there may only be O. Correct the tags, or name the "
            f"column that has them in {source.columns_field}"
        )


def unlabelled_words(source: Source, tokenizer: Any, settings: DataSettings) -> Examples:
    """`tokens`, or the words of a `text`, without tags: a teacher's predictions are learned on their first pieces."""

    def read(record: Record) -> tuple[list[str], float | None]:
        words = words_of(record, source) if "tokens" in record else text_of(record, "text", source).split()
        return words, weight_of(record, source)

    sentences, weights = zip(*source.usable(read, ("weight",)), strict=True)
    encoded = encode(tokenizer, sentences, words=True, max_length=settings.max_length)
    distill_mask = Ragged((encoded.words.values >= 0).astype(np.int32), encoded.ids.offsets)
    columns: dict[str, Any] = {"input_ids": encoded.ids, "distill_mask": distill_mask}
    return Examples(columns | sample_weights(weights))


def word_examples(predictions: BatchPredictions) -> dict[str, np.ndarray]:
    """Every sentence: entities right, predicted and true, its words, those right, their nats, and agreement.

    Entities begin and end as the scheme of the tags has it, and are counted by seqeval's (conlleval's) conventions.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    true, predicted, teacher = predictions.batch["labels"], predictions.read["predicted"], predictions.teacher
    names, scheme = predictions.labels, scheme_of(predictions.labels)
    labelled = true != IGNORED

    def entities(tags: np.ndarray) -> set[tuple[str, int, int]]:
        return set(get_entities(scheme.standard([names[tag] for tag in tags])))

    counts = np.zeros((len(true), 3), np.int64)
    for row, words in enumerate(labelled):
        in_truth, in_prediction = entities(true[row, words]), entities(predicted[row, words])
        counts[row] = len(in_truth & in_prediction), len(in_prediction), len(in_truth)
    columns = dict(zip(("entities_right", "entities_predicted", "entities_true"), counts.T, strict=True))
    columns |= {"right": ((true == predicted) & labelled).sum(axis=1), "words": labelled.sum(axis=1)}
    columns["nats"] = predictions.read["nats"]
    if teacher is not None:
        agreed = ((predicted == teacher["predicted"]) & labelled).sum(axis=1)
        columns |= {"agreed": agreed, "compared": columns["words"]}
    return {name: values[labelled.any(axis=1)] for name, values in columns.items()}


def word_table(predictions: Sequence[BatchPredictions], facts: Mapping[str, int]) -> str:
    """seqeval's report of the entities, scikit-learn's of the tags, and how many words were not read."""
    from seqeval.metrics import classification_report as entity_report

    true, predicted = _sentences(predictions)
    labels = predictions[0].labels
    scheme = scheme_of(labels)
    parts = []
    standard = [
        [scheme.standard([labels[tag] for tag in tags]) for tags in sentences] for sentences in (true, predicted)
    ]
    if any(tag != "O" for sentences in standard for tags in sentences for tag in tags):
        parts.append(f"entities\n{entity_report(*standard, digits=4, zero_division=0)}")
    if true:
        parts.append(f"words\n{class_report(np.concatenate(true), np.concatenate(predicted), labels)}")
    if (unread := facts.get("truncated_words")) is not None:
        parts.append(f"unread words (beyond max_length, or without pieces), not counted above: {unread}")
    return "\n".join(parts)


def _sentences(predictions: Sequence[BatchPredictions]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """True and predicted tags of the words of every sentence."""
    true, predicted = [], []
    for batch in predictions:
        for labels, tags in zip(batch.batch["labels"], batch.read["predicted"], strict=True):
            words = labels != IGNORED
            if words.any():
                true.append(labels[words])
                predicted.append(tags[words])
    return true, predicted


sequence = Task(
    structure={"head": "sequence"},
    prepare=labelled_texts,
    batches=padded_batches,
    loss=class_loss,
    evaluation=EvalSpec(
        metrics={"loss": example_loss, "accuracy": accuracy, "f1": macro_f1, "mcc": matthews},
        compared=(accuracy, macro_f1, matthews),
        read=class_read,
        examples=class_examples,
        same="true",
        reported=only("true", "predicted", "nats", "agreed", "compared"),
        table=class_table,
    ),
    columns={**PADDED, "labels": Column(per_token=False)},
    labels=text_labels,
    unlabelled=unlabelled_texts,
)
regression = Task(
    structure={"head": "sequence", "regression": True},
    prepare=rated_texts,
    batches=padded_batches,
    loss=rating_loss,
    evaluation=EvalSpec(
        metrics={"loss": mean_squared_error, "pearson": pearson, "spearman": spearman},
        compared=(pearson,),
        read=rating_read,
        examples=rating_examples,
        same="true",
        reported=only("true", "predicted", "teacher"),
        agreement=correlation,
    ),
    columns={**PADDED, "labels": Column(per_token=False, dtype=np.float32)},
    unlabelled=unlabelled_texts,
)
WORD_COLUMNS = ("entities_right", "entities_predicted", "entities_true", "right", "words", "agreed", "compared")
token = Task(
    structure={"head": "token"},
    prepare=labelled_words,
    batches=padded_batches,
    loss=class_loss,
    evaluation=EvalSpec(
        metrics={
            "loss": word_loss,
            "f1": entity_f1,
            "precision": entity_precision,
            "recall": entity_recall,
            "accuracy": word_accuracy,
        },
        compared=(entity_f1, word_accuracy),
        read=class_read,
        examples=word_examples,
        same="words",
        reported=only(*WORD_COLUMNS),
        facts={"unread_words": "truncated_words"},
        table=word_table,
    ),
    columns={**PADDED, "labels": Column()},
    labels=word_labels,
    unlabelled=unlabelled_words,
)
