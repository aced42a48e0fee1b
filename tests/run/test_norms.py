"""Margins that read quality from the embedding's norm: the scale is learned where it has to be, the norm orders images
by their quality after training, and ranges that no norm reaches are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn

from tests.runs import config, log_of
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.head.config import AdaFaceConfig
from trainer.head.margin import AdaFace
from trainer.models.model import EmbeddingModel
from trainer.models.open import load_model
from trainer.networks import BACKBONES, build_backbone
from trainer.networks.config import BackboneConfig
from trainer.networks.scale import embedding_norm, learn_scale
from trainer.networks.weights import load_backbone_weights
from trainer.run.engine import train

SIZE = 32
RANGE = {"lower_norm": 3.5, "upper_norm": 39}  # 10 and 110 at D = 512, in proportion


def pictures(classes: int, each: int, seed: int) -> np.ndarray:
    """(classes · each, H, W, 3) uint8: a pattern of 8 × 8 squares by class, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.rand(classes, 3, 8, 8, generator=generator).repeat_interleave(each, 0)
    whole = nn.functional.interpolate(squares, (SIZE, SIZE))
    whole = (whole + 0.08 * torch.randn(whole.shape, generator=generator)).clamp(0, 1)
    return (whole * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def blurred(images: np.ndarray, pixels: float) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(pixels))) for image in images])


