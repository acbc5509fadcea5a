"""The operators, one file an operation: registered with torch.library, differentiated by autograd.Functions."""

from .cross_entropy import cross_entropy, soft_cross_entropy
from .linear import linear
from .linear_cross_entropy import chunk_size, linear_cross_entropy

__all__ = ["chunk_size", "cross_entropy", "linear", "linear_cross_entropy", "soft_cross_entropy"]
