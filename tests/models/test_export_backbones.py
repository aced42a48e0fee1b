"""ONNX parity of every backbone in every mode, and the clients that load the files.

The networks have their own depth and few channels. A representative of each family runs always, in all modes; the whole
product (every backbone, every mode, in every precision) takes minutes and runs with LCE_ALL_EXPORTS=1.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.test_export import images, trained
from tests.sections import variant
from trainer.models.card import Direction, ModelCard, TransformCard
from trainer.models.folder import save_model
from trainer.models.model import TorchModel
from trainer.models.onnx import OnnxTransform
from trainer.models.onnx_export import Precision, export_onnx, export_transform
from trainer.models.open import load_model
from trainer.networks import BACKBONES, build_backbone, vit
from trainer.networks.config import AnyTransform, BackboneConfig
from trainer.networks.transform import build_transform

SIZE, DIM, OLD_DIM = (32, 32), 16, 24
MODES: dict[str, tuple[Direction, ...]] = {
    "direct": (),
    "backward": ("t21",),
    "forward": ("t12",),
    "both": ("t21", "t12"),
}
FAMILIES = (
    ("small", "both", "float32"),
    ("small_resnet", "backward", "float16"),
    ("iresnet18", "forward", "int8"),
    ("mobilefacenet", "backward", "float32"),
    ("vit_t", "direct", "float32"),
)
EVERY = [
    (name, mode, precision) for name in BACKBONES for mode in MODES for precision in ("float32", "float16", "int8")
]
CASES = EVERY if os.environ.get("LCE_ALL_EXPORTS") else FAMILIES
INSIGHTFACE = os.environ.get("LCE_INSIGHTFACE_PYTHON")


def made(folder: Path, name: str, mode: str, size: tuple[int, int] = SIZE, **card: Any) -> TorchModel:
    """A model folder of a narrow network with the transformations of a mode."""
    width = 8 if name.startswith("iresnet") else None
    chosen = BackboneConfig(name=name, dim=DIM, width=width)
    torch.manual_seed(6)
    dims = {"t21": (DIM, OLD_DIM), "t12": (OLD_DIM, DIM)}
    config = variant(AnyTransform, name="rbt", blocks=1, paths=2)
    parts = {d: TransformCard(config=config, dim_in=dims[d][0], dim_out=dims[d][1]) for d in MODES[mode]}
    modules = {d: trained(build_transform(config, *dims[d])) for d in parts}
    whole = ModelCard(backbone=chosen, dim=DIM, image_size=size, transforms=parts, mode=mode, **card)
    network = trained(build_backbone(chosen, size))
    for part, weight in network.named_parameters():
        if part.endswith("bn3.weight"):
            weight.data.mul_(0.2)  # or the deepest of these, with random weights, leave float32's range
    save_model(folder, network, whole, modules)
    model = load_model(folder)
    assert isinstance(model, TorchModel)
    return model


@pytest.fixture(autouse=True)
def narrow_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, (_, blocks, *rest) in vit.SIZES.items():
        monkeypatch.setitem(vit.SIZES, size, (32, blocks, *rest))


@pytest.mark.parametrize(("name", "mode", "precision"), CASES)
def test_files_give_what_torch_gives(tmp_path: Path, name: str, mode: str, precision: Precision) -> None:
    model, pixels = made(tmp_path / "m", name, mode), images(4)
    into = "t21" if "t21" in MODES[mode] else None
    for normalisation in ("inside", "outside") if precision == "float32" else ("inside",):
        out = tmp_path / f"{normalisation}.onnx"
        least = 0.9 if precision == "int8" else None  # random weights suffer more than trained ones
        parity = export_onnx(
            model, out, pixels, normalisation=normalisation, direction=into, precision=precision, smallest_cosine=least
        )
        expected = model.embed(pixels)
        if into is not None:
            expected = model.transform(into, expected)
        got = load_model(out).embed(pixels)
        assert got.shape == (4, OLD_DIM if into else DIM)
        if precision == "float32":
            assert parity.largest_difference < 1e-5
            np.testing.assert_allclose(got, expected, atol=1e-5)
        assert (got * expected).sum(1).min() >= parity.smallest_cosine - 1e-5
    if "t12" in MODES[mode]:
        vectors = np.random.default_rng(0).normal(size=(5, OLD_DIM)).astype(np.float32)
        export_transform(model, "t12", tmp_path / "t12.onnx", vectors)
        got = OnnxTransform(tmp_path / "t12.onnx")(vectors)
        np.testing.assert_allclose(got, model.transform("t12", vectors), atol=1e-5)


CLIENT = """
import json, sys
import numpy as np, insightface
from insightface.model_zoo import get_model
pixels = np.load(sys.argv[1])
model = get_model(sys.argv[2], providers=["CPUExecutionProvider"])
features = np.concatenate([model.get_feat(np.ascontiguousarray(image[:, :, ::-1])) for image in pixels])
print(json.dumps({"version": insightface.__version__, "kind": type(model).__name__, "task": model.taskname,
  "mean": model.input_mean, "std": model.input_std, "size": model.input_size, "features": features.tolist()}))
"""


@pytest.mark.skipif(
    INSIGHTFACE is None, reason="LCE_INSIGHTFACE_PYTHON names no Python that has PyPI's insightface 2.x"
)
@pytest.mark.parametrize("normalisation", ["inside", "outside"])
@pytest.mark.parametrize("mode", ["direct", "backward"])
@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_insightface_reads_the_file_rightly(tmp_path: Path, normalisation: Any, mode: str, color: Any) -> None:
    model = made(tmp_path / "m", "iresnet18", mode, (112, 112), color=color)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    into = "t21" if mode == "backward" else None
    export_onnx(model, tmp_path / "m.onnx", pixels, normalisation=normalisation, direction=into)
    np.save(tmp_path / "pixels.npy", pixels)
    command = [str(INSIGHTFACE), "-c", CLIENT, str(tmp_path / "pixels.npy"), str(tmp_path / "m.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    print({key: value for key, value in seen.items() if key != "features"})
    assert seen["version"].startswith("2.")
    assert (seen["kind"], seen["task"], seen["size"]) == ("ArcFaceONNX", "recognition", [112, 112])
    assert (seen["mean"], seen["std"]) == ((0.0, 1.0) if normalisation == "inside" else (127.5, 127.5))
    expected = model.embed(pixels)
    if into is not None:
        expected = model.transform(into, expected)
    np.testing.assert_allclose(np.array(seen["features"]), expected, atol=1e-4)
