"""Draw docs/figures.md from a finished demo: the space before and after, the slack of the boundaries, backfill curves.

  lce demo --data characters
  lce bench figures demo/characters/seed-0

The demo's folder is only read. The pictures go into `pictures` next to the page.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.evaluation.arrays import FloatArray, IntArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trainer.compat.bank.center_bank import CenterBank
    from trainer.data import Dataset
    from trainer.models.model import EmbeddingModel

HELP = "draw docs/figures.md from a finished demo"

QUERIES = {"old": "the old model", "paragon": "a new model, free", "new": "a new model, with LCE"}
"""Who searches the old gallery, by its role in the demo."""
IDENTITIES, SLACK_IMAGES = 8, 4000
ROUNDING = 1e-6
"""Of the cosines: the image that a boundary was taken from lies on it."""
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#B8A900", "#0072B2", "#D55E00", "#CC79A7")
_STYLES = {"old": ("#000000", "--"), "paragon": ("#D55E00", "-."), "new": ("#0072B2", "-")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench figures``."""
    parser.add_argument("demo", type=Path, metavar="DEMO", help="a seed's folder of a finished demo")
    parser.add_argument("--out", type=Path, default=Path("docs/figures.md"), help="the page (docs/figures.md)")


def run(args: argparse.Namespace) -> int:
    """Draw the pictures and write the page; returns the exit status."""
    from tools.measuring import origin
    from trainer.errors import ConfigError
    from trainer.evaluation.plots import figures, png
    from trainer.files import replaced
    from trainer.reading import read_json

    if not (args.demo / "evaluation.json").is_file():
        raise ConfigError(f"{args.demo}: no finished demo (evaluation.json is missing); run `lce demo` first")
    result = read_json(args.demo / "evaluation.json", ConfigError)
    unseen = result["sets"]["unseen"]
    models, data, bank = _open(args.demo)
    plane, share, images = space(models, data["unseen"], unseen)
    slacks = slack(models, data["train"], bank)
    curves, _ = figures({"verdict": {"sets": []}, "sets": {"unseen": unseen}}, {})["unseen-backfill"]
    inside = {role: float(np.mean(found + ROUNDING >= 0)) for role, found in slacks.items()}
    captions = {
        "space": f"{IDENTITIES} of {unseen['identities']:,} identities that no model was trained on (the first ones of "
        f"the set), {images} images of them. Crosses: their old embeddings, as the gallery keeps them. Dots: the same "
        "images as queries, embedded by three models. Drawn in the plane of the two principal components of these old "
        f"embeddings, which holds {share:.0%} of their variance. A free new model has a space of its own; LCE draws "
        "the queries to the old embeddings of their identity.",
        "slack": "cos(x, o_y) − b_y of "
        f"{len(slacks['new']):,} training images x: above 0 an image lies within the boundary of its old class. There "
        f"lie {inside['old']:.1%} of the old model's own embeddings, {inside['paragon']:.1%} of a free new model's and "
        f"{inside['new']:.1%} of those of the one that was trained with LCE.",
        "backfill": "What the new model finds while a growing share of the gallery is re-encoded, in three orders: "
        "random, the least confident old embeddings first, identity by identity.",
    }
    pictures = args.out.parent / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, figure in {"space": plane, "slack": _slack_figure(slacks), "backfill": curves}.items():
        with replaced(pictures / f"figures-{name}.png", ConfigError) as partial:
            partial.write_bytes(png(figure))
    made, drawn = result["provenance"]["commit"], origin()
    source = f"{args.demo.resolve().parent.name}/{args.demo.name}"
    commits = f"A demo of commit {made}, drawn by commit {drawn['commit']}; {drawn['machine']}, torch {drawn['torch']}."
    with replaced(args.out, ConfigError) as partial:
        partial.write_text(page(source, captions, commits), encoding="utf-8")
    print(f"{args.out}: {len(captions)} figures")
    return 0


def page(source: str, captions: Mapping[str, str], commits: str) -> str:
    """The page in Markdown. ``source``: the demo's data and seed, such as ``characters/seed-0``."""
    titles = {
        "space": "The space before and after",
        "slack": "The slack of the boundaries",
        "backfill": "Re-encoding little by little",
    }
    out = [
        "# An upgrade in figures",
        "",
        "Written by `lce bench figures` from a finished demo; the figures in numbers: [results](results.md); what they "
        "mean: [concepts](concepts.md).",
        "",
        "```bash not-run",
        f"lce demo --data {source.partition('/')[0]}",
        f"lce bench figures demo/{source}",
        "```",
        "",
        commits,
        "",
    ]
    for name, caption in captions.items():
        out += [f"## {titles[name]}", "", f"![{titles[name]}](pictures/figures-{name}.png)", "", caption, ""]
    return "\n".join(out)


