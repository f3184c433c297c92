"""How flat f is around a point."""

from torchflat.flatness.derivatives import DerivativeNorm, derivative_norm

__all__ = ["DerivativeNorm", "derivative_norm"]
