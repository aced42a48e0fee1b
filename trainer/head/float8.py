"""Rows of one byte a number: E4M3 with a scale per row, for SGD without momentum.

A row is ``scale · code``: the scale is what makes its largest number E4M3's largest, 448, so that neighbours are 1/8 to
1/16 of a number apart down to 1/28,672 of that largest one, and evenly spaced below. At D = 512 a class takes 516 bytes
(520 where rows are drawn).

* **Rounding** is stochastic, of the update's exact result: either neighbour, with the probability that makes the mean
  exact. It is seeded by the step, so that a resumed run rounds alike.
* **Residual** (``head.rows_residual``, bfloat16, 2 more bytes a number): results are rounded to the nearest instead,
  and what rounding took away is kept (itself rounded stochastically) and added at the row's next update, as in Kahan's
  summation. The passes read the rows alone.
* **Drawn rows**: without momentum a row that was not drawn has shrunk by one factor, which goes to its scale. No
  rounding takes place for it.

ELMO (ICML 2025) trains classifiers of millions of labels this way, without momentum as here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.head.config import SgdRowsConfig
from trainer.head.row_optimizer import (
    FUSE_FROM_ROWS,
    Change,
    RowGradient,
    Selection,
    SgdRows,
    element_noise,
    inverse_norms,
    round_stochastically,
    velocity,
)

CODES, SCALE, RESIDUAL = NAMES = ("rows_float8", "rows_scale", "rows_residual")
"""The tables' names in a checkpoint: not ``rows``, which other dtypes would be read into without their scales."""
LARGEST = 448.0
"""E4M3's largest number: 1.75 · 2⁸."""
SMALLEST_SCALE = 1e-30
"""Of a row of zeros, say."""
HALF = 1 << 19
"""Added to the 20 bits that float32 has and E4M3 does not, it rounds to the nearest."""
_BELOW_NORMAL = 2.0**-6
_EXPONENTS = 120 << 23  # float32's bias, 127, less E4M3's, 7


@dataclass(frozen=True)
class Float8Table:
    """Rows as they are stored: ``codes`` (R, D) uint8, ``scale`` (R, 1) float32, and, where what rounding takes away is
    kept, ``residual`` (R, D) bfloat16.
    """

    codes: Tensor
    scale: Tensor
    residual: Tensor | None

    @classmethod
    def empty(cls, rows: int, dim: int, device: torch.device, residual: bool) -> "Float8Table":
        """Rows of zeros."""
        codes = torch.zeros(rows, dim, dtype=torch.uint8, device=device)
        kept = torch.zeros(rows, dim, dtype=torch.bfloat16, device=device) if residual else None
        return cls(codes, torch.full((rows, 1), SMALLEST_SCALE, device=device), kept)

    def put(self, first: int, rows: Tensor) -> None:
        """Store the rows (n, D) from ``first`` on, rounded to the nearest."""
        here = slice(first, first + len(rows))
        value = rows.float()
        self.codes[here], self.scale[here] = encode(value, torch.full((), HALF, device=rows.device))
        if self.residual is not None:
            self.residual[here] = value - decode(self.codes[here], self.scale[here])

    def tables(self) -> tuple[Tensor, ...]:
        """Codes, scales and, where there is one, the residual."""
        return (self.codes, self.scale) if self.residual is None else (self.codes, self.scale, self.residual)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """scale · code in float32: (n, D) uint8 and (n, 1) → (n, D)."""
    size = (codes & 0x7F).to(torch.int32)
    value = torch.where(size < 8, size * 2.0**-9, ((size << 20) + _EXPONENTS).view(torch.float32))
    return torch.where(codes > 0x7F, -value, value) * scale


