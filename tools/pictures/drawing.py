"""One character in one typeface as a small grey picture, and "photographs" of such pictures."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]

PAPER, INK = 32, 224  # grey levels that leave room for contrast and noise before they clip
HAN = (range(0x4E00, 0xA000), range(0x3400, 0x4DC0))  # the unified ideographs and their extension A
HANGUL = (range(0xAC00, 0xAC00 + 11172),)  # the syllables
_FILL = 0.875  # size of the typeface in picture heights
_NEVER = "\U0010fffd"  # private use: what a typeface shows here is its picture of a missing character


class Pen:
    """A typeface at one size.

    Args:
        font: the font file, or its content.
        size: side of the pictures in pixels.
        index: which face of a collection (.ttc).

    Raises:
        OSError: it is no font that can be read.
    """

    def __init__(self, font: Path | bytes, size: int, index: int = 0) -> None:
        self._source = io.BytesIO(font) if isinstance(font, bytes) else font
        self.size, self._index = size, index
        # The basic layout draws single characters as the complex one does, in half the time.
        self._font = ImageFont.truetype(self._source, round(size * _FILL), index, layout_engine=ImageFont.Layout.BASIC)

    def mapped(self) -> dict[int, str]:
        """The font's character map: codepoint → name of its glyph.

        Raises:
            OSError: the font has none that can be read.
        """
        from fontTools.ttLib import TTFont, TTLibError

        if isinstance(self._source, io.BytesIO):
            self._source.seek(0)
        try:
            with TTFont(self._source, fontNumber=self._index, lazy=True) as font:
                return dict(font.getBestCmap() or {})
        except TTLibError as error:
            raise OSError(str(error)) from None

    def known(self) -> frozenset[int]:
        """The mapped codepoints with a glyph of their own: neither "missing" nor shared by two. Raises OSError."""
        glyphs = self.mapped()
        shared = Counter(glyphs.values())
        return frozenset(code for code, glyph in glyphs.items() if glyph != ".notdef" and shared[glyph] == 1)

    def draw(self, character: int | str) -> Pixels:
        """The picture (size, size) uint8 of a character, given as such or by its codepoint."""
        text = chr(character) if isinstance(character, int) else character
        picture = Image.new("L", (self.size, self.size), PAPER)
        middle = (self.size / 2, self.size / 2)
        ImageDraw.Draw(picture).text(middle, text, fill=INK, font=self._font, anchor="mm")
        return np.asarray(picture)

    def meaningless(self) -> set[bytes]:
        """The digests of what this typeface draws where it has nothing: a blank picture, and its box."""
        return {digest(np.full((self.size, self.size), PAPER, np.uint8)), digest(self.draw(_NEVER))}


def digest(picture: Pixels) -> bytes:
    """16 bytes that equal pictures share."""
    return hashlib.blake2b(picture.tobytes(), digest_size=16).digest()


def telling(digests: Sequence[bytes], meaningless: Iterable[bytes]) -> NDArray[np.bool_]:
    """Which pictures (n,) of one typeface stand for their character alone: not blank, not the box, not drawn twice."""
    count = Counter(digests)
    refused = set(meaningless)
    return np.array([count[one] == 1 and one not in refused for one in digests], dtype=bool)


def vary(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A "photograph" of a character: turned, resized and shifted a little, in other light, with noise.

    The same kinds and sizes of variation as the training augmentation of ``configs/demo-characters.yaml``.

    Args:
        image: (S, S) uint8 on a background of grey level ``PAPER``.
        rng: draws the variation; the same state gives the same picture.
    """
    size = image.shape[0]
    angle, zoom = rng.normal(0, 0.08), 1 + rng.normal(0, 0.08)
    shift = rng.normal(0, 0.03, 2) * size
    cos, sin, middle = np.cos(angle) * zoom, np.sin(angle) * zoom, (size - 1) / 2
    turned = Image.fromarray(image).transform(
        (size, size),
        Image.Transform.AFFINE,
        (
            cos,
            -sin,
            middle - cos * middle + sin * middle + shift[0],
            sin,
            cos,
            middle - sin * middle - cos * middle + shift[1],
        ),
        Image.Resampling.BILINEAR,
        fillcolor=PAPER,
    )
    lit = (np.asarray(turned, dtype=np.float32) - 127.5) * (1 + rng.normal(0, 0.3)) + 127.5
    noisy = lit + rng.normal(0, 0.04 * 255, lit.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)
