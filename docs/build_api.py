"""Build the API reference from the docstrings into a folder; any warning is an error.

Example:
  python docs/build_api.py build/docs
"""

import re
import sys
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import pdoc
from pdoc import docstrings, render

# Ours: what other projects import. launch/ and tools/ are commands, which have --help.
# The kernels are no Python for readers, and importing them needs Triton.
PACKAGES = ("trainer", "!trainer.head.triton_kernels")
_ROLE = re.compile(r":(?:class|func|mod|meth|attr|data|exc):`~?([^`]+)`")


def build(out: Path) -> None:
    """Write the pages of :data:`PACKAGES`."""
    google = docstrings.google
    docstrings.google = lambda text: google(_ROLE.sub(r"`\1`", text))  # roles name what pdoc links by itself
    render.configure(docformat="google", footer_text="lce-trainer", search=True)
    for absent in ("triton", "triton.language"):  # of no page, but pdoc imports the kernels to list their room
        sys.modules.setdefault(absent, MagicMock())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc(*PACKAGES, output_directory=out)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
