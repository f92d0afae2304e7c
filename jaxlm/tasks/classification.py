"""Classification and regression of whole texts, and of the words of a sentence."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import Term, Terms
from jaxlm.data.encoding import encode
from jaxlm.data.loader import Batches, bucketed, in_order, packed_examples
from jaxlm.data.ragged import Examples, Ragged
from jaxlm.data.settings import DataSettings
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import padding_id
from jaxlm.losses.cross_entropy import IGNORED, cross_entropy, squared_error
from jaxlm.tasks.measure import accuracy, correlation, entity_f1, macro_f1, matthews, pearson, word_accuracy
from jaxlm.tasks.task import (
    PADDED,
    Batch,
    Column,
    Outputs,
    Prepared,
    Quality,
    Read,
    Score,
    Task,
    column,
    sample_weights,
    scalar,
    texts_of,
)


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


def text_labels(source: Source) -> tuple[str, ...]:
    """The classes of the training data, sorted."""
    return tuple(sorted({str(column(record, "label", source)) for record in source}))


def labelled_texts(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """`text` (and `text_pair`) with the class of `label`; a class that training did not have is a bad row."""
    numbers = {name: i for i, name in enumerate(labels)}
    texts, classes, kept = [], [], []
    for row in source.located():
        record = row.record or {}
        label = str(column(record, "label", source))
        if label not in numbers:
            source.reject(row, f"label {label!r} is not in the training data ({', '.join(labels[:8])})")
            continue
        texts.append(texts_of(record, source))
        classes.append(numbers[label])
        kept.append(record)
    columns = {"labels": np.array(classes, np.int32)} | sample_weights(kept, source)
    return Prepared(Examples(_inputs(texts, tokenizer, settings) | columns), {})


def rated_texts(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """`text` (and `text_pair`) with the number in `label`."""
    texts, targets, kept = [], [], []
    for row in source.located():
        record = row.record or {}
        value = column(record, "label", source)
        number = _number(value)
        if not math.isfinite(number):
            source.reject(row, f"label {value!r} is not a number")
            continue
        targets.append(number)
        texts.append(texts_of(record, source))
        kept.append(record)
    columns = {"labels": np.array(targets, np.float32)} | sample_weights(kept, source)
    return Prepared(Examples(_inputs(texts, tokenizer, settings) | columns), {})


def _number(value: Any) -> float:
    """What a label says, NaN where it says no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def unlabelled_texts(source: Source, tokenizer: Any, settings: DataSettings) -> Examples:
    """`text` (and `text_pair`), each of which a teacher says the class of."""
    records = list(source)
    inputs = _inputs([texts_of(record, source) for record in records], tokenizer, settings)
    return Examples(inputs | {"scored": np.ones(len(records), np.int32)} | sample_weights(records, source))


def _inputs(texts: list[tuple[str, ...]], tokenizer: Any, settings: DataSettings) -> dict[str, Any]:
    """The columns that a model reads of texts, or of pairs of them."""
    paired = any(len(t) == 2 for t in texts)
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
    """Accuracy, macro F1 and Matthews correlation, with scikit-learn's report a class."""
    from sklearn.metrics import accuracy_score, classification_report, f1_score, matthews_corrcoef

    true, predicted = predictions["true"], predictions["predicted"]
    metrics = {
        "loss": scalar(terms, "cross_entropy"),
        "accuracy": accuracy_score(true, predicted),
        "f1": f1_score(true, predicted, average="macro", labels=range(len(labels)), zero_division=0),
        "mcc": matthews_corrcoef(true, predicted),
    }
    report = classification_report(
        true, predicted, labels=range(len(labels)), target_names=labels, digits=4, zero_division=0
    )
    return Score({name: float(value) for name, value in metrics.items()}, report)


def class_pieces(read: Read) -> dict[str, np.ndarray]:
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


def rating_pieces(read: Read) -> dict[str, np.ndarray]:
    """Every example: its number, the predicted one, and the teacher's."""
    true, predicted = read.batch["labels"], read.seen["predicted"]
    rows = ~np.isnan(true)
    found = {"true": true[rows], "predicted": predicted[rows]}
    return found if read.teacher is None else found | {"teacher": read.teacher["predicted"][rows]}


def rating_score(terms, predictions, labels, facts) -> Score:
    """Mean squared error, Pearson and Spearman correlation."""
    from scipy.stats import pearsonr, spearmanr

    true, predicted = predictions["true"], predictions["predicted"]
    correlations = {"pearson": pearsonr(true, predicted)[0], "spearman": spearmanr(true, predicted)[0]}
    return Score({"loss": scalar(terms, "squared_error")} | {n: float(v) for n, v in correlations.items()})


# -- words of a sentence ----------------------------------------------------------------------------------------------


