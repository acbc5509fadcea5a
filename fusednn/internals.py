"""Every private name of torch and of Triton that the package uses, and what for.

The next release may drop or change one: `tests/test_internals.py` then fails with its name, and `import fusednn` says
so of those that a module has. All of them are in torch 2.11 to 2.14 and in Triton 3.6 to 3.9.
"""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])

NAMES: dict[str, dict[str, str]] = {
    # where it is: its name: what for
    "torch._C": {
        "_are_functorch_transforms_active": "whether a transform of torch.func is on: requires_grad does not say so",
        "_get_tracing_state": "whether torch.jit.trace is on, which follows no kernel",
        "_len_torch_dispatch_stack": "whether a mode of __torch_dispatch__ is on, which must see an operator",
        "_len_torch_function_stack": "whether a mode of __torch_function__ is on",
    },
    "torch._C._autograd": {
        "_get_current_graph_task_keep_graph": "whether this backward is the last one, so that a saved gradient is free",
        "_top_saved_tensors_default_hooks": "whether somebody sees what is saved for backward",
    },
    "torch._C._functorch": {
        "unwrap_if_dead": "an input that was saved within torch.func.vjp, whose backward runs when that has ended",
        "is_legacy_batchedtensor": "a gradient of torch.autograd.grad(..., is_grads_batched=True)",
    },
    "torch._dynamo.eval_frame": {
        "OptimizedModule": "what torch.compile makes of a module: it is known by the name of its class's module",
    },
    "torch.autograd.forward_ad": {
        "_current_level": "whether forward-mode AD is on",
    },
    "torch.nn._reduction": {
        "legacy_get_string": "what size_average= and reduce= of torch.nn.functional.cross_entropy mean",
    },
    "torch.nn.modules.loss": {
        "_WeightedLoss": "the base of nn.CrossEntropyLoss, by which skorch and others tell a loss",
    },
    "torch.nn.modules.module": {
        "_has_any_global_hook": "whether hooks of all modules see a call",
        "_global_forward_hooks": "the same, while a model is read",
        "_global_forward_pre_hooks": "the same",
        "_global_backward_hooks": "the same",
        "_global_backward_pre_hooks": "the same",
    },
    "torch.optim.optimizer": {
        "_global_optimizer_pre_hooks": "whether hooks of all optimizers see a step",
        "_global_optimizer_post_hooks": "the same",
    },
    "torch.overrides": {
        "_get_current_function_mode_stack": "whether the mode of __torch_function__ is that of a default device",
    },
    "torch.utils._python_dispatch": {
        "_get_current_dispatch_mode_stack": "the FLOP counters that are on, which are told of our operators",
    },
    "torch.utils._device": {
        "DeviceContext": "the mode of a default device, known by the name of its class's module",
    },
    "torch.utils._pytree": {
        "tree_leaves": "the tensors within what a function is given and returns",
    },
    "a function that torch.compile meets": {
        "_dynamo_marked_constant": "set, so that torch.compile runs the function and does not trace it",
    },
    "a tensor": {
        "_is_zerotensor": "a tensor of zeros that has no memory",
        "_backward_hooks": "whether hooks see a parameter's gradient",
        "_post_accumulate_grad_hooks": "the same",
    },
    "a module": {
        "_modules": "the modules within, without the cost of an attribute",
        "_parameters": "the parameters, likewise",
        "_buffers": "the buffers, likewise",
        "_call_impl": "what a call runs, which some replace",
        "_wrapped_call_impl": "the same",
        "_compiled_call_impl": "what module.compile() made",
        "_forward_hooks": "whether hooks see a call",
        "_forward_pre_hooks": "the same",
        "_forward_pre_hooks_with_kwargs": "the same",
        "_backward_hooks": "the same of backward",
        "_backward_pre_hooks": "the same",
    },
    "an optimizer": {
        "_optimizer_step_pre_hooks": "whether hooks see a step",
        "_optimizer_step_post_hooks": "the same",
        "_opt_called": "set, so that a scheduler does not warn that no step was made",
    },
    "a chain of schedulers": {
        "_schedulers": "the schedulers within",
    },
    "triton.runtime.jit": {
        "native_specialize_impl": "which build of a kernel fits the arguments: kernels are launched as Triton does it",
    },
    "a kernel": {
        "device_caches": "the backend of a device",
        "pre_run_hooks": "whether hooks see a launch",
    },
    "a compiled kernel": {
        "function": "the kernel's handle",
        "packed_metadata": "its warps and shared memory, as its launcher takes them",
        "run": "its launcher",
    },
}
"""Where Triton lacks one of its names, kernels are launched through `kernel[grid](...)`: see kernels/launch.py."""


