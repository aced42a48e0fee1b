"""IR 18, 34, 50 and 101: the residual networks of AdaFace (Kim et al., CVPR 2022) and CVLface.

As iResNets, with an identity shortcut by subsampling where the channels stay, and dropout before the linear layer.
Parameter names and shapes are those of AdaFace's ``net.py``, so that its state dicts load strictly at 112 × 112.
"""

from torch import Tensor, nn

from trainer.networks.recompute import Recompute

UNITS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    101: (3, 13, 30, 3),
}


class Unit(nn.Module):
    """One residual unit: BN, 3×3, BN, PReLU, 3×3 (strided), BN, added to the (projected or subsampled) input."""

    def __init__(self, channels: int, into: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if channels != into:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(channels, into, 1, stride, bias=False), nn.BatchNorm2d(into))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, into, 3, 1, 1, bias=False),
            nn.BatchNorm2d(into),
            nn.PReLU(into),
            nn.Conv2d(into, into, 3, stride, 1, bias=False),
            nn.BatchNorm2d(into),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) → (b, into, h / stride, w / stride)."""
        return self.res_layer(x) + self.shortcut_layer(x)


class IR(Recompute):
    """The network of ``depth`` layers; its embeddings have their norms, which AdaFace's margin reads.

    Args:
        depth: 18, 34, 50 or 101.
        dim: embedding dimension D; the published networks have 512.
        image_size: (H, W) in pixels; four strides of 2 leave ⌈H/16⌉ × ⌈W/16⌉ positions before the linear layer.
        width: channels of the first stage; the published networks have 64.
    """

    def __init__(self, depth: int, dim: int, image_size: tuple[int, int], width: int = 64) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)
        )
        units: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(UNITS[depth]):
            into = width << stage
            units += [Unit(channels, into, 2), *(Unit(into, into, 1) for _ in range(count - 1))]
            channels = into
        self.body = nn.Sequential(*units)
        area = -(-image_size[0] // 16) * -(-image_size[1] // 16)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(channels * area, dim),
            nn.BatchNorm1d(dim, affine=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def units(self) -> list[nn.Module]:
        """The residual units, in order."""
        return list(self.body)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) → (b, D)."""
        x = self.input_layer(images)
        for block in self.units():
            x = self.run_unit(block, x)
        return self.output_layer(x)
