"""Classification and regression of whole texts, and of the words of a sentence."""

import math
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Term, Terms
from jaxlm.data.encoding import encode
from jaxlm.data.loader import Batches, bucketed, in_order, packed_examples
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Record, Source, Unusable
from jaxlm.data.tokenizer import padding_id
from jaxlm.losses.cross_entropy import IGNORED, cross_entropy, squared_error
from jaxlm.tasks.metrics import accuracy, correlation, entity_f1, macro_f1, matthews, pearson, word_accuracy
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
    Score,
    Task,
    column,
    number_of,
    sample_weights,
    scalar,
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
    found = sorted(set(names))
    return tuple(sorted(found, key=int) if all(map(_INTEGER.fullmatch, found)) else found)


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
    found = natural_order(names)
    known = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    numbers = any(map(_INTEGER.fullmatch, found))
    hint = "; where numbers stand for names, set config.data.labels to these in order" if numbers else ""
    return Unusable(f"{field} {', '.join(map(repr, found[:8]))} is not among the classes ({known}){hint}")


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
    """`text` (and `text_pair`), each of which a teacher says the class of."""
    rows = source.usable(lambda record: (texts_of(record, source), weight_of(record, source)), OPTIONAL)
    texts, weights = zip(*rows, strict=True)
    inputs = _inputs(texts, tokenizer, settings)
    return Examples(inputs | {"scored": np.ones(len(texts), np.int32)} | sample_weights(weights))


def _inputs(texts: Sequence[tuple[str, ...]], tokenizer: Any, settings: DataSettings) -> dict[str, Any]:
    """The columns that a model reads of texts, or of pairs of them."""
    paired = len(texts[0]) == 2
    encoded = encode(tokenizer, texts if paired else [t[0] for t in texts], max_length=settings.max_length)
    return {"input_ids": encoded.ids} | ({"token_type_ids": encoded.types} if paired else {})


def class_loss(outputs: Outputs, batch: Batch) -> Terms:
    """Cross-entropy an example (or a labelled word)."""
    return {"cross_entropy": cross_entropy(outputs["logits"], batch["labels"])}


