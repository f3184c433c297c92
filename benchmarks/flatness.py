"""The flatness profile of a trained MNIST classifier of 535 818 parameters: what it costs, and whether it is right.

    python -m benchmarks.flatness [--rows 5000] [--out FILE]

``variation`` at 8 radii is checked twice: the loss is evaluated anew at every point that it returned, and the values
are compared with the maximum of |gᵀu + ½uᵀHu| over the ball, within a Krylov space of H grown from g by a run of its
own. They agree at small radii, where cubic terms are small.
Then the network is moved along its orbit, so that it computes the same function with a larger λ₁, and compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from benchmarks.records import written
from torchflat import Objective, compare, sharpness, variation
from torchflat.data.mnist import mnist
from torchflat.problems.maximum import quadratic_maximum
from torchflat.spectrum.krylov import Krylov

STEPS = 60
EPOCHS = 6


def trained(rows: int) -> Objective:
    """Train a 784-512-256-10 classifier by SGD with momentum."""
    torch.manual_seed(0)
    images, labels = mnist(rows=rows)
    images = images.reshape(rows, -1).float()
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in trange(EPOCHS, desc="training", leave=False):
        for part in torch.randperm(rows).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    return Objective(model, nn.functional.cross_entropy, (images, labels))


def quadratic_model(f: Objective) -> tuple[Tensor, Tensor]:
    """Slopes (k,) and curvatures (k,) of the loss in a Krylov space of H that holds the gradient and both ends."""
    g = f.gradient()
    krylov = Krylov.of(f, 1, "the quadratic model of the benchmark", start=g / torch.linalg.vector_norm(g), fresh=0.0)
    for _ in range(STEPS):
        krylov.step()
    values, rotation = krylov.ritz()
    return rotation.T @ krylov.components(g), values


def moved(f: Objective, factor: float) -> Objective:
    """Multiply the first layer by a factor and divide the second by it: the same function."""
    w1, b1, w2, *rest = f.layout.split(f.x)
    return f.at(f.layout.flatten([factor * w1, factor * b1, w2 / factor, *rest]))


def normed(f: Objective) -> Objective:
    """Move to where both layers have the same norm, which is the same point from anywhere on this orbit."""
    w1, _, w2, *_ = f.layout.split(f.x)
    return moved(f, float(w2.norm() / w1.norm()) ** 0.5)


def profile(f: Objective) -> dict[str, Any]:
    found = variation(f)
    slopes, curvatures = quadratic_model(f.at(f.x))
    rows = []
    for i, radius in enumerate(found.radii):
        model = torch.stack([slopes, -slopes]), torch.stack([torch.diag(curvatures), torch.diag(-curvatures)])
        exact = float(quadratic_maximum(*model, radius).max())
        rows.append(
            {
                "radius": radius,
                "value": found.values[i],
                "floor": found.floor[i],
                "evaluated_again": abs(f.at(found.points[i]).value() - f.value()),
                "quadratic": exact,
                "over_the_quadratic": found.values[i] / exact - 1,
            }
        )
    return {"parameters": f.n, "status": found.status.name, "gradients": found.cost.gradients, "radii": rows}


def copies(f: Objective) -> list[dict[str, Any]]:
    before = sharpness(f).value
    rows = []
    for factor in (1 / 3, 1 / 2, 2.0, 3.0):
        g = moved(f, factor)
        plain, up_to = compare(f, g), compare(f, g, symmetry=normed)
        rows.append(
            {
                "factor": factor,
                "sharpness": [before, sharpness(g).value],
                "verdict": plain.verdict.name,
                "decided_by": plain.decided_by,
                "gradients": plain.cost.gradients,
                "up_to_the_symmetry": up_to.verdict.name,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "flatness.json")
    options = parser.parse_args()
    f = trained(options.rows)
    result = {
        "rows": options.rows,
        "loss": f.value(),
        "profile": profile(f),
        "copies": copies(f),
    }
    print(written(result, options.out))


if __name__ == "__main__":
    main()
