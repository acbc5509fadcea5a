"""Which engine runs a job: the first that does exactly what the reference loop does."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import dispatch, internals
from ..reading import Facts
from . import criteria, net, optimizers
from .engines import Engine
from .engines.chunks import Chunks, flat
from .engines.looped import Looped
from .engines.native import MACHINES, Native
from .job import Job
from .net import Net


class Choice(NamedTuple):
    """The engine for a job, and why not the first of those for its device."""

    engine: type[Engine]
    refusal: str | None
    job: Job
    parameters: list[Tensor] | None = None
    """Those that its kernels write; None where it has none."""
    net: Net | None = None
    """What it trains, if it is one that makes many steps in a call."""
    facts: tuple[Facts, ...] = ()
    """What it rests on, of the model, and of optimizer and criterion, where it has a net."""
    groups: tuple[int, ...] = ()
    """Which dicts the optimizer's groups are."""

    @property
    def reason(self) -> str:
        """Why it is this engine, and for what."""
        if self.refusal is not None:
            return self.refusal
        job = self.job
        device = "Triton interpreter" if job.inputs.is_cpu else str(job.inputs.device)
        where = Native.machine if self.engine is Native else device
        return f"{where}, {job.inputs.dtype}, {self.net}, batch {job.batch_size}"

    def without_data(self) -> "Choice":
        """The same, which keeps no batch alive."""
        job = self.job
        if not job.inputs.shape[0]:
            return self
        weights = None if job.sample_weight is None else job.sample_weight[:0].clone()
        inputs, targets = job.inputs[:0].clone(), job.targets[:0].clone()
        return self._replace(job=job._replace(inputs=inputs, targets=targets, sample_weight=weights))

    def is_for(self, job: Job) -> bool:
        """Whether `choose` would choose the same for a batch that is as large at most, by what is quick to see."""
        found, batch = self.net, job.inputs
        if found is None or batch.shape[1:] != self.job.inputs.shape[1:] or flat(batch) is None:
            return False
        if found.needs_rows and not batch.shape[0]:
            return False
        if batch.dtype is not found.first.dtype or job.batch_size > self.job.batch_size:
            return False
        if _device_refusal(job, found) is not None or self.groups != tuple(map(id, job.optimizer.param_groups)):
            return False
        return (
            _data_refusal(job) is None
            and self.facts[0].hold()
            and self.facts[1].hold()
            and criteria.refusal_now(job.criterion, found.sizes[-1], batch, job.targets) is None
            and optimizers.refusal_now(job.optimizer, found.parameters) is None
        )


def choose(job: Job) -> Choice:
    """The engine for `job`."""
    if (refusal := _data_refusal(job)) is not None:
        return Choice(Looped, refusal, job)
    found, facts = _read(job)
    for engine in _engines(job.inputs):
        refused = engine.refusal(job, found)
        if refused is None:
            parameters = engine.parameters(job, found)
            if not issubclass(engine, Chunks) or isinstance(found, str):
                return Choice(engine, refusal, job, parameters)
            return Choice(engine, refusal, job, parameters, found, facts, tuple(map(id, job.optimizer.param_groups)))
        refusal = refusal or refused
    raise AssertionError("the loop refuses nothing")


def _engines(x: Tensor) -> Iterator[type[Engine]]:
    """Those for the device of `x`, the best first."""
    if on_plain_cpu(x):
        yield Native
    else:
        from .engines.captured import Captured  # these import Triton
        from .engines.resident import Resident

        yield from (Resident, Captured)
    yield Looped


