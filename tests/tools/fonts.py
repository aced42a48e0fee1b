"""Small synthetic typefaces, and archives with them."""

import io
import lzma
import tarfile
from collections.abc import Mapping
from pathlib import Path

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

FIRST = 0xAC00


def typeface(
    characters: int, twins: int = 0, blanks: int = 0, first: int = FIRST, lift: int = 0, shared: int = 0
) -> bytes:
    """A font of boxes, each of its own size.

    Args:
        characters: how many, from ``first`` on.
        twins: so many of the last ones are drawn as the first one, by glyphs of their own.
        blanks: so many at the very end are empty.
        lift: how far the boxes stand above the base line, in thousandths: makes typefaces differ.
        shared: so many more characters are mapped to the first one's glyph.
    """
    names = [f"g{i}" for i in range(characters)]
    glyphs = {".notdef": _box(700, 300, lift)}
    for i, name in enumerate(names):
        from_end = characters - i
        if from_end <= blanks:
            glyphs[name] = _box(0, 0, 0)
        elif from_end <= blanks + twins:
            glyphs[name] = _box(100, 100, lift)
        else:
            glyphs[name] = _box(100 + 70 * (i % 10), 100 + 70 * (i // 10), lift)
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    mapping = {first + i: name for i, name in enumerate(names)}
    mapping |= {first + characters + i: names[0] for i in range(shared)}
    builder.setupCharacterMap(mapping)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    out = io.BytesIO()
    builder.save(out)
    return out.getvalue()


def _box(width: int, height: int, lift: int) -> object:
    pen = TTGlyphPen(None)
    if width:
        pen.moveTo((50, lift))
        for point in ((50, lift + height), (50 + width, lift + height), (50 + width, lift)):
            pen.lineTo(point)
        pen.closePath()
    return pen.glyph()


def debian_package(path: Path, members: Mapping[str, bytes], kind: str = "xz") -> Path:
    """A .deb with these files: an ar archive of debian-binary and data.tar."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = lzma.compress(tar.getvalue()) if kind == "xz" else tar.getvalue()
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (f"data.tar.{kind}", data)):
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    path.write_bytes(out)
    return path
