"""λ₁★ from several points of one orbit: how far apart the answers are, and what they take.

    python -m benchmarks.orbit [--network NAME ...] [--rows 10000] [--starts 5] [--curvature hessian gauss_newton]

The networks of ``benchmarks.sharpness`` that have laws of rescaling, and the small classifier that ships with torchflat
(``digits``) on MNIST's test images. Start 0 is the trained network; the others are the same function, all channels
rescaled by random factors between 1/e and e. Every run is kept, and not done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import torchflat
from benchmarks.networks import NETWORKS
from torchflat import Objective
from torchflat.audit.task import load_task
from torchflat.data.mnist import mnist
from torchflat.symmetry import Group, Laws, flattest, laws

RESULTS = Path(__file__).parent / "results" / "orbit.json"
CACHE = Path(__file__).parent / ".cache"
TOLD = ("network", "curvature", "start", "value", "lower", "products")


def loaded(name: str, rows: int) -> tuple[Objective, Laws]:
    """Return the objective at the trained network, and its laws."""
    if name == "digits":
        images, labels = mnist("test", rows=rows)
        model = load_task("digits").make_model()
        weights = Path(torchflat.__file__).parent / "data" / "sample" / "classifier.safetensors"
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
        data, loss = (images.reshape(-1, 1, 28, 28), labels), torch.nn.functional.cross_entropy
    else:
        problem = NETWORKS[name].load(rows, CACHE)
        model, data, loss = problem.model, (problem.inputs, problem.targets), problem.loss
    return Objective(model, loss, data, memory="4GiB"), laws(model, data[0][:1])


def runs(name: str, rows: int, curvature: str, starts: int, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Find λ₁★ from each start that was not done before."""
    left = [start for start in range(starts) if (name, rows, curvature, start) not in done]
    if not left:
        return
    f, found = loaded(name, rows)
    group = Group(found.couplings, f.layout, f.buffers)
    for start in left:
        source = torch.Generator().manual_seed(start)
        z = (2 * torch.rand(group.size, generator=source, dtype=torch.float64) - 1) * (start > 0)
        began = time.perf_counter()
        answer = flattest(f.at(group.move(f.x, z)), found, curvature, seed=start)
        yield {
            "network": name,
            "parameters": f.n,
            "rows": rows,
            "curvature": curvature,
            "start": start,
            "before": answer.before.value,
            "value": answer.value,
            "upper": answer.recomputed.upper,
            "lower": answer.lower,
            "status": answer.status.name,
            "proof": answer.proof,
            "negative": answer.negative,
            "products": answer.cost.products,
            "gradients": answer.cost.gradients,
            "seconds": time.perf_counter() - began,
            "torch": torch.__version__,
            "processor": platform.machine(),
        }


def summary(table: list[dict[str, Any]]) -> str:
    """Tell, by network and curvature, how far the starts are apart, and the largest gap and cost."""
    heads = f"{'starts':>6} {'λ₁★':>9} {'apart':>7} {'gap':>7} {'products':>8}"
    lines = [f"{'network':18} {'rows':>6} {'curvature':14} {heads}"]
    for key in dict.fromkeys((row["network"], row["rows"], row["curvature"]) for row in table):
        rows = [row for row in table if (row["network"], row["rows"], row["curvature"]) == key]
        values = [row["value"] for row in rows]
        gaps = [(row["upper"] - row["lower"]) / row["value"] for row in rows if row["lower"] is not None]
        gap = f"{max(gaps):7.2%}" if len(gaps) == len(rows) else "none".rjust(7)
        most = max(row["products"] for row in rows)
        lines.append(
            f"{key[0]:18} {key[1]:6} {key[2]:14} {len(rows):6} {min(values):9.5f} "
            f"{max(values) / min(values) - 1:7.2%} {gap} {most:8.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["digits", "denoiser_adam"])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--curvature", nargs="+", default=["hessian", "gauss_newton"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    table = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(row["network"], row["rows"], row["curvature"], row["start"]) for row in table}
    for name in options.network:
        for curvature in options.curvature:
            for row in runs(name, options.rows, curvature, options.starts, done):
                table.append(row)
                options.out.write_text(json.dumps(table, indent=1) + "\n")
                print({key: row[key] for key in TOLD}, flush=True)
    print(summary(table))


if __name__ == "__main__":
    main()