def on_plain_cpu(x: Tensor) -> bool:
    """Whether `x` lies where the native engine may serve: on a CPU, and not in the interpreter."""
    return x.is_cpu and not dispatch.INTERPRETED


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
    if flat(inputs) is None:
        return "the inputs have gaps, so a matrix of them would be a copy", ()
    features = tuple(inputs.shape[1:])
    found, net_facts = net.read(model, None if len(features) == 1 else features)
    if isinstance(found, str):
        return found, ()
    parameters = found.parameters
    weights = [weight for weight in criteria.weights_of(job.criterion) if isinstance(weight, Tensor)]
    others = [*optimizers.states_of(job.optimizer, parameters), *weights]
    kinds = inputs.dtype, *map(id, job.optimizer.param_groups), *net.kinds_of(found.places), *net.kinds_of(others)
    before = _READ.get(job.optimizer)
    if not (
        before is not None and before.model() is model and before.criterion() is job.criterion
        and (schedule is None if before.schedule is None else before.schedule() is schedule)
        and before.features == features and before.kinds == kinds
        and before.facts[0] is net_facts and before.facts[1].hold()
    ):  # fmt: skip
        facts = Facts()
        refusal = _inputs_refusal(job, found) or criteria.refusal(job.criterion, found.sizes[-1], inputs, facts)
        refusal = refusal or optimizers.refusal(job.optimizer, parameters, schedule, facts)
        kept = None if schedule is None else _weakly(schedule)
        before = _Read(ref(model), _weakly(job.criterion), kept, features, kinds, (net_facts, facts), refusal)
        _READ[job.optimizer] = before
    refusal = (
        before.refusal
        or optimizers.refusal_now(job.optimizer, parameters)
        or criteria.refusal_now(job.criterion, found.sizes[-1], inputs, job.targets)
    )
    if found.needs_rows and not inputs.shape[0]:
        refusal = refusal or "there are no rows, of which a view makes no matrix"
    return refusal or net.memory_refusal(parameters) or _device_refusal(job, found) or found, before.facts


def _weakly(value: Any) -> Callable[[], Any]:
    """What gives `value` while it lives; nothing where it cannot be held weakly."""
    try:
        return ref(value)
    except TypeError:
        return lambda: None


def refusal_to_go_on(now: Choice, before: Choice) -> str | None:
    """Why the kernels of a choice no longer do what is asked for, now that a user's code had its turn."""
    if now.engine is not before.engine or now.parameters is None:
        return now.reason
    if [*map(id, now.parameters)] != [*map(id, before.parameters or ())]:
        return "the model has other parameters"
    same = now.net is None or before.net is None or now.net[1:] == before.net[1:]
    return None if same else "the model has other sizes or activations"


def _data_refusal(job: Job) -> str | None:
    """Why no training kernel takes the inputs and targets, or None."""
    inputs, targets = job.inputs, job.targets
    if on_plain_cpu(inputs):
        if not MACHINES:
            return "the native engine was not built"
        if inputs.layout is not torch.strided or inputs.is_nested or internals.is_traced():
            return "the inputs are sparse, nested or traced"
    elif (refusal := dispatch.refusal(inputs)) is not None:
        return refusal
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
    if inputs._is_zerotensor():
        return "the inputs have no memory"
    if (refusal := _rows_refusal("targets", targets, inputs)) is not None:
        return refusal
    weights = job.sample_weight
    if weights is not None and weights.dtype is not inputs.dtype:
        return f"the sample_weight is {weights.dtype}, and the inputs are {inputs.dtype}"
    return None if weights is None else _rows_refusal("sample_weight", weights, inputs)


def _rows_refusal(name: str, values: Tensor, inputs: Tensor) -> str | None:
    """Why no training kernel reads what else each row has, or None."""
    if type(values) is not Tensor or values.layout is not torch.strided or values.requires_grad or values.is_neg():
        return f"{name}: no plain tensor, one that wants a gradient, or a view that negates"
    if values._is_zerotensor():
        return f"{name}: no memory"
    if values.is_cpu is not inputs.is_cpu or values.get_device() != inputs.get_device():
        return f"inputs and {name} are on two devices"
    return None


def _is_harmless(mode: Any) -> bool:
    """Whether it is that of a default device."""
    return type(mode).__module__ == "torch.utils._device"


def _inputs_refusal(job: Job, found: Net) -> str | None:
    if found.first.dtype != job.inputs.dtype:
        return f"the parameters have another dtype than the inputs, {found.first.dtype} and {job.inputs.dtype}"
    if math.prod(job.inputs.shape[1:]) != found.sizes[0]:
        return f"the inputs are {list(job.inputs.shape)}, and the net is {found}"
    return None


def _device_refusal(job: Job, found: Net) -> str | None:
    w, x = found.first, job.inputs
    if w.is_cpu == x.is_cpu and w.get_device() == x.get_device():
        return None
    return "the parameters have another device than the inputs"
