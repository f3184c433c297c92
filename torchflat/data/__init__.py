"""Data and networks to audit: the shipped sample, MNIST, and the small models made for them."""

from torchflat.data.mnist import denoising, mnist, mnist_folder, read_idx
from torchflat.data.models import digit_classifier, relu_network
from torchflat.data.sample import sample_checkpoint, sample_digits

__all__ = [
    "denoising",
    "digit_classifier",
    "mnist",
    "mnist_folder",
    "read_idx",
    "relu_network",
    "sample_checkpoint",
    "sample_digits",
]
