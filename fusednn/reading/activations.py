"""The activations that are known, as PyTorch spells them: modules, functions and methods of a tensor."""

from typing import Any, NamedTuple

import torch
from torch import nn


class Form(NamedTuple):
    """The module of an activation, and its options with their defaults, in order.

    Options are words, "inplace", or numbers of the activation. `by_name` says that its function takes them by name
    alone.
    """

    module: type[nn.Module]
    options: dict[str, Any]
    by_name: bool = False


FORMS = {
    "relu": Form(nn.ReLU, {"inplace": False}),
    "leaky_relu": Form(nn.LeakyReLU, {"negative_slope": 0.01, "inplace": False}),
    "elu": Form(nn.ELU, {"alpha": 1.0, "inplace": False}),
    "gelu": Form(nn.GELU, {"approximate": "none"}, by_name=True),
    "silu": Form(nn.SiLU, {"inplace": False}),
    "tanh": Form(nn.Tanh, {}),
    "sigmoid": Form(nn.Sigmoid, {}),
    "softplus": Form(nn.Softplus, {"beta": 1.0, "threshold": 20.0}),
}
"""By the name of the function in torch.nn.functional. Of some there is one more, with a `_`, that works in place."""

MODULES: dict[type, str] = {form.module: name for name, form in FORMS.items()}


def spelled(owner: Any) -> list[str]:
    """The names of these functions in torch.nn.functional, in torch, or among the methods of a tensor."""
    return [spelling for name in FORMS for spelling in (name, f"{name}_") if hasattr(owner, spelling)]


WITHOUT_OPTIONS = frozenset(getattr(torch, name) for name in spelled(torch))
"""The functions of torch: they take the tensor alone, and so do the methods."""
