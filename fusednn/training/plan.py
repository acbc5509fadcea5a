"""Which engine runs a job: the one that does exactly what the reference loop does, in the fewest launches."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import dispatch, functional, internals, modules
from ..reading import CALLS, GONE, HOOKS, Facts
from . import optimizers
from .chunks import products_of
from .job import Job
from .native import MACHINES, Native
from .nets import Net, against_memory, find_pure, kinds_of, read_net

CAPTURED_STEPS = 50
"""Fewer steps are not worth the capture of a CUDA graph. Unmeasured."""

MOST_CLASSES, MOST_ROWS, MOST_WORK = 128, 512, 2**25
"""What one program serves: outputs, rows of a batch, and products in a forward (batch · weights). Unmeasured."""

MOST_BEFORE_GRAPH = {"tf32": 2**21, "ieee": 2**20}
"""Products in a forward above which a CUDA graph of many programs is quicker than one program, where one can be made.

On an H100, us a step of one program and of a graph, nn.Linear and nn.CrossEntropyLoss, TF32 and exact: 64-128-10 at
batch 32 (0.3e6 products) 14 and 67, 28 and 85; at 64 24 and 65, 52 and 89; at 128 (1.2e6) 43 and about 65, 97 and about
90; at 256 (2.4e6) 77 and about 65; 784-128-10 at 32 (3.3e6) 108 and 64, 229 and 90; at 128 (13e6) 313 and 77, 794 and
160. "About": with epochs of 14 and 7 steps, of which each was a chunk of its own then, a graph took 119 and 271."""

MOST_NATIVE_PRODUCTS = (2**27, 2**26)
"""Products in a step, counted as in `products_of`, above which PyTorch's loop, on one thread and on several, is quicker
than the native one, which has one.

Measured by bench/bench_native.py on an AMD EPYC with AVX2, torch 2.13, float32. Of native's time the loop with fused
Adam, on one thread and on two, takes 3.1 and 3.0 at 9.8e6 products, 1.8 and 1.4 at 784-512-10 with batch 32 (3.9e7),
1.5 and 1.1 at 7.8e7, 1.1 to 1.2 and 0.8 to 1.1 at 1.6e8, and 0.9 and 0.8 at 6.2e8. Unmeasured on more threads, with
AVX-512 and on Arm."""


class Choice(NamedTuple):
    """The engine, "resident", "native", "captured" or "looped", and why not one of the first two; what it is given,
    which has the inputs as a matrix where the model makes them one; the first two's net, a graph's parameters."""

    engine: str
    refusal: str | None
    job: Job
    net: Net | None = None
    captured: list[Tensor] | None = None
    facts: tuple[Facts, ...] = ()
    """What it rests on, of the model, and of optimizer and criterion, where it has a net."""
    groups: tuple[int, ...] = ()
    """Which dicts the optimizer's groups are."""

    @property
    def parameters(self) -> list[Tensor] | None:
        """Those that the kernels of the engine write; None where it has none."""
        return self.captured if self.net is None else self.net.parameters

    @property
    def reason(self) -> str:
        """Why it is this engine, and for what."""
        if self.refusal is not None:
            return self.refusal
        job = self.job
        device = "Triton interpreter" if job.inputs.is_cpu else str(job.inputs.device)
        where = Native.machine if self.engine == "native" else device
        return f"{where}, {job.inputs.dtype}, {self.net}, batch {job.batch_size}"

    def without_data(self) -> "Choice":
        """The same, which keeps no batch alive."""
        job = self.job
        if not job.inputs.shape[0]:
            return self
        return self._replace(job=job._replace(inputs=job.inputs[:0].clone(), targets=job.targets[:0].clone()))

    def is_for(self, job: Job) -> bool:
        """Whether `choose` would choose the same for a batch that is as large at most, by what is quick to see."""
        net, batch = self.net, job.inputs
        if net is None or batch.dim() != 2 or batch.shape[1] != net.w1.shape[1] or batch.dtype is not net.w1.dtype:
            return False
        if job.batch_size > self.job.batch_size:
            return False
        if _against_device(job, net) is not None or self.groups != tuple(map(id, job.optimizer.param_groups)):
            return False
        return (
            _against_data(job) is None
            and self.facts[0].hold()
            and self.facts[1].hold()
            and optimizers.refusal_now(job.optimizer, net.parameters) is None
        )


