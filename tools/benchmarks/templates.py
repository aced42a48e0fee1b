"""How long a template protocol of the size of IJB-C takes once its images are embedded: pooling, 1:1 and 1:N.

Example:
  lce bench templates                        # 469,375 images, 23,124 templates, 15,658,489 pairs, 512 dimensions
  lce bench templates --pairs 1000000 --json -

Embeddings are random, drawn around the templates' subjects; the counts are those of the published IJB-C files. One cell
(one query model against one gallery model) is measured, with intervals by resampling.
"""

import argparse
import time
from typing import Any

from tools.measuring import origin, write_json

HELP = "template protocols: pooling, listed pairs and 1:N search after embedding"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--images", type=int, default=469_375)
    parser.add_argument("--templates", type=int, default=23_124)
    parser.add_argument("--subjects", type=int, default=3_531)
    parser.add_argument("--pairs", type=int, default=15_658_489)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--replicates", type=int, default=500, help="of the intervals")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    import numpy as np

    from trainer.evaluation.identification import open_set
    from trainer.evaluation.pairs import pair_cosines, pair_figures
    from trainer.evaluation.templates import pool

    generator = np.random.default_rng(0)
    subject_of = generator.integers(0, args.subjects, args.templates)
    centres = generator.normal(size=(args.subjects, args.dim)).astype(np.float32)
    more = generator.integers(0, args.templates, args.images - args.templates)
    template = np.sort(np.append(np.arange(args.templates), more))  # each has an image
    embeddings = generator.standard_normal((args.images, args.dim), np.float32) * 2 + centres[subject_of[template]]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    media, weights = generator.integers(0, 8, args.images), generator.uniform(0.5, 1, args.images)
    first, second = generator.integers(0, args.templates, (2, args.pairs))
    order = np.argsort(first, kind="stable")  # the published list goes from template to template
    first, second = first[order], second[order]
    genuine = subject_of[first] == subject_of[second]
    seconds: dict[str, float] = {}

    def timed(name: str, began: float) -> None:
        seconds[name] = time.perf_counter() - began

    began = time.perf_counter()
    numbers, pooled = pool(embeddings, template, media, weights)
    timed("pool", began)
    began = time.perf_counter()
    cosines = pair_cosines(pooled, pooled, first, second)
    timed("cosines", began)
    began = time.perf_counter()
    figures = pair_figures(cosines, genuine, (1e-6, 1e-5, 1e-4), args.replicates, 0)
    timed("figures", began)
    _, enrolled = np.unique(subject_of, return_index=True)
    probes = np.setdiff1d(np.arange(args.templates), enrolled)
    began = time.perf_counter()
    found = open_set(pooled[probes], subject_of[probes], pooled[enrolled], subject_of[enrolled])
    timed("search", began)
    result: dict[str, Any] = {
        "bench": "templates",
        "images": args.images,
        "templates": len(numbers),
        "pairs": args.pairs,
        "dim": args.dim,
        "seconds": seconds,
        "seconds_1_1": seconds["pool"] + seconds["cosines"] + seconds["figures"],
        "tar": [row["value"] for row in figures["tar"]],
        "rank_1": found.rank[1],
        **origin(),
    }
    if args.json != "-":
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(f"{args.pairs:,} pairs of {len(numbers):,} templates: {result['seconds_1_1']:.1f} s for 1:1 ({parts})")
    write_json(result, args.json)
    return 0
