"""`config.data` and `config.calibration`: every field is a field here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.data.sources import Source, read
from jaxlm.data.sources.locations import may_share


@dataclass(frozen=True)
class DataSettings:
    """The data of a run, and how batches are made of them.

    Attributes:
      format: `tfds`, `jsonl`, `csv`, `tsv`, `conll`, `text` or `python`.
      train, eval, test: path, glob or split, with an optional slice (`corpus.txt[:90%]`); "" for none.
      unlabelled: path, glob or split of unlabelled data for distillation, for tasks whose data have labels. It must not
        share a row with `eval` or `test`.
      unlabelled_format, unlabelled_columns: `format` and `columns` of these texts; with `text` every line is one.
      columns: names by position, or `{name here: name in the file}`; the names here are `text`, `text_pair`, `label`,
        `tokens`, `tags`, `source`, `target`, and `weight` (of a sample, for distillation).
      documents: what one document of the text format is: `file`, `line` or `paragraph`.
      labels: names of the classes in the order of the head's outputs, if neither the model nor a teacher has them and
        sorted order is not right; also the names of numbers in the data, `("O", "B-PER", …)`.
      bad_rows: `stop` or `skip` (and count).
      tokenizer: directory or hub id, `bpe:SIZE`, `wordpiece:SIZE` or `character` to train one, "" for the model's own.
      max_length: tokens of a row, also of the decoder.
      buckets: number of lengths that batches of examples are padded to, fitted to the data. Each is compiled once: more
        of them save padding in long runs, fewer save compilation in short ones.
      pack: put several whole examples in a row (token classification).
    """

    format: str = "text"
    train: str = ""
    eval: str = ""
    test: str = ""
    unlabelled: str = ""
    unlabelled_format: str = "text"
    unlabelled_columns: Any = None
    columns: Any = None
    labels: Any = None
    documents: str = "file"
    bad_rows: str = "stop"
    tokenizer: str = ""
    max_length: int = 128
    buckets: int = 8
    pack: bool = False

    def __post_init__(self):
        for name in ("max_length", "buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.data.{name} = {getattr(self, name)}: must be at least 1")

    def source(self, split: str) -> Source:
        """The records of `train`, `eval`, `test` or `unlabelled`."""
        location = getattr(self, split)
        if not location:
            raise ValueError(f"config.data.{split} is empty; name a file, a glob or a tfds split")
        columns: Mapping[str, str] | Sequence[str] | None = self.columns
        if split != "unlabelled":
            source = read(self.format, location, columns=columns, bad_rows=self.bad_rows, documents=self.documents)
            source.evaluated = split in ("eval", "test")
            return source
        format, columns = self.unlabelled_format, self.unlabelled_columns
        documents = "line" if format == "text" else "file"
        source = read(format, location, columns=columns, bad_rows=self.bad_rows, documents=documents)
        source.columns_field = "config.data.unlabelled_columns"
        return source

    def refuse_evaluated(self, location: str, field: str) -> None:
        """Raises ValueError if the data that a config field names may share a row with `eval` or `test`."""
        for split in ("eval", "test"):
            evaluated = getattr(self, split)
            if evaluated and may_share(location, evaluated):
                raise ValueError(
                    f"{field} reads {location!r}, which may share rows with config.data.{split} = {evaluated!r}: a "
                    f"model must not be evaluated on data that it is made from; take a slice that ends where that one "
                    f"begins (both in rows or both in percent), or other data"
                )


@dataclass(frozen=True)
class CalibrationSettings:
    """The text that calibrated methods read: every field of `config.calibration`.

    Attributes:
      source: `train` (the value of `config.data.train`), or a path, a glob or a split, with an optional slice. It must
        not share a row with `config.data.eval` or `config.data.test`.
      samples: rows, drawn at random from the source; all of a source with fewer.
      length: tokens of a row; `None` is `config.data.max_length`.
      batch_size: rows of a forward pass.
    """

    source: str = "train"
    samples: int = 128
    length: int | None = None
    batch_size: int = 8

    def __post_init__(self):
        for name in ("samples", "length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"config.calibration.{name} = {value}: must be at least 1")
