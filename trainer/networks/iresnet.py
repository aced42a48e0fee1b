"""iResNet 18 to 200: the residual networks of ArcFace.

Deng et al., CVPR 2019, section 3.1: BN-Conv-BN-PReLU-Conv-BN units, a linear layer over all positions instead of
pooling. Parameter names and shapes are those of insightface's ``arcface_torch``, so that its published state dicts load
strictly at 112 × 112.
"""

from torch import Tensor, nn

from trainer.networks.recompute import Recompute

UNITS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}


class Unit(nn.Module):
    """One residual unit: BN, 3×3, BN, PReLU, 3×3 (strided), BN, added to the (projected) input."""

    def __init__(self, channels: int, into: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, into, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(into)
        self.prelu = nn.PReLU(into)
        self.conv2 = nn.Conv2d(into, into, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(into)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != into:
            self.downsample = nn.Sequential(nn.Conv2d(channels, into, 1, stride, bias=False), nn.BatchNorm2d(into))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) → (b, into, h / stride, w / stride)."""
        y = self.conv1(self.bn1(x))
        y = self.bn3(self.conv2(self.prelu(self.bn2(y))))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(Recompute):
    """The network of ``depth`` layers.

    Args:
        depth: 18, 34, 50, 100 or 200.
        dim: embedding dimension D.
        image_size: (H, W) of the images in pixels; four strides of 2 leave ⌈H/16⌉ × ⌈W/16⌉ positions before the linear
            layer.
        width: channels of the first stage; the published networks have 64.
    """

    def __init__(self, depth: int, dim: int, image_size: tuple[int, int], width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        channels = width
        for stage, units in enumerate(UNITS[depth]):
            into = width << stage
            first = Unit(channels, into, 2)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *(Unit(into, into, 1) for _ in range(units - 1))))
            channels = into
        self.bn2 = nn.BatchNorm2d(channels)
        area = -(-image_size[0] // 16) * -(-image_size[1] // 16)
        self.fc = nn.Linear(channels * area, dim)
        self.features = nn.BatchNorm1d(dim)
        self.features.weight.requires_grad_(False)  # only its direction is used, but for magface: networks/scale.py
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def units(self) -> list[nn.Module]:
        """The residual units, in order."""
        stages = (self.get_submodule(f"layer{stage}") for stage in range(1, 5))
        return [unit for stage in stages for unit in stage.children()]

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) → (b, D)."""
        x = self.prelu(self.bn1(self.conv1(images)))
        for block in self.units():
            x = self.run_unit(block, x)
        x = self.fc(self.bn2(x).flatten(1))
        return self.features(x)
