"""``python -m benchmarks``: every benchmark in turn."""

import runpy

for name in ("products", "microbatch", "kernels", "calibration"):
    print(f"\n== {name}", flush=True)
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
