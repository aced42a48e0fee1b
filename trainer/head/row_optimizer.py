"""The rows of one rank, their optimizer state, and what an update does to the rows of a step.

Only the rows drawn in a step are read, differentiated and written. What that means for the others:

* **SGD** (momentum μ, decay λ, learning rate η): *as if every row had been updated in every step*, a row that was
  not drawn with a zero gradient. Such a step is linear and the same for all rows, ``(w, v) ← [[1 − ηλ, −ημ], [λ,
  μ]] (w, v)``, so a row remembers the number of the update that touched it last, and when it is drawn again the
  product of the steps it missed, four numbers from a table, brings it up to date. Training is numerically that of a
  dense gradient with ``torch.optim.SGD``, at the cost of the drawn rows. Every ``HORIZON`` updates, and before a
  checkpoint, all rows are brought up to date in one sweep. Without momentum there is no table of it, and what a row
  missed is one factor.
* **AdamW**: *a row's clock runs only while it is drawn*. Moments, decay and bias correction (by the row's own
  number of draws) stand still otherwise; torch's rule for a zero gradient is not linear, and decaying second
  moments of undrawn rows would make their next step huge.

Rows and state may be stored in bfloat16: arithmetic is float32, and results are rounded stochastically (each of the
two neighbours with the probability that makes the mean exact), so updates smaller than a bfloat16 step do not
vanish in the mean. Rows of one byte a number are :mod:`trainer.head.float8`'s.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.distributed import all_threads
from trainer.errors import ConfigError
from trainer.head.config import AdamWRowsConfig, RowOptimizerConfig, SgdRowsConfig
from trainer.head.products import product

HORIZON = 1024
"""After so many updates all rows are brought up to date, so that no row can miss more steps than the table holds."""
FLUSH_ROWS = {"cpu": 1024, "cuda": 65536}
"""Rows per block of that sweep. On CUDA the launches of small blocks would be the cost: 28,000 at 29M rows."""
FUSE_FROM_ROWS = 2048
"""Fewer rows, a batch's own or those of the sweep, are copied by torch as it is: compiling would not pay."""


@dataclass(frozen=True)
class RowGradient:
    """The gradient of n rows w in factored form: ``q @ x + radial[:, None] · w + pull_scale[:, None] · pull``.

    ``q`` (n, B) and ``x`` (B, D) are what the softmax leaves behind (None: no such part), ``radial`` (n,) is its
    projection; ``pull`` (n, D) with ``pull_scale`` (n,) are vectors that attract the rows, such as old class
    centres (None: none). ``extra`` (e, D) is added to the rows
    ``at`` (e,), distinct places among the n (None: nothing).
    """

    q: Tensor | None
    x: Tensor | None
    radial: Tensor
    pull: Tensor | None = None
    pull_scale: Tensor | None = None
    at: Tensor | None = None
    extra: Tensor | None = None

    def add_extra(self, out: Tensor) -> None:
        """Add ``extra`` to the rows ``at`` of ``out`` (n, D)."""
        if self.at is not None and self.extra is not None:
            out.index_add_(0, self.at, self.extra.to(out.dtype))

    def add_to(self, out: Tensor, w: Tensor) -> None:
        """Add everything but ``q @ x`` to ``out`` (n, D)."""
        out.addcmul_(w, self.radial[:, None])
        if self.pull is not None and self.pull_scale is not None:
            out.addcmul_(self.pull.to(out.dtype), self.pull_scale[:, None])
        self.add_extra(out)

    def product(self, dim: int) -> Tensor:
        """``q @ x`` (n, D) in working precision; zeros where there is none."""
        if self.q is None or self.x is None:
            return self.radial.new_zeros(len(self.radial), dim)
        return product(self.q, self.x).to(self.radial.dtype)

    def dense(self, w: Tensor) -> Tensor:
        """The gradient itself (n, D) at the rows ``w``."""
        out = self.product(w.shape[1])
        self.add_to(out, w)
        return out


