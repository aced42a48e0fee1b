"""Encoded bytes → pixels, and the one way in which images are resized."""

import functools
import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# What Pillow raises on damaged bytes, whatever the format.
_DAMAGE = (OSError, ValueError, SyntaxError, IndexError, TypeError, struct.error, Image.DecompressionBombError)


def decode_image(data: bytes, size: tuple[int, int] | None, color: str = "RGB") -> NDArray[np.uint8]:
    """Decode with Pillow: (H, W, 3) uint8, upright by its EXIF orientation, resized to ``size`` (antialiased bilinear)
    if it differs.

    Raises:
        ValueError: the bytes are no complete image.
    """
    problem = image_problem(data)
    if problem:
        raise ValueError(problem)
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except _DAMAGE as error:
        raise ValueError(_reason(error)) from None
    pixels = np.asarray(upright)
    if size is not None and pixels.shape[:2] != tuple(size):
        pixels = resize(pixels, size)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if color == "BGR" else pixels


def image_size(data: bytes) -> tuple[int, int]:
    """(H, W) that an encoded image announces; nothing is decoded. Raises :class:`ValueError`: no complete image."""
    problem = image_problem(data)
    if problem:
        raise ValueError(problem)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except _DAMAGE as error:
        raise ValueError(_reason(error)) from None


def _reason(error: Exception) -> str:
    unknown = isinstance(error, UnidentifiedImageError)
    return "the image's header is damaged" if unknown else f"the image is damaged ({error})"


def image_problem(data: bytes) -> str | None:
    """What is wrong with encoded bytes by their beginning and end alone, or None: quick enough for every step."""
    if data[:3] == b"\xff\xd8\xff":
        # Other software's bytes may follow the end marker; a thumbnail's own marker lies near the beginning.
        return None if data.rfind(b"\xff\xd9", len(data) // 2) >= 0 else "the JPEG is cut short (no end marker)"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return None if data.rfind(b"IEND", len(data) // 2) >= 0 else "the PNG is cut short (no end chunk)"
    if not data:
        return "the record holds no image"
    if data[:2] in (b"BM", b"II", b"MM", b"P5", b"P6") or data[:4] == b"RIFF":
        return None
    return f"begins with {data[:4].hex()}, which is no image format known here"


def resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 → (*size, 3) uint8, antialiased bilinear as DALI's triangular filter does it."""
    rows, columns = resize_weights(pixels.shape[0], size[0]), resize_weights(pixels.shape[1], size[1])
    mixed = np.einsum("jw,iwc->ijc", columns, np.tensordot(rows, pixels.astype(np.float32), 1), optimize=True)
    return np.rint(mixed).clip(0, 255).astype(np.uint8)


@functools.lru_cache(256)
def resize_weights(old: int, new: int) -> NDArray[np.float32]:
    """The (new, old) matrix that resizes a row of pixels: triangles as wide as an output pixel, borders repeated."""
    ratio = old / new
    radius = max(ratio, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * ratio
    taps = np.floor(centre - radius).astype(int) + np.arange(int(2 * radius) + 3)[None, :]
    weight = np.maximum(0.0, 1.0 - np.abs(taps + 0.5 - centre) / radius)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), weight)
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
