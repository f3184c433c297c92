"""``python -m benchmarks``: every benchmark in turn; the long comparison with other libraries in its quick form."""

import runpy
import sys

for name, *arguments in (("products",), ("microbatch",), ("kernels",), ("calibration",), ("sharpness", "--quick")):
    print(f"\n== {name}", flush=True)
    sys.argv[1:] = arguments
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
