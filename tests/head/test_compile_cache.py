"""A run that was killed while it compiled leaves a library without content in inductor's cache."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.head import kernels
from trainer.head.kernels import Kernels, exp_sum, why_eager

pytestmark = pytest.mark.slow
COMPILE = """
import torch
from trainer.head.kernels import Kernels, exp_sum, why_eager
one = Kernels(4096, compiled=True)
out = one.fuse(exp_sum)(torch.ones(64, 8), torch.ones(64, 1), torch.ones(64, 1))
print(one.compiled, why_eager(), float(out.sum()))
"""


@pytest.mark.attack  # compiles three times
def test_a_library_without_content_is_compiled_anew(tmp_path: Path) -> None:
    def run() -> str:
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        words = [sys.executable, "-c", COMPILE]
        root = Path(__file__).parents[2]
        done = subprocess.run(words, env=environment, cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() or done.stderr

    sound = run()
    libraries = list(tmp_path.rglob("*.so"))
    if not libraries:
        pytest.skip(f"torch.compile does not work here: {sound}")
    for library in libraries:
        library.write_bytes(b"")
    assert run() == sound == "True None 512.0"


def test_what_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_problems", [])

    def broken(function: object) -> object:
        def call(*_: object) -> None:
            raise RuntimeError("no compiler\nat all")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    one = Kernels(4096, compiled=True)
    with pytest.warns(UserWarning, match="the head runs uncompiled: no compiler at all"):
        out = one.fuse(exp_sum)(torch.ones(4, 2), torch.ones(4, 1), torch.ones(4, 1))
    assert out.tolist() == [4, 4]
    assert (one.compiled, why_eager()) == (False, "no compiler at all")


def test_a_benchmark_of_an_uncompiled_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.benchmarks.head import Implementation
    from trainer.errors import ConfigError

    side = Implementation.__new__(Implementation)
    monkeypatch.setattr(
        Implementation,
        "_ask",
        lambda self, what: [{"peak_bytes": 1, "eager": None}, {"peak_bytes": 2, "eager": "no g++"}],
    )
    with pytest.raises(ConfigError, match=r"the head ran uncompiled .*no g\+\+"):
        side.finish()
