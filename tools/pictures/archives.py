"""Files out of packages that need not be installed: Debian's (.deb), wheels (.whl) and gzipped tar files (.tgz)."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from trainer.errors import DataError


def read_members(archive: Path, wanted: Callable[[str], bool], remedy: str) -> dict[str, bytes]:
    """The files of a package whose path in it ``wanted`` accepts: path → content, in the order of the paths.

    Raises:
        DataError: the package cannot be read (the message ends with ``remedy``).
    """
    try:
        return dict(sorted(_read(archive, wanted).items()))
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive}: cannot be read: {error}; {remedy}") from None


def _read(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if wanted(name)}
    content = archive.read_bytes()
    data = _debian_data(content) if archive.suffix == ".deb" else gzip.decompress(content)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {
            member.name: file.read()
            for member in tar
            if member.isfile() and wanted(member.name) and (file := tar.extractfile(member))
        }


def _debian_data(package: bytes) -> bytes:
    """The tar file data.tar of a Debian package, which is an ar archive (deb(5), ar(5)). Raises ValueError."""
    unpackers: dict[str, Callable[[bytes], bytes]] = {
        "xz": lzma.decompress,
        "gz": gzip.decompress,
        "bz2": bz2.decompress,
        "tar": bytes,
    }
    if not package.startswith(b"!<arch>\n"):
        raise ValueError("is no Debian package")
    start = 8
    while start + 60 <= len(package):
        name = package[start : start + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(package[start + 48 : start + 58])
        if name.startswith("data.tar"):
            kind = name.rpartition(".")[2]
            if kind not in unpackers:
                raise ValueError(f"holds {name}, a compression that Python lacks")
            return unpackers[kind](package[start + 60 : start + 60 + size])
        start += 60 + size + size % 2
    raise ValueError("holds no data.tar")
