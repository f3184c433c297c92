"""Build of the native kernels; everything else about the package is in pyproject.toml.

The kernels are built against the torch of the environment that the package is installed into, also under pip's build
isolation, with the stable ABI of both: one binary serves every Python, and every torch from ABI_TARGET on. Without
torch or a C++ compiler the package installs with the reference kernels, and `torchflat doctor` says why.

Environment: TORCHFLAT_NO_NATIVE=1 builds no kernels; TORCHFLAT_CUDA=0 no CUDA kernels; CUDA_HOME and
TORCH_CUDA_ARCH_LIST are those of torch.utils.cpp_extension.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ABI_TARGET = (2, 10)
PACKAGE = "torchflat/ops"
WITHOUT = "set TORCHFLAT_CUDA=0 to install without the CUDA kernels, or TORCHFLAT_NO_NATIVE=1 without any"


def find_torch() -> str | None:
    """Make torch importable, and return None; or the reason why it is not."""
    # Under pip's isolation the target environment is hidden from sys.path, but sysconfig still knows where it is.
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    spec = importlib.machinery.PathFinder.find_spec("torch", folders)
    if spec is None or spec.origin is None:
        return "no torch where it was built: install torch, then `pip install --no-build-isolation --force-reinstall`"
    sys.path.append(str(Path(spec.origin).parent.parent))
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < ABI_TARGET:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, ABI_TARGET))}"
    return None


def find_compiler() -> str | None:
    """Return None if there is a C++ compiler, or the reason why it cannot be used."""
    compiler = os.environ.get("CXX", "cl" if os.name == "nt" else "c++").split()[0]
    return None if shutil.which(compiler) else f"no C++ compiler: {compiler!r} was not found"


def find_cuda() -> str | None:
    """Return None if CUDA sources can be compiled here, or the reason why not. Needs torch."""
    import torch

    if os.environ.get("TORCHFLAT_CUDA") == "0":
        return "TORCHFLAT_CUDA=0 where it was built"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or find_toolkit()
    if home is None or not shutil.which("nvcc", path=os.path.join(home, "bin")):
        return f"no nvcc in CUDA_HOME={home}" if home else "no nvcc: install the CUDA toolkit, or set CUDA_HOME"
    if not (os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available()):
        return "no GPU to build for: set TORCH_CUDA_ARCH_LIST, such as 9.0, to build for another machine"
    os.environ["CUDA_HOME"] = home
    return None


def find_toolkit() -> str | None:
    """Return the folder of the CUDA toolkit; the nvcc on the path may be a link or a script that lies elsewhere."""
    nvcc = Path(shutil.which("nvcc") or "nvcc").resolve()
    folders = (nvcc.parent.parent, Path("/usr/local/cuda"))
    return next((str(folder) for folder in folders if (folder / "include" / "cuda_runtime.h").exists()), None)


def extension(device: str) -> Extension:
    """Describe the library of one device, torchflat/ops/_<device>.so. Needs torch."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    target = f"-DTORCH_TARGET_VERSION=0x{ABI_TARGET[0]:02x}{ABI_TARGET[1]:02x}000000000000"
    optimized = ["/O2"] if os.name == "nt" else ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden"]
    kind, suffix = (CUDAExtension, "cu") if device == "cuda" else (CppExtension, "cpp")
    built: Extension = kind(
        f"{PACKAGE.replace('/', '.')}._{device}",
        sorted(str(path) for path in Path("csrc", device).glob(f"*.{suffix}")),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.*h")),
        extra_compile_args={"cxx": [target, *optimized], "nvcc": [target, "-DUSE_CUDA", "-O3"]},
        py_limited_api=True,
    )
    return built


def plan() -> tuple[list[Extension], dict[str, Any]]:
    """Decide what to build: the extensions, and the record that `torchflat doctor` reads."""
    off = os.environ.get("TORCHFLAT_NO_NATIVE", "0") not in ("", "0")
    reason = "TORCHFLAT_NO_NATIVE was set where it was built" if off else find_torch() or find_compiler()
    if reason:
        return [], {"cpu_reason": reason, "cuda_reason": reason}
    import torch

    cuda_reason = find_cuda()
    extensions = [extension("cpu")] if cuda_reason else [extension("cpu"), extension("cuda")]
    return extensions, {
        "abi_target": ".".join(map(str, ABI_TARGET)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu_reason": None,
        "cuda_reason": cuda_reason,
    }


EXTENSIONS, RECORD = plan()


class RecordingBuild(build_py):
    """Copies the modules, and writes the record beside the libraries."""

    def run(self) -> None:
        super().run()
        folder = Path("" if self.editable_mode else self.build_lib, PACKAGE)
        for stale in folder.glob("_*.so"):  # left by an earlier build with other settings
            stale.unlink()
        (folder / "_build.json").write_text(json.dumps(RECORD, indent=2) + "\n")


class AnyPythonWheel(bdist_wheel):
    """The libraries keep to the limited API: one wheel serves every Python from the oldest that is supported on."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("cp310", "abi3", super().get_tag()[2])


def native_build() -> type[build_ext]:
    """Return torch's build command, made to name the way out when it fails."""
    from torch.utils.cpp_extension import BuildExtension

    class NativeBuild(BuildExtension.with_options(no_python_abi_suffix=True)):  # type: ignore[misc]
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise RuntimeError(f"the native kernels did not compile, see above: {WITHOUT}") from error

    return NativeBuild


setup(
    ext_modules=EXTENSIONS,
    cmdclass={
        "build_py": RecordingBuild,
        "bdist_wheel": AnyPythonWheel,
        **({"build_ext": native_build()} if EXTENSIONS else {}),
    },
)
