"""The CUDA sources, compiled for the CPU on an emulation of threads, barriers and shuffles, against the twins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++").split()[0]
LAUNCH = re.compile(r"([\w<>]+?)<<<(.+?), (\w+), 0, stream>>>\((.*)\);")

# What the sources ask of CUDA's host side has no meaning here. A small grid makes every block loop over several tiles.
HOST_SIDE = (
    (re.compile(r"torchflat, CUDA,"), "torchflat, CPU,"),
    (re.compile(r"kBlocks = \d+"), "kBlocks = 8"),
    (re.compile(r".*(DeviceGuard guard|STD_CUDA_KERNEL_LAUNCH_CHECK).*\n"), ""),
    (re.compile(r"TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream.*"), "(void)tensor;"),
)

CHECKS = """
import sys
import torch
from torchflat import ops
from torchflat.ops import reference

assert ops.backend("cpu") == "reference"
torch.ops.load_library(sys.argv[1])
assert ops.backend("cpu") == "native"
emulated = torch.ops.torchflat
torch.manual_seed(0)

for dtype in (torch.float64, torch.float32):
    for n, k in ((0, 3), (1, 0), (5, 2), (1025, 5), (9001, 6), (300, 129)):
        basis = torch.zeros(k, 0, dtype=dtype)
        if n:
            basis = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0].T.contiguous().to(dtype)
        one = torch.randn(n, dtype=torch.float64)
        two, scale = one.clone(), 1 + one.norm().item()
        got, expected = emulated.orthogonalize_(basis, one), reference.orthogonalize_(basis, two)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14 * scale)
        torch.testing.assert_close(one, two, rtol=0, atol=1e-14 * scale)

floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
sizes = [0, 1, 255, 257, 65537, *range(125)]
a = [torch.randn(n).to(floats[i % 4]) for i, n in enumerate(sizes)]
b = [torch.randn(n).to(floats[i // 4 % 4]) for i, n in enumerate(sizes)]
torch.testing.assert_close(emulated.dot(a, b), reference.dot(a, b), rtol=0, atol=1e-10)
ones, twos = [each.clone() for each in a], [each.clone() for each in a]
emulated.axpy_(ones, b, 0.37)
reference.axpy_(twos, b, 0.37)
for one, two in zip(ones, twos, strict=True):
    torch.testing.assert_close(one, two, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-15)

# More tensors than one launch has norms, some of many chunks.
many = [*a, torch.randn(140_000), *(torch.randn(n % 7) for n in range(1000))]
torch.testing.assert_close(emulated.norms(many), reference.norms(many), rtol=1e-14, atol=0)
beta = torch.tensor([0.9], dtype=torch.float64)
each = torch.linspace(-1, 1, len(a), dtype=torch.float64)
each[7] = 0
for name, alpha in (("axpby_", each[:1]), ("axpby_", each), ("normalized_axpby_", each[:1])):
    ones, twos = [each.clone() for each in a], [each.clone() for each in a]
    got, expected = (getattr(kernels, name)(y, b, alpha, beta) for kernels, y in ((emulated, ones), (reference, twos)))
    if name == "normalized_axpby_":
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    for one, two in zip(ones, twos, strict=True):
        torch.testing.assert_close(one, two, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-15)
b[7] = torch.full_like(b[7], torch.inf)
twos = [each.clone() for each in ones]
emulated.normalized_axpby_(ones, b, each[:1], beta)
assert all(map(torch.equal, ones, twos))
emulated.axpby_(ones, b, each, beta)
assert ones[7].isfinite().all() and not torch.equal(ones[7], twos[7])
strided, base = torch.randn(4, 6), torch.zeros(3, 4)
emulated.normalized_axpby_([base.T], [strided[:, ::2]], each[-1:], beta)
torch.testing.assert_close(base.T, strided[:, ::2] / strided[:, ::2].norm())
print("all agree")
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which(COMPILER), reason="needs Linux and a C++ compiler"
)
def test_cuda_kernels_agree_with_their_twins_on_an_emulated_device(tmp_path: Path) -> None:
    sources = Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc"))
    launches = 0
    for path in sources.glob("cuda/*"):
        text, found = LAUNCH.subn(r"emulation::launch(\2, \3, [=] { \1(\4); });", path.read_text())
        for pattern, replacement in HOST_SIDE:
            text = pattern.sub(replacement, text)
        path.write_text(text)
        launches += found
        assert "<<<" not in text
    assert launches > 0

    torch_folder = Path(torch.__file__).parent
    library = tmp_path / "emulated.so"
    flags = [
        "-shared",
        "-fPIC",
        "-O1",
        "-std=c++17",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    folders = [f"-I{ROOT / 'tests' / 'cuda_emulation'}", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    compiled = [str(sources / "cuda" / "orthogonalize.cu"), str(sources / "cuda" / "lists.cu")]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILER, *flags, *folders, "-x", "c++", *compiled, "-o", str(library), *libraries], check=True)
    environment = {**os.environ, "TORCHFLAT_OPS": "reference", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", CHECKS, str(library)], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.stdout.strip() == "all agree", answer.stderr
