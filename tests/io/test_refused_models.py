"""Directories that no model comes out of: what in them is refused, in which words, and what only looks odd."""

import json
import math
import shutil

import numpy as np
import pytest

import jaxlm
from jaxlm.io.model_directory import CONFIG, OWN
from jaxlm.io.safetensors import INDEX, SINGLE, Tensor, open_file, open_tensors, read_json, write_file
from tests.io.conftest import edited, refused

# Configs of transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"num_hidden_layers": 20_000}, "num_hidden_layers 20000 must be from 1 to 1000"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers: expected a whole number, found True"),
        ("llama", {"hidden_size": "8"}, "hidden_size: expected a whole number, found '8'"),
        ("llama", {"hidden_size": 8.0}, "hidden_size: expected a whole number, found 8.0"),
        ("llama", {"intermediate_size": [8, 8]}, "intermediate_size: expected one value for all layers"),
        ("llama", {"num_attention_heads": None}, "num_attention_heads: expected a whole number"),
        ("llama", {"num_key_value_heads": 0}, "num_heads 2 is not a multiple of num_kv_heads 0"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps: expected a finite number, found nan"),
        ("llama", {"vocab_size": 10**12}, "vocab_size 1000000000000 must be from 0 to"),
        ("llama", {"head_dim": 3}, "head_dim must be even, not 3"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act: expected one value"),
        ("llama", {"hidden_act": "sliu"}, "unknown activation 'sliu'; did you mean 'silu'"),
        ("llama", {"model_type": ["llama"]}, "model_type: expected a text"),
        ("llama", {"model_type": "lama"}, "unknown model_type 'lama'; did you mean 'llama'"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures: expected a list"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention"),
        ("mistral", {"layer_types": ["full_attention"] * 2, "sliding_window": 4}, "only sliding_attention"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window: expected true or false, found 'no'"),
        ("qwen2", {"max_window_layers": None, "layer_types": None}, "max_window_layers: expected a whole number"),
        ("gpt2", {"attn_pdrop": 1.0}, "attn_pdrop 1.0 must be in [0, 1)"),
        ("gpt2", {"tie_word_embeddings": "true"}, "tie_word_embeddings: expected true or false"),
        ("bert", {"type_vocab_size": -1}, "type_vocab_size -1 must be from 0"),
        ("roberta", {"max_position_embeddings": 1}, "max_positions -1 must be from 0"),
        ("t5", {"feed_forward_proj": 3}, "feed_forward_proj: expected a text, found 3"),
        ("t5", {"scale_decoder_outputs": 1}, "scale_decoder_outputs: expected true or false"),
        ("t5", {"relative_attention_max_distance": 16}, "relative_max_distance 16 above half"),
    ],
)
def test_a_setting_that_cannot_be_is_named(directories, tmp_path, name, changes, message):
    shutil.copytree(directories / name, tmp_path / name)
    edited(tmp_path / name / CONFIG, **changes)
    refused(tmp_path / name, CONFIG, message)


def test_old_configs_that_say_no_padding_by_minus_one(directories, tmp_path):
    shutil.copytree(directories / "llama", tmp_path / "m")
    edited(tmp_path / "m" / CONFIG, pad_token_id=-1)
    assert jaxlm.load(tmp_path / "m").config.pad_token_id is None


# Tensors ----------------------------------------------------------------------------------------------------------


def test_a_single_file_counts_and_not_an_old_index_beside_it(directories, tmp_path):
    shutil.copytree(directories / "gpt2", tmp_path / "m")
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": {"gone": "model-00001-of-00001.safetensors"}}))
    assert open_tensors(tmp_path / "m").keys() == open_file(tmp_path / "m" / SINGLE).keys()
    (tmp_path / "m" / SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00001\.safetensors is missing"):
        jaxlm.load(tmp_path / "m")


def rewritten(directory, change):
    """The directory with its tensors, a table of arrays by name, as `change` returns them."""
    arrays = {name: tensor.read() for name, tensor in open_file(directory / SINGLE).items()}
    write_file(directory / SINGLE, {name: Tensor.of(array, name) for name, array in change(arrays).items()})


@pytest.mark.parametrize(
    ("name", "rename", "texts"),
    [
        ("gpt2", lambda n: f"_orig_mod.{n}", ["'_orig_mod'", "torch.compile"]),
        ("bert", lambda n: f"module.{n}", ["'module'", "DistributedDataParallel"]),
        ("llama", lambda n: f"module._orig_mod.{n}", ["'module'", "DistributedDataParallel"]),
        ("t5", lambda n: f"_fsdp_wrapped_module.{n}", ["'_fsdp_wrapped_module'", "FSDP"]),
        ("llama", lambda n: n.replace("layers.1.", "layers.1._checkpoint_wrapped_module."), ["checkpointing"]),
        ("bert", lambda n: f"model.{n}", ["'model'", "an object that holds the model"]),
        ("bert", lambda n: f"net.student.{n}", ["'net.student'", "an object that holds the model"]),
        ("qwen2", lambda n: f"base_model.model.{n}", ["'base_model'", "PEFT", "merge_and_unload"]),
        ("qwen2", lambda n: n.replace("q_proj.", "q_proj.base_layer."), ["'base_layer'", "PEFT", "merge_and_unload"]),
    ],
)
@pytest.mark.parametrize("head", [None, "none"])
def test_what_wraps_a_model_is_named(directories, tmp_path, name, rename, texts, head):
    shutil.copytree(directories / name, tmp_path / "m")
    rewritten(tmp_path / "m", lambda arrays: {rename(n): array for n, array in arrays.items()})
    refused(tmp_path / "m", *texts, head=head)


def test_an_adapter_without_its_model_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*adapter.*merge_and_unload"):
        jaxlm.load(tmp_path)


def test_integers_in_the_place_of_weights_are_refused(directories, tmp_path):
    for name, tensor in (("gpt2", "transformer.wpe.weight"), ("native", "final_norm/scale")):
        shutil.copytree(directories / name, tmp_path / name)
        rewritten(tmp_path / name, lambda arrays, tensor=tensor: arrays | {tensor: arrays[tensor].astype(np.int8)})
        refused(tmp_path / name, repr(tensor), "int8, expected floating-point numbers")


def with_header(path, text):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = text(header) if callable(text) else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([10**12, 0], "expected"),
        ([2**62, 0], "no array has"),
        ([2**62, 2**62, 0], "no array has"),
        ([1] * 33, "no array has"),
        ([2**40] * 20, "lies at bytes"),
        ([-1, -128], "has the shape"),
        ([True, 128], "has the shape"),
        ([8.0, 16], "has the shape"),
    ],
)
def test_shapes_that_no_tensor_has(directories, tmp_path, shape, message):
    shutil.copytree(directories / "gpt2", tmp_path / "m")
    end = lambda header: max(entry["data_offsets"][1] for entry in header.values() if "dtype" in entry)  # noqa: E731
    with_header(
        tmp_path / "m" / SINGLE,
        lambda header: json.dumps(
            header | {"odd": {"dtype": "F32", "shape": shape, "data_offsets": [end(header), end(header)]}}
        ).encode(),
    )
    refused(tmp_path / "m", "'odd'", message) if message != "expected" else refused(tmp_path / "m", "'odd'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1), "the key 'dtype' is given twice"),
        (lambda text: text.replace(b'"pt"', b"3"), "__metadata__"),
        (lambda text: text.replace(b"int4[", b"int4[a"), "expected int4[inputs,outputs]"),
    ],
)
def test_headers_that_say_two_things_or_nothing(directories, tmp_path, change, message):
    shutil.copytree(directories / "native", tmp_path / "m")
    with_header(tmp_path / "m" / SINGLE, lambda header: change(json.dumps(header).encode()))
    refused(tmp_path / "m", SINGLE, message)


