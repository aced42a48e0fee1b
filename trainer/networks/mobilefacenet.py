"""MobileFaceNet: depthwise bottlenecks for phones (Chen et al., CCBR 2018, table 1), at twice its width.

Parameter names and shapes are those of insightface's ``arcface_torch`` (its ``mbf``: blocks 1, 4, 6, 2 at scale 2), so
that its state dicts load strictly at 112 × 112.
"""

from torch import Tensor, nn

from trainer.networks.recompute import Recompute


class _Conv(nn.Module):
    """Convolution without bias, batch norm and, unless linear, PReLU; padded to keep the size at stride 1."""

    def __init__(
        self, channels: int, into: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, into, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(into))
        if not linear:
            self.layers.append(nn.PReLU(into))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Bottleneck(nn.Module):
    """1×1 to ``inner`` channels, 3×3 depthwise, 1×1 linear; with the input added where ``residual``."""

    def __init__(self, channels: int, into: int, inner: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            _Conv(channels, inner), _Conv(inner, inner, 3, stride, inner), _Conv(inner, into, linear=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class _Stage(nn.Module):
    """Residual bottlenecks in series."""

    def __init__(self, channels: int, count: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_Bottleneck(channels, channels, inner, 1, True) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Embedding(nn.Module):
    """A depthwise convolution over all positions, then a linear layer with batch norm."""

    def __init__(self, channels: int, area: tuple[int, int], dim: int) -> None:
        super().__init__()
        whole = _Conv(channels, channels, groups=channels, linear=True)
        whole.layers[0] = nn.Conv2d(channels, channels, area, groups=channels, bias=False)
        self.layers = nn.Sequential(whole, nn.Flatten(), nn.Linear(channels, dim, bias=False), nn.BatchNorm1d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MobileFaceNet(Recompute):
    """The network.

    Args:
        dim: embedding dimension D.
        image_size: (H, W) in pixels; four strides of 2 leave ⌈H/16⌉ × ⌈W/16⌉ positions.
        width: channels of the first convolution; the published network has 128.
    """

    def __init__(self, dim: int, image_size: tuple[int, int], width: int = 128) -> None:
        super().__init__()
        w = width
        self.layers = nn.ModuleList(
            [
                _Conv(3, w, 3, 2),
                _Conv(w, w, 3, 1, groups=w // 2),
                _Bottleneck(w, w, w, 2, False),
                _Stage(w, 4, w),
                _Bottleneck(w, 2 * w, 2 * w, 2, False),
                _Stage(2 * w, 6, 2 * w),
                _Bottleneck(2 * w, 2 * w, 4 * w, 2, False),
                _Stage(2 * w, 2, 2 * w),
            ]
        )
        self.conv_sep = _Conv(2 * w, 512)
        area = -(-image_size[0] // 16), -(-image_size[1] // 16)
        self.features = _Embedding(512, area, dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def units(self) -> list[nn.Module]:
        """The convolutions and stages before the embedding, in order."""
        return list(self.layers)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) → (b, D)."""
        x = images
        for block in self.units():
            x = self.run_unit(block, x)
        return self.features(self.conv_sep(x))
