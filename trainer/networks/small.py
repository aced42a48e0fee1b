"""Two small networks for small images: quick to train on a processor, and each other's "another architecture"."""

from torch import Tensor, nn


def _steps(size: int, halvings: int) -> int:
    """The side that is left after ``halvings`` convolutions of stride 2 with padding."""
    for _ in range(halvings):
        size = -(-size // 2)
    return size


class Small(nn.Module):
    """Three strided convolutions, each with batch norm and ReLU, then a linear layer with batch norm.

    Args:
        dim: embedding dimension D.
        image_size: (H, W) of the images, in pixels.
        width: channels of the first convolution; the others have twice as many.
    """

    def __init__(self, dim: int, image_size: tuple[int, int], width: int = 12) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for channels, into in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
            stages += [nn.Conv2d(channels, into, 3, 2, 1), nn.BatchNorm2d(into), nn.ReLU()]
        self.stages = nn.Sequential(*stages)
        area = _steps(image_size[0], 3) * _steps(image_size[1], 3)
        self.embed = nn.Linear(2 * width * area, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) → (b, D)."""
        return self.norm(self.embed(self.stages(images).flatten(1)))


class _Residual(nn.Module):
    """BN, 3×3, BN, PReLU, 3×3 of stride 2, BN, plus a strided 1×1 with BN."""

    def __init__(self, channels: int, into: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, into, 3, 1, 1, bias=False),
            nn.BatchNorm2d(into),
            nn.PReLU(into),
            nn.Conv2d(into, into, 3, 2, 1, bias=False),
            nn.BatchNorm2d(into),
        )
        self.skip = nn.Sequential(nn.Conv2d(channels, into, 1, 2, bias=False), nn.BatchNorm2d(into))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.skip(x)


class SmallResNet(nn.Module):
    """A strided convolution and two residual blocks of stride 2, then a linear layer with batch norm.

    Args:
        dim: embedding dimension D.
        image_size: (H, W) of the images, in pixels.
        width: channels of the first convolution; the blocks have two and four times as many.
    """

    def __init__(self, dim: int, image_size: tuple[int, int], width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width))
        self.blocks = nn.Sequential(_Residual(width, 2 * width), _Residual(2 * width, 4 * width))
        self.last = nn.BatchNorm2d(4 * width)
        area = _steps(image_size[0], 3) * _steps(image_size[1], 3)
        self.embed = nn.Linear(4 * width * area, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) → (b, D)."""
        return self.norm(self.embed(self.last(self.blocks(self.stem(images))).flatten(1)))