def _open(demo: Path) -> tuple[dict[str, "EmbeddingModel"], dict[str, "Dataset"], "CenterBank"]:
    from trainer.compat.bank.center_bank import CenterBank
    from trainer.data import open_dataset
    from trainer.models.open import load_model

    models = {role: load_model(demo / role) for role in QUERIES}
    data = {name: open_dataset(demo / "data" / name) for name in ("train", "unseen")}
    return models, data, CenterBank.open(demo / "bank")


@dataclass(frozen=True)
class _Embedded:
    """Queries (n, D1) by role, as they search the old gallery, and the gallery's own embeddings (n, D1)."""

    queries: dict[str, FloatArray]
    gallery: FloatArray


def _embedded(models: Mapping[str, "EmbeddingModel"], dataset: "Dataset", records: IntArray) -> _Embedded:
    """Raises :class:`trainer.errors.ConfigError` where a query does not meet the stored embeddings as they are."""
    from trainer.distributed import Ranks
    from trainer.errors import ConfigError
    from trainer.evaluation.embeddings import EmbeddingCache, embed_spaces

    spaces = embed_spaces("figures", models, dataset, records, EmbeddingCache(None), Ranks())
    queries = {}
    for role in QUERIES:
        view = spaces.view(role, "old")
        if view is None or view[2] not in ("own", "direct", "t21"):
            raise ConfigError(
                f"{models[role].path}: its queries do not meet stored embeddings as they are; take a demo in mode "
                "`direct` or `backward`"
            )
        queries[role] = view[0]
    return _Embedded(queries, spaces.native["old"])


def space(
    models: Mapping[str, "EmbeddingModel"], dataset: "Dataset", unseen: Mapping[str, Any]
) -> tuple["Figure", float, int]:
    """Old embeddings and three models' queries of the first identities, in the plane of the old ones' two principal
    components.

    Args:
        unseen: what ``lce evaluate`` found on the set, for the figures above the plots.

    Returns:
        The figure, the share of the old embeddings' variance in the plane, and the number of images.
    """
    from matplotlib.figure import Figure

    labels = np.asarray(dataset.labels)
    shown = np.unique(labels[dataset.kept])[:IDENTITIES]
    records = dataset.kept[np.isin(labels[dataset.kept], shown)]
    found = _embedded(models, dataset, records)
    mean = found.gallery.mean(0)
    _, spread, axes_of = np.linalg.svd(found.gallery - mean, full_matrices=False)
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    panels = figure.subplots(1, len(QUERIES), sharex=True, sharey=True)
    for panel, (role, title) in zip(panels, QUERIES.items(), strict=True):
        for colour, label in zip(COLOURS, shown, strict=False):
            own = labels[records] == label
            stored, asked = ((x[own] - mean) @ axes_of[:2].T for x in (found.gallery, found.queries[role]))
            panel.scatter(*stored.T, marker="x", s=26, linewidths=0.9, color=colour, alpha=0.55)
            panel.scatter(*asked.T, marker="o", s=16, color=colour, edgecolors="white", linewidths=0.4)
        rank = unseen["cells"][f"{role}->old"]["rank"]["1"]["value"]
        panel.set_title(f"queries of {title}\n{role} → old: rank-1 {rank:.3f}", fontsize=10)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_aspect("equal")
    return figure, float((spread[:2] ** 2).sum() / (spread**2).sum()), len(records)


def slack(
    models: Mapping[str, "EmbeddingModel"], dataset: "Dataset", bank: "CenterBank", images: int = SLACK_IMAGES
) -> dict[str, FloatArray]:
    """cos(x, o_y) − b_y (LCE's boundary condition) of up to ``images`` training images, by the role of the query:
    each (n,) float32. Classes without an old centre are left out."""
    rows = bank.rows(0, bank.num_classes)
    centers, boundaries, mask = rows.centers.numpy(), rows.boundaries.numpy(), rows.mask.numpy()
    labels = np.asarray(dataset.labels)
    kept = dataset.kept[mask[labels[dataset.kept]]]
    records = kept[np.unique(np.linspace(0, len(kept) - 1, min(images, len(kept))).astype(np.int64))]
    of = labels[records]
    queries = _embedded(models, dataset, records).queries
    return {role: np.einsum("nd,nd->n", x, centers[of]) - boundaries[of] for role, x in queries.items()}


def _slack_figure(slacks: Mapping[str, FloatArray]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    axes = figure.add_subplot()
    every = np.concatenate(list(slacks.values()))
    width = max(1e-6, float(np.ptp(every)) / 80)
    edges = width * np.arange(np.floor(every.min() / width), np.ceil(every.max() / width) + 2)  # 0 is one of them
    axes.axvspan(0, edges[-1], color="#009E73", alpha=0.1, label="within the old class's boundary")
    for role, values in slacks.items():
        shares = np.histogram(values + ROUNDING, edges)[0] / len(values)
        colour, dash = _STYLES[role]
        axes.stairs(shares, edges, color=colour, linestyle=dash, linewidth=1.8, label=QUERIES[role])
    axes.set_xlabel("slack of the boundary: cos(x, o_y) − b_y")
    axes.set_ylabel("share of training images")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="upper center")
    return figure
