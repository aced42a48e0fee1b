"""Vision transformers for faces, T, S, B and L: patches of 9 × 9 pixels, no class token, all tokens feed the embedding;
and XS, ours, for images of 32 × 32.

An et al., "Partial FC" (CVPR 2022), section 5, trains the same networks: Dosovitskiy et al.'s encoder (ICLR 2021) with
ReLU6, and a share of the tokens masked in training. Parameter names and shapes are those of insightface's
``arcface_torch``.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainer.networks.recompute import Recompute

SIZES: dict[str, tuple[int, int, float, float, int]] = {
    "xs": (128, 4, 0.1, 0.1, 8),
    "t": (256, 12, 0.1, 0.1, 9),
    "s": (512, 12, 0.1, 0.1, 9),
    "b": (512, 24, 0.1, 0.1, 9),
    "l": (768, 24, 0.1, 0.05, 9),
}
"""name → (token width, blocks, largest share of dropped residual branches, share of masked tokens, a patch's side)."""

HEADS = 8


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Block(nn.Module):
    """Attention and MLP, each added to its input; in training dropped, per sample, with probability ``drop``."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = _Attention(width)
        self.mlp = _Mlp(width)
        self.drop = drop

    def _kept(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device, dtype=branch.dtype) >= self.drop
        return branch * keep / (1 - self.drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._kept(self.attn(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))


class _Patches(nn.Module):
    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, side, side)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(Recompute):
    """The network of one of :data:`SIZES`.

    Args:
        size: xs, t, s, b or l.
        dim: embedding dimension D.
        image_size: (H, W) in pixels; pixels beyond the last whole patch are not seen (112: 12 × 12 patches of 9).
    """

    def __init__(self, size: str, dim: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        width, depth, drop, self.mask_share, side = SIZES[size]
        tokens = (image_size[0] // side) * (image_size[1] // side)
        self.patch_embed = _Patches(width, side)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(_Block(width, drop * i / (depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * tokens, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, dim, bias=False),
            nn.BatchNorm1d(dim, eps=2e-5),
        )
        for tensor in (self.pos_embed, self.mask_token):
            nn.init.trunc_normal_(tensor, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def units(self) -> list[nn.Module]:
        """The encoder's blocks, in order."""
        return list(self.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) → (b, D). In training a share of each image's tokens skips the encoder, drawn anew each time."""
        x = self.patch_embed(images) + self.pos_embed
        b, tokens, width = x.shape
        masking = self.training and self.mask_share > 0
        if masking:
            order = torch.rand(b, tokens, device=x.device).argsort(1)
            kept = order[:, : int(tokens * (1 - self.mask_share))]
            x = x.gather(1, kept[..., None].expand(-1, -1, width))
        for block in self.units():
            x = self.run_unit(block, x)
        x = self.norm(x)
        if masking:
            blank = self.mask_token.to(x.dtype).expand(b, tokens - x.shape[1], width)
            x = torch.cat([x, blank], 1).gather(1, order.argsort(1)[..., None].expand(-1, -1, width))
        return self.feature(x.flatten(1))
