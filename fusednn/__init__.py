"""Drop-in PyTorch layers, losses and training loops for small networks, with kernels in Triton and C++.

    from fusednn import SimpleNN, CrossEntropyLoss, train_steps

The import asks no driver anything and needs neither a GPU nor Triton. The kernels are imported at their first use.
"""

from . import functional
from .dispatch import Decision, FallbackError, check_labels, explain, strict, warmup
from .fuse import Fusion, fuse, fusions, unfuse
from .modules import CrossEntropyLoss, Linear, LinearCrossEntropyLoss, LinearReLU, SimpleNN
from .training import make_train_step, train_steps

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "Decision",
    "FallbackError",
    "Fusion",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearReLU",
    "SimpleNN",
    "check_labels",
    "explain",
    "functional",
    "fuse",
    "fusions",
    "make_train_step",
    "strict",
    "train_steps",
    "unfuse",
    "warmup",
]