def choose(job: Job) -> Choice:
    """The engine for `job`."""
    if (refusal := _against_data(job)) is not None:
        return Choice("looped", refusal, job)
    flat = _flat(job)
    net, facts = (_COPIED, ()) if flat is None else _read(job)
    groups = tuple(map(id, job.optimizer.param_groups))
    if isinstance(net, str):
        refusal = net
    elif flat is not None and (refusal := _against_sizes(flat, net)) is None:
        if on_plain_cpu(job.inputs):
            return Choice("native", None, flat, net, facts=facts, groups=groups)
        if (captured := _captured_if_quicker(flat, net)) is None:
            return Choice("resident", None, flat, net, facts=facts, groups=groups)
        refusal = f"{job.inputs.device}, {job.inputs.dtype}, {net}, batch {job.batch_size}: many programs are quicker"
        return Choice("captured", refusal, job, captured=captured)
    captured = _captured(job)
    return Choice("looped" if captured is None else "captured", refusal, job, captured=captured)


_COPIED = "the model makes its inputs a matrix, for which they are copied"


class _Read(NamedTuple):
    """What was read of model, criterion and optimizer: why no kernel stands for them, and what that rests on."""

    model: Any
    criterion: Any
    schedule: Any
    features: tuple[int, ...]
    kinds: tuple[Any, ...]
    facts: tuple[Facts, Facts]
    refusal: str | None


_READ: "WeakKeyDictionary[Optimizer, _Read]" = WeakKeyDictionary()
"""What was read last for an optimizer, held weakly but for the optimizer's own groups and states."""


def _read(job: Job) -> tuple[Net | str, tuple[Facts, ...]]:
    """The net that the kernels train as `job` asks, or why there is none, whatever the batch; and the facts of that."""
    model, inputs, schedule = job.model, job.inputs, job.lr_schedule
    features = tuple(inputs.shape[1:])
    net, net_facts = read_net(model, None if len(features) == 1 else features)
    if isinstance(net, str):
        return net, ()
    weights = getattr(job.criterion, "weight", None)
    others = [*optimizers.states_of(job.optimizer, net.parameters), weights if isinstance(weights, Tensor) else None]
    kinds = inputs.dtype, *map(id, job.optimizer.param_groups), *kinds_of(net), *kinds_of(others)
    before = _READ.get(job.optimizer)
    if not (
        before is not None and before.model() is model and before.criterion() is job.criterion
        and (schedule is None if before.schedule is None else before.schedule() is schedule)
        and before.features == features and before.kinds == kinds
        and before.facts[0] is net_facts and before.facts[1].hold()
    ):  # fmt: skip
        facts = Facts()
        refusal = _against_net(job, net) or _against_criterion(job, net.sizes[2], facts)
        refusal = refusal or optimizers.refusal(job.optimizer, net.parameters, schedule, facts)
        kept = None if schedule is None else _weakly(schedule)
        before = _Read(ref(model), _weakly(job.criterion), kept, features, kinds, (net_facts, facts), refusal)
        _READ[job.optimizer] = before
    parameters = net.parameters
    refusal = before.refusal or optimizers.refusal_now(job.optimizer, parameters)
    return refusal or against_memory(parameters) or _against_device(job, net) or net, before.facts


def _weakly(value: Any) -> Callable[[], Any]:
    """What gives `value` while it lives; nothing where it cannot be held weakly."""
    try:
        return ref(value)
    except TypeError:
        return lambda: None


