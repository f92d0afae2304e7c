"""`config.data` and `config.calibration`: every field is a field here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.data.sources import Source, read
from jaxlm.data.sources.locations import may_share


@dataclass(frozen=True)
class DataSettings:
    """Where the data are and how they become batches.

    Attributes:
      format: `tfds`, `jsonl`, `csv`, `tsv`, `conll`, `text` or `python`.
      train, eval, test: path, glob or split, with an optional slice (`corpus.txt[:90%]`); "" where there is none.
      unlabelled: a place like these, of texts without labels that a student reads besides, for what its teachers say
        of them; of tasks whose data have labels. One that may share a row with `eval` or `test` is refused.
      unlabelled_format, unlabelled_columns: `format` and `columns` of these texts; of `text` every line is one.
      columns: names by position, or `{ours: the file's}`; ours are `text`, `text_pair`, `label`, `tokens`, `tags`,
        `source`, `target`, and `weight` (of a sample, for distillation).
      documents: what one document of the text format is: `file`, `line` or `paragraph`.
      labels: names of the classes in the order of the head's outputs, where neither the model nor a teacher has them
        and sorting does not do; also what numbers in the data stand for, `("O", "B-PER", …)`.
      bad_rows: `stop` or `skip` (and count).
      tokenizer: directory or hub id, `bpe:SIZE`, `wordpiece:SIZE` or `character` to train one, "" for the model's own.
      max_length: tokens of a row, of the decoder's too.
      buckets: lengths that batches of examples are padded to, fitted to the data. Each is compiled once: more of them
        save padding in long runs, fewer save compilation in short ones.
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
        place = getattr(self, split)
        if not place:
            raise ValueError(f"config.data.{split} is empty; name a file, a glob or a tfds split")
        columns: Mapping[str, str] | Sequence[str] | None = self.columns
        if split != "unlabelled":
            found = read(self.format, place, columns=columns, bad_rows=self.bad_rows, documents=self.documents)
            found.evaluated = split in ("eval", "test")
            return found
        format, columns = self.unlabelled_format, self.unlabelled_columns
        documents = "line" if format == "text" else "file"
        found = read(format, place, columns=columns, bad_rows=self.bad_rows, documents=documents)
        found.columns_field = "config.data.unlabelled_columns"
        return found

    def refuse_evaluated(self, place: str, field: str) -> None:
        """Raises ValueError for a place, of a field of the config, that may share a row with `eval` or `test`."""
        for split in ("eval", "test"):
            other = getattr(self, split)
            if other and may_share(place, other):
                raise ValueError(
                    f"{field} reads {place!r}, which may share rows with config.data.{split} = {other!r}: what a model "
                    f"is made from must not be what it is measured on; take a slice that ends where the other begins "
                    f"(both in rows or both in percent), or another place"
                )


@dataclass(frozen=True)
class CalibrationSettings:
    """Which text calibrated methods read: every field of `config.calibration`.

    Attributes:
      source: `train` (the place in `config.data.train`), or a place like that one: a path, a glob or a split, with an
        optional slice. One that may share a row with `config.data.eval` or `config.data.test` is refused.
      samples: rows, drawn at random from the source; fewer where it has fewer.
      length: tokens of a row; `None` is `config.data.max_length`.
      batch_size: rows that go through the model at a time.
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
