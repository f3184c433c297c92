"""Ways to the largest eigenvalue of a Hessian over data: torchflat and three other libraries, behind one face.

Every way has two functions. ``product`` makes a Hessian-vector product as the library does it, to find the fastest
batch size and to warm up. ``solve`` goes from the model and the data to the value, everything included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.networks import Problem
from torchflat import Objective, sharpness

__all__ = ["METHODS", "PEERS", "Method"]

Setting = Mapping[str, Any]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """``distribution`` is its name among packages, ``modules`` are what it needs, ``ladder`` its settings, loose first.

    ``whole`` methods gain by taking all rows as one batch: they keep that batch's graph.
    """

    distribution: str
    modules: tuple[str, ...]
    product: Callable[[Problem, Setting], Callable[[], object]]
    solve: Callable[[Problem, Setting], Record]
    ladder: Callable[[Setting], Sequence[Setting]] = lambda searched: ()
    whole: bool = False

    def load(self) -> None:
        """Import what it needs."""
        for module in self.modules:
            importlib.import_module(module)

    def installed(self) -> bool:
        """Whether what it needs is there."""
        return all(importlib.util.find_spec(module.split(".")[0]) is not None for module in self.modules)


# torchflat ------------------------------------------------------------------------------------------------------------


def objective(problem: Problem, setting: Setting) -> Objective:
    """Return f, with 12 GiB unless the setting has another budget."""
    memory, microbatch = setting.get("memory", "12GiB"), setting.get("microbatch")
    data = (problem.inputs, problem.targets)
    return Objective(problem.model, problem.loss, data, memory=memory, microbatch=microbatch)


def torchflat_product(problem: Problem, setting: Setting) -> Callable[[], object]:
    f = objective(problem, setting)
    v = torch.ones(f.n)  # the same on every process
    return lambda: f.hvp(v)


def torchflat_solve(problem: Problem, setting: Setting) -> Record:
    """Call :func:`torchflat.sharpness`; ``trace`` has seconds, value, lower and upper after each look at the run."""
    trace: list[tuple[float | None, ...]] = []
    start = time.perf_counter()

    def look(known: Any) -> None:
        bounds = (bound if math.isfinite(bound) else None for bound in (known.lower, known.upper))
        trace.append((time.perf_counter() - start, known.value, *bounds))

    arguments = {name: setting[name] for name in ("rtol", "method") if name in setting}
    f = objective(problem, setting)
    answer = sharpness(f, callback=look, **arguments)
    look(answer)
    return {
        "value": answer.value,
        "lower": trace[-1][2],
        "upper": trace[-1][3],
        "status": answer.status.name,
        "basis": answer.basis,
        "products": answer.cost.products,
        "cost": answer.cost.to_dict(),
        "trace": trace,
        "provenance": f.provenance(),
    }


# PyHessian ------------------------------------------------------------------------------------------------------------


def pyhessian_computer(problem: Problem, batch: int) -> Any:
    """Hand over the data as one batch, whose graph PyHessian keeps, if ``batch`` is that large."""
    from pyhessian import hessian

    if batch >= problem.rows:
        return hessian(problem.model, problem.loss, data=(problem.inputs, problem.targets), cuda=False)
    return hessian(problem.model, problem.loss, dataloader=problem.batches(batch), cuda=False)


def pyhessian_product(problem: Problem, setting: Setting) -> Callable[[], object]:
    from pyhessian.utils import hessian_vector_product

    computer = pyhessian_computer(problem, setting["batch"])
    v = [torch.randn_like(parameter) for parameter in computer.params]
    if computer.full_dataset:
        return lambda: computer.dataloader_hv_product(v)
    return lambda: hessian_vector_product(computer.gradsH, computer.params, v)


def pyhessian_solve(problem: Problem, setting: Setting) -> Record:
    """Power iteration until two values differ by less than ``tol``; the default limit of 100 steps is lifted."""
    module = importlib.import_module("pyhessian.hessian")
    torch.manual_seed(0)
    computer = pyhessian_computer(problem, setting["batch"])
    products = Counted(computer.dataloader_hv_product)
    computer.dataloader_hv_product = products
    if not computer.full_dataset:
        products.call = module.hessian_vector_product
        module.hessian_vector_product = products  # type: ignore[attr-defined]
    values, _ = computer.eigenvalues(maxIter=100_000, tol=setting["tol"], top_n=1)
    return {"value": values[0], "products": products.count}


# hessian-eigenthings --------------------------------------------------------------------------------------------------


def eigenthings_operator(problem: Problem, batch: int) -> Any:
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings.loss_fns import supervised_loss

    # It takes the plain mean over batches, which is right only if all have the same number of rows.
    assert problem.rows % batch == 0, f"{batch} does not divide {problem.rows} rows"
    return HessianOperator(problem.model, problem.batches(batch), supervised_loss(problem.loss))


def eigenthings_product(problem: Problem, setting: Setting) -> Callable[[], object]:
    operator = eigenthings_operator(problem, setting["batch"])
    v = torch.randn(operator.size)
    return lambda: operator.matvec(v)


def eigenthings_solve(problem: Problem, setting: Setting) -> Record:
    """``max_iter`` steps of its Lanczos; with ``search``, record what fewer steps of the same run would have given."""
    from hessian_eigenthings.algorithms.lanczos import lanczos, lanczos_tridiagonal

    operator = eigenthings_operator(problem, setting["batch"])
    if "search" in setting:
        start = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
        run = lanczos_tridiagonal(operator, start, setting["search"])
        off = torch.diag(run.betas, 1)
        matrix = (torch.diag(run.alphas) + off + off.T).double()
        values = [float(torch.linalg.eigvalsh(matrix[:k, :k])[-1]) for k in range(1, len(matrix) + 1)]
        return {"value": values[-1], "products": run.iterations, "values": values}
    answer = lanczos(operator, k=1, max_iter=setting["max_iter"], which="LA", seed=0, reorthogonalize=True)
    return {"value": float(answer.eigenvalues[0]), "products": answer.iterations}


# curvlinops and scipy's eigsh -----------------------------------------------------------------------------------------


def curvlinops_operator(problem: Problem, batch: int) -> Any:
    """Return its operator, without its check of determinism, which takes two gradients and two products."""
    from curvlinops import HessianLinearOperator

    parameters, data = list(problem.model.parameters()), problem.batches(batch)
    return HessianLinearOperator(
        problem.model, problem.loss, parameters, data, check_deterministic=False, num_data=problem.rows
    )


def curvlinops_product(problem: Problem, setting: Setting) -> Callable[[], object]:
    operator = curvlinops_operator(problem, setting["batch"])
    v = torch.randn(operator.shape[1])
    return lambda: operator @ v


def curvlinops_solve(problem: Problem, setting: Setting) -> Record:
    import numpy
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = curvlinops_operator(problem, setting["batch"]).to_scipy()
    products = Counted(operator.matvec)
    counted = LinearOperator(operator.shape, matvec=products, dtype=operator.dtype)
    start = numpy.random.default_rng(0).standard_normal(operator.shape[0])
    value = eigsh(counted, k=1, which="LA", tol=setting["tol"], v0=start, return_eigenvectors=False)
    return {"value": float(value[0]), "products": products.count}


@dataclasses.dataclass
class Counted:
    """A function that counts its calls."""

    call: Callable[..., Any]
    count: int = 0

    def __call__(self, *arguments: Any) -> Any:
        """Count, and pass on."""
        self.count += 1
        return self.call(*arguments)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keep to attention that has the derivatives that the peers need; torchflat finds that out by itself."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def plainly(way: Callable[[Problem, Setting], Any]) -> Callable[[Problem, Setting], Any]:
    """Wrap a way so that its products keep to :func:`plain_attention`."""

    def wrapped(problem: Problem, setting: Setting) -> Any:
        with plain_attention():
            made = way(problem, setting)
        return plain_attention()(made) if callable(made) else made

    return wrapped


def tolerances(*values: float) -> Callable[[Setting], Sequence[Setting]]:
    return lambda searched: [{"tol": value} for value in values]


def more_steps(searched: Setting) -> Sequence[Setting]:
    return [{"max_iter": searched["max_iter"] + more} for more in range(8)]


PEERS = {
    "pyhessian": Method(
        "pyhessian",
        ("pyhessian",),
        plainly(pyhessian_product),
        plainly(pyhessian_solve),
        tolerances(1e-3, 1e-4, 1e-5, 1e-6, 1e-7),
        whole=True,
    ),
    "hessian-eigenthings": Method(
        "hessian-eigenthings",
        ("hessian_eigenthings",),
        plainly(eigenthings_product),
        plainly(eigenthings_solve),
        more_steps,
    ),
    "curvlinops": Method(
        "curvlinops-for-pytorch",
        ("curvlinops", "scipy.sparse.linalg"),
        plainly(curvlinops_product),
        plainly(curvlinops_solve),
        tolerances(1e-3, 1e-4, 1e-5),
    ),
}
METHODS = {"torchflat": Method("torchflat", ("torchflat",), torchflat_product, torchflat_solve), **PEERS}
