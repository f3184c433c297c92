"""torchflat: how sharp is the minimum that a network was trained to, in numbers that carry an interval."""

from torchflat import optim, symmetry
from torchflat.audit.report import Report
from torchflat.audit.run import audit
from torchflat.audit.task import Task
from torchflat.flatness import Verdict, compare, derivative_norm, is_flat_against, level_distance, variation
from torchflat.objective import Objective
from torchflat.result import Cost, Interval, Status
from torchflat.spectrum import block_sharpness, eigenpairs, sampling_interval, sharpness, spectral_density, trace

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "Interval",
    "Objective",
    "Report",
    "Status",
    "Task",
    "Verdict",
    "audit",
    "block_sharpness",
    "compare",
    "derivative_norm",
    "eigenpairs",
    "is_flat_against",
    "level_distance",
    "optim",
    "sampling_interval",
    "sharpness",
    "spectral_density",
    "symmetry",
    "trace",
    "variation",
]
