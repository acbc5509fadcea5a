"""What a training step is, without a tensor: its layers, its loss, the rule of its optimizer, and the names of these.

    a = x;  for each layer: z = a Wᵀ + b, a = activation(z);  y = a
    loss of y and the targets; the gradient of each W and b;  the optimizer's rule on each

Every engine is driven by a :class:`Step`. To add an activation, a loss or a rule is a line in a table here, its name in
the enum and in the table of native/step.h, in the same order, and a device function in each language; of a rule also
its numbers in fusednn/training/formulas.py. Imports nothing.
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


class LossKind(NamedTuple):
    """What its targets are, and how many numbers it takes.

    The targets are `labels` [N], or numbers [N, outputs]. A mean is over all numbers if the loss is one for each
    output, and else over the rows.
    """

    labels: bool
    per_output: bool
    numbers: int


LOSSES = {
    "cross_entropy": LossKind(labels=True, per_output=False, numbers=0),
    "cross_entropy_probabilities": LossKind(labels=False, per_output=False, numbers=0),
    "mse": LossKind(labels=False, per_output=True, numbers=0),
    "l1": LossKind(labels=False, per_output=True, numbers=0),
    "smooth_l1": LossKind(labels=False, per_output=True, numbers=1),
    "huber": LossKind(labels=False, per_output=True, numbers=1),
    "bce_with_logits": LossKind(labels=False, per_output=True, numbers=0),
    "poisson_nll": LossKind(labels=False, per_output=True, numbers=0),
}

STEP_SIZE, DECAY, SHRINK, SIGN = range(4)
LOSS_SCALE, MAX_NORM = 4, 5  # of the step, in the row of the first parameter
ROOT, EPS, GRAD_PART, SQUARE_KEPT, SQUARE_PART, GRAD_STEP = range(6, 12)
MOMENTUM, UNDAMPED = 6, 7  # no rule has MOMENTUM and ROOT, or UNDAMPED and EPS
ROW = 12
"""The places in a row of the optimizer's table, which has a row for each step and parameter; see updates.py."""

_MOMENTS = (EPS, GRAD_PART, SQUARE_KEPT, SQUARE_PART)


class RuleKind(NamedTuple):
    """The states that it keeps of each parameter, as torch.optim calls them, and the numbers it reads of a row.

    Those beside the first four places, which each rule reads as its options say.
    """

    states: tuple[str, ...]
    numbers: tuple[int, ...]


RULES = {
    "adam": RuleKind(("exp_avg", "exp_avg_sq"), (ROOT, *_MOMENTS)),
    "amsgrad": RuleKind(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), (ROOT, *_MOMENTS)),
    "nadam": RuleKind(("exp_avg", "exp_avg_sq"), (ROOT, *_MOMENTS, GRAD_STEP)),
    "radam": RuleKind(("exp_avg", "exp_avg_sq"), (ROOT, *_MOMENTS)),
    "adagrad": RuleKind(("sum",), (EPS,)),
    "rmsprop": RuleKind(("square_avg",), (EPS, SQUARE_KEPT, SQUARE_PART)),
    "rmsprop_momentum": RuleKind(("square_avg", "momentum_buffer"), (MOMENTUM, EPS, SQUARE_KEPT, SQUARE_PART)),
    "rmsprop_centered": RuleKind(("square_avg", "grad_avg"), _MOMENTS),
    "rmsprop_centered_momentum": RuleKind(("square_avg", "momentum_buffer", "grad_avg"), (MOMENTUM, *_MOMENTS)),
    "sgd": RuleKind((), ()),
    "momentum": RuleKind(("momentum_buffer",), (MOMENTUM, UNDAMPED)),
    "nesterov": RuleKind(("momentum_buffer",), (MOMENTUM, UNDAMPED)),
}


class Activation(NamedTuple):
    """A name of ACTIVATIONS, and its numbers: LeakyReLU's slope, ELU's alpha, softplus' beta and threshold."""

    name: str = "identity"
    numbers: tuple[float, ...] = ()


class Loss(NamedTuple):
    """A name of LOSSES; mean or sum, whether classes or outputs have weights, whether targets are smoothed.

    And its numbers: SmoothL1Loss' beta, HuberLoss' delta; whether positive targets have weights (BCEWithLogitsLoss'
    pos_weight), whether rows have (sample_weight), and whether it is scaled, at each step by the LOSS_SCALE of it.
    """

    name: str = "cross_entropy"
    mean: bool = True
    weighted: bool = False
    smoothed: bool = False
    numbers: tuple[float, ...] = ()
    positive_weighted: bool = False
    rows_weighted: bool = False
    scaled: bool = False


class Rule(NamedTuple):
    """A name of RULES; whether weight decay is in the gradient, or shrinks w; whether the gradient's sign turns."""

    name: str = "adam"
    coupled: bool = False
    decoupled: bool = False
    maximize: bool = False


class Step(NamedTuple):
    """A training step of a net whose layer l has sizes[l] inputs and sizes[l + 1] outputs.

    `biases` says which layers have one, and `activations` what is behind each, also behind the last. `accuracy` asks
    for the share of the rows whose largest output is the target's, or of binary cross entropy for the share of the
    outputs on the right side of 0. `clipped` steps make the norm of all gradients at most the MAX_NORM of the step. Its
    str() says all of it: Triton keeps a compiled kernel by that.
    """

    sizes: tuple[int, ...]
    biases: tuple[bool, ...]
    activations: tuple[Activation, ...]
    loss: Loss = Loss()
    rule: Rule = Rule()
    accuracy: bool = False
    clipped: bool = False

    @property
    def layers(self) -> int:
        """How many Linear layers there are."""
        return len(self.biases)
