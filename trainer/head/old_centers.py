"""LCE's direct mode as the class-sharded head needs it: old centres and boundaries on the rank that owns the new rows.

Alignment ``L_a = mean_j (1 − cos(w_j, o_j))`` over the classes that have a centre and boundary ``L_b = mean_i max(0,
b_y − cos(x_i, o_y))`` over the samples whose class has one (LCE, Meng et al., ICCV 2021, eq. 5 and 6, in (1 − cos)
units; the paper's λ_a is ``alignment_weight · D/2``). Both are computed in the head's own pass over its rows, see
trainer/head/fused.py.

With a sample rate below 1 the mean over all rows is estimated from the classes that were *drawn* as negatives, each
weighted by C/S (Horvitz–Thompson); a positive that was not drawn has no term. So the estimate is unbiased, whatever
the class sizes.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed import all_reduce_sum, worker_threads
from trainer.errors import CenterBankError
from trainer.head.sampling import Drawn

SPARE_ROWS = 4096
"""Room for a step's centres is a multiple of so many: draws differ by a few rows, and torch uses memory again where its
size is the same.
"""


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all steps: memory that is taken on it is used again on it alone."""
    return torch.cuda.Stream(device)


class StepCenters:
    """The centres (n, D1) of a step's rows on their way from host memory to the device.

    A thread gathers them, a block of rows at a time, into two pinned buffers, from which a stream of its own copies
    them. They stay on the device for the second pass. The copies wait for nothing that is queued on the stream that
    computes: their memory belongs to the copying stream, and torch gives it to another step only when both streams
    have done with it.

    Args:
        centers: (c, D1) on the host. index: makes the (n,) rows of it on the host, called once by the thread. count: n.
        device: of the step. block: rows at a time.
    """

    def __init__(
        self, centers: Tensor, index: Callable[[], Tensor], count: int, device: torch.device, block: int
    ) -> None:
        self.centers, self.block, self._index = centers, block, functools.cache(index)
        self._stream, self._events = _copy_stream(device), [torch.cuda.Event() for _ in range(2)]
        with torch.cuda.stream(self._stream):
            size = -(-count // SPARE_ROWS) * SPARE_ROWS, centers.shape[1]
            self.out = torch.empty(size, dtype=centers.dtype, device=device)[:count]
        self.out.record_stream(torch.cuda.current_stream(device))
        size = (min(block, count), centers.shape[1])
        self._buffers = [torch.empty(size, dtype=centers.dtype, pin_memory=True) for _ in range(2)]
        thread = worker_threads(1, "old centres")
        self._arriving: list[Future[torch.cuda.Event]] = [
            thread.submit(self._send, start) for start in range(0, count, block)
        ]
        thread.shutdown(wait=False)

    def rows(self, start: int, stop: int) -> Tensor:
        """The centres of the rows [start, stop) of the step; what is queued after this call finds them there."""
        for arriving in self._arriving[start // self.block : -(-stop // self.block)]:
            torch.cuda.current_stream(self.out.device).wait_event(arriving.result())
        return self.out[start:stop]

    def _send(self, start: int) -> torch.cuda.Event:
        number, part = start // self.block, self._index()[start : start + self.block]
        buffer, over = self._buffers[number % 2][: len(part)], self._events[number % 2]
        if number > 1:
            over.synchronize()  # in this thread alone
        torch.index_select(self.centers, 0, part, out=buffer)
        with torch.cuda.stream(self._stream):
            self.out[start : start + self.block].copy_(buffer, non_blocking=True)
            over.record(self._stream)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return arrived


@dataclass(frozen=True)
class DirectCompat:
    """One rank's part of a centre bank and the weights of the two losses.

    Args:
        centers: (c, D1), unit vectors, float32 or bfloat16; may stay in host memory, then only the rows of a step are
        moved.
        boundaries: (c,) cosines, on the rank's device.
        mask: (c,) bool, whether the class has an old centre; a masked class has no term at all. On the rank's device.
        alignment_weight: λ_a in (1 − cos) units.
        boundary_weight: λ_b.
    """

    centers: Tensor
    boundaries: Tensor
    mask: Tensor
    alignment_weight: float
    boundary_weight: float

    def check(self, classes: int, dim: int) -> None:
        """Raise :class:`CenterBankError` unless the bank fits the rank's ``classes`` rows of dimension ``dim``."""
        if self.centers.shape != (classes, dim):
            raise CenterBankError(
                f"centre bank: {len(self.centers)} centres of dimension {self.centers.shape[1]} for {classes} classes "
                f"of dimension {dim}; direct mode needs D1 = D2 (choose backbone.dim, or a mode with a transformation)"
            )

    def total(self, device: torch.device) -> Tensor:
        """The number of classes with a centre over all ranks, 0-dim float64 (one all-reduce; called once)."""
        return all_reduce_sum(self.mask.sum().to(device=device, dtype=torch.float64))

    def start(self, drawn: Drawn, device: torch.device, block: int) -> StepCenters | None:
        """Send the centres of a step's rows to the device; None: they are there, or all rows take part."""
        if drawn.index is None or self.centers.device.type == device.type:
            return None
        return StepCenters(self.centers, drawn.host_index, len(drawn.index), device, block)

    def rows(self, index: Tensor | slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (n, D1) as they are stored, and the mask as numbers (n,) of the dtype of ``like``."""
        return self.centers[index], self.mask[index].to(like)
