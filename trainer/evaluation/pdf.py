"""The report as PDF, printed by headless Chromium."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from trainer.errors import DataError
from trainer.files import replaced

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 120


def chromium() -> str:
    """The path of a Chromium on this machine. Raises :class:`DataError`: there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        raise DataError(
            "no Chromium is installed, which prints the report as PDF (Debian: apt-get install chromium); or open the "
            "report in any browser and print it"
        )
    return found


def print_pdf(report: Path, path: Path) -> None:
    """Print an .html file as PDF, without the browser's own header. Raises :class:`DataError`: Chromium failed."""
    with replaced(path, DataError) as partial, tempfile.TemporaryDirectory(prefix="lce-pdf-") as profile:
        command = [
            chromium(),
            "--headless=new",
            "--disable-gpu",
            "--no-pdf-header-footer",
            f"--user-data-dir={profile}",
        ]
        if os.geteuid() == 0:  # as root Chromium starts without its sandbox only; the page holds no script
            command.append("--no-sandbox")
        command += [f"--print-to-pdf={partial.absolute()}", report.absolute().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"{path}: Chromium did not print the report: {error}") from None
        if not partial.is_file() or partial.read_bytes()[:5] != b"%PDF-":
            last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise DataError(f"{path}: Chromium printed no PDF (status {done.returncode}): {last}")
