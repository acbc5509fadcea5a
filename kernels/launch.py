"""How kernels are launched: the configuration, as data, and the one call that launches.

`LaunchConfig` says how one launch is tiled; each kernel file keeps a table of them beside its kernels, with
the measurement that chose a row, or the word unmeasured. Every launcher launches through :func:`launch`, so what
it would compile can be recorded there: `bench/builds.py` does, to count registers and spills without a GPU.

`kernel[grid](...)` binds, specialises and builds a key in Python, which takes longer than the launch. So the compiled
kernels are kept with their plan, and run as Triton runs them, wherever that is all that Triton would do.
"""

import threading
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from triton.compiler import CompiledKernel
from triton.runtime import jit

from .numerics import INTERPRETED

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
"""The dtypes that the kernels take, with Triton's names."""


@dataclass(frozen=True)
class LaunchConfig:
    """How one launch is tiled.

    A matrix product gives a program `block_m` rows and `block_n` columns of the output and reduces `block_k`
    at a time; a row-wise kernel gives it `block_m` rows and reads `block_n` columns at a time. `most_registers`, of an
    NVIDIA GPU's thread, are otherwise the compiler's choice.
    """

    block_m: int
    block_n: int
    block_k: int = 1
    num_warps: int = 4
    num_stages: int = 2
    most_registers: int | None = None


class Launch(NamedTuple):
    """What a launcher has decided about one launch: the grid and the keyword arguments of the kernel.

    `kept` has what was compiled for it, by kernel, device and specialisation, and the compile-time arguments with it.
    """

    grid: tuple[int]
    options: dict[str, Any]
    kept: dict[Any, tuple[CompiledKernel, tuple[Any, ...]]]


def plan(programs: int, config: LaunchConfig, **constexprs: Any) -> Launch:
    """A launch of `programs` programs. Raises ValueError where a grid does not hold as many."""
    if programs >= 2**31:
        raise ValueError(f"{programs} programs do not fit a launch grid of at most {2**31 - 1}")
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.most_registers is not None:
        options["maxnreg"] = config.most_registers
    return Launch((programs,), constexprs | options, {})


RUN, RUNTIME, COMPILATION = jit.JITFunction.run, jit.knobs.runtime, jit.knobs.compilation

NAMES = """
_do_compile _pack_args active callable compilation compute_cache_key debug device_caches driver function get
get_current_device get_current_stream instrumentation_mode items knobs launch_enter_hook launch_exit_hook
launch_metadata len object packed_metadata pre_run_hooks run runtime RuntimeError used_global_vals values
"""
SOME_NAMES = "add_stages_inspection_hook append fpsan_homomorphic_casts hasattr result"
"""What `JITFunction.run` names in Triton 3.6 to 3.9, and in some of them. One that names more may have a longer key."""

DIRECT = (
    not INTERPRETED
    and hasattr(jit, "native_specialize_impl")
    and {*getattr(RUN, "__code__", plan.__code__).co_names} - {*SOME_NAMES.split()} == {*NAMES.split()}
)
"""Whether this Triton launches as those do, and compiled kernels are kept. `kernel[grid](...)` is right for any."""


def is_plain(kernel: Any) -> bool:
    """Whether Triton would just run a compiled kernel: no hook, profiler or option for debugging is in its way."""
    return getattr(type(kernel), "run", None) is RUN and not (
        getattr(RUNTIME.launch_enter_hook, "calls", RUNTIME.launch_enter_hook)
        or getattr(RUNTIME.launch_exit_hook, "calls", RUNTIME.launch_exit_hook)
        or RUNTIME.add_stages_inspection_hook
        or RUNTIME.debug
        or COMPILATION.instrumentation_mode
        or kernel.pre_run_hooks
    )


def launch(kernel: Any, plan: Launch, *arguments: Any) -> None:
    """Launch `kernel` on the device of the first argument, a tensor, and on its current stream.

    Raises RuntimeError for a CPU tensor outside the interpreter.
    """
    tensor = arguments[0]
    if tensor.is_cpu:
        if not INTERPRETED:
            raise RuntimeError("the Triton kernels take CPU tensors only under TRITON_INTERPRET=1")
        interpret(kernel, plan, [readable(argument) for argument in arguments])
        return
    device = tensor.get_device()
    if device != torch.accelerator.current_device_index():
        with torch.accelerator.device_index(device):
            launch(kernel, plan, *arguments)
        return
    if not (DIRECT and is_plain(kernel)):
        kernel[plan.grid](*arguments, **plan.options)
        return
    # Triton's own rule, for tuples too; where a kernel says do_not_specialize, it tells apart more than Triton would
    types = jit.native_specialize_impl(kernel.device_caches[device][3], arguments, False, True, True)
    key = (id(kernel), device, types)
    kept = plan.kept.get(key)
    if kept is None:
        compiled = kernel[plan.grid](*arguments, **plan.options)
        if isinstance(compiled, CompiledKernel):  # not None, nor one that is still being compiled
            constants = tuple(plan.options[parameter.name] for parameter in kernel.params[len(arguments) :])
            plan.kept[key] = compiled, constants
        return
    compiled, constants = kept
    stream = jit.driver.active.get_current_stream(device)
    state = (stream, compiled.function, compiled.packed_metadata, None, None, None)  # None: for hooks, and no hooks
    compiled.run(plan.grid[0], 1, 1, *state, *arguments, *constants)


_interpreting = threading.RLock()


def interpret(kernel: Any, plan: Launch, arguments: list[Any]) -> None:
    """Run `kernel` in Triton's interpreter, one at a time: it puts its own functions in the place of triton.language's.

    NumPy does the arithmetic in it, and warns of NaN and inf, also in rows past the end that no mask lets out.
    """
    with _interpreting, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        kernel[plan.grid](*arguments, **plan.options)


def readable(x: Any) -> Any:
    """An argument as it is, or zeros for a tensor of torch._efficientzerotensor, which has no memory.

    Raises RuntimeError for another tensor that has none, or less than it needs.
    """
    if isinstance(x, tuple):
        return type(x)(*map(readable, x)) if hasattr(x, "_fields") else tuple(map(readable, x))
    if not isinstance(x, torch.Tensor):
        return x
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    ends = [(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    needed = (x.storage_offset() + 1 + sum(ends)) * x.itemsize
    if x.numel() and (not x.data_ptr() or x.untyped_storage().nbytes() < needed):
        raise RuntimeError(f"a tensor of {list(x.shape)} has no memory, or less than that")
    return x


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for a positive b."""
    return -(-a // b)
