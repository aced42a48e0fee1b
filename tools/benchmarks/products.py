"""How fast this device multiplies large matrices, as the head does; and a step by torch's own fused cross entropy.

The products are square, of 8,192 on CUDA: the most that a step of the head can reach. The step with
torch.nn.functional.linear_cross_entropy (torch 2.13 has it, 2.11 does not) is forward, backward and SGD with momentum
for bfloat16 rows, all classes, cosines times 64 without a margin.

  lce bench products
  lce bench products --device cuda --json products.json
  lce bench products --linear-cross-entropy --classes 20000 --batch 64
"""

import argparse
from typing import Any

from tools.arguments import whole_number

HELP = "the quickest matrix products of this device, and torch's linear_cross_entropy"
KINDS = ("bfloat16", "tf32", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench products``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=whole_number(1), help="of the square matrices (CUDA: 8192, CPU: 1024)")
    parser.add_argument("--linear-cross-entropy", action="store_true", help="torch's own step instead of products")
    parser.add_argument("--classes", type=whole_number(1), default=100_000, help="of that step (100000)")
    parser.add_argument("--batch", type=whole_number(1), default=128, help="of that step (128)")
    parser.add_argument("--dim", type=whole_number(1), default=512, help="of that step (512)")
    parser.add_argument("--steps", type=whole_number(1), default=15, help="measured (15)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON (- for standard output)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status.

    Raises:
        ConfigError: no usable GPU, or a torch without the function.
    """
    import torch

    from tools.measuring import origin, write_json
    from trainer.errors import ConfigError

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` cuda: torch sees no usable GPU")
    if args.linear_cross_entropy and not has_linear_cross_entropy():
        raise ConfigError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy; 2.13 has it")
    figures = _linear_cross_entropy(args) if args.linear_cross_entropy else _products(args)
    write_json({"bench": "products", "device": args.device, **origin(), **figures}, args.json)
    if args.json != "-":
        for name, value in figures.items():
            print(f"{name:24} {value}")
    return 0


def has_linear_cross_entropy() -> bool:
    """Whether this torch has the function."""
    import torch

    return hasattr(torch.nn.functional, "linear_cross_entropy")


def _products(args: argparse.Namespace) -> dict[str, Any]:
    """``flops_per_second`` by what the products take."""
    import torch

    from tools.measuring import median_seconds
    from trainer.head.products import matmul_precision, product

    size = args.size or (8192 if args.device == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=args.device) for _ in range(2))
    rates = {}
    for kind in KINDS:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        left, right = a.to(dtype), b.to(dtype)
        with matmul_precision(kind == "tf32"):
            seconds = median_seconds(lambda left=left, right=right: product(left, right), args.device, args.steps)  # type: ignore[misc]
        rates[kind] = 2 * size**3 / seconds
    return {"size": size, "flops_per_second": rates}


def _linear_cross_entropy(args: argparse.Namespace) -> dict[str, Any]:
    """``seconds`` of a step and ``peak_bytes``."""
    import torch
    import torch.nn.functional as F

    from tools.measuring import median_seconds
    from trainer.distributed import peak_memory_bytes

    device = torch.device(args.device)
    rows = torch.randn(args.classes, args.dim, device=device, dtype=torch.bfloat16).mul_(0.01).requires_grad_()
    x = torch.randn(args.batch, args.dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, args.classes, (args.batch,), device=device)
    optimizer = torch.optim.SGD([rows], 0.1, momentum=0.9, weight_decay=5e-4)
    options = torch.nn.LinearCrossEntropyOptions() if hasattr(torch.nn, "LinearCrossEntropyOptions") else None
    more: dict[str, Any] = {} if options is None else {"options": options}

    def step() -> None:
        F.linear_cross_entropy(64 * F.normalize(x), F.normalize(rows), labels, **more).backward()
        optimizer.step()
        optimizer.zero_grad()

    sizes = {name: getattr(args, name) for name in ("classes", "batch", "dim")}
    return sizes | {
        "rows": "bfloat16",
        "seconds": median_seconds(step, args.device, args.steps),
        "peak_bytes": peak_memory_bytes(device),
    }
