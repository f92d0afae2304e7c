"""Model directories from anywhere: whatever their small files say, a model comes out, or an error that names the file.

`make test` draws 300 directories, `make test-full` 10,000.
"""

import json
import math
import os
import shutil
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm.core import arrays, flatten
from jaxlm.io.model_directory import CONFIG, OWN, open_model
from jaxlm.io.safetensors import INDEX, SINGLE, read_json
from jaxlm.models import FAMILIES
from tests.io.conftest import refused

CASES = 10_000 if os.environ.get("JAXLM_FULL") else 300
SHARES = {CONFIG: 0.4, OWN: 0.35, SINGLE: 0.15, INDEX: 0.1}
"""How many of the cases change which file."""


# Whatever a file says ---------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 3, 20_000, 10**12, -(10**30), 10**400, 0.5, math.nan, math.inf]),
    st.sampled_from(["", "x", "gelu", "relu", "linear", "llama3", "yarn", "int4", "float32", "U8", "I64", "int4[4,9]"]),
    st.sampled_from([[], {}, [0], [1, 1], [[0]], {"type": "Masked"}, {"0": 0}, {"0": "a", "1": "a"}, "like a"]),
    st.integers() | st.floats() | st.text(max_size=6),
    st.integers(1, 150).map(lambda depth: nested(depth)),
    st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)),
)


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def changed(draw, value):
    """A JSON value with one entry, at any depth, dropped, replaced, wrapped, renamed or added."""
    children = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if not children or draw(st.integers(0, 4)) == 0:
        if isinstance(value, dict) and draw(st.booleans()):
            return {**value, draw(st.text(max_size=6)): draw(ODD)}
        return draw(ODD | st.just([value]) | st.just({"type": value}))
    key = draw(st.sampled_from(children))
    how = draw(st.sampled_from(["enter", "enter", "enter", "drop", "rename"]))
    copy = dict(value) if isinstance(value, dict) else list(value)
    inner = copy.pop(key)
    if how == "enter":
        inner = draw(changed(inner))
        return {**copy, key: inner} if isinstance(copy, dict) else [*copy[:key], inner, *copy[key:]]
    if how == "rename" and isinstance(copy, dict):
        copy[draw(st.sampled_from(children) | st.text(max_size=6))] = inner
    return copy


