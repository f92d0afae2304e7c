"""TensorFlow Datasets, read through ``as_data_source``, that is without TensorFlow."""

import os
from collections.abc import Iterator
from typing import Any

from jaxlm.data.sources.locations import Slice, nearest
from jaxlm.data.sources.source import Options, Row, Stream

READABLE = ("array_record", "parquet")  # tfrecord needs TensorFlow


def rows(location: str, part: Slice, options: Options) -> Stream:
    """One record per example of ``dataset[/config][:version]:split``, for example ``glue/sst2:train[:90%]``.

    Text becomes str, a class label its name (None if the data set has none, as in unlabelled test splits), numbers and
    lists of them become Python's. ``TFDS_DATA_DIR`` (by default ``~/tensorflow_datasets``) is the directory of prepared
    data sets; nothing is downloaded, as preparing many of them needs TensorFlow. Slices round to the nearest row, as
    TensorFlow Datasets does; they are applied here because its parquet reader ignores them.
    """
    name, colon, split = location.rpartition(":")
    if not colon:
        raise ValueError(f"a tfds location is 'dataset:split', for example 'glue/sst2:train', not {location!r}")
    builder = _builder(name)
    if split not in builder.info.splits:
        raise ValueError(f"{name}: no split {split!r}; {nearest(split, builder.info.splits)}")
    examples = builder.as_data_source(split=split)
    features = builder.info.features
    start, stop = part.bounds(len(examples), rounding=round)

    def stream() -> Iterator[Row]:
        for index in range(start, stop):
            try:
                record = {key: _plain(features[key], value) for key, value in examples[index].items()}
            except UnicodeDecodeError as error:
                yield Row(f"{name}:{split}", index + 1, None, f"bytes that are not UTF-8: {error.reason}")
                continue
            yield Row(f"{name}:{split}", index + 1, record)

    return stream


def files(location: str) -> list[str]:
    """The files of a prepared data set, of all its splits."""
    folder = str(_builder(location.rpartition(":")[0]).data_path)
    return sorted(entry.path for entry in os.scandir(folder) if entry.is_file())


def _builder(name: str) -> Any:
    """A reader of a data set on disk, which needs no code of the data set."""
    from jaxlm.core.extras import require

    require("tensorflow_datasets", "tfds")
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    folder = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    recipe = f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        prepared = os.listdir(folder) if os.path.isdir(folder) else []
        raise FileNotFoundError(
            f"no data set {name!r} is prepared in {folder!r} (TFDS_DATA_DIR): "
            f"{nearest(name.partition('/')[0].partition(':')[0], prepared)}; to prepare it, {recipe}"
        ) from None
    stored = builder.info.file_format.value
    if stored not in READABLE:
        raise ValueError(f"{name} is stored as {stored}, which only TensorFlow reads; prepare it again with {recipe}")
    return builder


def _plain(feature: Any, value: Any) -> Any:
    """An example's value without bytes, numpy scalars and label numbers."""
    import numpy as np
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {key: _plain(feature[key], item) for key, item in value.items()}
    if isinstance(feature, tfds.features.Sequence):
        if isinstance(value, dict):  # a sequence of dicts is stored as a dict of sequences
            return {key: [_plain(feature.feature[key], item) for item in items] for key, items in value.items()}
        return [_plain(feature.feature, item) for item in value]
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value)) if int(value) >= 0 else None
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value
