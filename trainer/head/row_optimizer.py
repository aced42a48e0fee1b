"""The rows of one rank, their optimizer state, and what an update does to the rows of a step.

Only the rows drawn in a step are read, differentiated and written. What that means for the others:

* **SGD** (momentum μ, decay λ, learning rate η): *as if every row had been updated in every step*, a row that was
  not drawn with a zero gradient. Such a step is linear and the same for all rows, ``(w, v) ← [[1 − ηλ, −ημ], [λ,
  μ]] (w, v)``, so a row remembers the number of the update that touched it last, and when it is drawn again the
  product of the steps it missed, four numbers from a table, brings it up to date. Training is numerically that of a
  dense gradient with ``torch.optim.SGD``, at the cost of the drawn rows. Every ``HORIZON`` updates, and before a
  checkpoint, all rows are brought up to date in one sweep.
* **AdamW**: *a row's clock runs only while it is drawn*. Moments, decay and bias correction (by the row's own
  number of draws) stand still otherwise; torch's rule for a zero gradient is not linear, and decaying second
  moments of undrawn rows would make their next step huge.

Rows and state may be stored in bfloat16: arithmetic is float32, and results are rounded stochastically (each of the
two neighbours with the probability that makes the mean exact), so updates smaller than a bfloat16 step do not
vanish in the mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import RowOptimizerConfig
from trainer.errors import ConfigError

HORIZON = 1024
"""After so many updates all rows are brought up to date, so that no row can miss more steps than the table holds."""


@dataclass(frozen=True)
class RowGradient:
    """The gradient of n rows w in factored form: ``q @ x + radial[:, None] · w + pull_scale[:, None] · pull``.

    ``q`` (n, B) and ``x`` (B, D) are what the softmax leaves behind (None: no such part), ``radial`` (n,) is its
    projection; ``pull`` (n, D) with ``pull_scale`` (n,) are vectors that attract the rows, such as old class
    centres (None: none).
    """

    q: Tensor | None
    x: Tensor | None
    radial: Tensor
    pull: Tensor | None = None
    pull_scale: Tensor | None = None

    def add_to(self, out: Tensor, w: Tensor, decay: Tensor | float) -> None:
        """Add everything but ``q @ x``, and ``decay`` · w, to ``out`` (n, D)."""
        out.addcmul_(w, (self.radial + decay)[:, None])
        if self.pull is not None and self.pull_scale is not None:
            out.addcmul_(self.pull.to(out.dtype), self.pull_scale[:, None])

    def product(self, like: Tensor) -> Tensor:
        """``q @ x`` in the dtype of ``like`` (n, D)."""
        if self.q is None or self.x is None:
            return torch.zeros_like(like)
        return torch.mm(self.q, self.x).to(like.dtype)

    def dense(self, w: Tensor) -> Tensor:
        """The gradient itself (n, D) at the rows ``w``."""
        out = self.product(w)
        self.add_to(out, w, 0.0)
        return out


class Selection:
    """The rows of one step with their state, as float32 (or float64) blocks.

    Without an index (all rows) blocks are views of the table where the dtypes agree; with one they are slices of a
    gathered copy.
    """

    def __init__(self, owner: "RowOptimizer", index: Tensor | None) -> None:
        self.owner, self.index = owner, index
        self.count = owner.rows.shape[0] if index is None else len(index)
        self._kept = None if index is None else owner.gather(index)

    def load(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Rows and state [start, stop) of the selection, (n, D) each, to be changed in place and given to
        :meth:`store`.
        """
        if self._kept is not None:
            return tuple(t[start:stop] for t in self._kept)
        return tuple(t[start:stop].to(self.owner.work) for t in self.owner.tables)

    def weights(self, start: int, stop: int) -> Tensor:
        """The rows alone."""
        table = self.owner.rows if self._kept is None else self._kept[0]
        return table[start:stop].to(self.owner.work)

    def take(self, places: Tensor) -> Tensor:
        """Copies of the rows at some places of the selection, (P, D)."""
        table = self.owner.rows if self._kept is None else self._kept[0]
        return table.index_select(0, places).to(self.owner.work)

    def store(self, start: int, stop: int, blocks: tuple[Tensor, ...]) -> None:
        """Write changed blocks back."""
        for table, block in zip(self.owner.tables, blocks, strict=True):
            value = block if table.dtype == block.dtype else self.owner.round(block, table.dtype)
            if self.index is not None:
                table.index_copy_(0, self.index[start:stop], value)
            elif value.data_ptr() != table[start:stop].data_ptr():
                table[start:stop] = value


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
        self.work = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.tables = (rows, *(torch.zeros_like(rows) for _ in self.state_names))
        self._noise = torch.Generator(rows.device).manual_seed(seed)
        self.fuse: Callable[[Callable[..., None]], Callable[..., None]] = lambda function: function

    def set_lr(self, lr: float) -> None:
        """The learning rate of the coming updates (the configuration's ``lr_factor`` is applied here)."""
        self.lr = lr * self.config.lr_factor

    def select(self, index: Tensor | None) -> Selection:
        """The rows ``index`` (None: all), brought up to date."""
        return Selection(self, index)

    def gather(self, index: Tensor) -> tuple[Tensor, ...]:
        """Copies of rows and state at ``index`` in working precision, brought up to date."""
        return tuple(t.index_select(0, index).to(self.work) for t in self.tables)

    def round(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Round stochastically to bfloat16: E[result] = value."""
        if dtype != torch.bfloat16:
            return value.to(dtype)
        n, d = value.shape
        limits = (-(2**31), 2**31)
        by_row = torch.randint(*limits, (n, 1), generator=self._noise, device=value.device, dtype=torch.int32)
        by_column = torch.randint(*limits, (1, d), generator=self._noise, device=value.device, dtype=torch.int32)
        noise = (((by_row ^ by_column) * -1640531535) >> 16) & 0xFFFF  # Knuth's multiplicative hash, its upper half
        return ((value.view(torch.int32) + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)

    def reseed(self, seed: int) -> None:
        """Seed the rounding of a step, so that a resumed run rounds alike."""
        self._noise.manual_seed(seed)

    @abstractmethod
    def update(self, blocks: tuple[Tensor, ...], gradient: RowGradient, gate: Tensor | None) -> None:
        """Change rows and state (n, D) in place.

        Args:
            blocks: rows, then the state in the order of ``state_names``.
            gradient: the rows' gradient, averaged over the batch.
            gate: a 0-dim float tensor on the device, 1 to update and 0 to leave everything as it is (None: update).
        """

    @abstractmethod
    def finish(self, index: Tensor | None, gate: Tensor | None) -> None:
        """The step is complete: its rows ``index`` (None: all) were updated if ``gate`` says so."""

    def flush(self) -> None:
        """Bring every row up to date; nothing to do where rows that were not drawn stand still."""
        return

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep beside the tables, by name: (R,) tensors."""
        return {}


class SgdRows(RowOptimizer):
    """SGD with momentum and weight decay, as if all rows were updated in every step (see the module's text)."""

    state_names = ("momentum",)

    def __init__(self, config: RowOptimizerConfig, rows: Tensor, sampled: bool, seed: int) -> None:
        super().__init__(config, rows, sampled, seed)
        if not sampled:
            return
        self._last = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        self._now = torch.zeros((), dtype=torch.int32, device=rows.device)
        self._since_flush = 0
        # _missed[k] is the product of the last k steps, (HORIZON + 1, 2, 2); it is exact, so it is kept in float64.
        self._missed = torch.eye(2, dtype=torch.float64, device=rows.device).repeat(HORIZON + 1, 1, 1)

    def gather(self, index: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`RowOptimizer.gather`."""
        w, v = super().gather(index)
        age = self._now - self._last.index_select(0, index)
        a, b, c, d = self._missed.view(-1, 4).index_select(0, age).to(self.work).t()[:, :, None].contiguous().unbind()
        self.fuse(_catch_up)(w, v, a, b, c, d)
        return w, v

    def update(self, blocks: tuple[Tensor, ...], gradient: RowGradient, gate: Tensor | None) -> None:
        """See :meth:`RowOptimizer.update`."""
        w, v = blocks
        mu, decay = self.config.momentum, self.config.weight_decay
        step = torch.as_tensor(self.lr, dtype=w.dtype, device=w.device)
        if gate is not None:
            gate = gate.to(w.dtype)
            step = step * gate
            v.mul_(1 + gate * (mu - 1)).add_(gradient.product(w))
        elif gradient.q is not None and gradient.x is not None and gradient.q.dtype == v.dtype:
            v.addmm_(gradient.q, gradient.x, beta=mu)  # one product that also applies μ: no further pass over v
        else:
            v.mul_(mu).add_(gradient.product(w))
        beta = (gradient.radial + (decay if gate is None else decay * gate))[:, None]
        if gradient.pull is None or gradient.pull_scale is None:
            self.fuse(_descend)(w, v, beta, step)
        else:
            self.fuse(_descend_pulled)(w, v, beta, step, gradient.pull, gradient.pull_scale[:, None])

    def finish(self, index: Tensor | None, gate: Tensor | None) -> None:
        """See :meth:`RowOptimizer.finish`."""
        if not self.sampled:
            return
        mu, decay, lr = self.config.momentum, self.config.weight_decay, self.lr
        step = torch.tensor([[1 - lr * decay, -lr * mu], [decay, mu]], dtype=torch.float64, device=self.rows.device)
        longer = step @ self._missed[:-1]
        if gate is None:
            self._missed[1:] = longer
            self._now += 1
        else:
            self._missed[1:] = torch.where(gate > 0, longer, self._missed[1:])
            self._now += (gate > 0).to(self._now)
        # A gated step wrote rows that were brought up to date to `now`, which did not move; an update moved both by
        # one.
        if index is None:
            self._last.copy_(self._now.expand_as(self._last))
        else:
            self._last[index] = self._now.expand(len(index))
        self._since_flush += 1
        if self._since_flush >= HORIZON:
            self.flush()

    def flush(self) -> None:
        """See :meth:`RowOptimizer.flush`."""
        if not self.sampled:
            return
        for start in range(0, len(self.rows), 65536):
            index = torch.arange(start, min(start + 65536, len(self.rows)), device=self.rows.device)
            selection = self.select(index)
            selection.store(0, len(index), selection.load(0, len(index)))
        self._last.copy_(self._now.expand_as(self._last))
        self._since_flush = 0


class AdamWRows(RowOptimizer):
    """AdamW (Loshchilov & Hutter, ICLR 2019, alg. 2), on a clock per row that runs while the row is drawn."""

    state_names = ("first_moment", "second_moment")

    def __init__(self, config: RowOptimizerConfig, rows: Tensor, sampled: bool, seed: int) -> None:
        super().__init__(config, rows, sampled, seed)
        self._draws = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        self._counts: Tensor = self._draws

    def select(self, index: Tensor | None) -> Selection:
        """See :meth:`RowOptimizer.select`."""
        self._counts = self._draws if index is None else self._draws.index_select(0, index)
        self._offset = 0
        return super().select(index)

    def update(self, blocks: tuple[Tensor, ...], gradient: RowGradient, gate: Tensor | None) -> None:
        """See :meth:`RowOptimizer.update`; blocks must come in order."""
        w, first, second = blocks
        c = self.config
        count = self._counts[self._offset : self._offset + len(w), None].to(w.dtype) + 1
        self._offset += len(w)
        on = torch.ones((), dtype=w.dtype, device=w.device) if gate is None else gate.to(w.dtype)
        g = gradient.dense(w)
        first.add_((g - first) * ((1 - c.beta1) * on))
        second.add_((g.square() - second) * ((1 - c.beta2) * on))
        root = (second / (1 - c.beta2**count)).sqrt_().add_(c.eps)
        w.mul_(1 - self.lr * c.weight_decay * on)
        w.sub_(first / root * (self.lr * on / (1 - c.beta1**count)))

    def finish(self, index: Tensor | None, gate: Tensor | None) -> None:
        """See :meth:`RowOptimizer.finish`."""
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
    kind = SgdRows if config.name == "sgd" else AdamWRows
    return kind(config, rows, sampled, seed)


def _descend(w: Tensor, v: Tensor, beta: Tensor, lr: Tensor) -> None:
    v.addcmul_(w, beta)
    w.sub_(v * lr)


def _descend_pulled(w: Tensor, v: Tensor, beta: Tensor, lr: Tensor, pull: Tensor, pull_scale: Tensor) -> None:
    v.addcmul_(w, beta).addcmul_(pull.to(v.dtype), pull_scale)
    w.sub_(v * lr)


def _catch_up(w: Tensor, v: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    old = w.clone()
    w.mul_(a).addcmul_(v, b)
    v.mul_(d).addcmul_(old, c)