def _flat(job: Job) -> Job | None:
    """The job with its inputs as a matrix, which is a view of them; None where it cannot be one."""
    inputs = job.inputs
    if inputs.dim() == 2:
        return job
    try:
        return job._replace(inputs=inputs.view(len(inputs), math.prod(inputs.shape[1:])))
    except RuntimeError:
        return None


def on_plain_cpu(x: Tensor) -> bool:
    """Whether `x` lies where the native engine may serve: on a CPU, and not in the interpreter."""
    return x.is_cpu and not dispatch.INTERPRETED


def against_change(now: Choice, before: Choice) -> str | None:
    """Why the kernels of a choice no longer do what is asked for, now that a user's code had its turn."""
    if now.engine != before.engine or now.parameters is None:
        return now.reason
    shape = now.job.inputs.shape
    if shape != before.job.inputs.shape or now.job.inputs.data_ptr() != before.job.inputs.data_ptr():
        return f"the inputs became {list(shape)}"
    same = [*map(id, now.parameters)] == [*map(id, before.parameters or ())]
    return None if same else "the model has other parameters"


def _captured_if_quicker(job: Job, net: Net) -> list[Tensor] | None:
    """The parameters for a CUDA graph where one takes less time than the one program that could make the steps."""
    if not job.inputs.is_cuda or job.inputs.dtype != torch.float32:
        return None
    from ..kernels.linear import precision_of

    most = MOST_BEFORE_GRAPH[precision_of(job.inputs)]
    return _captured(job) if work_of(job, net) > most else None


def work_of(job: Job, net: Net) -> int:
    """How many products of two numbers the forward of a step has."""
    return min(job.batch_size, job.epoch_rows) * (net.w1.numel() + net.w2.numel())


def _captured(job: Job) -> list[Tensor] | None:
    """The parameters of the model if a step of `job` can be a CUDA graph, else None."""
    if not job.inputs.is_cuda or torch.version.hip or dispatch.checks_labels():
        return None
    if (
        0 < job.steps < CAPTURED_STEPS  # also those before start_step: a run that goes on has the same engine
        or not job.epoch_rows
        or _against_criterion(job, None, Facts()) is not None
    ):
        return None
    parameters = find_pure(job.model)
    if isinstance(parameters, str) or not parameters or parameters[0].dtype != job.inputs.dtype:
        return None
    if parameters[0].device != job.inputs.device or _against_optimizer(job, parameters):
        return None
    return parameters


def _against_optimizer(job: Job, parameters: list[Tensor]) -> str | None:
    optimizer = job.optimizer
    return optimizers.refusal(optimizer, parameters, job.lr_schedule, Facts()) or optimizers.refusal_now(
        optimizer, parameters
    )


def _against_data(job: Job) -> str | None:
    """Why no training kernel takes the inputs and targets, or None."""
    inputs, targets = job.inputs, job.targets
    if on_plain_cpu(inputs):
        if not MACHINES:
            return "the native engine was not built"
        if inputs.layout is not torch.strided or inputs.is_nested or internals.is_traced():
            return "the inputs are sparse, nested or traced"
    elif (reason := dispatch.reason_against(inputs)) is not None:
        return reason
    if torch.is_autocast_enabled("cpu" if inputs.is_cpu else inputs.device.type):
        return "autocast is on"
    if torch.is_inference_mode_enabled():
        return "inference mode is on"
    if internals.function_modes() and not all(map(_is_harmless, internals.function_mode_stack())):
        return "a mode of __torch_function__ is on"
    if internals.dispatch_modes():
        return "a mode of __torch_dispatch__ is on"
    if internals.has_saved_tensor_hooks():
        return "hooks see the tensors that are saved for backward"
    if internals.transforming():
        return "a transform of torch.func is on"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    if type(inputs) is not Tensor or inputs.requires_grad or inputs.is_neg():
        return "the inputs are no plain tensor, want a gradient, or are a view that negates"
    if inputs.dtype is not torch.float32 and inputs.dtype is not torch.float64:
        return f"no training kernel for {inputs.dtype}"
    if type(targets) is not Tensor or targets.dim() != 1 or targets.dtype not in functional.LABELS:
        return "the targets are not a vector of labels"
    if inputs._is_zerotensor() or targets._is_zerotensor() or targets.is_neg():
        return "the inputs or targets have no memory"
    if targets.is_cpu is not inputs.is_cpu or targets.get_device() != inputs.get_device():
        return "inputs and targets are on two devices"
    return None


