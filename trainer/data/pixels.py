"""Encoded bytes → pixels, and the one way in which images are resized."""

import contextlib
import functools
import importlib
import io
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.reading import is_pointer

# Pillow keeps so many buffers for the next image; given back and asked for again they take a quarter of the time.
Image.core.set_blocks_max(8)  # type: ignore[attr-defined]


with contextlib.suppress(ImportError):  # Pillow reads .heic where this is installed
    importlib.import_module("pillow_heif").register_heif_opener()


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in small letters, of the files that are taken for images: those that Pillow here can read."""
    wanted = ".jpg .jpeg .jpe .jfif .png .bmp .webp .pgm .ppm .tif .tiff .gif .avif .heic .heif"
    return frozenset(wanted.split()) & frozenset(Image.registered_extensions())


def decode_image(
    data: bytes, size: tuple[int, int] | None, color: str = "RGB", exact: bool = False
) -> NDArray[np.uint8]:
    """Decode with Pillow: (H, W, 3) uint8, upright by its EXIF orientation, resized to ``size`` (antialiased bilinear)
    if it differs. 16-bit grey is scaled to 8 bits, as DALI does it.

    Raises:
        ValueError: the bytes are no complete image, their values have no known range, or (``exact``) one of another
            size.
    """
    problem = image_problem(data)
    if problem:
        raise ValueError(problem)
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = _eight_bits(ImageOps.exif_transpose(image), image.format)
            pixels = None if upright is None else np.asarray(upright.convert("RGB"))
    except Exception as error:  # Pillow raises whatever the format's reader stumbles over
        raise ValueError(_reason(error)) from None
    if pixels is None:
        raise ValueError("its pixels are 32-bit numbers, which may mean anything; convert it to 8 or 16 bits")
    if size is not None and pixels.shape[:2] != tuple(size):
        if exact:
            raise ValueError(f"it is {pixels.shape[0]}x{pixels.shape[1]}, not {size[0]}x{size[1]} as all others")
        pixels = resize(pixels, size)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if color == "BGR" else pixels


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image | None:
    """Grey values 0 … 65535 as 0 … 255, which Pillow would clip; other images as they are; None: no known range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return None if image.mode in ("I", "F") else image


def as_png(data: bytes) -> bytes:
    """Encoded bytes of any format that Pillow reads as a PNG of the same pixels. Raises: as :func:`decode_image`."""
    out = io.BytesIO()
    Image.fromarray(decode_image(data, None)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def is_deep_png(data: bytes) -> bool:
    """Whether it is a PNG of 16 bits a channel, of which decoders make different 8-bit values."""
    return data[:8] == _PNG_SIGNATURE and data[24:25] == b"\x10"


def image_size(data: bytes) -> tuple[int, int]:
    """(H, W) that an encoded image announces; nothing is decoded. Raises :class:`ValueError`: no complete image."""
    problem = image_problem(data)
    if problem:
        raise ValueError(problem)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return upright_size(image)
    except Exception as error:  # Pillow raises whatever the format's reader stumbles over
        raise ValueError(_reason(error)) from None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) of an opened image once it is turned by its EXIF orientation."""
    turned = image.getexif().get(_ORIENTATION, 1) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def _reason(error: Exception) -> str:
    unknown = isinstance(error, UnidentifiedImageError)
    return "the image's header is damaged" if unknown else f"the image is damaged ({error})"


def image_problem(data: bytes) -> str | None:
    """What is wrong with encoded bytes by their structure, or None; a few microseconds, so every step can afford it.

    No pixel is decoded. JPEG: the segments before the scan lead from one to the next, one of them says the size, and
    there is an end marker. PNG: every chunk's checksum. DALI must never see what fails here: it may crash where it
    cannot parse an image's header (2.4 did), while pixels that do not decode are a clean error there.
    """
    if data[:2] == _START_OF_IMAGE:
        return _jpeg_problem(data)
    if data[:8] == _PNG_SIGNATURE:
        return _png_problem(data)
    if not data:
        return "the record holds no image"
    if is_pointer(data):
        return "it is a Git LFS pointer, not the image itself; run `git lfs pull` where it was cloned"
    try:
        with Image.open(io.BytesIO(data)):
            return None
    except Exception as error:
        return _reason(error)


_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap height and width
_START_OF_IMAGE, _START_OF_SCAN, _END_OF_IMAGE = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_FRAME_HEADERS = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive: what decoders here can read
_SEGMENTS = _FRAME_HEADERS | {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _jpeg_problem(data: bytes) -> str | None:
    first = data.find(_START_OF_SCAN)
    scan = _known_scan(data[: first + 2])
    if scan != first:
        scan = _find_scan(data)  # the first marker belonged to a thumbnail inside a segment, or something is wrong
    if scan < 0:
        return "the JPEG's header is damaged"
    # Other software's bytes may follow the end marker.
    return None if data.rfind(_END_OF_IMAGE, scan) >= 0 else "the JPEG is cut short (no end marker)"


def _find_scan(data: bytes) -> int:
    """Where a JPEG's scan begins, found by walking its segments; −1: the walk fails."""
    at, sized = 2, False
    while at + 2 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _START_OF_SCAN[1]:
            return at if sized else -1
        if at + 10 > len(data) or marker not in _SEGMENTS:
            return -1
        length = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAME_HEADERS:
            if sized or not _frame_is_sound(data[at + 2 : at + 2 + length]):
                return -1
            sized = True
        if length < 2:
            return -1
        at += 2 + length
    return -1


