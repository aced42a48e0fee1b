"""Training augmentations: the parameters of each sample, and their application in torch.

Both loaders draw the parameters here, from (seed, epoch, record) alone, so that they depend neither on the world size
nor on the loader. Steps, in this order, each rounded to uint8 as DALI does:

    low resolution · warp (rotate, scale, shift; border pixels repeat) · blur · occlusion · colour (saturation,
    contrast, brightness) · noise · flip · (pixel/255 − mean)/std
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.config import AugmentConfig
from trainer.data.draws import normals, uniforms
from trainer.data.order import Samples
from trainer.data.pixels import resize

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

GREY = 127.5
_MIN_SCALE = 0.2
_LUMA = (0.299, 0.587, 0.114)  # of R, G, B (ITU-R BT.601)
_NOISE_LENGTH = 1 << 22
_STREAMS = 24


@dataclass(frozen=True)
class Draw:
    """The parameters of n samples; None: that step is off for all of them.

    Attributes:
        flip: (n,) int32, 1 mirrors left and right.
        warp: (n, 2, 3) float32, output pixel → input pixel, coordinates counted from the corner of the first pixel.
        low_size: (n, 2) float32, height and width that the image is shrunk to before it is enlarged again.
        blur: (n,) float32, σ of the Gaussian in pixels; BLUR_OFF: none.
        hole: (n, 4) float32, top, left, height, width of the grey rectangle; height 0: none.
        colour: (n, 3, 4) float32, [M | t] with out = M · in + t for pixel values 0…255.
        noise: (n,) int64, where in the noise ring the sample's noise begins.
    """

    flip: Ints | None
    warp: Floats | None
    low_size: Floats | None
    blur: Floats | None
    hole: Floats | None
    colour: Floats | None
    noise: NDArray[np.int64] | None


BLUR_OFF = 0.01
"""A σ so small that the Gaussian is the identity after rounding (DALI has no per-sample way to leave the step out)."""


def draw(config: AugmentConfig, seed: int, samples: Samples, size: tuple[int, int], color: str = "RGB") -> Draw:
    """The parameters of some samples of an epoch for images of ``size`` (H, W)."""
    u = uniforms(seed, samples.epoch, samples.records, samples.copies, _STREAMS)
    height, width = size
    flip = warp = low_size = blur = hole = colour = noise = None
    if config.flip:
        flip = (u[:, 0] < config.flip).astype(np.int32)
    if config.rotate_degrees or config.scale or config.translate:
        warp = _warp(config, u[:, 1:9], size)
    if config.low_resolution:
        factor = np.where(u[:, 9] < config.low_resolution, 0.25 + 0.25 * u[:, 10], 1.0)
        low_size = np.maximum(1, np.rint(factor[:, None] * [height, width])).astype(np.float32)
    if config.blur:
        blur = np.where(u[:, 11] < config.blur, 0.5 + u[:, 12], BLUR_OFF).astype(np.float32)
    if config.occlusion:
        sides = np.rint((0.2 + 0.2 * u[:, 14:16]) * [height, width])
        corner = np.floor(u[:, 16:18] * (np.array([height, width]) - sides + 1))
        hole = np.where((u[:, 13] < config.occlusion)[:, None], np.concatenate([corner, sides], 1), 0.0).astype(
            np.float32
        )
    if config.contrast or config.brightness or config.saturation:
        colour = _colour(config, normals(u[:, 18:21], u[:, 21:24]), color)
    if config.noise:
        ring = uniforms(seed ^ 0x5EED, samples.epoch, samples.records, samples.copies, 1)[:, 0]
        noise = np.floor(ring * (_NOISE_LENGTH - 3 * height * width)).astype(np.int64)
    return Draw(flip, warp, low_size, blur, hole, colour, noise)


def _warp(config: AugmentConfig, u: NDArray[np.float64], size: tuple[int, int]) -> Floats:
    """Output → input: undo the shift, rotation and scale about the centre."""
    z = normals(u[:, :4], u[:, 4:])
    angle = np.deg2rad(config.rotate_degrees) * z[:, 0]
    scale = np.maximum(_MIN_SCALE, 1.0 + config.scale * z[:, 1])
    shift = config.translate * size[1] * z[:, 2:4]
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    linear = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    centre = np.array([size[1] / 2, size[0] / 2])
    offset = centre - np.einsum("nij,nj->ni", linear, centre + shift)
    return np.concatenate([linear, offset[:, :, None]], 2).astype(np.float32)


def _colour(config: AugmentConfig, z: NDArray[np.float64], color: str) -> Floats:
    """Saturation about the luma, then contrast about mid grey, then the shift of brightness, as one matrix."""
    saturation = np.maximum(0.0, 1.0 + config.saturation * z[:, 0])[:, None, None]
    contrast = np.maximum(0.0, 1.0 + config.contrast * z[:, 1])[:, None, None]
    shift = 255.0 * config.brightness * z[:, 2][:, None, None]
    luma = np.array(_LUMA if color == "RGB" else _LUMA[::-1])
    linear = contrast * (saturation * np.eye(3) + (1.0 - saturation) * np.ones((3, 1)) * luma)
    offset = np.broadcast_to(GREY * (1.0 - contrast) + shift, (len(z), 3, 1))
    return np.concatenate([linear, offset], 2).astype(np.float32)


def noise_ring(seed: int) -> Floats:
    """A long row of standard normal numbers; a sample's noise is a stretch of it (nothing is drawn per pixel)."""
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal(_NOISE_LENGTH, dtype=np.float32)


