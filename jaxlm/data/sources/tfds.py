"""TensorFlow Datasets, read through ``as_data_source`` and so without TensorFlow."""

from collections.abc import Iterator
from typing import Any

from jaxlm.data.sources.places import Slice, nearest
from jaxlm.data.sources.rows import Options, Row, Stream

READABLE = ("array_record", "parquet")  # tfrecord needs TensorFlow


def rows(place: str, part: Slice, options: Options) -> Stream:
    """One record an example of ``dataset[/config][:version]:split``, for example ``glue/sst2:train[:90%]``.

    Text becomes str, a class label its name (None where the data set leaves it out, as in unlabelled test splits),
    numbers and lists of them become Python's. ``TFDS_DATA_DIR`` says where data sets lie; one that is not there yet is
    prepared as array_record, which downloads it. Slices round to the nearest row, as TensorFlow Datasets does; they
    are cut here because its parquet reader ignores them.
    """
    name, colon, split = place.rpartition(":")
    if not colon:
        raise ValueError(f"a tfds place is 'dataset:split', for example 'glue/sst2:train', not {place!r}")
    builder = _builder(name)
    if split not in builder.info.splits:
        raise ValueError(f"{name}: no split {split!r}; {nearest(split, builder.info.splits)}")
    examples = builder.as_data_source(split=split)
    features = builder.info.features
    start, stop = part.bounds(len(examples), rounding=round)

    def stream() -> Iterator[Row]:
        for index in range(start, stop):
            record = {key: _plain(features[key], value) for key, value in examples[index].items()}
            yield Row(f"{name}:{split}", index + 1, record)

    return stream


def _builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"no TensorFlow data set {name!r}, neither prepared under TFDS_DATA_DIR nor known by name; "
            f"{nearest(name, tfds.list_builders())}"
        ) from None
    if not builder.is_prepared():
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare()
    stored = builder.info.file_format.value
    if stored not in READABLE:
        raise ValueError(
            f"{name} is stored as {stored}, which only TensorFlow reads; prepare it again with "
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare(), or `tfds convert_format`"
        )
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