class Selection:
    """The rows of one step with their state, as float32 (or float64) blocks, one block at a time.

    Where all rows take part and the dtypes agree, blocks are views of the tables. Otherwise they are copies in
    workspaces that the owner keeps from step to step: drawn rows stay there from the first pass to the second, their
    state and rows of another dtype are copied block by block.
    """

    def __init__(self, owner: "RowOptimizer", index: Tensor | None) -> None:
        self.owner, self.index = owner, index
        self.count = len(owner.rows) if index is None else len(index)
        self.in_place = index is None and owner.rows.dtype == owner.work
        owner.selections += 1
        self._number, self._updates = owner.selections, owner.updates
        self.kept = owner.workspace(0, 0 if index is None else self.count)

    def open(self, start: int, stop: int) -> Tensor:
        """The rows [start, stop) of the selection (n, D), for the first time in this step."""
        if self.index is None:
            if self.in_place:
                return self.owner.rows[start:stop]
            return self.owner.read(start, stop, self.owner.workspace(0, stop - start))
        self.owner.copy_rows(self.index[start:stop], self.kept[start:stop])
        return self.kept[start:stop]

    @property
    def undisturbed(self) -> bool:
        """Whether no later selection may have used the workspace."""
        return self._number == self.owner.selections

    def check(self) -> None:
        """Raise RuntimeError when the tables were updated since this selection was made: its step is out of date."""
        if self._updates != self.owner.updates:
            raise RuntimeError("the head's rows were updated between a forward and its backward; end one step first")

    def direct(self, dtype: torch.dtype) -> bool:
        """Whether all rows take part and are stored in ``dtype``: :meth:`stored` then gives what products take."""
        return self.index is None and self.owner.rows.dtype == dtype

    def stored(self, start: int, stop: int) -> Tensor:
        """A view of the table's rows [start, stop), where all take part."""
        return self.owner.rows[start:stop]

    def rows(self, start: int, stop: int) -> Tensor:
        """The same rows once more, in the second pass."""
        if self.index is None or not self.undisturbed:
            return self.open(start, stop)
        return self.kept[start:stop]

    def state(self, start: int, stop: int, w: Tensor) -> tuple[Tensor, ...]:
        """The state of the rows ``w`` that :meth:`rows` gave, (n, D) each; valid until the next call."""
        if self.in_place:
            return tuple(t[start:stop] for t in self.owner.tables[1:])
        blocks = tuple(self.owner.workspace(i, stop - start) for i in range(1, len(self.owner.tables)))
        if self.index is None:
            for block, table in zip(blocks, self.owner.tables[1:], strict=True):
                block.copy_(table[start:stop])
        else:
            self.owner.copy_state(self.index[start:stop], w, blocks)
        return blocks

    def take(self, places: Tensor) -> Tensor:
        """Copies of the rows at some places of the selection, (P, D)."""
        out = self.owner.rows.new_empty((len(places), self.owner.rows.shape[1]), dtype=self.owner.work)
        if self.index is None:
            return self.owner.read_at(places, out)
        self.owner.copy_rows(self.index[places], out)
        return out

    def store(self, start: int, stop: int, blocks: tuple[Tensor, ...]) -> None:
        """Write changed rows and state back to the tables."""
        if self.in_place:
            return
        for table, block in zip(self.owner.tables, blocks, strict=True):
            table[slice(start, stop) if self.index is None else self.index[start:stop]] = self.owner.round(block)


class Change(NamedTuple):
    """What the kernels of an update by SGD take of a gradient of n rows.

    Attributes:
        move: (n, D), the gradient but for its other parts. pull: (n, D), scale: (n, 1), or None: see :func:`velocity`.
        beta: (n, 1), times the row. lr, keep: 0-dim, η and the share of the momentum that is kept.
    """

    move: Tensor
    pull: Tensor | None
    scale: Tensor | None
    beta: Tensor
    lr: Tensor
    keep: Tensor


