"""Time gradients and Hessian-vector products, side by side with other libraries where they are installed.

    python -m benchmarks.products [--threads 2] [--rounds 9] [--rows 1000] [--width 784] [--depth 6]

On a ReLU network of `depth` layers, all rows in one micro-batch. The rows of the table run in turn, round by round,
so that a busy moment hits all of them; ms are medians over the rounds, and a ratio is the median over the rounds of the
time divided by that of one gradient by plain torch. Targets: 2.2 for a product on a retained graph, 3.2 for one whose
graph is rebuilt. Others: `pip install curvlinops-for-pytorch pyhessian`.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchflat import Objective

Way = Callable[[], object]
TARGETS = {"torchflat, product on a retained graph": 2.2, "torchflat, product on a rebuilt graph": 3.2}


def plain_gradient(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]) -> Way:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(loss(model(data[0]), data[1]), parameters)


def plain_product(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], v: Tensor) -> Way:
    """Reverse over reverse, the graph built anew: what one would write by hand."""
    parameters = list(model.parameters())
    parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]

    def product() -> object:
        gradients = torch.autograd.grad(loss(model(data[0]), data[1]), parameters, create_graph=True)
        return torch.autograd.grad(gradients, parameters, grad_outputs=parts)

    return product


def ours(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], v: Tensor) -> dict[str, Way]:
    rows = len(data[0])
    retained = Objective(model, loss, data, microbatch=rows, memory="16GiB")
    rebuilt = Objective(model, loss, data, microbatch=rows, memory="0B")
    x, several = retained.x, v[:, None].expand(-1, 4)
    for f, path in ((retained, "retained"), (rebuilt, "rebuilt")):
        f.hvp(v)
        assert f.provenance()["products"] == path
    return {
        "torchflat, gradient": lambda: retained.at(x).gradient(),
        "torchflat, product on a retained graph": lambda: retained.hvp(v),
        "torchflat, product on a rebuilt graph": lambda: rebuilt.hvp(v),
        "torchflat, 4 products at once, retained": lambda: retained.hvp(several),
    }


def curvlinops_product(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], v: Tensor) -> Way:
    from curvlinops import HessianLinearOperator

    parameters = {name: p for name, p in model.named_parameters()}
    try:
        operator = HessianLinearOperator(model, loss, parameters, [data], check_deterministic=False)
    except (TypeError, ValueError, AttributeError):
        operator = HessianLinearOperator(model, loss, list(parameters.values()), [data], check_deterministic=False)
    return lambda: operator @ v


def pyhessian_product(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], v: Tensor) -> Way:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    computer = hessian(model, loss, data=data, cuda=False)
    parts = [
        part.view_as(p) for part, p in zip(v.split([p.numel() for p in computer.params]), computer.params, strict=True)
    ]
    # On one batch it retains the graph, as we do.
    return lambda: hessian_vector_product(computer.gradsH, computer.params, parts)


def ways(options: argparse.Namespace) -> dict[str, Way]:
    torch.manual_seed(0)
    layers = [each for _ in range(options.depth) for each in (nn.Linear(options.width, options.width), nn.ReLU())]
    model, loss = nn.Sequential(*layers[:-1]).eval(), nn.MSELoss()
    data = torch.randn(options.rows, options.width), torch.randn(options.rows, options.width)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    table = {
        "torch, gradient": plain_gradient(model, loss, data),
        "torch, product by hand, rebuilt": plain_product(model, loss, data, v),
        **ours(model, loss, data, v),
    }
    peers = {"curvlinops": curvlinops_product, "pyhessian": pyhessian_product}
    for name, make in peers.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: left out")
            continue
        table[f"{name}, product"] = make(model, loss, data, v)
    return table


def milliseconds(way: Way) -> float:
    start = time.perf_counter()
    way()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 2), ("rounds", 9), ("rows", 1000), ("width", 784), ("depth", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds, {options.rows} rows")
    table = ways(options)
    for way in table.values():
        way()
    rounds = [{name: milliseconds(way) for name, way in table.items()} for _ in range(options.rounds)]
    print("\n| what | ms | in gradients | target |\n|---|--:|--:|--:|")
    for name in table:
        ratio = statistics.median(each[name] / each["torch, gradient"] for each in rounds)
        target = TARGETS.get(name, "")
        print(f"| {name} | {statistics.median(each[name] for each in rounds):.1f} | {ratio:.2f} | {target} |")


if __name__ == "__main__":
    main()