def _frame_is_sound(frame: bytes) -> bool:
    """Length, precision 8, height, width, and 1, 3 or 4 components with sampling factors of 1 to 4."""
    if len(frame) < 11 or len(frame) != 8 + 3 * frame[7] or frame[7] not in (1, 3, 4):
        return False
    sampling = [factor for byte in frame[9::3] for factor in (byte >> 4, byte & 15)]
    return frame[2] == 8 and any(frame[3:5]) and any(frame[5:7]) and all(1 <= factor <= 4 for factor in sampling)


_known_scan = functools.lru_cache(1024)(_find_scan)  # one encoder's images of one size share their header


def _png_problem(data: bytes) -> str | None:
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        checksum = int.from_bytes(data[end : end + 4], "big")
        if (at == 8) != (kind == b"IHDR") or zlib.crc32(data[at + 4 : end]) != checksum:
            return f"the PNG is damaged at byte {at}"
        if kind == b"IEND":
            return None
        at = end + 4
    return "the PNG is cut short (no end chunk)"


def resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 → (*size, 3) uint8, antialiased bilinear as DALI's triangular filter does it.

    Few taps a pixel are added up one by one: a matrix product would wake the threads of the linear algebra for nothing.
    """
    image: NDArray[np.float32] = pixels.astype(np.float32)
    for axis in (0, 1):
        places, weights = _taps(image.shape[axis], size[axis])
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        image = sum(w.reshape(shape) * image.take(at, axis) for at, w in zip(places, weights, strict=True))
    return np.rint(image).clip(0, 255).astype(np.uint8)


@functools.lru_cache(256)
def _taps(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For a row of pixels: (k, new) places in the old row and their weights: a triangle as wide as an output pixel.

    Places outside the row are its border pixels.
    """
    ratio = old / new
    radius = max(ratio, 1.0)
    centre = (np.arange(new) + 0.5) * ratio
    places = np.floor(centre - radius).astype(int) + np.arange(int(2 * radius) + 3)[:, None]
    weights = np.maximum(0.0, 1.0 - np.abs(places + 0.5 - centre) / radius)
    used = weights.any(1)
    weights = (weights / weights.sum(0))[used].astype(np.float32)
    return places[used].clip(0, old - 1), weights