def encode(value: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, D) and scales (n, 1) of float32 rows (n, D).

    Args:
        noise: int32 in [0, 2²⁰), evenly spread for stochastic rounding, :data:`HALF` for the nearest.
    """
    scale = (value.abs().amax(1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    size = (value / scale).abs().clamp_max(LARGEST)
    even = size < _BELOW_NORMAL  # there the codes are evenly spaced, as they are from 2⁻⁶ to 2⁻⁵
    bits = (torch.where(even, size + _BELOW_NORMAL, size).view(torch.int32) + noise - _EXPONENTS) >> 20
    return (torch.where(even, bits - 8, bits) | torch.where(value < 0, 0x80, 0)).to(torch.uint8), scale


class Float8Rows(SgdRows):
    """:class:`SgdRows` without momentum on a :class:`Float8Table`; ``rows`` are the codes."""

    def __init__(self, config: SgdRowsConfig, table: Float8Table, sampled: bool, seed: int) -> None:
        super().__init__(config, table.codes, sampled, seed)
        self.table, self.tables = table, table.tables()
        self.table_names = NAMES[: len(self.tables)]

    def put(self, first: int, rows: Tensor) -> None:
        """See :meth:`RowOptimizer.put`."""
        self.table.put(first, rows.to(self.rows.device))

    def read(self, start: int, stop: int, out: Tensor) -> Tensor:
        """See :meth:`RowOptimizer.read`."""
        copy = self.fuse(_decode_to) if stop - start >= FUSE_FROM_ROWS else _decode_to
        copy(self.table.codes[start:stop], self.table.scale[start:stop], out)
        return out

    def read_at(self, places: Tensor, out: Tensor) -> Tensor:
        """See :meth:`RowOptimizer.read_at`."""
        return out.copy_(decode(self.table.codes[places], self.table.scale[places]))

    def copy_rows(self, index: Tensor, out: Tensor) -> None:
        """See :meth:`RowOptimizer.copy_rows`."""
        copy = self.fuse(_copy_decoded) if len(index) >= FUSE_FROM_ROWS else _copy_decoded
        copy(index, self.table.codes, self.table.scale, self.missed_by(index), out)

    def update(self, selection: Selection, start: int, stop: int, gradient: RowGradient, gate: Tensor | None) -> None:
        """See :meth:`RowOptimizer.update`."""
        change, decay = self.change(gradient, gate), self.config.weight_decay
        by_row, by_column = self.noise(stop - start)
        noise = by_row[:, None], by_column
        if selection.index is None:
            part = tuple(table[start:stop] for table in self.tables)
            left = self.fuse(_descend_stored)(part, noise, gate, decay, change)
            if not self.sampled:
                self._left_inverse = True
                self._inverse[start:stop] = left
            return
        index = selection.index[start:stop]
        w = selection.rows(start, stop)
        self.fuse(_descend_into)(index, self.tables, self.missed_by(index), w, noise, gate, decay, change)

    def flush(self) -> None:
        """See :meth:`RowOptimizer.flush`: what the rows missed goes to their scales."""
        if not self.sampled:
            return
        factor = self._coefficients[:, :1].contiguous().index_select(0, self._now - self._last)
        for table in self.tables[1:]:
            table.mul_(factor)
        self._current()


def _decode_to(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_(decode(codes, scale))


def _copy_decoded(index: Tensor, codes: Tensor, scale: Tensor, missed: Tensor, out: Tensor) -> None:
    out.copy_(decode(codes[index], scale[index] * missed[:, 0:1]))


def _moved(
    w: Tensor, stored: tuple[Tensor, ...], noise: tuple[Tensor, Tensor], decay: float, change: Change
) -> tuple[Tensor, ...]:
    """What an update makes of the rows w (n, D), to be stored; ``stored`` is what is there, up to date."""
    moved = w - velocity(w, None, change) * change.lr
    by_row, by_column = noise
    if len(stored) > 2:
        moved = moved + stored[2].to(w.dtype) * (1 - change.lr * decay)
        codes, row_scale = encode(moved, torch.full((), HALF, device=w.device))
        return codes, row_scale, round_stochastically(moved - decode(codes, row_scale), by_row, by_column)
    return encode(moved, element_noise(by_row, by_column, 20))


def _descend_stored(
    stored: tuple[Tensor, ...], noise: tuple[Tensor, Tensor], gate: Tensor | None, decay: float, change: Change
) -> Tensor:
    """Update rows where they are stored; 1/‖w‖ (n, 1) of what they are then."""
    moved = _moved(decode(stored[0], stored[1]), stored, noise, decay, change)
    for table, value in zip(stored, moved, strict=True):
        table.copy_(value if gate is None else torch.where(gate > 0, value, table))
    return inverse_norms(decode(stored[0], stored[1]))


def _descend_into(
    index: Tensor,
    tables: tuple[Tensor, ...],
    missed: Tensor,
    w: Tensor,
    noise: tuple[Tensor, Tensor],
    gate: Tensor | None,
    decay: float,
    change: Change,
) -> None:
    """The same of drawn rows, ``w`` (n, D) brought up to date; a closed gate leaves them that."""
    factor = missed[:, 0:1]
    stored = (tables[0][index], *((table[index] * factor).to(table.dtype) for table in tables[1:]))
    moved = _moved(w, stored, noise, decay, change)
    for table, old, value in zip(tables, stored, moved, strict=True):
        table[index] = value if gate is None else torch.where(gate > 0, value, old)
