"""UniBCT (Zhang et al., IJCAI 2022): BCT with prototypes refined from the old embeddings."""

from typing import cast

import numpy as np
import torch

from trainer.compat.methods import losses
from trainer.compat.methods.bct import Bct
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.old_embeddings import StoredEmbeddings
from trainer.data.config import SyntheticConfig
from trainer.head.frozen import FrozenRows
from trainer.head.partition import ClassRange

PROTOTYPE_BLOCK = 64
"""Classes whose prototypes are made at a time."""


class UniBct(Bct):
    """UniBCT (Zhang et al., IJCAI 2022): BCT whose rows are prototypes refined along the links within each class.

    Each rank makes those of its own classes once, at the start, from the old embeddings of their images; images without
    an old embedding (zero rows) take no part, classes without any image are masked. The links come from the *old*
    embeddings: the paper takes the new model's and makes them again while it trains, which needs a pass over the
    training set each time. Left out as well: links across classes.
    """

    def rows(self, run: Sections, inputs: Inputs, classes: ClassRange) -> FrozenRows:
        """See :class:`Bct`. Memory: the old embeddings of a few classes at a time."""
        old = cast(StoredEmbeddings, inputs.old)
        labels = record_labels(run, inputs)
        own = np.flatnonzero((labels >= classes.start) & (labels < classes.stop))
        own = own[np.argsort(labels[own], kind="stable")]
        sorted_labels = labels[own]
        dtype = getattr(torch, run.head.frozen_rows)
        rows, masks = [torch.empty(0, old.dim, dtype=dtype)], [torch.empty(0, dtype=torch.bool)]
        for first in range(classes.start, classes.stop, PROTOTYPE_BLOCK):
            last = min(first + PROTOTYPE_BLOCK, classes.stop)
            low, high = np.searchsorted(sorted_labels, [first, last])
            old.will_need(own[low:high])
            vectors = torch.from_numpy(old.read(own[low:high])).double()
            known = vectors.norm(dim=1) > 0
            y = torch.from_numpy(sorted_labels[low:high] - first)[known]
            made, mask = losses.unibct_prototypes(vectors[known], vectors[known], y, last - first)
            rows.append(made[mask].to(dtype))
            masks.append(mask)
        return FrozenRows(torch.cat(rows), torch.cat(masks), classes)


def record_labels(run: Sections, inputs: Inputs) -> np.ndarray:
    """The class of every record, (N,) int64; −1: not used."""
    if isinstance(run.data, SyntheticConfig):
        return np.arange(run.data.synthetic_records) % inputs.num_classes
    assert inputs.dataset is not None
    return np.asarray(inputs.dataset.labels)