def noisy(images: np.ndarray, share: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 255 * share, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 classes of 10 pictures each, packed."""
    folder = tmp_path_factory.mktemp("norms")
    for number, image in enumerate(pictures(40, 10, 0)):
        person = folder / "source" / f"{number // 10:02d}"
        person.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(person / f"{number % 10}.png")
    pack(list_source(folder / "source"), folder / "packed", PackOptions())
    return folder / "packed"


def settings(faces: Path, margin: dict[str, Any], name: str, dim: int, **more: Any) -> dict[str, Any]:
    """Training in which images lose quality at random, in float32 and with the defaults of head and optimizer."""
    data = {"loader": "torch", "path": str(faces), "workers": 0, "batch_size": 32}
    data |= {"augment": {"blur": 0.3, "noise": 0.1, "low_resolution": 0.3}}
    head = {"margin": margin, "rows": "float32", "init_std": 0.01}
    rest = {"backbone__name": name, "backbone__dim": dim, "train__precision": "float32", "train__steps": 150}
    return {f"data__{k}": v for k, v in data.items()} | {f"head__{k}": v for k, v in head.items()} | rest | more


def norms(model: EmbeddingModel, images: np.ndarray) -> np.ndarray:
    return np.linalg.norm(model.embed(images, unit=False), axis=1)


CASES = [
    ({"name": "magface", **RANGE}, "small", 64),
    pytest.param({"name": "magface"}, "iresnet18", 512, marks=pytest.mark.attack),
    pytest.param({"name": "adaface"}, "iresnet18", 512, marks=pytest.mark.attack),
]


@pytest.mark.slow
@pytest.mark.parametrize(("margin", "name", "dim"), CASES)
def test_norms_order_quality(faces: Path, tmp_path: Path, margin: dict[str, Any], name: str, dim: int) -> None:
    width = {"backbone__width": 4} if name == "iresnet18" else {}
    train(config(tmp_path / "run", **settings(faces, margin, name, dim, **width)), Ranks())
    model, clean = load_model(tmp_path / "run"), pictures(40, 3, 7)  # of classes that were not trained on
    found = norms(model, clean)
    worse = {f"blur {p}": blurred(clean, p) for p in (1, 2, 4)} | {f"noise {s}": noisy(clean, s) for s in (0.2, 0.4)}
    shares = {what: float((norms(model, images) < found).mean()) for what, images in worse.items()}
    assert all(share >= 0.75 for share in shares.values()), shares
    for kind in ("blur", "noise"):  # and more damage, a smaller norm
        means = [
            found.mean(),
            *(norms(model, images).mean() for what, images in worse.items() if what.startswith(kind)),
        ]
        assert means == sorted(means, reverse=True), (kind, means)
    if name == "small":  # at D = 64 the norms begin at 8: the norm term, least at upper_norm, pulls them up
        lines = log_of(tmp_path / "run")
        assert norms(model, pictures(40, 1, 0)).mean() > 1.3 * dim**0.5
        assert lines[-1]["norm_penalty"] < 0.8 * lines[0]["norm_penalty"]
    gamma = embedding_norm(model.backbone)[1].weight  # type: ignore[attr-defined,index]
    assert bool((gamma != 1).any()) == (margin["name"] == "magface")  # AdaFace's own network has no scale either


def test_adafaces_statistics_follow_the_norms_of_iresnet() -> None:
    """Its last scale is frozen, so all norms lie around √D: the margin is spread over their own mean and deviation,
    and grows from the smallest norm to the largest."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="iresnet18", width=4, dim=64), (32, 32)).train()
    with torch.no_grad():
        norm = backbone(torch.randn(32, 3, 32, 32)).norm(dim=1)
    assert norm.mean().item() == pytest.approx(64**0.5, rel=0.1)
    margin = AdaFace(AdaFaceConfig())
    for _ in range(1500):
        psi = margin.target(torch.full((32,), 0.9), norm, True).psi
    state = margin.state()
    assert state["margin_norm_mean"].item() == pytest.approx(norm.mean().item(), rel=1e-3)
    assert state["margin_norm_deviation"].item() == pytest.approx(norm.std().item(), rel=1e-2)
    by_norm = psi[norm.argsort()]
    assert bool((by_norm.diff() <= 1e-6).all()), "a larger norm is asked for more"
    assert (by_norm[0] - by_norm[-1]).item() > 0.1


def test_ranges_that_no_norm_reaches_are_refused(tmp_path: Path) -> None:
    more = {"backbone__name": "small", "backbone__dim": 64}
    message = (
        r"lower_norm = 10, upper_norm = 110: embeddings of dimension 64 begin with norms of about 8, .*lower_norm=3\.5"
    )
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", head__margin={"name": "magface"}, **more), Ranks())
    assert not (tmp_path / "run").exists()
    train(config(tmp_path / "in", head__margin={"name": "magface", **RANGE}, train__steps=1, **more), Ranks())
    start = {"backbone__weights": str(tmp_path / "in"), "head__margin": {"name": "magface", "lower_norm": 50}}
    with pytest.raises(ConfigError, match=r"begin with norms of about [78]\.?\d*, "):
        train(config(tmp_path / "again", **more, **start), Ranks())


@pytest.mark.parametrize("name", ["small", "small_resnet", "iresnet18", "ir_18", "mobilefacenet", "vit_t"])
def test_every_backbone_can_learn_its_scale(name: str) -> None:
    plain = build_backbone(BackboneConfig(name=name, dim=8), (36, 36))
    free = build_backbone(BackboneConfig(name=name, dim=8), (36, 36))
    learn_scale(free)
    found = embedding_norm(free)
    assert found is not None, "a backbone that does not end in a batch norm: say so in learn_scale"
    assert found[1].weight.requires_grad
    added = set(free.state_dict()) - set(plain.state_dict())
    last = {"small": "norm", "small_resnet": "norm", "ir_18": "output_layer.4"}.get(name)  # without a scale otherwise
    assert added == ({f"{last}.weight", f"{last}.bias"} if last else set()), "published names stay"
    out = free.train()(torch.randn(4, 3, 36, 36))
    out.square().sum().backward()
    assert found[1].weight.grad is not None


def test_the_test_above_knows_every_backbone() -> None:
    kinds = {name.rstrip("0123456789").replace("vit_", "") for name in BACKBONES if not name.startswith("test_")}
    assert kinds == {"small", "small_resnet", "iresnet", "ir_", "mobilefacenet", "xs", "t", "s", "b", "l"}


@pytest.mark.parametrize("learned", [False, True])
def test_weights_start_a_network_of_the_other_kind(tmp_path: Path, learned: bool) -> None:
    first, second = (build_backbone(BackboneConfig(name="small", dim=8), (16, 16)) for _ in range(2))
    learn_scale(first if learned else second)
    if learned:
        nn.init.uniform_(first.get_parameter("norm.weight"), 1, 2)
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    load_backbone_weights(second, tmp_path / "weights.pt")
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(first.eval()(images), second.eval()(images))