def _find(owner: str, name: str) -> Any:
    """The private object. Raises ImportError if this torch has none of that name."""
    purpose = NAMES[owner][name]
    try:
        return getattr(importlib.import_module(owner) if owner != "torch._C._functorch" else torch._C._functorch, name)
    except (AttributeError, ImportError) as error:
        raise ImportError(
            f"torch {torch.__version__} has no {owner}.{name}, which fusednn needs ({purpose}). "
            "This fusednn knows torch 2.11 to 2.14."
        ) from error


transforming: Callable[[], bool] = _find("torch._C", "_are_functorch_transforms_active")
"""Whether a torch.func transform (grad, vmap, ...) is active."""

is_traced: Callable[[], Any] = _find("torch._C", "_get_tracing_state")
"""Whether torch.jit.trace is on (its state, or None)."""

dispatch_modes: Callable[[], int] = _find("torch._C", "_len_torch_dispatch_stack")
"""How many modes of __torch_dispatch__ are on."""

function_modes: Callable[[], int] = _find("torch._C", "_len_torch_function_stack")
"""How many modes of __torch_function__ are on."""

dispatch_mode_stack: Callable[[], list[Any]] = _find("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack")
function_mode_stack: Callable[[], list[Any]] = _find("torch.overrides", "_get_current_function_mode_stack")

keeps_graph: Callable[[], bool] = _find("torch._C._autograd", "_get_current_graph_task_keep_graph")
"""Within a backward: whether the graph can be gone through again."""

_saved_hooks: Callable[[bool], Any] = _find("torch._C._autograd", "_top_saved_tensors_default_hooks")

is_batched: Callable[[torch.Tensor], bool] = _find("torch._C._functorch", "is_legacy_batchedtensor")
"""Whether `torch.autograd.grad(..., is_grads_batched=True)` made the tensor."""

unwrap_if_dead: Callable[[torch.Tensor], torch.Tensor] = _find("torch._C._functorch", "unwrap_if_dead")
"""The tensor in a wrapper of a transform that has ended; else the tensor itself."""

has_global_hook: Callable[[], bool] = _find("torch.nn.modules.module", "_has_any_global_hook")
"""Whether a hook sees every module's call."""

legacy_reduction: Callable[..., str] = _find("torch.nn._reduction", "legacy_get_string")
"""The reduction that size_average and reduce ask for."""

tree_leaves: Callable[[Any], list[Any]] = _find("torch.utils._pytree", "tree_leaves")

for _owner in ("autograd.forward_ad", "nn.modules.loss", "nn.modules.module", "optim.optimizer"):
    for _name in NAMES[f"torch.{_owner}"]:
        _find(f"torch.{_owner}", _name)  # used in their place, and missed only there


def has_saved_tensor_hooks() -> bool:
    """Whether hooks see what a Function saves for backward."""
    return _saved_hooks(True) is not None


def in_forward_mode() -> bool:
    """Whether forward-mode AD is on."""
    return forward_ad._current_level >= 0


def constant_under_compile(function: Function) -> Function:
    """Mark `function`, so that torch.compile runs it while it traces, and takes the result for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
