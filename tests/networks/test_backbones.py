"""The networks: shapes at both image sizes, published sizes and names, recomputation that changes nothing."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.errors import ConfigError
from trainer.networks import BACKBONES, build_backbone
from trainer.networks.config import BackboneConfig
from trainer.networks.recompute import Recompute

# Published for 112 × 112 and D = 512: parameters in 10⁶; multiply-adds in 10⁹ (theirs include the norms, ours not).
PUBLISHED = {
    "iresnet18": (24.02, 2.63),
    "iresnet34": (34.14, 4.48),
    "iresnet50": (43.59, 6.33),
    "iresnet100": (65.15, 12.12),
    "mobilefacenet": (2.06, 0.45),
}

# Published without their parameters, to one decimal.
PUBLISHED_OPERATIONS = {"iresnet200": 23.5, "vit_t": 1.5, "vit_s": 5.7, "vit_b": 11.4, "vit_l": 25.3}

# Names and shapes in insightface's state dicts.
NAMES = {
    "iresnet50": {
        "conv1.weight": (64, 3, 3, 3),
        "prelu.weight": (64,),
        "layer1.0.downsample.0.weight": (64, 64, 1, 1),
        "layer3.13.bn3.running_var": (256,),
        "layer4.2.conv2.weight": (512, 512, 3, 3),
        "bn2.num_batches_tracked": (),
        "fc.weight": (512, 25088),
        "fc.bias": (512,),
        "features.running_mean": (512,),
    },
    "mobilefacenet": {
        "layers.0.layers.2.weight": (128,),
        "layers.1.layers.0.weight": (128, 2, 3, 3),
        "layers.3.layers.3.layers.1.layers.0.weight": (128, 1, 3, 3),
        "layers.6.layers.1.layers.0.weight": (512, 1, 3, 3),
        "conv_sep.layers.0.weight": (512, 256, 1, 1),
        "features.layers.0.layers.0.weight": (512, 1, 7, 7),
        "features.layers.2.weight": (512, 512),
        "features.layers.3.bias": (512,),
    },
    "vit_t": {
        "pos_embed": (1, 144, 256),
        "mask_token": (1, 1, 256),
        "patch_embed.proj.weight": (256, 3, 9, 9),
        "blocks.11.attn.qkv.weight": (768, 256),
        "blocks.0.attn.proj.bias": (256,),
        "blocks.0.mlp.fc1.weight": (1024, 256),
        "norm.weight": (256,),
        "feature.0.weight": (256, 36864),
        "feature.3.running_var": (512,),
    },
}
COUNTS = {"iresnet50": 43_590_976}


@pytest.mark.parametrize("name", ["small", "small_resnet", "iresnet18", "mobilefacenet", "vit_xs", "vit_t"])
@pytest.mark.parametrize("size", [32, 112])
def test_embeds_both_sizes(name: str, size: int) -> None:
    torch.manual_seed(0)
    net = build_backbone(BackboneConfig(name=name, dim=24), (size, size)).train()
    out = net(torch.randn(3, 3, size, size))
    assert out.shape == (3, 24)
    out.square().sum().backward()
    unused = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def _measured(name: str) -> tuple[float, float]:
    """Parameters in 10⁶ and multiply-adds in 10⁹."""
    with torch.device("meta"):
        net = build_backbone(BackboneConfig(name=name, dim=512), (112, 112)).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, 112, 112))
    return sum(p.numel() for p in net.parameters()) / 1e6, counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_operations_are_the_published_ones(name: str) -> None:
    millions, operations = _measured(name)
    assert millions == pytest.approx(PUBLISHED[name][0], rel=2e-3)
    assert operations == pytest.approx(PUBLISHED[name][1], rel=3e-2)


@pytest.mark.parametrize("name", PUBLISHED_OPERATIONS)
def test_operations_are_the_published_ones(name: str) -> None:
    assert _measured(name)[1] == pytest.approx(PUBLISHED_OPERATIONS[name], abs=0.09)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_of_published_state_dicts(name: str) -> None:
    with torch.device("meta"):
        state = build_backbone(BackboneConfig(name=name, dim=512), (112, 112)).state_dict()
    assert {k: tuple(state[k].shape) for k in NAMES[name]} == NAMES[name]


@pytest.mark.parametrize("name", [n for n in BACKBONES if n.startswith(("iresnet", "vit"))])
def test_every_size_builds(name: str) -> None:
    with torch.device("meta"):
        assert isinstance(build_backbone(BackboneConfig(name=name), (112, 112)), Recompute)


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet"])
def test_recomputation_gives_the_same_gradients_and_statistics(name: str) -> None:
    torch.manual_seed(1)
    plain = build_backbone(BackboneConfig(name=name, dim=8, width=16), (32, 32)).double().train()
    again = build_backbone(BackboneConfig(name=name, dim=8, width=16), (32, 32)).double().train()
    again.load_state_dict(plain.state_dict())
    assert isinstance(again, Recompute)
    again.recompute = True
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    weights = torch.randn(4, 8, dtype=torch.float64)
    for net in (plain, again):
        (net(images) * weights).sum().backward()
    for (key, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, msg=key)
    for (key, a), b in zip(plain.named_buffers(), again.buffers(), strict=True):
        if "num_batches" not in key:
            torch.testing.assert_close(a, b, msg=key)


def test_vit_in_evaluation_masks_nothing() -> None:
    torch.manual_seed(0)
    net: nn.Module = build_backbone(BackboneConfig(name="vit_t", dim=8), (36, 36))
    images = torch.randn(3, 3, 36, 36)
    net.train()
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_unknown_name_and_width() -> None:
    with pytest.raises(ConfigError, match="iresnet100"):
        build_backbone(BackboneConfig(name="resnet"), (112, 112))
    with pytest.raises(ConfigError, match="fixed width"):
        build_backbone(BackboneConfig(name="vit_t", width=3), (112, 112))
