"""A small real data set, prepared and read without TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest

from jaxlm.data import read


@pytest.fixture(scope="module", params=["array_record", "parquet"])
def prepared(request, tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features.FeaturesDict(
        {
            "sentence": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["negative", "positive"]),
            "score": np.float32,
            "tokens": tfds.features.Sequence(tfds.features.Text()),
            "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B-X"])),
        }
    )

    class TinyReviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        @classmethod
        def get_metadata(cls):  # by default looked for in the folder of the module
            return tfds.core.dataset_metadata.DatasetMetadata(description="", citation="")

        url_infos = None  # nothing to download

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(20), "test": self._generate_examples(4)}

        def _generate_examples(self, n):
            for i in range(n):
                yield (
                    i,
                    {
                        "sentence": f"row é {i}",
                        "label": i % 2 if n > 4 else -1,
                        "score": i / 2,
                        "tokens": ["row"] * (i % 3 + 1),
                        "tags": [1] + [0] * (i % 3),
                    },
                )

    folder = tmp_path_factory.mktemp(request.param)
    TinyReviews(data_dir=str(folder), file_format=request.param).download_and_prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        yield folder


def test_records_are_plain(prepared):
    rows = list(read("tfds", "tiny_reviews:train"))
    assert len(rows) == 20
    for row in rows:
        i = int(row["sentence"].removeprefix("row é "))
        assert row["label"] == ("negative", "positive")[i % 2] and row["score"] == i / 2
        assert row["tokens"] == ["row"] * (i % 3 + 1) and row["tags"] == ["B-X"] + ["O"] * (i % 3)
        assert type(row["score"]) is float and type(row["label"]) is str
    assert {row["label"] for row in read("tfds", "tiny_reviews:test")} == {None}


def test_slices_and_columns(prepared):
    head = read("tfds", "tiny_reviews:train[:90%]", columns={"text": "sentence"})
    tail = read("tfds", "tiny_reviews:1.0.0:train[90%:]", columns={"text": "sentence"})
    texts = [row["text"] for row in head], [row["text"] for row in tail]
    assert [len(t) for t in texts] == [18, 2] and len(set(texts[0] + texts[1])) == 20


def test_errors_name_what_there_is(prepared):
    with pytest.raises(ValueError, match="did you mean 'train'"):
        read("tfds", "tiny_reviews:trian")
    with pytest.raises(FileNotFoundError, match=r"TFDS_DATA_DIR\): did you mean 'tiny_reviews'\?; to prepare it, tfds"):
        read("tfds", "tiny_review:train")
    with pytest.raises(FileNotFoundError, match="no data set"):
        read("tfds", "tiny_reviews:9.9.9:train")
    with pytest.raises(ValueError, match="dataset:split"):
        read("tfds", "tiny_reviews")


def test_no_tensorflow(prepared):
    program = """
import sys
from jaxlm.data import read
assert read("tfds", "tiny_reviews:train").rows == 20
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