def class_predictions(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """The likeliest class beside the true one."""
    return {"predicted": jnp.argmax(outputs["logits"], axis=-1), "true": batch["labels"]}


def class_score(
    terms: dict[str, Term], predictions: dict[str, np.ndarray], labels: tuple[str, ...], facts: Mapping[str, int]
) -> Score:
    """Accuracy, macro F1 and Matthews correlation as scikit-learn's, with its report; NaN where there is nothing."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    true, predicted = predictions["true"], predictions["predicted"]
    if not len(true):
        return Score(dict.fromkeys(("loss", "accuracy", "f1", "mcc"), math.nan))
    metrics = {
        "loss": scalar(terms, "cross_entropy"),
        "accuracy": accuracy_score(true, predicted),
        "f1": f1_score(true, predicted, average="macro", zero_division=0),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")
        metrics["mcc"] = matthews_corrcoef(true, predicted)
    return Score({name: float(value) for name, value in metrics.items()}, class_report(true, predicted, labels))


def class_report(true: np.ndarray, predicted: np.ndarray, labels: tuple[str, ...]) -> str:
    """scikit-learn's report of the classes that occur in truth or prediction."""
    from sklearn.metrics import classification_report

    occur = np.union1d(true, predicted)
    names = [labels[i] for i in occur]
    return classification_report(true, predicted, labels=occur, target_names=names, digits=4, zero_division=0)


def class_pieces(read: BatchPredictions) -> dict[str, np.ndarray]:
    """Every example: its class, the predicted one, and whether the teacher predicts the same."""
    true, predicted = read.batch["labels"], read.seen["predicted"]
    rows = true != IGNORED
    found = {"true": true[rows], "predicted": predicted[rows], "nats": read.seen["nats"][rows]}
    if read.teacher is None:
        return found
    agreed = (predicted == read.teacher["predicted"])[rows]
    return found | {"agreed": agreed.astype(np.int32), "compared": np.ones(len(agreed), np.int32)}


def rating_loss(outputs: Outputs, batch: Batch) -> Terms:
    """Squared error an example."""
    return {"squared_error": squared_error(outputs["logits"][:, 0], batch["labels"])}


def rating_predictions(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """The predicted number beside the true one."""
    return {"predicted": outputs["logits"][:, 0], "true": batch["labels"]}


def rating_read(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """The predicted number."""
    return {"predicted": outputs["logits"][:, 0]}


def rating_pieces(read: BatchPredictions) -> dict[str, np.ndarray]:
    """Every example: its number, the predicted one, and the teacher's."""
    true, predicted = read.batch["labels"], read.seen["predicted"]
    rows = ~np.isnan(true)
    found = {"true": true[rows], "predicted": predicted[rows]}
    return found if read.teacher is None else found | {"teacher": read.teacher["predicted"][rows]}


def rating_score(terms, predictions, labels, facts) -> Score:
    """Mean squared error, Pearson and Spearman correlation; NaN where a correlation does not exist."""
    from scipy.stats import pearsonr, spearmanr

    true, predicted = (np.asarray(predictions[name], np.float64) for name in ("true", "predicted"))
    together = np.stack([true, predicted])
    # of a single pair, of one side that does not vary, or of what is no number
    exists = len(true) > 1 and bool(np.isfinite(together).all() and (np.ptp(together, axis=1) > 0).all())
    correlations = {
        name: float(found(true, predicted)[0]) if exists else math.nan
        for name, found in (("pearson", pearsonr), ("spearman", spearmanr))
    }
    return Score({"loss": scalar(terms, "squared_error"), **correlations})


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
    every = np.concatenate(tags)
    counts = np.bincount(every, minlength=len(labels)).tolist()
    refuse_mixed([name for name, count in zip(labels, counts, strict=True) if count], labels, source)
    encoded = encode(tokenizer, sentences, words=True, max_length=settings.max_length)
    values = np.full(len(encoded.ids.values), IGNORED, np.int32)
    first = encoded.words.values >= 0
    row_of = np.repeat(np.arange(len(tags)), encoded.ids.lengths)[first]
    starts = Ragged.of(tags).offsets
    values[first] = every[starts[row_of] + encoded.words.values[first]]
    columns: dict[str, Any] = {"input_ids": encoded.ids, "labels": Ragged(values, encoded.ids.offsets)}
    facts = {"truncated_words": int(starts[-1] - first.sum())}
    notices = unlikely(counts, labels, "tags", len(tags))
    return Prepared(Examples(columns | sample_weights(weights)), facts, notices=notices)


def refuse_mixed(found: Sequence[str], labels: Sequence[str], source: Source) -> None:
    """Raises ValueError where some of the tags in the data say a position and others do not.

    A model may have further ones (`X`, `[CLS]`), which are no part of a name.
    """
    scheme = scheme_of(labels)
    strangers = scheme.strangers(found)
    positions = [tag for tag in found if scheme.read(tag)]
    if strangers and positions:
        raise ValueError(
            f"{source.place}: tags of two kinds, {', '.join(positions[:4])} say where a name begins and ends, "
            f"{', '.join(strangers[:4])} do not; beside the first there may only be O. Correct the tags, or name the "
            f"column that has them in {source.columns_field}"
        )


def unlabelled_words(source: Source, tokenizer: Any, settings: DataSettings) -> Examples:
    """`tokens`, or the words of a `text`, of each of which a teacher says the tag, on its first piece."""

    def read(record: Record) -> tuple[list[str], float | None]:
        words = words_of(record, source) if "tokens" in record else text_of(record, "text", source).split()
        return words, weight_of(record, source)

    sentences, weights = zip(*source.usable(read, ("weight",)), strict=True)
    encoded = encode(tokenizer, sentences, words=True, max_length=settings.max_length)
    heard = Ragged((encoded.words.values >= 0).astype(np.int32), encoded.ids.offsets)
    columns: dict[str, Any] = {"input_ids": encoded.ids, "scored": heard}
    return Examples(columns | sample_weights(weights))


def word_score(
    terms: dict[str, Term], predictions: dict[str, np.ndarray], labels: tuple[str, ...], facts: Mapping[str, int]
) -> Score:
    """Precision, recall, F1 of names by seqeval's (conlleval's) conventions, accuracy of words; reports of both.

    Names begin and end as the scheme of the labels has it. All of it is of the words that were read, and
    `unread_words` says how many were not. NaN where there is no name in truth or prediction.
    """
    from seqeval.metrics import classification_report as entity_report
    from seqeval.metrics import f1_score, precision_score, recall_score
    from sklearn.metrics import accuracy_score

    valid = predictions["true"] != IGNORED
    scheme = scheme_of(labels)
    true, predicted = (
        [scheme.standard([labels[i] for i in row[keep]]) for row, keep in zip(predictions[name], valid, strict=True)]
        for name in ("true", "predicted")
    )
    metrics = {"loss": scalar(terms, "cross_entropy")}
    report = []
    if any(tag != "O" for row in true + predicted for tag in row):
        metrics |= {
            "f1": f1_score(true, predicted, zero_division=0),
            "precision": precision_score(true, predicted, zero_division=0),
            "recall": recall_score(true, predicted, zero_division=0),
        }
        report.append(f"entities\n{entity_report(true, predicted, digits=4, zero_division=0)}")
    else:
        metrics |= dict.fromkeys(("f1", "precision", "recall"), math.nan)
    if valid.any():
        words = predictions["true"][valid], predictions["predicted"][valid]
        metrics["accuracy"] = accuracy_score(*words)
        report.append(f"words\n{class_report(*words, labels)}")
    else:
        metrics["accuracy"] = math.nan
    if "truncated_words" in facts:
        metrics["unread_words"] = facts["truncated_words"]
        report.append(
            f"unread words (beyond max_length, or without pieces), not counted above: {facts['truncated_words']}"
        )
    return Score({name: float(value) for name, value in metrics.items()}, "\n".join(report))


def word_pieces(read: BatchPredictions) -> dict[str, np.ndarray]:
    """Every sentence: entities right, predicted and true (as `word_score` counts them), words, and words right."""
    from seqeval.metrics.sequence_labeling import get_entities

    true, predicted, names = read.batch["labels"], read.seen["predicted"], read.labels
    scheme = scheme_of(names)
    counted = true != IGNORED
    other = predicted if read.teacher is None else read.teacher["predicted"]
    pieces = []
    for tags, guesses, taught, keep in zip(true, predicted, other, counted, strict=True):
        if not keep.any():
            continue
        tags, guesses, taught = tags[keep], guesses[keep], taught[keep]
        here, there = (set(get_entities(scheme.standard([names[t] for t in each]))) for each in (tags, guesses))
        right, agreed = (tags == guesses).sum(), (guesses == taught).sum()
        pieces.append((len(here & there), len(there), len(here), right, len(tags), agreed, len(tags)))
    fields = ("entities_right", "entities_predicted", "entities_true", "right", "words", "agreed", "compared")
    columns = dict(zip(fields, np.array(pieces, np.int64).reshape(-1, len(fields)).T, strict=True))
    return columns if read.teacher is not None else {n: c for n, c in columns.items() if n not in fields[-2:]}


sequence = Task(
    {"head": "sequence"},
    labelled_texts,
    padded_batches,
    class_loss,
    class_loss,
    class_score,
    EvalSpec((accuracy, macro_f1, matthews), class_pieces, same="true"),
    {**PADDED, "labels": Column(per_token=False)},
    text_labels,
    class_predictions,
    unlabelled_texts,
)
regression = Task(
    {"head": "sequence", "regression": True},
    rated_texts,
    padded_batches,
    rating_loss,
    rating_loss,
    rating_score,
    EvalSpec((pearson,), rating_pieces, same="true", read=rating_read, agreement=correlation),
    {**PADDED, "labels": Column(per_token=False, dtype=np.float32)},
    predict=rating_predictions,
    unlabelled=unlabelled_texts,
)
token = Task(
    {"head": "token"},
    labelled_words,
    padded_batches,
    class_loss,
    class_loss,
    word_score,
    EvalSpec((entity_f1, word_accuracy), word_pieces, same="words"),
    {**PADDED, "labels": Column()},
    word_labels,
    class_predictions,
    unlabelled_words,
)
