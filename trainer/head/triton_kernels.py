"""The two passes over the rows as Triton kernels: logits stay in registers.

Both walk tiles of (rows × samples), each multiplied over D in blocks. What they compute is :mod:`trainer.head.fused`'s;
here is how:

* ``first`` reads a row where it lies (drawn rows through their index, brought up to date on the way), so that norms,
  exp sums and LCE's cosine with the old centre come from one walk. A program keeps one block of samples and takes every
  ``parts``-th block of rows; it writes its sums once. No atomics: a run repeats itself to the last bit.
* ``second`` multiplies once more and writes Q, once, in the products' dtype, with the row's radial sum. The targets'
  entries are put in here: a sample has one row at most, which a comparison finds.

Importing this module needs the package triton. ``TRITON_INTERPRET=1``, set before, runs the kernels in NumPy (not with
bfloat16: there the interpreter multiplies the bits as integers).
"""

import triton
import triton.language as tl


@triton.jit
def first(
    W,  # (R, D) rows as they are stored
    V,  # (R, D) momentum; with SAMPLED and MOMENTUM
    INDEX,  # (n,) int64 places in the tables; with SAMPLED
    MISSED,  # (n, 4) float32, what each row missed; with SAMPLED
    KEPT,  # (n, D) float32, receives the rows brought up to date; with SAMPLED
    X,  # (B, D) s·x, in the products' dtype
    LOG_WEIGHT,  # (n,) float32; with CORRECTED
    ORDER,  # (B,) int32 which of the targets is a sample's; -1: its class is not here
    PLACES,  # (P,) int64 the targets' rows among the n
    CENTERS,  # (R, D) old centres; with ALIGN
    INVERSE,  # (n,) float32, receives 1/‖w‖
    COSINE,  # (n,) float32, receives the cosine with the old centre; with ALIGN
    SUMS,  # (parts, B) float32, receives Σ exp(z − shift)
    n,
    parts,
    shift,
    limit,  # with FILTER: negatives above it are left out
    D: tl.constexpr,
    BATCH: tl.constexpr,
    SAMPLED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CORRECTED: tl.constexpr,
    ALIGN: tl.constexpr,
    FILTER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first pass; a program for each block of samples and each of ``parts`` shares of the rows."""
    columns: tl.constexpr = (BATCH + BN - 1) // BN
    column = tl.program_id(0) % columns
    part = tl.program_id(0) // columns
    # Of the programs on a block of rows the first one writes what belongs to a row (as a vector: the interpreter has no
    # other masks).
    leads = (tl.zeros((BM,), dtype=tl.int32) + column) == 0
    c = column * BN + tl.arange(0, BN)
    order = tl.load(ORDER + c, mask=c < BATCH, other=-1)
    position = tl.load(PLACES + order, mask=order >= 0, other=-1)
    total = tl.zeros((BN,), dtype=tl.float32)
    for block in range(part, tl.cdiv(n, BM), parts):
        r = block * BM + tl.arange(0, BM)
        ok = r < n
        if SAMPLED:
            at = tl.load(INDEX + r, mask=ok, other=0)
            of_row = tl.load(MISSED + r * 4, mask=ok, other=0.0)
            of_momentum = tl.load(MISSED + r * 4 + 1, mask=ok, other=0.0)
        else:
            at = r.to(tl.int64)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        square = tl.zeros((BM,), dtype=tl.float32)
        dot = tl.zeros((BM,), dtype=tl.float32)
        for k0 in range(0, D, BK):
            k = k0 + tl.arange(0, BK)
            inside = ok[:, None] & (k[None, :] < D)
            w = tl.load(W + at[:, None] * D + k[None, :], mask=inside, other=0.0).to(tl.float32)
            if SAMPLED:
                w = w * of_row[:, None]
                if MOMENTUM:
                    v = tl.load(V + at[:, None] * D + k[None, :], mask=inside, other=0.0)
                    w += v.to(tl.float32) * of_momentum[:, None]
                tl.store(KEPT + r.to(tl.int64)[:, None] * D + k[None, :], w, mask=inside & leads[:, None])
            square += tl.sum(w * w, 1)
            if ALIGN:
                o = tl.load(CENTERS + at[:, None] * D + k[None, :], mask=inside & leads[:, None], other=0.0)
                dot += tl.sum(w * o.to(tl.float32), 1)
            x = tl.load(X + c[None, :] * D + k[:, None], mask=(c[None, :] < BATCH) & (k[:, None] < D), other=0.0)
            acc = tl.dot(w.to(x.dtype), x, acc, input_precision=PRECISION)
        inverse = 1.0 / tl.maximum(tl.sqrt(square), 1e-12)
        z = acc * inverse[:, None]
        shifted = z - shift
        if CORRECTED:
            shifted += tl.load(LOG_WEIGHT + r, mask=ok, other=0.0)[:, None]
        counted = ok[:, None] & (r[:, None] != position[None, :])
        if FILTER:
            counted = counted & (z <= limit)
        total += tl.sum(tl.where(counted, tl.exp(shifted), 0.0), 0)
        tl.store(INVERSE + r, inverse, mask=ok & leads)
        if ALIGN:
            tl.store(COSINE + r, dot * inverse, mask=ok & leads)
    tl.store(SUMS + part * BATCH + c, total, mask=c < BATCH)


@triton.jit
def second(
    W,  # (n, D) rows of a chunk, in the products' dtype
    X,  # (B, D) s·x, in the products' dtype
    INVERSE,  # (n,) float32
    LOG_SUM,  # (B,) float32, inf: the sample has no class
    LOG_WEIGHT,  # (n,) float32; with CORRECTED
    COEFFICIENT,  # () float32
    ORDER,  # (B,) int32, as in the first pass
    PLACES,  # (P,) int64
    PULL,  # (P,) float32 ∂L/∂(target's cosine)
    TARGET,  # (P,) float32 the target's cosine
    Q,  # (n, B), receives P/‖w‖
    RADIAL,  # (n,) float32, receives −(Σ P cos)/‖w‖²
    begin,  # the chunk's first row among those of the step
    n,
    scale,
    limit,
    D: tl.constexpr,
    BATCH: tl.constexpr,
    CORRECTED: tl.constexpr,
    FILTER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The second pass over a chunk; a program for each block of rows."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = r < n
    at = r.to(tl.int64)  # n·D and n·B may pass 2³¹
    inverse = tl.load(INVERSE + r, mask=ok, other=0.0)
    coefficient = tl.load(COEFFICIENT)
    radial = tl.zeros((BM,), dtype=tl.float32)
    for c0 in range(0, BATCH, BN):
        c = c0 + tl.arange(0, BN)
        here = c < BATCH
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, D, BK):
            k = k0 + tl.arange(0, BK)
            w = tl.load(W + at[:, None] * D + k[None, :], mask=ok[:, None] & (k[None, :] < D), other=0.0)
            x = tl.load(X + c[None, :] * D + k[:, None], mask=here[None, :] & (k[:, None] < D), other=0.0)
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        z = acc * inverse[:, None]
        log_sum = tl.load(LOG_SUM + c, mask=here, other=float("inf"))
        exponent = z - log_sum[None, :]
        if CORRECTED:
            exponent += tl.load(LOG_WEIGHT + r, mask=ok, other=0.0)[:, None]
        p = tl.exp(exponent) * coefficient
        if FILTER:
            p = tl.where(z <= limit, p, 0.0)
        order = tl.load(ORDER + c, mask=here, other=-1)
        known = order >= 0
        position = tl.load(PLACES + order, mask=known, other=-1)
        target = (begin + r)[:, None] == position[None, :]
        pull = tl.load(PULL + order, mask=known, other=0.0)
        cosine = tl.load(TARGET + order, mask=known, other=0.0)
        radial += tl.sum(tl.where(target, (pull * cosine * scale)[None, :], p * z), 1)
        p = tl.where(target, pull[None, :], p)
        q = p * inverse[:, None]
        tl.store(Q + at[:, None] * BATCH + c[None, :], q.to(Q.dtype.element_ty), mask=ok[:, None] & here[None, :])
    tl.store(RADIAL + r, -radial / scale * inverse * inverse, mask=ok)
