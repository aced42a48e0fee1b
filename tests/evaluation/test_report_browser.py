"""The report in headless Chromium: nothing on the console, every plot and picture there, no wider than a phone."""

import html
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.test_verdict import OPTIONS, upgrade
from trainer.evaluation.report import RunRecord, write_report
from trainer.evaluation.results import study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

# Runs in a copy of the page: the report itself holds no script.
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images];
  const result = {plots: images.filter(i => i.className === "plot").length, images: images.length,
    broken: images.filter(i => !i.complete || i.naturalWidth === 0).length,
    overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
    requests: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length};
  document.body.dataset.probe = Object.entries(result).map(([k, v]) => `${k}=${v}`).join(" ");
});</script></body>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")

    def picture(name, record):
        file = folder / "picture.png"
        Image.fromarray(np.full((32, 32, 3), record % 256, np.uint8)).save(file)
        return file.read_bytes()

    case = upgrade(0.5, noise=1.0)
    result = study([case], OPTIONS)
    runs = [RunRecord("new", {"loss": [(s, 5 / (s + 1)) for s in range(50)]}, "run:\n  seed: 1 <&>\n")]
    write_report(folder / "report.html", result, runs, picture)
    return folder / "report.html"


def open_page(page, width, folder):
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={folder}", f"--window-size={width},900", "--virtual-time-budget=5000",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:]
    return console, {key: float(value) for key, value in (p.split("=") for p in html.unescape(found[1]).split())}


def test_the_report_opens_without_errors_and_fits_a_phone(report, tmp_path):
    page = report.with_name("probed.html")
    page.write_text(report.read_text().replace("</body>", PROBE))
    for width in (500, 1200):
        console, seen = open_page(page, width, tmp_path / str(width))
        assert console == []
        assert seen["plots"] == 4  # criterion, ROC, scores, loss
        assert seen["images"] > 20
        assert seen["broken"] == 0
        assert seen["requests"] == 0
        assert seen["overflow"] <= 0


def test_the_probe_sees_what_is_broken(report, tmp_path):
    page = report.with_name("broken.html")
    text = report.read_text().replace("data:image/svg+xml;base64,", "data:image/svg+xml;base64,AAAA", 1)
    wide = '<div style="width:2000px">x</div><script>console.error("told")</script>'
    page.write_text(text.replace("</body>", wide + PROBE))
    console, seen = open_page(page, 500, tmp_path / "broken")
    assert len(console) == 1
    assert seen["broken"] == 1
    assert seen["overflow"] > 0
