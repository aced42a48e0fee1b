"""Build the package, install the wheel into an empty environment, and ask every command for its help there.

Example:
  python tests/package_check.py            # `make package-check`; needs a package index, takes minutes
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = (
    "nvidia-dali-cuda130",
    "deepspeed",
    "mpi4py",
    "faiss-cpu",
    "psycopg",
    "pgvector",
    "pytest",
    "mypy",
    "pdoc",
    "scikit-learn",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "fonttools",
)
WANTED = ("tools/pictures/drawing.py", "trainer/py.typed", "configs/base.yaml", "configs/gpus/64.yaml")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command, end with what it printed if it fails; its output."""
    print("$", *command, file=sys.stderr)
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nexit status {done.returncode}")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel, made by way of the source package; its content is looked at."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = [name for name in WANTED if name not in names]
    strange = [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/", "tools/results/"))]
    if missing or strange:
        sys.exit(f"{wheel.name}: lacks {missing}, should not hold {strange[:3]}")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel and what it requires, no extra; its folder of commands."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    run(*pip, *index, f"torch=={version('torch')}")
    run(*pip, wheel)
    return folder / "bin"


def check(commands: Path, folder: Path) -> None:
    """Nothing optional is there, every command explains itself, and the recipes came along."""
    listed = run(commands / "python", "-m", "pip", "list", "--format", "freeze", cwd=folder).lower()
    present = [name for name in OPTIONAL if f"\n{name}==" in f"\n{listed}"]
    if present:
        sys.exit(f"installed without having been asked for: {', '.join(present)}")
    names = run(commands / "python", "-c", "from tools.cli import COMMANDS; print(*COMMANDS)", cwd=folder).split()
    for name in names:
        run(commands / "lce", name, "--help", cwd=folder)
    (folder / "tools.py").write_text("raise SystemExit(0)\n")
    foreign = subprocess.run(
        [commands / "lce", "--version"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    (folder / "tools.py").unlink()
    if foreign.returncode != 2 or "is shadowed by" not in foreign.stderr:
        sys.exit(f"lce with a foreign tools.py first: exit status {foreign.returncode}, {foreign.stderr}")
    bench = subprocess.run([commands / "lce", "bench", "compat"], cwd=folder, capture_output=True, text=True)
    if bench.returncode != 2 or "clone of the repository" not in bench.stderr:
        sys.exit(f"lce bench compat, which the wheel leaves out: exit status {bench.returncode}, {bench.stderr}")
    code = "from tools.steps import CONFIGS; print(CONFIGS / 'demo-faces-old.yaml')"
    recipe = run(commands / "python", "-c", code, cwd=folder).strip()
    run(commands / "lce", "launch", recipe, "--dry-run", cwd=folder)
    print(f"{len(names)} commands explain themselves in an environment without any extra")


def main() -> None:
    """Build, install, check."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        check(install(build(folder / "dist"), folder / "clean"), folder)


if __name__ == "__main__":
    main()
