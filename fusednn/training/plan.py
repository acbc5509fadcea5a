"""Which engine runs a job: the one that does exactly what the reference loop does, in the fewest launches."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from .. import dispatch, functional, modules
from . import optimizers
from .chunks import products_of
from .job import Job
from .native import MACHINES, Native
from .nets import Net, find_net, find_pure, has_hooks

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
    """The engine, "resident", "native", "captured" or "looped", and why; what it is given, which has the
    inputs as a matrix where the model makes them one; the first two's net, a graph's parameters."""

    engine: str
    reason: str
    job: Job
    net: Net | None = None
    captured: list[Tensor] | None = None

    @property
    def parameters(self) -> list[Tensor] | None:
        """Those that the kernels of the engine write; None where it has none."""
        return self.captured if self.net is None else self.net.parameters


def choose(job: Job) -> Choice:
    """The engine for `job`."""
    if (reason := _against_data(job)) is not None:
        return Choice("looped", reason, job)
    net, flat = find_net(job.model, None if job.inputs.dim() == 2 else tuple(job.inputs.shape[1:])), _flat(job)
    if isinstance(net, str) or flat is None:
        reason = net if isinstance(net, str) else "the model makes its inputs a matrix, for which they are copied"
    else:
        reason = _against_net(flat, net) or _against_criterion(flat, net.sizes[2])
        reason = reason or optimizers.refusal(job.optimizer, net.parameters, job.lr_schedule)
        where = f"{job.inputs.dtype}, {net}, batch {job.batch_size}"
        if reason is None and on_plain_cpu(job.inputs):
            return Choice("native", f"{Native.machine}, {where}", flat, net)
        if reason is None and (captured := _captured_if_quicker(flat, net)) is not None:
            reason = f"{job.inputs.device}, {where}: as a CUDA graph of many programs"
            return Choice("captured", reason, job, captured=captured)
        if reason is None:
            device = "Triton interpreter" if job.inputs.is_cpu else str(job.inputs.device)
            return Choice("resident", f"{device}, {where}", flat, net)
    captured = _captured(job)
    return Choice("looped", reason if captured is None else f"{reason}; as a CUDA graph", job, captured=captured)


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


def against_change(job: Job, choice: Choice) -> str | None:
    """Why the kernels of `choice` no longer do what `job` asks for, now that a user's code had its turn."""
    now = choose(job)
    if now.engine != choice.engine or now.parameters is None:
        return now.reason
    if now.job.inputs.shape != choice.job.inputs.shape or now.job.inputs.data_ptr() != choice.job.inputs.data_ptr():
        return f"the inputs became {list(job.inputs.shape)}"
    same = [*map(id, now.parameters)] == [*map(id, choice.parameters or ())]
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
        0 < job.steps - job.start_step < CAPTURED_STEPS
        or not job.epoch_rows
        or _against_criterion(job, None) is not None
    ):
        return None
    parameters = find_pure(job.model)
    if isinstance(parameters, str) or not parameters or parameters[0].dtype != job.inputs.dtype:
        return None
    if parameters[0].device != job.inputs.device or optimizers.refusal(job.optimizer, parameters, job.lr_schedule):
        return None
    return parameters


def dispatch_modes() -> int:
    """How many modes of __torch_dispatch__ are on."""
    return torch._C._len_torch_dispatch_stack()


def _against_data(job: Job) -> str | None:
    """Why no training kernel takes the inputs and targets, or None."""
    inputs, targets = job.inputs, job.targets
    if on_plain_cpu(inputs):
        if not MACHINES:
            return "the native engine was not built"
        if inputs.layout != torch.strided or inputs.is_nested or torch._C._get_tracing_state():
            return "the inputs are sparse, nested or traced"
    elif (reason := dispatch.reason_against(inputs)) is not None:
        return reason
    if torch.is_autocast_enabled(inputs.device.type):
        return "autocast is on"
    if torch.is_inference_mode_enabled():
        return "inference mode is on"
    modes = _get_current_function_mode_stack()  # of them a default device is harmless
    if any(type(mode).__module__ != "torch.utils._device" for mode in modes):
        return "a mode of __torch_function__ is on"
    if dispatch_modes():
        return "a mode of __torch_dispatch__ is on"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks see the tensors that are saved for backward"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is on"
    if inputs._is_zerotensor() or targets._is_zerotensor():
        return "the inputs or targets have no memory"
    if inputs.dtype not in (torch.float32, torch.float64):
        return f"no training kernel for {inputs.dtype}"
    if type(inputs) is not Tensor or inputs.requires_grad or inputs.is_neg():
        return "the inputs are no plain tensor, want a gradient, or are a view that negates"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    if type(targets) is not Tensor or targets.dim() != 1 or targets.dtype not in functional.LABELS:
        return "the targets are not a vector of labels"
    if targets.device != inputs.device:
        return "inputs and targets are on two devices"
    return None


def _against_net(job: Job, net: Net) -> str | None:
    rows = min(job.batch_size, job.epoch_rows)
    if net.w1.dtype != job.inputs.dtype or net.w1.device != job.inputs.device:
        return "the parameters have another dtype or device than the inputs"
    if job.inputs.dim() != 2 or job.inputs.shape[1] != net.sizes[0]:
        return f"the inputs are {list(job.inputs.shape)}, and the net is {net}"
    if on_plain_cpu(job.inputs):
        if products_of(job, net) > MOST_NATIVE_PRODUCTS[torch.get_num_threads() > 1]:
            return f"{net} with batches of {rows} is so large that PyTorch's own products are quicker"
        return None
    if net.sizes[2] > MOST_CLASSES or rows > MOST_ROWS or work_of(job, net) > MOST_WORK:
        return f"{net} with batches of {rows} is too large for one program"
    return None


def _against_criterion(job: Job, outputs: int | None) -> str | None:
    """Why no kernel computes the loss of so many outputs, which may be unknown; or None."""
    criterion = job.criterion
    if type(criterion) not in (nn.CrossEntropyLoss, modules.CrossEntropyLoss) or "forward" in vars(criterion):
        return f"no training kernel for the criterion {getattr(criterion, '__name__', type(criterion).__name__)}"
    if type(criterion.ignore_index) is not int or not -(2**63) <= criterion.ignore_index < 2**63:
        return f"no training kernel for ignore_index {criterion.ignore_index!r}"
    if has_hooks(criterion):
        return "the criterion has hooks"
    if criterion.reduction not in ("mean", "sum") or not 0.0 <= criterion.label_smoothing <= 1.0:
        return f"no training kernel for reduction {criterion.reduction!r}, label_smoothing {criterion.label_smoothing}"
    weight = criterion.weight
    if weight is not None:
        plain = weight.dim() == 1 and weight.is_contiguous() and not weight.requires_grad
        if not plain or outputs not in (None, len(weight)):
            return "the class weights have another length than the outputs, gaps or a gradient"
        if weight.dtype != job.inputs.dtype or weight.device != job.inputs.device:
            return "the class weights have another dtype or device than the inputs"
    return None