def _is_harmless(mode: Any) -> bool:
    """Whether it is that of a default device."""
    return type(mode).__module__ == "torch.utils._device"


def _against_net(job: Job, net: Net) -> str | None:
    if net.w1.dtype != job.inputs.dtype:
        return f"the parameters have another dtype than the inputs, {net.w1.dtype} and {job.inputs.dtype}"
    if math.prod(job.inputs.shape[1:]) != net.sizes[0]:
        return f"the inputs are {list(job.inputs.shape)}, and the net is {net}"
    return None


def _against_device(job: Job, net: Net) -> str | None:
    w, x = net.w1, job.inputs
    if w.is_cpu == x.is_cpu and w.get_device() == x.get_device():
        return None
    return "the parameters have another device than the inputs"


def _against_sizes(job: Job, net: Net) -> str | None:
    """Why no kernel takes batches of such a net, or None."""
    rows = min(job.batch_size, job.epoch_rows)
    if on_plain_cpu(job.inputs):
        if products_of(job, net) > MOST_NATIVE_PRODUCTS[torch.get_num_threads() > 1]:
            return f"{net} with batches of {rows} is so large that PyTorch's own products are quicker"
        return None
    if net.sizes[2] > MOST_CLASSES or rows > MOST_ROWS or work_of(job, net) > MOST_WORK:
        return f"{net} with batches of {rows} is too large for one program"
    return None


def _against_criterion(job: Job, outputs: int | None, facts: Facts) -> str | None:
    """Why no kernel computes the loss of so many outputs, which may be unknown; or None."""
    criterion = job.criterion
    if type(criterion) not in (nn.CrossEntropyLoss, modules.CrossEntropyLoss):
        return f"no training kernel for the criterion {getattr(criterion, '__name__', type(criterion).__name__)}"
    facts.attribute(criterion, "__class__")
    if any(facts.attribute(type(criterion), name) is not value for name, value in CALLS):
        return "the criterion has a __call__ of its own"
    own = {name: facts.item(criterion, "__dict__", name) for name in (*_OPTIONS, *_OWN)}
    if not all(own[name] is GONE or own[name] is None for name in _OWN):
        return "the criterion's forward was replaced"
    ignored, reduction, smoothing = (own[name] for name in _OPTIONS)
    if type(ignored) is not int or not -(2**63) <= ignored < 2**63:
        return f"no training kernel for ignore_index {ignored!r}"
    if any(facts.length(criterion, hooks) for hooks in HOOKS):
        return "the criterion has hooks"
    if reduction not in ("mean", "sum") or not isinstance(smoothing, float | int) or not 0.0 <= smoothing <= 1.0:
        return f"no training kernel for reduction {reduction!r}, label_smoothing {smoothing!r}"
    weight = facts.item(criterion, "_buffers", "weight")
    if weight is not None and weight is not GONE:
        plain = (
            weight.dim() == 1
            and weight.is_contiguous()
            and not weight._is_zerotensor()
            and not facts.attribute(weight, "requires_grad")
        )
        if not plain or outputs not in (None, len(weight)):
            return "the class weights have another length than the outputs, gaps or a gradient"
        if facts.attribute(weight, "dtype") != job.inputs.dtype or weight.device != job.inputs.device:
            return "the class weights have another dtype or device than the inputs"
    return None


_OWN = ("forward", "_compiled_call_impl", "_call_impl")
_OPTIONS = ("ignore_index", "reduction", "label_smoothing")