@st.composite
def damaged(draw, text):
    """The bytes of a JSON file, changed as a table once or twice, and now and then as bytes."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        value = draw(changed(value))
    text = json.dumps(value).encode()
    how = draw(st.sampled_from(["table", "table", "table", "table", "cut", "byte", "twice", "deep", "mark"]))
    at = draw(st.integers(0, max(len(text) - 1, 0)))
    return {
        "table": lambda: text,
        "cut": lambda: text[:at],
        "byte": lambda: text[:at] + bytes([draw(st.integers(0, 255))]) + text[at + 1 :],
        "twice": lambda: b'{"model_type": "bert", ' + text[1:],
        "deep": lambda: text[:at] + b"[" * 100_000,
        "mark": lambda: b"\xef\xbb\xbf" + text,
    }[how]()


def outcome(directory, head):
    """Opens a model and reads every tensor; `None` where that worked, or the documented error."""
    try:
        stored = open_model(directory, head)
        spec = flatten(stored.network.spec)
        for path, leaf in flatten(stored.params).items():
            assert path not in spec or tuple(leaf.shape) == spec[path].shape
        for tensor in arrays(stored.params).values():
            assert tensor.read().shape == tensor.shape and tensor.read(np.float32).shape == tensor.shape
    except (ValueError, FileNotFoundError) as error:
        return error
    return None


@pytest.mark.parametrize("file", SHARES)
def test_any_file_gives_a_model_or_an_error_that_names_it(directories, tmp_path, file):
    names = {
        CONFIG: [*FAMILIES, "sequence", "token", "ours"],
        OWN: ["ours", "native", "native", "native"],
        SINGLE: ["gpt2", "native"],
        INDEX: ["shards"],
    }[file]
    for name in names:
        shutil.copytree(directories / name, tmp_path / name, dirs_exist_ok=True)
        assert outcome(tmp_path / name, None) is None
    data = {name: (directories / name / file).read_bytes() for name in names}
    outcomes = set()

    @settings(
        max_examples=round(CASES * SHARES[file]),
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.data())
    def check(drawn):
        name = drawn.draw(st.sampled_from(names))
        path = tmp_path / name / file
        if file == SINGLE:
            length = int.from_bytes(data[name][:8], "little")
            text = drawn.draw(damaged(data[name][8 : 8 + length]))
            path.write_bytes(len(text).to_bytes(8, "little") + text + data[name][8 + length :])
        else:
            path.write_bytes(drawn.draw(damaged(data[name])))
        head = drawn.draw(st.sampled_from([None, None, "none"]))
        began = time.monotonic()
        error = outcome(tmp_path / name, head)
        assert time.monotonic() - began < 5
        assert error is None or str(tmp_path / name) in str(error), repr(error)
        assert error is None or len(str(error)) < 1000, "a message repeats what it was given"
        outcomes.add(type(error))

    check()
    assert ValueError in outcomes


# Text that is no plain JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 200_000, "deeper than 100"),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "deeper than 100"),
        (b'{"num_layers": 2, "num_layers": 3}', "the key 'num_layers' is given twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' is given twice"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is no JSON"),
        (b'{"a": "\xff"}', "is no JSON"),
        ('{"a": 1}'.encode("utf-16"), "is no JSON"),
        (b"", "is no JSON"),
        (b"3", "expected a JSON object, found int"),
    ],
)
def test_json_that_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(error.value)


def test_json_with_a_byte_order_mark_and_infinity(tmp_path):
    (tmp_path / "a.json").write_bytes(
        b'\xef\xbb\xbf{"limits": [0.0, Infinity], "deep": ' + b"[" * 98 + b"]" * 98 + b"}"
    )
    assert read_json(tmp_path / "a.json")["limits"] == [0.0, math.inf]


def test_a_file_that_is_too_large_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.io.safetensors.MAX_JSON", 10)
    (tmp_path / "a.json").write_text('{"a": 12}')
    assert read_json(tmp_path / "a.json") == {"a": 12}
    (tmp_path / "a.json").write_text('{"a": 1234}')
    with pytest.raises(ValueError, match=r"a\.json has more than"):
        read_json(tmp_path / "a.json")


# Links and special files ------------------------------------------------------------------------------------------


@pytest.fixture
def model(directories, tmp_path):
    """A copy of a model with a tokenizer file, beside a directory of secrets."""
    shutil.copytree(directories / "ours", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("name", [CONFIG, OWN, SINGLE, "tokenizer.json", "generation_config.json", "vocab.txt"])
def test_links_out_of_a_model_are_not_followed(model, name):
    target = model.parent / "secret" / name
    target.write_bytes((model / name).read_bytes() if (model / name).exists() else b"{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(os.path.relpath(target, model))
    refused(model, name, str(target), "outside of its directory")
    (model / name).unlink()
    target.replace(model / name)
    jaxlm.load(model)


def test_a_shard_and_a_chat_template_behind_a_link(directories, tmp_path):
    shutil.copytree(directories / "shards", tmp_path / "m")
    jaxlm.load(tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m" / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "a.jinja").write_text("{{ x }}")
    refused(tmp_path / "m", "additional_chat_templates/a.jinja", "outside of its directory")
    (tmp_path / "m" / "additional_chat_templates").unlink()
    shard = next((tmp_path / "m").glob("model-*.safetensors"))
    shard.replace(tmp_path / "elsewhere" / shard.name)
    shard.symlink_to(tmp_path / "elsewhere" / shard.name)
    refused(tmp_path / "m", shard.name, "outside of its directory")


def test_links_within_a_directory_and_to_it_are_followed(model):
    (model / CONFIG).rename(model / "real")
    (model / CONFIG).symlink_to("real")
    (model.parent / "name").symlink_to(model)
    assert jaxlm.load(model.parent / "name").config == jaxlm.load(model).config
    (model / "real").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is a link to .*real, which is missing"):
        jaxlm.load(model)
    (model / "real").symlink_to(CONFIG)
    with pytest.raises((ValueError, FileNotFoundError), match=r"config\.json"):
        jaxlm.load(model)


def test_the_cache_of_the_hub_is_read(directories, tmp_path):
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / "0f3e"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate((directories / "sequence").iterdir()):
        shutil.copyfile(path, repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    assert jaxlm.load(snapshot).config == jaxlm.load(directories / "sequence").config
    (snapshot / "vocab.txt").symlink_to("../../../secret")
    (tmp_path / "secret").write_text("x")
    refused(snapshot, "vocab.txt", "outside of its directory")


@pytest.mark.parametrize("name", [CONFIG, SINGLE, "tokenizer.json"])
def test_pipes_and_directories_are_no_files(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    refused(model, name, "no plain file")
    (model / name).unlink()
    (model / name).mkdir()
    refused(model, name, "no plain file")
