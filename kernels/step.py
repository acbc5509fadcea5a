"""What a training step is, without a tensor: its layers, its loss, the rule of its optimizer, and the names of these.

    a = x;  for each layer: z = a Wᵀ + b, a = activation(z);  y = a
    loss of y and the targets; the gradient of each W and b;  the optimizer's rule on each

Every engine is driven by a :class:`Step`. To add an activation, a loss or a rule is a line in a table here, its name in
the enum and in the table of native/step.h, in the same order, and a device function in each language. Imports nothing.
"""

from typing import NamedTuple

MOST_LAYERS = 8
"""Linear layers of a net."""


class Kind(NamedTuple):
    """How many numbers an activation takes, and whether its slope is read off the number before, as in PyTorch.

    Otherwise it is read off the value.
    """

    numbers: int
    before: bool


ACTIVATIONS = {
    "identity": Kind(0, before=False),
    "relu": Kind(0, before=False),
    "leaky_relu": Kind(1, before=True),
    "elu": Kind(1, before=True),
    "gelu": Kind(0, before=True),
    "gelu_tanh": Kind(0, before=True),
    "silu": Kind(0, before=True),
    "tanh": Kind(0, before=False),
    "sigmoid": Kind(0, before=False),
    "softplus": Kind(2, before=True),
}

LOSSES = ("cross_entropy",)

RULES = ("adam", "sgd", "momentum", "nesterov")

STEP_SIZE, DECAY, SHRINK, SIGN = range(4)
MOMENTUM, UNDAMPED = 4, 5  # of momentum and nesterov
ROOT, EPS, GRAD_PART, SQUARE_KEPT, SQUARE_PART = range(4, 9)  # of adam
ROW = 9
"""The places in a row of the optimizer's table, which has a row for each step and parameter; see updates.py."""


class Activation(NamedTuple):
    """A name of ACTIVATIONS, and its numbers: LeakyReLU's slope, ELU's alpha, softplus' beta and threshold."""

    name: str = "identity"
    numbers: tuple[float, ...] = ()


class Loss(NamedTuple):
    """A name of LOSSES; mean or sum over the rows, whether classes have weights, whether labels are smoothed."""

    name: str = "cross_entropy"
    mean: bool = True
    weighted: bool = False
    smoothed: bool = False


class Rule(NamedTuple):
    """A name of RULES; whether weight decay is in the gradient, or shrinks w; whether the gradient's sign turns."""

    name: str = "adam"
    coupled: bool = False
    decoupled: bool = False
    maximize: bool = False


class Step(NamedTuple):
    """A training step of a net whose layer l has sizes[l] inputs and sizes[l + 1] outputs.

    `biases` says which layers have one, and `activations` what is behind each, also behind the last. `accuracy` asks
    for the share of the rows whose largest output is the target's. Its str() says all of it: Triton keeps a compiled
    kernel by that.
    """

    sizes: tuple[int, ...]
    biases: tuple[bool, ...]
    activations: tuple[Activation, ...]
    loss: Loss = Loss()
    rule: Rule = Rule()
    accuracy: bool = False

    @property
    def layers(self) -> int:
        """How many Linear layers there are."""
        return len(self.biases)