def word_labels(source: Source) -> tuple[str, ...]:
    """The tags of the training data, sorted."""
    return tuple(sorted({tag for record in source for tag in column(record, "tags", source)}))


def labelled_words(source: Source, tokenizer: Any, labels: tuple[str, ...], settings: DataSettings) -> Prepared:
    """`tokens` with the tag of each on its first piece; words beyond `max_length` are counted as `truncated_words`."""
    numbers = {name: i for i, name in enumerate(labels)}
    sentences, tags, kept = [], [], []
    for row in source.located():
        record = row.record or {}
        unknown = set(column(record, "tags", source)) - numbers.keys()
        if unknown:
            source.reject(row, f"tags {sorted(unknown)} are not in the training data")
            continue
        sentences.append(column(record, "tokens", source))
        tags.append(np.array([numbers[tag] for tag in record["tags"]], np.int32))
        kept.append(record)
    encoded = encode(tokenizer, sentences, words=True, max_length=settings.max_length)
    values = np.full(len(encoded.ids.values), IGNORED, np.int32)
    first = encoded.words.values >= 0
    row_of = np.repeat(np.arange(len(tags)), encoded.ids.lengths)[first]
    starts = Ragged.of(tags).offsets
    values[first] = np.concatenate(tags)[starts[row_of] + encoded.words.values[first]] if tags else 0
    columns: dict[str, Any] = {"input_ids": encoded.ids, "labels": Ragged(values, encoded.ids.offsets)}
    columns |= sample_weights(kept, source)
    return Prepared(Examples(columns), {"truncated_words": int(starts[-1] - first.sum())})


def unlabelled_words(source: Source, tokenizer: Any, settings: DataSettings) -> Examples:
    """`tokens`, or the words of a `text`, of each of which a teacher says the tag, on its first piece."""
    records = list(source)
    sentences = [record["tokens"] if "tokens" in record else texts_of(record, source)[0].split() for record in records]
    encoded = encode(tokenizer, sentences, words=True, max_length=settings.max_length)
    heard = Ragged((encoded.words.values >= 0).astype(np.int32), encoded.ids.offsets)
    columns: dict[str, Any] = {"input_ids": encoded.ids, "scored": heard}
    return Examples(columns | sample_weights(records, source))


def word_score(
    terms: dict[str, Term], predictions: dict[str, np.ndarray], labels: tuple[str, ...], facts: Mapping[str, int]
) -> Score:
    """Precision, recall, F1 of entities by seqeval's (conlleval's) conventions, accuracy of words; reports of both."""
    from seqeval.metrics import classification_report as entity_report
    from seqeval.metrics import f1_score, precision_score, recall_score
    from sklearn.metrics import accuracy_score
    from sklearn.metrics import classification_report as word_report

    valid = predictions["true"] != IGNORED
    true = [[labels[t] for t in row[keep]] for row, keep in zip(predictions["true"], valid, strict=True)]
    predicted = [[labels[p] for p in row[keep]] for row, keep in zip(predictions["predicted"], valid, strict=True)]
    metrics = {
        "loss": scalar(terms, "cross_entropy"),
        "f1": f1_score(true, predicted, zero_division=0),
        "precision": precision_score(true, predicted, zero_division=0),
        "recall": recall_score(true, predicted, zero_division=0),
        "accuracy": accuracy_score(predictions["true"][valid], predictions["predicted"][valid]),
    }
    words = word_report(
        predictions["true"][valid],
        predictions["predicted"][valid],
        labels=range(len(labels)),
        target_names=labels,
        digits=4,
        zero_division=0,
    )
    report = f"entities\n{entity_report(true, predicted, digits=4, zero_division=0)}\nwords\n{words}"
    return Score({name: float(value) for name, value in metrics.items()}, report)


def word_pieces(read: Read) -> dict[str, np.ndarray]:
    """Every sentence: entities right, predicted and true (as `word_score` counts them), words, and words right."""
    from seqeval.metrics.sequence_labeling import get_entities

    true, predicted, names = read.batch["labels"], read.seen["predicted"], read.labels
    counted = true != IGNORED
    other = predicted if read.teacher is None else read.teacher["predicted"]
    pieces = []
    for tags, guesses, taught, keep in zip(true, predicted, other, counted, strict=True):
        if not keep.any():
            continue
        tags, guesses, taught = tags[keep], guesses[keep], taught[keep]
        here, there = (set(get_entities([names[t] for t in each])) for each in (tags, guesses))
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
    Quality((accuracy, macro_f1, matthews), class_pieces, same="true"),
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
    Quality((pearson,), rating_pieces, same="true", read=rating_read, agreement=correlation),
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
    Quality((entity_f1, word_accuracy), word_pieces, same="words"),
    {**PADDED, "labels": Column()},
    word_labels,
    class_predictions,
    unlabelled_words,
)
