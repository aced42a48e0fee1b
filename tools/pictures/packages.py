"""Packages that are fetched once into a cache and checked against a pinned hash: of PyPI, of Debian, of npm.

Each is asked for by its own client first, so that the client's configuration applies (mirrors, proxies, certificates),
and from the project's own address where there is no such client or it does not have the package. None is installed.
"""

import hashlib
import http.client
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import DataError

TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class Package:
    """One file of a package index, pinned by its hash.

    Attributes:
        project, version: what the client asks for.
        file: as the index calls it.
        sha256: of the file.
    """

    project: str
    version: str
    file: str
    sha256: str

    @property
    def url(self) -> str:
        """Where the file is had from if the client does not bring it; empty: nowhere else."""
        return ""

    def command(self, folder: Path) -> list[str]:
        """The client's command line; run in ``folder``, it leaves the file there."""
        raise NotImplementedError


class Wheel(Package):
    """A wheel of PyPI."""

    def command(self, folder: Path) -> list[str]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        return [*command, "--only-binary", ":all:", "--dest", str(folder), f"{self.project}=={self.version}"]


@dataclass(frozen=True)
class DebianPackage(Package):
    """A binary package of Debian; ``pool`` is its folder in every mirror."""

    pool: str = ""

    @property
    def url(self) -> str:
        return f"https://deb.debian.org/debian/{self.pool}/{self.file}"

    def command(self, folder: Path) -> list[str]:
        architecture = Path(self.file).stem.rpartition("_")[2]
        return ["apt-get", "--quiet", "download", f"{self.project}:{architecture}={self.version}"]


class NpmPackage(Package):
    """A package of npm."""

    @property
    def url(self) -> str:
        return f"https://registry.npmjs.org/{self.project}/-/{self.project.rpartition('/')[2]}-{self.version}.tgz"

    def command(self, folder: Path) -> list[str]:
        return ["npm", "pack", "--silent", "--cache", str(folder / "npm"), f"{self.project}@{self.version}"]


def fetch(package: Package, cache: Path) -> Path:
    """The package's path in ``cache``, fetched when it does not lie there or is damaged.

    Raises:
        DataError: it cannot be fetched (offline, no client) or what came has another hash; the message says what to do.
    """
    target = cache / package.file
    try:
        if target.is_file() and sha256(target) == package.sha256:
            return target
        cache.mkdir(parents=True, exist_ok=True)
        state = "damaged, and cannot be fetched again" if target.exists() else "cannot be fetched"
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            print(f"fetching {package.file}, once, into {cache}", file=sys.stderr)
            fetched, reasons = Path(folder) / package.file, []
            for reason in _attempts(package, Path(folder)):
                if reason == "" and sha256(fetched) == package.sha256:
                    fetched.replace(target)
                    return target
                reasons.append(reason or "what was fetched has another sha256 than the one expected")
    except OSError as error:
        raise DataError(
            f"{cache}: cannot keep {package.file} there: {error}; set XDG_CACHE_HOME to another folder"
        ) from None
    raise DataError(
        f"{package.file}: {state}: {'; '.join(reasons)}; connect to the index of {package.project}, "
        f"or put the file (sha256 {package.sha256}) into {cache}"
    )


def _attempts(package: Package, folder: Path) -> Iterator[str]:
    """Try what may leave the file in the folder, one way after the other: why it failed, or "" if the file is there."""
    command = package.command(folder)
    client = "pip" if "pip" in command else command[0]
    if client == "pip" or shutil.which(client):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder)
        there = done.returncode == 0 and (folder / package.file).is_file()
        said = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
        yield "" if there else f"{client}: {said}"
    if package.url:
        try:
            with (
                urllib.request.urlopen(package.url, timeout=TIMEOUT) as answer,
                (folder / package.file).open("wb") as file,
            ):
                shutil.copyfileobj(answer, file)
            yield ""
        except (OSError, http.client.HTTPException) as error:
            yield f"{package.url}: {error}"


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
