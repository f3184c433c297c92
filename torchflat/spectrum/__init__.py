"""Eigenvalues of the Hessian: the largest, several, all of them as a density, their sum, and those of each block."""

from torchflat.spectrum.blocks import Block, BlockSharpness, block_sharpness
from torchflat.spectrum.density import SpectralDensity, spectral_density
from torchflat.spectrum.eigenpairs import Eigenpair, Eigenpairs, eigenpairs
from torchflat.spectrum.run import NotConvergedWarning
from torchflat.spectrum.sampling import Sampling, sampling_interval
from torchflat.spectrum.sharpness import Sharpness, sharpness
from torchflat.spectrum.trace import Trace, trace

__all__ = [
    "Block",
    "BlockSharpness",
    "Eigenpair",
    "Eigenpairs",
    "NotConvergedWarning",
    "Sampling",
    "Sharpness",
    "SpectralDensity",
    "Trace",
    "block_sharpness",
    "eigenpairs",
    "sampling_interval",
    "sharpness",
    "spectral_density",
    "trace",
]
