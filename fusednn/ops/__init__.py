"""The operators, one file an operation: registered with torch.library, differentiated by autograd.Functions."""

from .cross_entropy import cross_entropy, soft_cross_entropy
from .linear import is_library, linear
from .linear_cross_entropy import chunk_size, linear_cross_entropy

__all__ = ["chunk_size", "cross_entropy", "is_library", "linear", "linear_cross_entropy", "soft_cross_entropy"]