def test_a_mask_of_other_bytes_than_0_and_1_is_refused(tmp_path):
    write_file(tmp_path / SINGLE, {"mask": Tensor.of(np.ones(3, np.bool_), "mask")})
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[:-1] + b"\x02")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'mask' holds bytes"):
        open_tensors(tmp_path)["mask"].read()


# Classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ({"0": 0, "1": 1, "2": 2}, ("0", "1", "2")),
        ({"2": "c", "0": -1, "1": 0.5}, ("-1", "0.5", "c")),
        ({"0": "", "1": "1", "2": "null"}, ("", "1", "null")),
    ],
)
def test_names_that_are_numbers_are_names(directories, tmp_path, names, labels):
    shutil.copytree(directories / "sequence", tmp_path / "m")
    edited(tmp_path / "m" / CONFIG, id2label=names, label2id={"old": 7})
    lm = jaxlm.load(tmp_path / "m")
    assert lm.config.labels == labels
    jaxlm.save(lm, tmp_path / "again")
    assert read_json(tmp_path / "again" / CONFIG)["id2label"] == {str(i): name for i, name in enumerate(labels)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"0": "a", "1": "b", "2": "a"}, "id2label gives the classes 0 and 2 one name, 'a'"),
        ({"0": 1, "1": "1", "2": "b"}, "id2label gives the classes 0 and 1 one name, '1'"),
        ({"0": "a", "1": "b", "3": "c"}, "id2label numbers its labels [0, 1, 3], expected 0 to 2"),
        ({"0": "a", "01": "b", "2": "c"}, "expected the numbers of the classes, found '01'"),
        ({"a": 0, "b": 1, "c": 2}, "expected the numbers of the classes, found 'a'"),
        ({"0": "a", "1": None, "2": "c"}, "the name of class 1: expected a text"),
        ({"0": False, "1": True, "2": "c"}, "the name of class 0: expected a text"),
        (["a", "b", "c"], "id2label: expected a table"),
        ({"0": "a", "1": "b"}, "[3, 8], expected [2, 8]: id2label of config.json names 2 classes"),
    ],
)
def test_names_that_do_not_fit_are_refused(directories, tmp_path, names, message):
    shutil.copytree(directories / "sequence", tmp_path / "m")
    edited(tmp_path / "m" / CONFIG, id2label=names)
    refused(tmp_path / "m", message)


