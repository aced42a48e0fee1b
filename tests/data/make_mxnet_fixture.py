"""Write the fixture tests/data/mxnet with a real MXNet, in an environment of its own.

It was made once, with Python 3.8 and 3.9:
    python3.9 -m venv mxnet-env && mxnet-env/bin/pip install mxnet==1.9.1 'numpy<1.24' pillow
    mxnet-env/bin/python tests/data/make_mxnet_fixture.py tests/data/mxnet [NAME …]    # all of them, or those named

plain/        records 0…59 with their class as a float label
insightface/  240 images of 24 characters: header record 0, images 1…240, one record per identity
recbuilder/   14 images of 6 characters in the order of InsightFace's RecBuilder: images, identities, header record
face2rec2/    the same in the order of its face2rec2.py: images with two labels, header record, identities
vector/       label vectors of three entries
magic/        data (not images) that contains RecordIO's magic at aligned and other places: records of several parts
expected.json the labels and a SHA-256 of every record's image, as this script put them in
"""

import hashlib
import io
import json
import struct
import sys
from pathlib import Path

import mxnet
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
MAGIC = struct.pack("<I", 0xCED7230A)


def draw(character, variant):
    """A 24 × 24 JPEG or PNG of a character, moved and shaded by ``variant``."""
    random = np.random.RandomState(1000 * ord(character) + variant)
    shade = [int(v) for v in random.randint(0, 90, 3)]
    image = Image.new("RGB", (24, 24), tuple(255 - s for s in shade))
    at = tuple(int(v) for v in random.randint(9, 15, 2))
    ImageDraw.Draw(image).text(at, character, fill=tuple(shade), font=ImageFont.load_default(18), anchor="mm")
    out = io.BytesIO()
    image.save(out, "PNG") if variant % 5 == 4 else image.save(out, "JPEG", quality=80)
    return out.getvalue()


def write(folder, records):
    """``records``: (key, label or labels, image bytes), written by MXNet; returns them for expected.json."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = mxnet.recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "w")
    expected = []
    for key, label, image in records:
        header = mxnet.recordio.IRHeader(0, label, key, 0)  # MXNet sets the flag to the number of labels
        writer.write_idx(key, mxnet.recordio.pack(header, image))
        expected.append({"key": key, "label": label, "sha256": hashlib.sha256(image).hexdigest()})
    writer.close()
    return expected


def insightface():
    """Ten images of each character between header record 0 and the identity records."""
    count, people = 10, len(CHARACTERS)
    last = count * people
    yield 0, [last + 1.0, last + 1.0 + people], b""
    for k, character in enumerate(CHARACTERS):
        for variant in range(count):
            yield 1 + count * k + variant, float(k), draw(character, variant)
    for k in range(people):
        yield last + 1 + k, [1.0 + count * k, 1.0 + count * (k + 1)], b""


COUNTS = (2, 3, 1, 4, 2, 2)


def few():
    """The 14 images of :data:`COUNTS`, keys from 1 on, and the range of keys of each character."""
    images, ranges = [], []
    for k, count in enumerate(COUNTS):
        first = 1 + len(images)
        images += [(first + v, float(k), draw(CHARACTERS[k], v)) for v in range(count)]
        ranges.append([float(first), float(first + count)])
    return images, ranges


def header_last():
    """RecBuilder: the header record, key 0, is the last of the file."""
    images, ranges = few()
    end = 1 + len(images)
    yield from images
    for k, span in enumerate(ranges):
        yield end + k, span, b""
    yield 0, [float(end), float(end + len(ranges))], b""


def header_after_images():
    """face2rec2.py: the header record between images and identities; images say whether they were aligned."""
    images, ranges = few()
    end = 1 + len(images)
    for key, label, image in images:
        yield key, [label, 1.0], image
    yield 0, [float(end), float(end + len(ranges))], b""
    for k, span in enumerate(ranges):
        yield end + k, span, b""


def magics():
    """Data with the magic at its beginning, in its middle, twice in a row, at its end, and where it is not aligned."""
    yield 0, 0.0, MAGIC + b"begins with it."
    yield 1, 1.0, b"four" + MAGIC + b"in the middle"
    yield 2, 2.0, b"four" + MAGIC + MAGIC + b"twice"
    yield 3, 3.0, b"it is the end" + b"..." + MAGIC
    yield 4, 4.0, b"odd" + MAGIC + b"not aligned"
    yield 5, 5.0, MAGIC
    yield 6, 6.0, b""


def main(out, names):
    """Write everything, or what is named, below ``out``."""
    plain = [(k, float(k % 12), draw(CHARACTERS[k % 12], k)) for k in range(60)]
    vectors = [(k, [float(k % 4), 0.5 * k, -float(k)], draw(CHARACTERS[k % 4], k)) for k in range(12)]
    makers = {
        "plain": lambda: plain,
        "insightface": insightface,
        "recbuilder": header_last,
        "face2rec2": header_after_images,
        "vector": lambda: vectors,
        "magic": magics,
    }
    file = out / "expected.json"
    expected = json.loads(file.read_text()) if file.exists() else {}
    for name in names or makers:
        expected[name] = write(out / name, makers[name]())
    for name, count in (("insightface", len(CHARACTERS)), ("recbuilder", len(COUNTS)), ("face2rec2", len(COUNTS))):
        (out / name / "property").write_text(f"{count},24,24\n")
    expected["mxnet"] = mxnet.__version__
    file.write_text(json.dumps(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