def apply(
    images: Tensor, params: Draw, mean: tuple[float, ...], std: tuple[float, ...], ring: Floats | None, noise: float
) -> Tensor:
    """Augment and normalise in torch.

    Args:
        images: (n, H, W, 3) uint8.
        params: the n samples' parameters.
        mean, std: of the pixel values / 255.
        ring, noise: the noise ring and the standard deviation of the noise (1 is the full range).

    Returns:
        (n, 3, H, W) float32.
    """
    x = images.permute(0, 3, 1, 2).float()
    n, _, height, width = x.shape
    if params.low_size is not None:
        x = _low_resolution(x, params.low_size)
    if params.warp is not None:
        x = _round(F.grid_sample(x, _grid(params.warp, height, width), padding_mode="border", align_corners=False))
    if params.blur is not None:
        x = _blur(x, params.blur)
    if params.hole is not None:
        for i, (top, left, h, w) in enumerate(params.hole.astype(int)):
            x[i, :, top : top + h, left : left + w] = round(GREY)
    if params.colour is not None:
        matrix = torch.from_numpy(params.colour)
        x = _round(torch.einsum("nij,njhw->nihw", matrix[:, :, :3], x) + matrix[:, :, 3][:, :, None, None])
    if params.noise is not None:
        assert ring is not None
        length = 3 * height * width
        rows = np.stack([ring[at : at + length] for at in params.noise]) if n else np.empty((0, length), np.float32)
        x = x + 255.0 * noise * torch.from_numpy(rows).reshape(n, height, width, 3).permute(0, 3, 1, 2)
    if params.flip is not None:
        x = torch.where(torch.from_numpy(params.flip)[:, None, None, None] > 0, x.flip(3), x)
    scale = torch.tensor([255.0 * s for s in std])[:, None, None]
    return ((x - torch.tensor([255.0 * m for m in mean])[:, None, None]) / scale).contiguous()


def _round(x: Tensor) -> Tensor:
    return x.round_().clamp_(0, 255)


def _low_resolution(x: Tensor, sizes: Floats) -> Tensor:
    full = (x.shape[2], x.shape[3])
    for i, small in enumerate(map(tuple, sizes.astype(int).tolist())):
        if small != full:
            pixels = x[i].permute(1, 2, 0).to(torch.uint8).numpy()
            x[i] = torch.from_numpy(resize(resize(pixels, small), full)).permute(2, 0, 1)
    return x


def _grid(warp: Floats, height: int, width: int) -> Tensor:
    """Where each output pixel's centre lies in the input, in grid_sample's coordinates: (n, H, W, 2)."""
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = torch.stack([xs, ys, torch.ones_like(xs)], -1)
    source = torch.einsum("nij,hwj->nhwi", torch.from_numpy(warp), points)
    return source * (2.0 / torch.tensor([width, height])) - 1.0


def _blur(x: Tensor, sigmas: Floats) -> Tensor:
    for i, sigma in enumerate(sigmas.tolist()):
        if sigma > BLUR_OFF * 1.5:
            radius = math.ceil(3 * sigma)
            taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
            taps = (taps / taps.sum()).expand(3, 1, 1, -1)
            padded = F.pad(x[i : i + 1], (radius,) * 4, mode="reflect")
            across = F.conv2d(padded, taps, groups=3)
            x[i : i + 1] = _round(F.conv2d(across, taps.transpose(2, 3), groups=3))
    return x
