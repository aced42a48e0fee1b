"""The report in headless Chromium: nothing on the console, every plot and picture there, no wider than a phone,
light and dark; held to the accessibility rules of axe-core; printed as PDF.

Screenshots are left in ``build/screenshots`` of the checkout, or in ``$LCE_ARTEFACTS/screenshots``.
"""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.test_verdict import OPTIONS, upgrade
from trainer.evaluation.pdf import print_pdf
from trainer.evaluation.report import RunRecord, write_report
from trainer.evaluation.results import measure_sets

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(os.environ.get("LCE_ARTEFACTS") or ROOT / "build") / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

# Runs in a copy of the page: the report itself holds no script.
PROBE = r"""<script>addEventListener("load", async () => {
  const images = [...document.images];
  const result = {plots: images.filter(i => i.className === "plot").length, images: images.length,
    broken: images.filter(i => !i.complete || i.naturalWidth === 0).length,
    overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
    narrow: images.filter(i => i.className === "plot" && innerWidth <= 400 && i.width < innerWidth - 40).length,
    cut: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
    dark: matchMedia("(prefers-color-scheme: dark)").matches ? 1 : 0,
    back: parseInt(getComputedStyle(document.body).backgroundColor.match(/\d+/)[0]),
    requests: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length};
  const rules = [];
  if (window.axe) for (const v of (await axe.run(document)).violations) rules.push(v.id);
  result.violations = rules.length;
  for (const rule of rules) result["rule:" + rule] = 1;
  const text = Object.entries(result).map(([k, v]) => `${k}=${v}`).join(" ");
  parent === window ? document.body.dataset.probe = text : parent.postMessage(text, "*");
});</script></body>"""

# A window of Chromium is never narrower than 500 pixels; a frame is.
FRAME = """<!doctype html><title>frame</title><body style="margin:0"><script>
addEventListener("message", event => { document.body.dataset.probe = event.data; });
</script><iframe src="PAGE" style="border:0;width:WIDTHpx;height:2400px"></iframe></body>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")

    def picture(name, record):
        file = folder / "picture.png"
        Image.fromarray(np.full((32, 32, 3), record % 256, np.uint8)).save(file)
        return file.read_bytes()

    case = upgrade(0.5, noise=1.0)
    result = measure_sets([case], OPTIONS)
    runs = [RunRecord("new", {"loss": [(s, 5 / (s + 1)) for s in range(50)]}, "run:\n  seed: 1 <&>\n")]
    write_report(folder / "report.html", result, runs, picture)
    return folder / "report.html"


def open_page(page, width, folder, dark=False, shot=None):
    """What the console and the probe say of a page; ``shot``: the file that a screenshot goes to."""
    folder.mkdir()
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("PAGE", page.as_uri()).replace("WIDTH", str(width)))
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},2400", "--virtual-time-budget=20000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom",
        *([f"--screenshot={shot}", "--hide-scrollbars"] if shot else []), frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:]
    return console, {key: float(value) for key, value in (p.split("=") for p in html.unescape(found[1]).split())}


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_opens_without_errors_and_fits(report, tmp_path, width, dark):
    page = report.with_name(f"probed-{width}-{dark}.html")
    page.write_text(report.read_text().replace("</body>", PROBE))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    shot = SCREENSHOTS / f"report-{width}-{'dark' if dark else 'light'}.png"
    shot.unlink(missing_ok=True)
    console, seen = open_page(page, width, tmp_path / "browser", dark, shot)
    with Image.open(shot) as picture:
        assert picture.size == (max(width, 500), 2400)
        assert (picture.convert("L").getpixel((width // 2, 5)) < 60) == dark
    assert console == []
    assert seen["width"] == width
    assert seen["dark"] == dark
    assert (seen["back"] < 60) == dark
    assert seen["plots"] == 4  # criterion, ROC, scores, loss
    assert seen["images"] > 20
    assert seen["narrow"] == 0
    assert seen["broken"] == 0
    assert seen["requests"] == 0
    assert seen["overflow"] <= 0
    assert width == 400 or seen["cut"] == 0  # on a phone wide tables are pushed sideways


@pytest.mark.parametrize("dark", [False, True])
def test_the_rules_of_axe_hold(report, tmp_path, dark):
    package = pytest.importorskip("axe_core_python", reason="needs axe-core-python (extra dev)")
    script = next(Path(package.__file__).parent.glob("**/axe.min.js")).read_text(encoding="utf-8")
    page = report.with_name(f"axe-{dark}.html")
    page.write_text(report.read_text().replace("</body>", f"<script>{script}</script>{PROBE}"))
    _, seen = open_page(page, 1200, tmp_path / "browser", dark)
    assert [name for name in seen if name.startswith("rule:")] == []
    page.write_text(page.read_text().replace('<html lang="en">', "<html>").replace('alt="', 'data-alt="'))
    _, seen = open_page(page, 1200, tmp_path / "broken", dark)
    assert {"rule:html-has-lang", "rule:image-alt"} <= set(seen)


def test_the_pdf_is_printed(report, tmp_path):
    print_pdf(report, tmp_path / "report.pdf")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF-")
    assert len(data) > 20_000
    assert [path.name for path in tmp_path.iterdir()] == ["report.pdf"]


def test_the_probe_sees_what_is_broken(report, tmp_path):
    page = report.with_name("broken.html")
    text = report.read_text().replace("data:image/svg+xml;base64,", "data:image/svg+xml;base64,AAAA", 1)
    wide = '<div style="width:2000px">x</div><script>console.error("told")</script>'
    page.write_text(text.replace("</body>", wide + PROBE))
    console, seen = open_page(page, 500, tmp_path / "broken")
    assert len(console) == 1
    assert seen["broken"] == 1
    assert seen["overflow"] > 0
