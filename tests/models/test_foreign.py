"""Models of other trainers: ONNX graphs read by their operators whatever their form, torch weights by their layers.

``origins/`` holds narrow networks (2 to 4 channels at first) that the code of arcface_torch, AdaFace, CVLface, MagFace
and PLSC built and saved (see its README), and ``expected.npz`` what that code's networks gave for :func:`pixels`, unit
rows.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

from tools.cli import main
from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.bank.from_model import bank_from_model
from trainer.compat.bank.matrices import open_arrays
from trainer.data.index import open_dataset
from trainer.errors import CenterBankError, ModelError
from trainer.models.description import Reading
from trainer.models.onnx import OnnxModel, providers
from trainer.models.open import load_model
from trainer.models.preprocessing import read_beginning

ORIGINS = Path(__file__).parent / "origins"
SIZE, DIM = (32, 32), 16


def pixels() -> np.ndarray:
    """The images of ``expected.npz``, (8, 112, 112, 3) uint8."""
    coarse = np.random.default_rng(17).integers(0, 256, (8, 7, 7, 3)).astype(np.uint8)
    return coarse.repeat(16, 1).repeat(16, 2)


def small_pixels(count: int = 12) -> np.ndarray:
    coarse = np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2)


def matrix() -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(3 * 32 * 32, DIM)) * 0.02).astype(np.float32)


def node(operator: str, inputs: list[str], outputs: list[str], name: str = "", **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)


def graph_file(
    path: Path,
    before: list[Any] | None = None,
    constants: dict[str, Any] | None = None,
    *,
    shape: list[Any] | None = None,
    dtype: int = TensorProto.FLOAT,
    last: str = "input",
    after: list[Any] | None = None,
    outputs: dict[str, list[Any]] | None = None,
    weights: np.ndarray | None = None,
) -> Path:
    """``before`` (from ``input`` to ``last``), then a linear map of all pixels to ``e``, then ``after``."""
    nodes = [*(before or []), node("Flatten", [last], ["f"]), node("MatMul", ["f", "W"], ["e"]), *(after or [])]
    made = {"W": matrix() if weights is None else weights, **(constants or {})}
    initial = [numpy_helper.from_array(np.asarray(value), name) for name, value in made.items()]
    kind = TensorProto.FLOAT16 if made["W"].dtype == np.float16 else TensorProto.FLOAT
    whole = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", dtype, shape or ["b", 3, *SIZE])],
        [helper.make_tensor_value_info(name, kind, s) for name, s in (outputs or {"e": ["b", DIM]}).items()],
        initial,
    )
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def f(value: Any) -> np.ndarray:
    return np.asarray(value, np.float32)


Spelling = tuple[list[Any], dict[str, Any]]

SPELLINGS: dict[str, Spelling] = {
    "named by MXNet": (
        [node("Sub", ["input", "m"], ["s"], "Sub_0"), node("Mul", ["s", "k"], ["q"], "Mul_1")],
        {"m": f(127.5), "k": f(1 / 128)},
    ),
    "named by torch": (
        [node("Sub", ["input", "m"], ["s"], "/norm/Sub"), node("Mul", ["s", "k"], ["q"], "/norm/Mul")],
        {"m": f(127.5), "k": f(1 / 128)},
    ),
    "without names": (
        [node("Sub", ["input", "m"], ["s"]), node("Mul", ["s", "k"], ["q"])],
        {"m": f(127.5), "k": f(1 / 128)},
    ),
    "with Div": (
        [node("Sub", ["input", "m"], ["s"], "Sub_0"), node("Div", ["s", "k"], ["q"], "Div_1")],
        {"m": f(127.5), "k": f(128)},
    ),
}


def folder_of(path: Path, count: int = 40, size: int = 32) -> Path:
    """A set of images: 20 identities of two pictures each."""
    for number, picture in enumerate(np.random.default_rng(2).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)):
        into = path / f"p{number // 2:02d}" / f"{number}.png"
        into.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR).save(into)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    folder_of(folder / "pictures")
    assert main(["pack", str(folder / "pictures"), str(folder / "packed"), "--size", "32"]) == 0
    return folder / "packed"


def test_four_spellings_of_one_graph_give_equal_banks(
    tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    banks = []
    for number, (before, constants) in enumerate(SPELLINGS.values()):
        path = graph_file(tmp_path / f"{number}.onnx", before, constants, last="q")
        assert main(["centers", "from-model", str(path), str(packed), str(tmp_path / f"bank{number}")]) == 0
        assert "fed pixels 0 … 255 (the graph begins with Sub 127.5, " in capsys.readouterr().err
        rows = CenterBank.open(tmp_path / f"bank{number}").rows(0, 20)
        banks.append((rows.centers.numpy(), rows.boundaries.numpy()))
    for centers, boundaries in banks[1:]:
        np.testing.assert_allclose(centers, banks[0][0], atol=1e-6)
        np.testing.assert_allclose(boundaries, banks[0][1], atol=1e-6)
    assert np.abs(banks[0][1]).max() < 0.99


def _normalisation(*values: float) -> dict[str, np.ndarray]:
    return {name: f([value] * 3) for name, value in zip(("g", "b", "m", "v"), values, strict=True)}


BEGINNINGS: list[tuple[list[Any], dict[str, Any], str | None]] = [
    ([], {}, None),
    ([node("Sub", ["input", "m"], ["a"]), node("Div", ["a", "s"], ["q"])], {"m": f(0.5), "s": f(0.5)}, "0..1"),
    (
        [node("Sub", ["input", "m"], ["a"]), node("Div", ["a", "s"], ["q"])],
        {"m": f([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1), "s": f([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)},
        "0..1",
    ),
    (
        [node("Sub", ["input", "m"], ["a"]), node("Mul", ["k", "a"], ["q"])],
        {"m": f([123.7, 116.3, 103.5]).reshape(3, 1, 1), "k": f(0.0171)},
        "0..255",
    ),
    ([node("Mul", ["input", "k"], ["a"]), node("Add", ["a", "m"], ["q"])], {"k": f(2), "m": f(-1)}, "0..1"),
    ([node("Div", ["input", "k"], ["q"])], {"k": f(255)}, "0..255"),
    (
        [
            node("Cast", ["input"], ["c"], to=1),
            node("Div", ["c", "s"], ["a"]),
            node("Sub", ["a", "m"], ["d"]),
            node("Div", ["d", "m"], ["q"]),
        ],
        {"s": f(255), "m": f(0.5)},
        "0..255",
    ),
    (
        [node("BatchNormalization", ["input", "g", "b", "m", "v"], ["q"], "bn_data")],
        _normalisation(1, 0, 127.5, 5000),
        "0..255",
    ),
    ([node("BatchNormalization", ["input", "g", "b", "m", "v"], ["q"])], _normalisation(1, 0, 0.02, 0.3), "normalised"),
    (
        [
            node("Constant", [], ["m"], value_float=127.5),
            node("Sub", ["input", "m"], ["a"]),
            node("Constant", [], ["k"], value=numpy_helper.from_array(f(128))),
            node("Div", ["a", "k"], ["q"]),
        ],
        {},
        "0..255",
    ),
    ([node("Sub", ["input", "z"], ["a"], "x"), node("Mul", ["a", "o"], ["q"], "y")], {"z": f(0), "o": f(1)}, "0..255"),
    # a mean of pixels without a scale, as Caffe's models have it:
    ([node("Sub", ["input", "k"], ["q"])], {"k": f([103.939, 116.779, 123.68]).reshape(3, 1, 1)}, "0..255"),
    # a Clip says what is expected, also after arithmetic; of a mean image each colour's mean counts:
    ([node("Clip", ["input", "z", "k"], ["q"])], {"z": f(0), "k": f(255)}, "0..255"),
    ([node("Clip", ["input", "z", "k"], ["q"])], {"z": f(0), "k": f(1)}, "0..1"),
    ([node("Clip", ["input", "z", "k"], ["q"])], {"z": f(-1), "k": f(1)}, "normalised"),
    ([node("Clip", ["input", "z"], ["q"])], {"z": f(0)}, None),
    (
        [node("Div", ["input", "s"], ["a"]), node("Clip", ["a", "z", "o"], ["q"])],
        {"s": f(255), "z": f(0), "o": f(1)},
        "0..255",
    ),
    ([node("Sub", ["input", "k"], ["q"])], {"k": f(np.full((1, 3, 32, 32), 120))}, "0..255"),
    # a divisor that is computed, behind a border:
    (
        [
            node("Pad", ["input", "p"], ["w"]),
            node("Slice", ["w", "one", "less", "sides"], ["v"]),
            node("Mul", ["s", "s"], ["t"]),
            node("Sqrt", ["t"], ["u"]),
            node("Div", ["v", "u"], ["q"]),
        ],
        {
            "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "one": np.array([1, 1]),
            "less": np.array([-1, -1]),
            "sides": np.array([2, 3]),
            "s": f(127.5),
        },
        "0..255",
    ),
    # neither constants of the input's colours nor on the way from the input:
    ([node("ReduceMean", ["input"], ["m"], axes=[1, 2, 3]), node("Sub", ["input", "m"], ["q"])], {}, None),
    ([node("Mul", ["input", "k"], ["q"])], {"k": f(np.ones((3, 32, 32)))}, None),
]


@pytest.mark.parametrize(("before", "constants", "expected"), BEGINNINGS)
def test_what_a_graph_does_first_says_what_it_takes(
    tmp_path: Path, before: list[Any], constants: dict[str, Any], expected: str | None
) -> None:
    path = graph_file(tmp_path / "m.onnx", before, constants, last="q" if before else "input")
    assert read_beginning(path, "input").pixels == expected


class Prepared(torch.nn.Module):
    """A small network behind something that people put in front of one."""

    def __init__(self, first: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.flat = first, torch.nn.Linear(3 * 32 * 32, DIM, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.flat(self.first(images).flatten(1))


REVERSALS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "indices": lambda x: x[:, [2, 1, 0]],
    "flip": lambda x: x.flip(1),
    "split": lambda x: torch.cat(x.split(1, 1)[::-1], 1),
}


@pytest.mark.parametrize("how", REVERSALS)
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_reverses_the_colours_is_fed_bgr(tmp_path: Path, how: str, dynamo: bool) -> None:
    """By both of torch's exporters, which write it as Gather, GatherND, Slice, or Split and Concat."""
    module, path = Prepared(REVERSALS[how]).eval(), tmp_path / "m.onnx"
    torch.onnx.export(module, (torch.zeros(2, 3, *SIZE),), path, dynamo=dynamo, verbose=False)
    model = load_model(path)
    assert "BGR (the graph reverses the colours first; state it with `color`)" in model.reading
    images = small_pixels(4)
    with torch.no_grad():
        expected = module.flat(torch.from_numpy(signed(images)).float().flatten(1)).numpy()
    np.testing.assert_allclose(model.embed(images), expected / np.linalg.norm(expected, axis=1)[:, None], atol=1e-4)
    assert "BGR (" not in load_model(path, reading=Reading(color="BGR")).reading
    assert load_model(path, reading=Reading(color="RGB")).card.color == "RGB"


