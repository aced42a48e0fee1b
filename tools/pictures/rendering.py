"""Every character of a script in every typeface, encoded once into one file per typeface; and which of them to use."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.pictures.drawing import HAN, HANGUL, Pen, Pixels, digest, telling
from tools.pictures.typefaces import Found
from trainer.data.processes import worker_context
from trainer.errors import DataError
from trainer.files import replaced

_SCRIPTS = {"han": HAN, "hangul": HANGUL, "both": (*HAN, *HANGUL)}


@dataclass(frozen=True)
class Sheet:
    """What one typeface draws: n characters whose pictures stand for them alone.

    Attributes:
        path: the file with the PNG pictures, one behind the other.
        codepoints: (n,) int64, ascending.
        spans: (n, 2) int64, first byte and length in the file.
        digests: (n, 16) uint8, of the pixels.
    """

    path: Path
    codepoints: NDArray[np.int64]
    spans: NDArray[np.int64]
    digests: NDArray[np.uint8]


def codepoints_of(script: str, typeface_script: str = "both") -> list[int]:
    """The characters of a script (``han``, ``hangul``, ``both``) that a typeface for ``typeface_script`` may draw."""
    own = {code for block in _SCRIPTS[typeface_script] for code in block}
    return sorted(code for block in _SCRIPTS[script] for code in block if code in own)


def render(
    found: Sequence[Found],
    script: str,
    size: int,
    folder: Path,
    processes: int,
    progress: Callable[[int, int], None],
) -> list[Sheet]:
    """Draw all typefaces into ``folder``; what an earlier call finished there is not drawn again.

    Args:
        found: the typefaces.
        script: see :func:`codepoints_of`.
        size: side of the pictures in pixels.
        folder: made if missing.
        processes: how many draw at a time.
        progress: called with (typefaces done, typefaces to do).

    Raises:
        DataError: a font that cannot be read, a folder that cannot be written.
    """
    progress(0, len(found))
    with ProcessPoolExecutor(min(processes, len(found)), worker_context()) as pool:
        waiting = [pool.submit(_render_one, one, script, size, folder) for one in found]
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()
                progress(done, len(found))
        except BrokenProcessPool:
            raise DataError("a drawing process died (out of memory?); run the same command again to continue") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [_load(folder, one) for one in found]


def _render_one(found: Found, script: str, size: int, folder: Path) -> None:
    name = found.typeface.name
    if (folder / f"{name}.npz").exists():
        return
    try:
        pen = Pen(found.read(), size, found.index)
        known = pen.known()
    except (OSError, ValueError) as error:
        raise DataError(f"{found.path}: {found.member or name}: cannot be read as a font: {error}") from None
    codes = [code for code in codepoints_of(script, found.typeface.scripts) if code in known]
    spans = np.zeros((len(codes), 2), np.int64)
    digests: list[bytes] = []
    with replaced(folder / f"{name}.png.bin", DataError) as partial, partial.open("wb") as file:
        for row, code in enumerate(codes):
            picture = pen.draw(code)
            encoded = encode(picture)
            spans[row] = file.tell(), len(encoded)
            file.write(encoded)
            digests.append(digest(picture))
    keep = telling(digests, pen.meaningless())
    table = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    with replaced(folder / f"{name}.npz", DataError) as partial, partial.open("wb") as file:
        np.savez(file, codepoints=np.array(codes, np.int64)[keep], spans=spans[keep], digests=table[keep])


def encode(picture: Pixels) -> bytes:
    """A picture (S, S) uint8 as PNG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _load(folder: Path, found: Found) -> Sheet:
    name = found.typeface.name
    try:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as table:
            return Sheet(folder / f"{name}.png.bin", table["codepoints"], table["spans"], table["digests"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{folder / name}.npz: {error}; remove {folder} and run the command again") from None


def coverage(sheets: Sequence[Sheet]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which typeface draws which character.

    A picture that an earlier typeface draws for the same character, pixel by pixel, counts for that one alone.

    Returns:
        The codepoints (n,) int64, ascending, and for each its row in each sheet (n, typefaces) int64; −1: not drawn.
    """
    codes = np.unique(np.concatenate([sheet.codepoints for sheet in sheets]))
    rows = np.full((len(codes), len(sheets)), -1, np.int64)
    seen = np.zeros((len(codes), len(sheets), 16), np.uint8)
    for k, sheet in enumerate(sheets):
        at = np.searchsorted(codes, sheet.codepoints)
        twin = (seen[at, :k] == sheet.digests[:, None]).all(-1) & (rows[at, :k] >= 0)
        new = ~twin.any(1)
        rows[at[new], k] = np.flatnonzero(new)
        seen[at, k] = sheet.digests
    return codes, rows