def test_several_labels_for_one_text_are_refused_and_the_body_is_not(directories, tmp_path):
    shutil.copytree(directories / "sequence", tmp_path / "m")
    edited(tmp_path / "m" / CONFIG, problem_type="multi_label_classification")
    for head in (None, "sequence"):
        refused(tmp_path / "m", CONFIG, "multi_label_classification", 'head="none"', head=head)
    body = jaxlm.load(tmp_path / "m", head="none")
    assert body.config.labels == () and "head" not in body.params
    assert jaxlm.load(tmp_path / "m", head="token", labels=["O", "B-X"]).config.labels == ("O", "B-X")
    edited(tmp_path / "m" / CONFIG, problem_type="single_label_classification")
    assert jaxlm.load(tmp_path / "m").config.labels == ("a", "b", "c")


# The native layout ------------------------------------------------------------------------------------------------


def deep(table, *keys):
    for key in keys:
        table = table[key]
    return table


UP, KEY, GATE = "layers_0/mlp/up/kernel", "layers_0/attention/key/kernel", "layers_0/mlp/gate"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.update(layout="natve"), "the layout 'natve', expected transformers or native or adapter"),
        (lambda own: own.update(format=True), "has the format True"),
        (lambda own: own.update(config=[]), "config: expected a table, found []"),
        (lambda own: own["config"].update(family="lama"), "unknown family 'lama'; did you mean 'llama'"),
        (lambda own: own["config"].update(num_layers=20_000), "num_layers 20000 must be from 1 to 1000"),
        (lambda own: own["config"].update(num_layer=2), "no option 'num_layer'; did you mean 'num_layers'"),
        (lambda own: own["config"]["rotary"].update(theta="x"), "theta: expected a finite number, found 'x'"),
        (lambda own: own["config"].update(pooling="mean"), "unknown pooling 'mean'"),
        (lambda own: own.update(axes=[]), "axes: expected a table"),
        (lambda own: own["axes"].pop(GATE), f"{GATE!r}: expected a name for each axis"),
        (lambda own: own["axes"].update({GATE: ["ffn", "x"]}), f"{GATE}.value is float32 [64], expected 2 dimensions"),
        (lambda own: own["axes"].update(stray=["ffn"]), "lacks the tensor 'stray'"),
        (lambda own: own["axes"].update({UP: ["embed", "ffn"]}), f"axis names for {UP!r}, which has its own"),
        (lambda own: own["weights"][UP].update(base=None), f"'{UP}.base' is described by None"),
        (lambda own: own["weights"][UP].update(dense_grad=1), "dense_grad: expected true or false, found 1"),
        (lambda own: own["weights"][KEY].update(rate=1.5), "rate cannot be 1.5"),
        (lambda own: deep(own, "weights", KEY, "base").update(channel=-3), "channel cannot be -3"),
        (lambda own: deep(own, "weights", KEY, "base").update(dtype_name="os"), "dtype_name cannot be 'os'"),
        (lambda own: deep(own, "weights", KEY, "base", "scheme").update(group=8), "expected [4, 32]"),
        (lambda own: deep(own, "weights", KEY, "base", "scheme").update(symmetric=False), "its format needs zero"),
        (lambda own: deep(own, "weights", KEY, "base", "scheme").update(bits="int8"), "no dtype of 'codes'"),
        (lambda own: deep(own, "sparse", f"{UP}.mask").update(shape=[10**15, 64]), "no array has the shape"),
        (lambda own: deep(own, "sparse", f"{UP}.mask").update(support="0:4"), "unknown support '0:4'"),
        (lambda own: own["sparse"].update({f"{UP}.mask": {"shape": [9], "dtype": "U8", "packed": 0}}), "1 to 7 bits"),
        (
            lambda own: own["sparse"].update({f"{UP}.mask": {"shape": [], "dtype": "finfo", "packed": 1}}),
            "dtype 'finfo'",
        ),
    ],
)
def test_descriptions_that_cannot_be_are_named(directories, tmp_path, change, message):
    shutil.copytree(directories / "native", tmp_path / "m")
    own = read_json(tmp_path / "m" / OWN)
    change(own)
    (tmp_path / "m" / OWN).write_text(json.dumps(own))
    refused(tmp_path / "m", message)


def test_leaves_that_lie_in_each_other_are_refused(directories, tmp_path):
    shutil.copytree(directories / "native", tmp_path / "m")
    rewritten(tmp_path / "m", lambda arrays: arrays | {f"{GATE}/x": np.ones(3, np.float32)})
    own = read_json(tmp_path / "m" / OWN)
    edited(tmp_path / "m" / OWN, axes=own["axes"] | {f"{GATE}/x": ["ffn"]})
    refused(tmp_path / "m", f"the network has no place for '{GATE}/x'")
    rewritten(tmp_path / "m", lambda arrays: {n.replace(f"{GATE}/x", "extra"): a for n, a in arrays.items()})
    edited(tmp_path / "m" / OWN, axes=own["axes"] | {"extra": ["ffn", None]})
    refused(tmp_path / "m", "'extra' has the shape [3], but 2 axis names")