UNREAD: dict[str, tuple[Spelling, str]] = {
    "whitening": (
        ([node("ReduceMean", ["input"], ["m"], axes=[1, 2, 3]), node("Sub", ["input", "m"], ["q"])], {}),
        "begins with ReduceMean and Sub by what is no constant:",
    ),
    "a power": (([node("Pow", ["input", "k"], ["q"])], {"k": f(2)}), "begins with Pow:"),
    "after something known": (
        ([node("Mul", ["input", "k"], ["a"]), node("Min", ["a", "m"], ["q"])], {"k": f(1), "m": f(255)}),
        "begins with Mul 1, then Min:",
    ),
    "a contradiction": (
        (
            [node("Clip", ["input", "z", "o"], ["a"]), node("Sub", ["a", "k"], ["q"])],
            {"z": f(0), "o": f(1), "k": f(127.5)},
        ),
        "begins with Clip to 0 … 1, Sub 127.5, which do not agree:",
    ),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_cannot_be_read_is_not_guessed(
    tmp_path: Path, packed: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (before, constants), words = UNREAD[kind]
    path = graph_file(tmp_path / "m.onnx", before, constants, last="q")
    assert main(["centers", "from-model", str(path), str(packed), str(tmp_path / "bank")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "state it with --pixels (0..255, 0..1 or normalised, then --mean and --std) and --color" in said
    assert "fed pixels 0 … 255 (as stated)" in load_model(path, reading=Reading(pixels="0..255")).reading


def embedding(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Unit rows of the linear map, from (b, 3, H, W) or (b, H, W, 3) as it takes them."""
    found = images.reshape(len(images), -1).astype(np.float64) @ weights.astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def signed(images: np.ndarray) -> np.ndarray:
    return (images.transpose(0, 3, 1, 2) - 127.5) / 127.5


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "float16": ({"dtype": TensorProto.FLOAT16, "weights": matrix().astype(np.float16)}, "float16"),
    "fixed batch of 1": ({"shape": [1, 3, *SIZE], "outputs": {"e": [1, DIM]}}, "in groups of 1"),
    "fixed batch of 5": ({"shape": [5, 3, *SIZE], "outputs": {"e": [5, DIM]}}, "in groups of 5"),
    "two outputs": (
        {
            "after": [node("ReduceL2", ["e"], ["norm"], axes=[1], keepdims=1)],
            "outputs": {"norm": ["b", 1], "e": ["b", DIM]},
        },
        "the first of its outputs that is an embedding, of norm, e",
    ),
    "four axes": (
        {
            "after": [node("Unsqueeze", ["e", "ax"], ["o"])],
            "constants": {"ax": np.array([2, 3])},
            "outputs": {"o": ["b", DIM, 1, 1]},
        },
        "from the output 'o'",
    ),
    "unnamed dimension": ({"outputs": {"e": ["b", "d"]}}, f"dimension {DIM}"),
    "fails in batches": (
        {
            "before": [node("Reshape", ["input", "to"], ["r"])],
            "constants": {"to": np.array([1, 3, *SIZE])},
            "last": "r",
            "outputs": {"e": ["b", DIM]},
        },
        "one image at a time",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_inputs_and_outputs(tmp_path: Path, form: str) -> None:
    options, said = FORMS[form]
    model = load_model(graph_file(tmp_path / "m.onnx", **options))
    assert said in model.reading
    images = small_pixels()
    tolerance = 5e-3 if form == "float16" else 1e-5
    np.testing.assert_allclose(model.embed(images), embedding(signed(images), matrix()), atol=tolerance)
    assert model.embed(images[:0]).shape == (0, DIM)


def test_uint8_takes_pixels_and_channels_may_come_last(tmp_path: Path) -> None:
    cast = [node("Cast", ["input"], ["c"], to=1)]
    path = graph_file(tmp_path / "u.onnx", cast, last="c", dtype=TensorProto.UINT8, shape=["b", 3, *SIZE])
    images = small_pixels()
    expected = embedding(images.transpose(0, 3, 1, 2), matrix())
    np.testing.assert_allclose(load_model(path).embed(images), expected, atol=1e-5)
    with pytest.raises(ModelError, match="its input is uint8"):
        load_model(path, reading=Reading(pixels="0..1"))
    path = graph_file(tmp_path / "n.onnx", shape=["b", *SIZE, 3])
    model = load_model(path)
    assert "channels last" in model.reading
    np.testing.assert_allclose(model.embed(images), embedding((images - 127.5) / 127.5, matrix()), atol=1e-5)


def test_a_free_size_has_to_be_stated(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", shape=["b", 3, "h", "w"])
    with pytest.raises(ModelError, match=r"leaves height and width free; state them: `size`"):
        load_model(path)
    model = load_model(path, reading=Reading(size=SIZE))
    assert model.card.image_size == SIZE
    with pytest.raises(ModelError, match="`size` says 24 × 24"):
        load_model(graph_file(tmp_path / "f.onnx"), reading=Reading(size=(24, 24)))
    with pytest.raises(ModelError, match=r"fails on one image"):
        load_model(path, reading=Reading(size=(24, 24)))


def test_statements_count_before_the_graph(tmp_path: Path) -> None:
    images, weights = small_pixels(), matrix()
    before, constants = SPELLINGS["named by torch"]
    plain = graph_file(tmp_path / "m.onnx")
    hashes = set()
    rgb = images.transpose(0, 3, 1, 2)
    mean, std = np.array([0.4, 0.5, 0.6]).reshape(3, 1, 1), np.array([0.2, 0.3, 0.5]).reshape(3, 1, 1)
    cases: list[tuple[Reading, np.ndarray]] = [
        (Reading(), (rgb - 127.5) / 127.5),
        (Reading(pixels="0..255"), rgb),
        (Reading(pixels="0..1"), rgb / 255),
        (Reading(color="BGR"), (rgb[:, ::-1] - 127.5) / 127.5),
        (Reading(color="BGR", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.5)), (rgb[:, ::-1] / 255 - mean) / std),
    ]
    for reading, fed in cases:
        model = load_model(plain, reading=reading)
        np.testing.assert_allclose(model.embed(images), embedding(fed, weights), atol=1e-5)
        np.testing.assert_allclose(model.embed(images[..., ::-1], "BGR"), embedding(fed, weights), atol=1e-5)
        hashes.add(model.hash)
    assert len(hashes) == len(cases), "caches must not mix two readings of one file"
    inside = load_model(graph_file(tmp_path / "i.onnx", before, constants, last="q"), reading=Reading(pixels="0..1"))
    assert isinstance(inside, OnnxModel)
    assert "as stated" in inside.reading
    np.testing.assert_allclose(inside.embed(images), embedding((rgb / 255 - 127.5) / 128, weights), atol=1e-5)
    two = {"e": ["b", DIM], "norm": ["b", 1]}
    path = graph_file(tmp_path / "t.onnx", after=[node("ReduceL2", ["e"], ["norm"], axes=[1], keepdims=1)], outputs=two)
    assert load_model(path, reading=Reading(output="e")).dim == DIM
    for name, words in (("norm", "no embedding"), ("x", "it has e, norm")):
        with pytest.raises(ModelError, match=words):
            load_model(path, reading=Reading(output=name))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": ["b", 1, *SIZE], "weights": matrix()[:1024]}, r"needed is \(batch, 3, H, W\)"),
        (
            {"dtype": TensorProto.DOUBLE, "before": [node("Cast", ["input"], ["c"], to=1)], "last": "c"},
            "taken are float32, float16 and uint8",
        ),
        ({"after": [node("ReduceL2", ["e"], ["n"], axes=[1])], "outputs": {"n": ["b", 1]}}, r"needed is \(batch, D\)"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_a_line(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(graph_file(tmp_path / "m.onnx", **options))


def collapsed(path: Path) -> Path:
    """Takes 0 … 255 but does not show it (its range is inside its first weights): (x − 127.5) / 128 as a map."""
    weights = matrix()
    shift = -127.5 * weights.sum(0)
    return graph_file(path, after=[node("Add", ["e", "s"], ["o"])], constants={"s": shift}, outputs={"o": ["b", DIM]})


def test_embeddings_that_are_not_finite_are_named_as_such(
    tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [node("Mul", ["input", "k"], ["q"])]
    broken = graph_file(tmp_path / "nan.onnx", before=nodes, constants={"k": f(np.nan)}, last="q")
    assert main(["model", "describe", str(broken), "--data", str(packed)]) == 2
    err = capsys.readouterr().err
    assert "its embeddings are not finite" in err
    assert "coincide" not in err


def test_a_model_that_is_fed_wrongly_is_refused_by_every_command(
    tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = collapsed(tmp_path / "old.onnx")
    data, words = f"unseen={packed}", "embeddings of different images all but coincide (mean cosine "
    from_model = ["centers", "from-model", str(old), str(packed), str(tmp_path / "bank")]
    evaluate = ["evaluate", "--old", str(old), "--new", str(old), "--data", data, "--fars", "1e-1", "--cache", "none"]
    describe = ["model", "describe", str(old), "--data", str(packed)]
    np.save(tmp_path / "faces.npy", np.eye(40, DIM, dtype=np.float32) + 0.1)
    gallery = ["gallery", "plan", str(tmp_path / "faces.npy"), "--model", str(old), "--images", str(packed)]
    for command in (from_model, evaluate, describe, gallery):
        assert main(command) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()
    assert main([*gallery, "--pixels", "0..255"]) == 0
    assert main([*from_model, "--allow-collapsed"]) == 0
    assert main([*from_model, "--force", "--pixels", "0..255"]) == 0
    assert "fed pixels 0 … 255 (as stated)" in capsys.readouterr().err
    assert float(CenterBank.open(tmp_path / "bank").rows(0, 20).boundaries.max()) < 0.99
    assert main([*evaluate, "--pixels", "0..255", "--replicates", "100", "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["sets"]["unseen"]


def test_a_bank_whose_boundaries_coincide_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    np.save(tmp_path / "e.npy", (random.normal(size=(1, 8)) + 1e-3 * random.normal(size=(40, 8))).astype(np.float32))
    np.save(tmp_path / "l.npy", np.arange(40) // 2)
    command = ["centers", "from-embeddings", str(tmp_path / "e.npy"), str(tmp_path / "bank"), "--labels"]
    assert main([*command, str(tmp_path / "l.npy")]) == 2
    assert "95 % of the classes have boundaries above" in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()
    assert main([*command, str(tmp_path / "l.npy"), "--allow-collapsed"]) == 0


def test_a_description_is_kept_where_the_user_names_it(
    tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    old, images = collapsed(tmp_path / "a" / "old.onnx"), small_pixels()
    expected = load_model(old, reading=Reading(pixels="0..255", color="BGR")).embed(images)
    elsewhere, beside = tmp_path / "kept.model.json", tmp_path / "a" / "old.model.json"
    for target in (elsewhere, beside):
        words = ["model", "describe", str(old), "--pixels", "0..255", "--color", "BGR", "--write", str(target)]
        assert main(words) == 0
        assert "fed pixels 0 … 255 (as stated), BGR" in capsys.readouterr().out
        for path in (target, old) if target == beside else (target,):
            model = load_model(path)
            assert (model.path.resolve(), model.card.color) == (old.resolve(), "BGR")
            np.testing.assert_allclose(model.embed(images), expected, atol=1e-6)
    assert main(words) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    kept = beside.read_bytes()
    refused = ["--pixels", "normalised", "--data", str(packed), "--write", str(beside), "--force"]
    assert main(["model", "describe", str(old), *refused]) == 2  # what is refused replaces nothing
    assert beside.read_bytes() == kept
    assert load_model(elsewhere, reading=Reading(color="RGB")).card.color == "RGB"  # what is stated now counts first
    assert main(["model", "describe", str(elsewhere), "--data", str(packed), "--json", str(tmp_path / "d.json")]) == 0
    assert json.loads((tmp_path / "d.json").read_text())["color"] == "BGR"
    graph_file(old)
    for path in (old, elsewhere):
        with pytest.raises(ModelError, match=r"describes another old.onnx .* describe it anew"):
            load_model(path)
    assert main([*words, "--force"]) == 0  # which is what it says
    beside.write_text(beside.read_text()[:-20])
    with pytest.raises(ModelError, match="is no readable JSON"):
        load_model(old)
    beside.unlink()
    old.unlink()
    with pytest.raises(ModelError, match="which does not exist"):
        load_model(elsewhere)
    with pytest.raises(ModelError, match="no such file"):
        load_model(old)


def test_options_that_do_not_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = graph_file(tmp_path / "m.onnx")
    assert main(["model", "describe", str(old), "--pixels", "0..1", "--mean", "0.5"]) == 2
    assert "mean and std belong to pixels = normalised" in capsys.readouterr().err
    assert main(["model", "describe", str(old), "--write", str(tmp_path / "x.json")]) == 2
    assert "ends with .model.json" in capsys.readouterr().err
    for option, value in (("--mean", "1,2"), ("--std", "a"), ("--size", "0")):
        with pytest.raises(SystemExit):
            main(["model", "describe", str(old), option, value])
    assert main(["model", "describe", str(old), "--std", "0"]) == 2


def test_onnx_runtime_uses_cuda_where_it_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import onnxruntime

    assert providers("cpu") == ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert providers("cuda:1") == ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert providers("cuda:3") == [("CUDAExecutionProvider", {"device_id": 3}), "CPUExecutionProvider"]
    assert providers("cpu") == ["CPUExecutionProvider"]
    asked = []
    original = onnxruntime.InferenceSession

    def session(path: str, options: Any, providers: list[Any]) -> Any:
        asked.append(providers)
        return original(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    load_model(graph_file(tmp_path / "m.onnx"), torch.device("cuda", 2))  # a rank's own device
    assert asked == [[("CUDAExecutionProvider", {"device_id": 2}), "CPUExecutionProvider"]]


@pytest.mark.parametrize("built_in", [False, True])
def test_without_cuda_onnx_runtime_says_that_it_runs_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, built_in: bool
) -> None:
    """Without its CUDA provider, and with one that fails to start, as where drivers are missing."""
    import onnxruntime

    original = onnxruntime.InferenceSession

    def session(path: str, options: Any, providers: list[Any]) -> Any:
        if len(providers) > 1:
            raise RuntimeError("libcudnn.so: cannot open shared object file")
        return original(path, options, providers=providers)

    if built_in:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    model = load_model(graph_file(tmp_path / "m.onnx"), torch.device("cuda", 0))
    assert model.embed(small_pixels(2)).shape == (2, DIM)
    why = "its CUDA provider did not start" if built_in else "it has no CUDA provider"
    assert f"m.onnx: ONNX Runtime runs it on the CPU: {why} (pip install onnxruntime-gpu)" in caplog.text


FILES = {
    "arcface_r18.pt": ("iresnet18 of width 2", "RGB"),
    "arcface_mbf.pt": ("mobilefacenet of width 4", "RGB"),
    "adaface_ir18.ckpt": ("ir_18 of width 2", "BGR"),
    "cvlface_ir18.pt": ("ir_18 of width 2", "RGB"),
    "magface_r18.pth": ("iresnet18 of width 2", "BGR"),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_of_other_trainers_give_what_their_own_code_gives(name: str) -> None:
    network, color = FILES[name]
    model = load_model(ORIGINS / name)
    assert f"{name}: {network}, dimension 16, 112 × 112" in model.reading
    assert model.card.color == color
    np.testing.assert_allclose(model.embed(pixels()), np.load(ORIGINS / "expected.npz")[name.split(".")[0]], atol=1e-5)


def test_plsc_exported_by_paddle_gives_what_it_gives_there() -> None:
    model = load_model(ORIGINS / "plsc_r18.onnx", reading=Reading(pixels="normalised", color="RGB"))
    assert "fed pixels normalised by mean 0.5 and std 0.5 (of pixel / 255) (as stated), RGB, 112 × 112" in model.reading
    np.testing.assert_allclose(model.embed(pixels()), np.load(ORIGINS / "expected.npz")["plsc_r18"], atol=1e-5)


def test_an_export_that_fails_in_batches_is_run_one_by_one() -> None:
    """arcface_torch's torch2onnx.py on its own MobileFaceNet."""
    model = load_model(ORIGINS / "arcface_mbf.onnx")
    assert "one image at a time, for the graph does not work on several" in model.reading
    np.testing.assert_allclose(model.embed(pixels()), np.load(ORIGINS / "expected.npz")["arcface_mbf"], atol=1e-5)


WRAPPINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {f"model.{k}": v for k, v in s.items()},
    "net": lambda s: {f"net.{k}": v for k, v in s.items()},
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "_orig_mod": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "module._orig_mod": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "_orig_mod.module": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "state_dict, model.net": lambda s: {"state_dict": {f"model.net.{k}": v for k, v in s.items()}},
    "next to a head": lambda s: {**{f"backbone.{k}": v for k, v in s.items()}, "head.weight": torch.zeros(4, 16)},
    "arcface_torch's checkpoint": lambda s: {
        "epoch": 1,
        "state_dict_backbone": s,
        "state_dict_softmax_fc": {"weight": torch.zeros(4, 16)},
        "state_optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2, 3, 3, 3)}}, "param_groups": []},
    },
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "a Namespace next to it": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)},
}


BEFORE_ZIP = [
    w for w in WRAPPINGS if w != "a Namespace next to it"
]  # stand-ins need the list of names of the zip format


@pytest.mark.parametrize(("wrapping", "legacy"), [(w, False) for w in WRAPPINGS] + [(w, True) for w in BEFORE_ZIP])
def test_wrappings_of_state_dicts(tmp_path: Path, wrapping: str, legacy: bool) -> None:
    state = torch.load(ORIGINS / "arcface_r18.pt", weights_only=True)
    path = tmp_path / "w.pt"
    torch.save(WRAPPINGS[wrapping](state), path, _use_new_zipfile_serialization=not legacy)
    found = load_model(path).embed(pixels())
    tolerance = 5e-3 if wrapping == "half" else 1e-5
    np.testing.assert_allclose(found, np.load(ORIGINS / "expected.npz")["arcface_r18"], atol=tolerance)


class Runs:
    """What unpickling would run."""

    def __reduce__(self) -> Any:
        return eval, ("print('it ran')",)


def _changed(change: Callable[[dict[str, Any]], Any], name: str = "arcface_r18.pt") -> Any:
    return change(dict(torch.load(ORIGINS / name, weights_only=True)))


def _renamed(state: dict[str, Any]) -> dict[str, Any]:
    return {k.replace("downsample", "shortcut"): v for k, v in state.items()}


def refused() -> Iterator[tuple[Any, str]]:
    yield _changed(_renamed), r"lacks layer1.0.downsample.0.weight, .* and \d+ more; it has layer1.0.shortcut.0.weight,"
    yield _changed(lambda s: {"a": s, "b": s}), "holds 2 networks that fit, below 'a.', 'b.'"
    yield _changed(lambda s: {k: v for k, v in s.items() if "layer4" not in k}), r"stages of 2, 2, 2, 0 units\); export"
    yield {"encoder.weight": torch.zeros(3, 3)}, r"of no network known here \(it has encoder.weight"
    yield _changed(lambda s: {k: v for k, v in s.items() if k != "fc.weight"}), "'fc.weight'"
    yield {"epoch": 3}, "not a state dict"
    yield torch.nn.Linear(2, 2), "it holds a Linear"


@pytest.mark.parametrize("number", range(7))
def test_unknown_layouts_show_the_names_that_do_not_meet(tmp_path: Path, number: int) -> None:
    content, words = list(refused())[number]
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path / "w.pt")


def test_nothing_that_a_file_names_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(ORIGINS / "arcface_r18.pt", weights_only=True)
    torch.save({"state_dict": state, "hook": Runs()}, tmp_path / "w.pt")
    load_model(tmp_path / "w.pt")  # with a stand-in for what it names
    torch.save({"state_dict": state, "hook": Runs()}, tmp_path / "o.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="nothing of it was executed"):
        load_model(tmp_path / "o.pt")
    assert "it ran" not in capsys.readouterr().out
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"cut.pt: is cut short or damaged \(5,000 bytes"):
        load_model(tmp_path / "cut.pt")
    script = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    torch.jit.save(script, tmp_path / "script.pt")
    with pytest.raises(
        ModelError,
        match=r"script\.pt: a TorchScript archive, which is a program and is not run; export the network to ONNX",
    ):
        load_model(tmp_path / "script.pt")


def test_an_ir_network_without_wrapping_needs_its_colour_order(tmp_path: Path) -> None:
    state = torch.load(ORIGINS / "cvlface_ir18.pt", weights_only=True)
    torch.save({k.removeprefix("net."): v for k, v in state.items()}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="AdaFace trains it on BGR, CVLface on RGB; state which with `color`"):
        load_model(tmp_path / "w.pt")
    model = load_model(tmp_path / "w.pt", reading=Reading(color="RGB", backbone="ir_18"))
    np.testing.assert_allclose(model.embed(pixels()), np.load(ORIGINS / "expected.npz")["cvlface_ir18"], atol=1e-5)
    with pytest.raises(ModelError, match="its layers are those of ir_18, not of ir_50"):
        load_model(tmp_path / "w.pt", reading=Reading(color="RGB", backbone="ir_50"))


def test_resized_images_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One data set, models of 64 and of 32 pixels."""
    data = folder_of(tmp_path / "data", size=48)
    assert main(["pack", str(data), str(tmp_path / "packed"), "--size", "48"]) == 0
    weights = np.repeat(matrix(), 4, 0)
    small = graph_file(tmp_path / "small.onnx")
    large = graph_file(tmp_path / "large.onnx", shape=["b", 3, 64, 64], weights=weights)
    for number, model in enumerate((small, large)):
        out = tmp_path / f"bank{number}"
        assert main(["centers", "from-model", str(model), str(tmp_path / "packed"), str(out)]) == 0
        said = capsys.readouterr().err
        assert f"its images of 48 × 48 are resized to {'32 × 32' if model == small else '64 × 64'}" in said
    words = ["--data", f"x={tmp_path / 'packed'}", "--fars", "1e-1", "--replicates", "100", "--cache", "none"]
    assert main(["evaluate", "--old", str(small), "--new", str(large), *words]) == 0  # both of dimension 16
    assert capsys.readouterr().err.count("are resized to") == 2


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


NO_TENSORS = {
    "m.onnx": "or no ONNX file: no whole graph is in it",
    "m.safetensors": "is no safetensors file: it does not begin as one",
    **dict.fromkeys(("m.pt", "m.ckpt", "m.bin"), "is no file of PyTorch: it does not begin as one"),
}


@pytest.mark.parametrize("name", NO_TENSORS)
def test_files_that_are_no_models_are_named_for_what_they_are(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content, words in (
        (POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page: a download gave that"),
        (b"", "is empty"),
        (b"a note on where the model is kept", NO_TENSORS[name]),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=f"{name}: .*{re.escape(words)}"):
            load_model(path)


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    for name in ("old", "old.onnx", "old.pt"):
        with pytest.raises(ModelError, match=f"{name}: no such file"):
            load_model(tmp_path / name)
    (tmp_path / "old").write_text("none")
    with pytest.raises(ModelError, match=r"no model \(a file of no kind that is known\); give"):
        load_model(tmp_path / "old")
    for path, words in ((tmp_path / "old", "a file; a bank is a folder"), (tmp_path / "bank", "no such folder")):
        with pytest.raises(CenterBankError, match=words):
            CenterBank.open(path)
    for name, words in (("a.npy", "is no array of numpy"), ("a.npz", "is no archive of numpy arrays")):
        (tmp_path / name).write_text("none")
        with pytest.raises(CenterBankError, match=words):
            open_arrays(tmp_path / name)


def test_files_of_other_frameworks_say_how_they_are_converted(tmp_path: Path) -> None:
    for path, words in (
        (ORIGINS / "plsc_latest.pdparams", "a file of Paddle: paddle.onnx.export writes its network as ONNX"),
        (ORIGINS / "faceres" / "model.json", "`lce model convert` makes one of a TensorFlow.js graph model"),
        (tmp_path / "model-0000.params", "a file of MXNet: mxnet.onnx.export_model"),
        (tmp_path / "net.H5", "a file of TensorFlow: tf2onnx"),
        (tmp_path / "dlib_face.dat", "with dlib's network embed the images there"),
    ):
        if path.parent == tmp_path:
            path.write_bytes(b"\x00\x01")
        for read, error in ((load_model, ModelError), (open_arrays, CenterBankError)):
            with pytest.raises(error, match=f"{path.name}: .*{re.escape(words)}"):
                read(path)


def test_files_that_are_cut_short_say_so(tmp_path: Path) -> None:
    graph, weights = graph_file(tmp_path / "m.onnx"), tmp_path / "w.safetensors"
    save_file(torch.load(ORIGINS / "arcface_r18.pt", weights_only=True), weights)
    for path, words in ((graph, "is cut short or damaged, or no ONNX file"), (weights, r"is cut short \(.* bytes\)")):
        whole = path.read_bytes()
        for part in (len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:part])
            with pytest.raises(ModelError, match=f"{path.name}: {words}"):
                load_model(path)


def test_weights_next_to_a_graph_that_are_missing_or_cut_are_named(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    data = tmp_path / "m.onnx.data"
    assert load_model(path).dim == DIM
    whole = data.read_bytes()
    for content, words in (
        (whole[:-100], r"its weights are in m.onnx.data, which is cut short \("),
        (POINTER, "which is a Git LFS pointer"),
    ):
        data.write_bytes(content)
        with pytest.raises(ModelError, match=words):
            load_model(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"its weights are in m.onnx.data, which is not next to it; copy both files"):
        load_model(path)


def test_a_folder_of_hugging_face_is_loaded_or_named(tmp_path: Path) -> None:
    state = torch.load(ORIGINS / "cvlface_ir18.pt", weights_only=True)
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["CVLFaceRecognitionModel"]}))
    with pytest.raises(
        ModelError, match=r"hub: a model folder of Hugging Face \(CVLFaceRecognitionModel\).*it holds none"
    ):
        load_model(folder)
    save_file({f"model.{name}": value for name, value in state.items()}, folder / "model.safetensors")
    found = load_model(folder).embed(pixels())
    np.testing.assert_allclose(found, np.load(ORIGINS / "expected.npz")["cvlface_ir18"], atol=1e-5)
    save_file({"vision_model.embeddings.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"export it with torch.onnx.export and give the .onnx: .*of no network known"):
        load_model(folder)


def test_an_image_whose_embedding_is_zero_or_not_finite_is_named(tmp_path: Path) -> None:
    """A network that gives nothing for dark pictures: the bank's working files are not what is wrong."""
    dark = folder_of(tmp_path / "dark")
    Image.new("RGB", (32, 32)).save(dark / "p03" / "6.png")
    nodes = {
        "zero": ([node("Mul", ["input", "k"], ["q"])], {"k": f(1)}),
        "not finite": ([node("ReduceMean", ["input"], ["m"], axes=[1, 2, 3]), node("Div", ["input", "m"], ["q"])], {}),
    }
    for what, (before, constants) in nodes.items():
        path = graph_file(tmp_path / "m.onnx", before, constants, last="q")
        model = load_model(path, reading=Reading(pixels="0..255", allow_collapsed=True))
        with pytest.raises(ModelError, match=f"6.png: the embedding that .*m.onnx makes of this image is {what}"):
            bank_from_model(model, open_dataset(dark), tmp_path / f"bank-{what}")
