"""``python -m benchmarks``: every benchmark in turn; the long comparison with other libraries in its quick form."""

import runpy
import sys

ALL = (
    "products",
    "microbatch",
    "kernels",
    "optimizer_step",
    "calibration",
    "pairs",
    "flatness",
    "tracking",
    "sharpness --quick",
    "optimizers --quick",
)
for name, *arguments in map(str.split, ALL):
    print(f"\n== {name}", flush=True)
    sys.argv[1:] = arguments
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