class RowOptimizer(ABC):
    """Rows (R, D) with their optimizer state; subclasses say what a step is.

    Args:
        config: validated settings.
        rows: the table; it is updated in place.
        sampled: whether steps touch only some of the rows.
        seed: seeds stochastic rounding.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, config: RowOptimizerConfig, rows: Tensor, sampled: bool, seed: int) -> None:
        self.config, self.rows, self.sampled = config, rows, sampled
        self.lr = 0.0
        self.selections = self.updates = 0
        self.work = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.tables = (rows, *(torch.zeros_like(rows) for _ in self.state_names))
        self.table_names: tuple[str, ...] = ("rows", *self.state_names)
        self._noise = torch.Generator(rows.device).manual_seed(seed)
        self._space = [rows.new_empty(0) for _ in self.tables]
        self.fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function

    def set_lr(self, lr: float) -> None:
        """The learning rate of the coming updates (the configuration's ``lr_factor`` is applied here)."""
        self.lr = lr * self.config.lr_factor

    def set_sampled(self, sampled: bool) -> None:
        """Whether the coming steps touch only some of the rows. Where that changes, all are brought up to date, and
        earlier selections are invalid.
        """
        if sampled != self.sampled:
            self.flush()
            self.sampled = sampled
            self.updates += 1
            self._space = [self.rows.new_empty(0) for _ in self.tables]
            self._begin()

    def _begin(self) -> None:
        """Make what steps on all rows, or on some of them, need; all rows are up to date."""
        return

    def select(self, index: Tensor | None) -> Selection:
        """The rows ``index`` (None: all), brought up to date."""
        return Selection(self, index)

    def workspace(self, number: int, count: int) -> Tensor:
        """``count`` rows of a block in working precision that is kept between steps; one for each table."""
        if len(self._space[number]) < count:
            self._space[number] = self.rows.new_empty(0)  # first let go, then take
            size = (count + count // 64, self.rows.shape[1])  # draws differ by a few rows
            self._space[number] = self.rows.new_empty(size, dtype=self.work)
        return self._space[number][:count]

    def put(self, first: int, rows: Tensor) -> None:
        """Start with these rows (n, D) from ``first`` on."""
        self.rows[first : first + len(rows)] = rows

    def put_at(self, index: Tensor, rows: Tensor) -> None:
        """Put rows (n, D) at ``index`` (n,), up to date, with the state of rows that no gradient has moved."""
        for table in self.tables[1:]:
            table[index] = 0
        self.rows[index] = rows.to(self.rows.dtype)

    def read(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Copy the rows [start, stop), which are up to date, to ``out`` (n, D)."""
        return out.copy_(self.rows[start:stop])

    def read_at(self, places: Tensor, out: Tensor) -> Tensor:
        """Copy the rows at some places (n,), which are up to date, to ``out`` (n, D)."""
        return out.copy_(self.rows[places])

    def copy_rows(self, index: Tensor, out: Tensor) -> None:
        """Copy the rows at ``index`` (n,) to ``out`` (n, D), brought up to date."""
        out.copy_(self.rows.index_select(0, index))

    def copy_state(self, index: Tensor, w: Tensor, out: tuple[Tensor, ...]) -> None:
        """Copy the state at ``index`` to ``out``, brought up to date; ``w`` are the rows that :meth:`copy_rows`
        gave.
        """
        for table, block in zip(self.tables[1:], out, strict=True):
            block.copy_(table.index_select(0, index))

    def inverse(self, selection: Selection, start: int, stop: int) -> Tensor | None:
        """1/‖w‖ (n, 1) of rows of a selection, None where it has to be computed: a pass over the rows is saved where
        the last update of all of them has left it behind.
        """
        del selection, start, stop
        return None

    def round(self, value: Tensor) -> Tensor:
        """In the tables' dtype; to bfloat16 stochastically: E[result] = value."""
        if self.rows.dtype != torch.bfloat16:
            return value.to(self.rows.dtype)
        by_row, by_column = self.noise(len(value))
        return self.fuse(round_stochastically)(value, by_row[:, None], by_column)

    def noise(self, count: int, columns: int = 1) -> tuple[Tensor, Tensor]:
        """Random int32 by row (n,) and by column (columns, D); the hash of both is the noise of an element."""
        d = self.rows.shape[1]
        options = {"generator": self._noise, "device": self.rows.device, "dtype": torch.int32}
        both = torch.randint(-(2**31), 2**31, (count + columns * d,), **options)  # type: ignore[call-overload]
        return both[:count], both[count:].view(columns, d)

    def reseed(self, seed: int) -> None:
        """Seed the rounding of a step, so that a resumed run rounds alike."""
        self._noise.manual_seed(seed)

    @abstractmethod
    def update(self, selection: Selection, start: int, stop: int, gradient: RowGradient, gate: Tensor | None) -> None:
        """Update the rows [start, stop) of a selection, and store them.

        Args:
            selection: the step's rows.
            start: first row.
            stop: one past the last; blocks come in order, each once.
            gradient: the rows' gradient, averaged over the batch.
            gate: a 0-dim float tensor on the device, 1 to update and 0 to leave everything as it is (None: update).
        """

    def loaded(self) -> None:
        """The tables were loaded from a checkpoint: every row counts as current; earlier selections are invalid."""
        self.updates += 1

    @abstractmethod
    def finish(self, index: Tensor | None, gate: Tensor | None) -> None:
        """The step is complete: its rows ``index`` (None: all) were updated if ``gate`` says so."""

    def flush(self) -> None:
        """Bring every row up to date; nothing to do where rows that were not drawn stand still."""
        return

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep besides the tables, by name: (R,) tensors."""
        return {}


class SgdRows(RowOptimizer):
    """SGD with momentum and weight decay, as if all rows were updated in every step (see the module's text)."""

    def __init__(self, config: SgdRowsConfig, rows: Tensor, sampled: bool, seed: int) -> None:
        self.state_names = ("momentum",) if config.momentum else ()
        super().__init__(config, rows, sampled, seed)
        self.config: SgdRowsConfig = config
        self._begin()

    def _begin(self) -> None:
        """See :meth:`RowOptimizer._begin`."""
        rows, sampled = self.rows, self.sampled
        # 1/‖w‖ as the last update of all rows left it, for the next pass, and the version of the rows it belongs to.
        self._inverse = rows.new_empty((0 if sampled else len(rows), 1), dtype=self.work)
        self._inverse_of = -1
        self._left_inverse = False  # whether the update under way leaves it behind (not the one in C++)
        # The update that touched a row last, and the current one.
        self._last = torch.zeros(len(rows) if sampled else 0, dtype=torch.int32, device=rows.device)
        self._now = torch.zeros((), dtype=torch.int32, device=rows.device)
        if not sampled:
            return
        # Decay alone shrinks a row that is never drawn by this; copy_state divides by it, so it is kept from vanishing.
        self._since_flush, self._shrunk = 0, 1.0
        # _missed[k] is the product of the last k steps as (a, b, c, d), kept in float64; _coefficients is what rows
        # use.
        identity = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=rows.device)
        self._missed = identity.repeat(HORIZON + 1, 1)
        self._coefficients = self._missed.to(self.work)

    def inverse(self, selection: Selection, start: int, stop: int) -> Tensor | None:
        """See :meth:`RowOptimizer.inverse`."""
        known = selection.index is None and not self.sampled and self._inverse_of == self.rows._version
        return self._inverse[start:stop] if known else None

    @property
    def momentum(self) -> Tensor | None:
        """The table of it (R, D); None at momentum 0."""
        return self.tables[self.state_names.index("momentum") + 1] if self.state_names else None

    def put_at(self, index: Tensor, rows: Tensor) -> None:
        """See :meth:`RowOptimizer.put_at`."""
        super().put_at(index, rows)
        if self.sampled:
            self._mark(index)  # else they would owe the decay of the steps in which they were not drawn

    def missed_by(self, index: Tensor) -> Tensor:
        """What the rows at ``index`` missed, (n, 4)."""
        return self._coefficients.index_select(0, self._now - self._last.index_select(0, index))

    def copy_rows(self, index: Tensor, out: Tensor) -> None:
        """See :meth:`RowOptimizer.copy_rows`."""
        copy = self.fuse(_copy_rows) if len(index) >= FUSE_FROM_ROWS else _copy_rows
        copy(index, self.rows, self.momentum, self.missed_by(index), out)

    def copy_state(self, index: Tensor, w: Tensor, out: tuple[Tensor, ...]) -> None:
        """See :meth:`RowOptimizer.copy_state`."""
        if self.momentum is None:
            return
        copy = self.fuse(_copy_momentum) if len(index) >= FUSE_FROM_ROWS else _copy_momentum
        copy(index, self.momentum, self.missed_by(index), w, out[0])

    def _mark(self, index: Tensor | None) -> None:
        if index is None:
            self._last.copy_(self._now.expand_as(self._last))
        else:
            self._last.index_fill_(0, index, self._now)

    def update(self, selection: Selection, start: int, stop: int, gradient: RowGradient, gate: Tensor | None) -> None:
        """See :meth:`RowOptimizer.update`."""
        change = self.change(gradient, gate)
        if selection.index is None and not selection.in_place and not self.sampled:
            by_row, (of_w, of_v) = self.noise(stop - start, 2)
            stored = tuple(table[start:stop] for table in self.tables)
            noise = (by_row[:, None], of_w[None], of_v[None])
            self._left_inverse = True
            self._inverse[start:stop] = self.fuse(_descend_rounding)(stored, noise, change)
            return
        w = selection.rows(start, stop)
        if selection.index is not None and self.sampled and self.rows.dtype in (self.work, torch.bfloat16):
            index, rounding = selection.index[start:stop], None
            if self.rows.dtype != self.work:
                each = [self.noise(stop - start) for _ in self.tables]
                rounding = tuple((by_row[:, None], by_column) for by_row, by_column in each)
            self.fuse(_descend_into)(index, self.tables, self.missed_by(index), w, rounding, change)
            return
        state = selection.state(start, stop, w)
        left = self.fuse(_descend)(w, *(state or (None,)), change)
        if selection.in_place:
            self._left_inverse = True
            self._inverse[start:stop] = left
        else:
            selection.store(start, stop, (w, *state))

    def change(self, gradient: RowGradient, gate: Tensor | None) -> Change:
        """What the kernels of an update take of a gradient."""
        radial = gradient.radial
        on = torch.ones((), dtype=self.work, device=radial.device) if gate is None else gate.to(self.work)
        lr, keep = self.lr * on, 1 + on * (self.config.momentum - 1)
        beta = (radial + self.config.weight_decay * on)[:, None]
        move = gradient.product(self.rows.shape[1])
        gradient.add_extra(move)
        scale = None if gradient.pull_scale is None else gradient.pull_scale[:, None]
        return Change(move, None if scale is None else gradient.pull, scale, beta, lr, keep)

    def finish(self, index: Tensor | None, gate: Tensor | None) -> None:
        """See :meth:`RowOptimizer.finish`."""
        self.updates += 1
        if not self.sampled:
            self._inverse_of, self._left_inverse = (self.rows._version if self._left_inverse else -1), False
            return
        mu, decay, lr = self.config.momentum, self.config.weight_decay, self.lr
        a, b, c, d = self._missed[:-1].unbind(1)
        # [[1 − ηλ, −ημ], [λ, μ]] times the product so far
        longer = torch.stack(
            [
                (1 - lr * decay) * a - lr * mu * c,
                (1 - lr * decay) * b - lr * mu * d,
                decay * a + mu * c,
                decay * b + mu * d,
            ],
            dim=1,
        )
        done = torch.ones_like(self._now) if gate is None else (gate > 0).to(self._now)
        self._missed[1:] = longer if gate is None else torch.where(gate > 0, longer, self._missed[1:])
        self._coefficients = self._missed.to(self.work)
        self._now += done
        self._mark(index)  # after an update, which moved `now` and these rows by one step, or after none
        self._since_flush += 1
        self._shrunk *= 1 - min(1.0, lr * decay / (1 - mu))
        if self._since_flush >= HORIZON or self._shrunk < 0.5:
            self.flush()

    def set_lr(self, lr: float) -> None:
        """See :meth:`RowOptimizer.set_lr`. Raises :class:`ConfigError` where decay alone would halve a row per step."""
        super().set_lr(lr)
        if self.sampled and self.lr * self.config.weight_decay > 0.5:
            raise ConfigError(
                f"head.optimizer: learning rate {self.lr} times weight_decay {self.config.weight_decay} is above 0.5; "
                "with a sample rate below 1, rows that are not drawn would be lost"
            )

    def loaded(self) -> None:
        """See :meth:`RowOptimizer.loaded`."""
        super().loaded()
        if self.sampled:
            self._current()
        else:
            self._inverse_of = -1

    @all_threads()
    def flush(self) -> None:
        """See :meth:`RowOptimizer.flush`."""
        if not self.sampled:
            return
        step = FLUSH_ROWS[self.rows.device.type]
        for first in range(0, len(self.rows), step):
            index = torch.arange(first, min(first + step, len(self.rows)), device=self.rows.device)
            selection = self.select(index)
            w = selection.open(0, len(index))
            selection.store(0, len(index), (w, *selection.state(0, len(index), w)))
        self._current()

    def _current(self) -> None:
        """All rows are up to date."""
        self._mark(None)
        self._since_flush, self._shrunk = 0, 1.0


class AdamWRows(RowOptimizer):
    """AdamW (Loshchilov & Hutter, ICLR 2019, alg. 2), on a clock per row that runs while the row is drawn."""

    state_names = ("first_moment", "second_moment")

    def __init__(self, config: AdamWRowsConfig, rows: Tensor, sampled: bool, seed: int) -> None:
        super().__init__(config, rows, sampled, seed)
        self.config: AdamWRowsConfig = config
        self._draws = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)

    def update(self, selection: Selection, start: int, stop: int, gradient: RowGradient, gate: Tensor | None) -> None:
        """See :meth:`RowOptimizer.update`."""
        w = selection.rows(start, stop)
        first, second = selection.state(start, stop, w)
        c, index = self.config, selection.index
        draws = self._draws[start:stop] if index is None else self._draws.index_select(0, index[start:stop])
        count = draws[:, None].to(w.dtype) + 1
        on = torch.ones((), dtype=w.dtype, device=w.device) if gate is None else gate.to(w.dtype)
        g = gradient.dense(w)
        first.add_((g - first) * ((1 - c.beta1) * on))
        second.add_((g.square() - second) * ((1 - c.beta2) * on))
        root = (second / (1 - c.beta2**count)).sqrt_().add_(c.eps)
        w.mul_(1 - self.lr * c.weight_decay * on)
        w.sub_(first / root * (self.lr * on / (1 - c.beta1**count)))
        selection.store(start, stop, (w, first, second))

    def finish(self, index: Tensor | None, gate: Tensor | None) -> None:
        """See :meth:`RowOptimizer.finish`."""
        self.updates += 1
        done = (
            torch.ones((), dtype=torch.int32, device=self.rows.device) if gate is None else (gate > 0).to(torch.int32)
        )
        if index is None:
            self._draws += done
        else:
            self._draws[index] += done

    def extra_state(self) -> dict[str, Tensor]:
        """See :meth:`RowOptimizer.extra_state`."""
        return {"draws": self._draws}


def build_row_optimizer(config: RowOptimizerConfig, rows: Tensor, sampled: bool, seed: int) -> RowOptimizer:
    """The row optimizer that a configuration names. Raises :class:`ConfigError` for a dtype that it cannot store."""
    if rows.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ConfigError(f"head.rows = {rows.dtype}: rows are stored as float32, float64 or bfloat16")
    if isinstance(config, SgdRowsConfig):
        return SgdRows(config, rows, sampled, seed)
    assert isinstance(config, AdamWRowsConfig)
    return AdamWRows(config, rows, sampled, seed)


class CollectedGradients:
    """Gradients of rows that wait for their update, for gradient accumulation and loss scaling.

    Memory: the drawn rows' gradient per call, or one gradient of the whole shard when all rows take part.
    """

    def __init__(self, optimizer: RowOptimizer) -> None:
        self.optimizer = optimizer
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._steps = 0  # of which the parts are, each beginning with the rows from 0 on
        self._sum: Tensor | None = None  # of all rows' gradients, where all rows take part

    def add(self, first: int, index: Tensor | None, gradient: Tensor) -> None:
        """Keep the gradient (n, D) of the rows ``index``, or (None) add that of rows ``first`` … to the sum."""
        if index is not None:
            self._parts.append((index, gradient))
            self._steps += first == 0
            return
        if self._sum is None:
            rows = self.optimizer.rows
            self._sum = torch.zeros(rows.shape, dtype=self.optimizer.work, device=rows.device)
        self._sum[first : first + len(gradient)] += gradient

    def apply(self, factor: float, chunk: int) -> None:
        """Update the rows with all that was kept, times ``factor``, in chunks of rows; then forget it."""
        if not self._parts and self._sum is None:
            return
        optimizer = self.optimizer
        index, gradient = self._merge()
        selection = optimizer.select(index)
        for start in range(0, selection.count, chunk):
            stop = min(start + chunk, selection.count)
            selection.open(start, stop)
            ones = torch.ones(stop - start, dtype=optimizer.work, device=optimizer.rows.device)
            pull = RowGradient(None, None, ones * 0, gradient[start:stop], ones * factor)
            optimizer.update(selection, start, stop, pull, None)
        optimizer.finish(index, None)
        self.clear()

    def clear(self) -> None:
        """Forget what was kept."""
        self._parts.clear()
        self._steps, self._sum = 0, None

    def _merge(self) -> tuple[Tensor | None, Tensor]:
        """The gradients, summed by row."""
        if self._sum is not None:
            return None, self._sum
        if self._steps == 1:  # its rows are distinct, and the device need not say how many there are
            every, gradients = zip(*self._parts, strict=True)
            return torch.cat(every), torch.cat(gradients)
        index, inverse = torch.unique(torch.cat([i for i, _ in self._parts]), return_inverse=True)
        out = torch.zeros(len(index), self.optimizer.rows.shape[1], dtype=self.optimizer.work, device=index.device)
        return index, out.index_add_(0, inverse, torch.cat([g for _, g in self._parts]))


# The element-wise work on a block, plain torch that torch.compile fuses; the first argument has the block's length n.


def _descend(
    w: Tensor,
    v: Tensor | None,
    change: Change,
) -> Tensor:
    """v ← keep·v + move + β·w + scale·pull, w ← w − η·v, in one pass over each; 1/‖w‖ (n, 1). ``v`` None: μ is 0."""
    new = velocity(w, v, change)
    if v is not None:
        v.copy_(new)
    moved = w - new * change.lr
    w.copy_(moved)
    return inverse_norms(moved)


def inverse_norms(rows: Tensor) -> Tensor:
    """1/‖w‖ (n, 1) of rows (n, D)."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12).reciprocal()


def velocity(w: Tensor, v: Tensor | None, change: Change) -> Tensor:
    """keep·v + move + β·w + scale·pull (n, D)."""
    new = (change.move if v is None else v * change.keep + change.move) + w * change.beta
    return (
        new if change.pull is None or change.scale is None else new + change.pull.to(change.move.dtype) * change.scale
    )


def _descend_rounding(
    stored: tuple[Tensor, ...],
    noise: tuple[Tensor, Tensor, Tensor],
    change: Change,
) -> Tensor:
    """:func:`_descend` on bfloat16 rows and momentum (none at μ = 0) as they are stored, rounded stochastically."""
    rows, *momentum = stored
    by_row, of_w, of_v = noise
    w = rows.to(change.move.dtype)
    v = momentum[0].to(change.move.dtype) if momentum else None
    new = velocity(w, v, change)
    for table in momentum:
        table.copy_(round_stochastically(new, by_row, of_v))
    moved = round_stochastically(w - new * change.lr, by_row, of_w)
    rows.copy_(moved)
    return inverse_norms(moved.to(change.move.dtype))


def _descend_into(
    index: Tensor,
    tables: tuple[Tensor, ...],
    missed: Tensor,
    w: Tensor,
    noise: tuple[tuple[Tensor, Tensor], ...] | None,
    change: Change,
) -> None:
    """:func:`_descend` of drawn rows: the momentum, where there is one, is read from its table and brought up to date,
    the result is written to the tables at ``index``, with ``noise`` for each rounded stochastically to bfloat16.
    """
    v = _up_to_date(tables[1][index].to(w.dtype), missed, w) if len(tables) > 1 else None
    new = velocity(w, v, change)
    for number, value in ((1, new), (0, w - new * change.lr)):
        if number < len(tables):
            tables[number][index] = value if noise is None else round_stochastically(value, *noise[number])


def _copy_rows(index: Tensor, rows: Tensor, momentum: Tensor | None, missed: Tensor, out: Tensor) -> None:
    """w' = a·w + b·v at ``index``; ``missed`` (n, 4) is the 2 × 2 product [[a, b], [c, d]] of each row's missed
    steps; without momentum b is 0.
    """
    w = missed[:, 0:1] * rows[index].to(out.dtype)
    out.copy_(w if momentum is None else w + missed[:, 1:2] * momentum[index].to(out.dtype))


def _copy_momentum(index: Tensor, momentum: Tensor, missed: Tensor, w: Tensor, out: Tensor) -> None:
    """v' = c·w + d·v at ``index``, with w = (w' − b·v) / a taken from the w' that was copied before."""
    out.copy_(_up_to_date(momentum[index].to(out.dtype), missed, w))


def _up_to_date(v: Tensor, missed: Tensor, w: Tensor) -> Tensor:
    a, b, c, d = missed[:, 0:1], missed[:, 1:2], missed[:, 2:3], missed[:, 3:4]
    return c / a * w + (d - b * c / a) * v


def round_stochastically(value: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """A value (n, D) in bfloat16, either neighbour; see :func:`element_noise`."""
    noise = element_noise(by_row, by_column, 16)
    return ((value.view(torch.int32) + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)


def element_noise(by_row: Tensor, by_column: Tensor, bits: int) -> Tensor:
    """int32 in [0, 2^bits) for each element, of :meth:`RowOptimizer.noise`: the upper bits of Knuth's multiplicative
    hash.
    """
    return (((by_row ^ by_column) * -1640531535) >> (32 - bits)) & ((1 << bits) - 1)
