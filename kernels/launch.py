"""How kernels are launched: the configuration, as data, and the one call that launches.

`LaunchConfig` says how one launch is tiled; each kernel file keeps a table of them beside its kernels, with
the measurement that chose a row, or the word unmeasured. Every launcher launches through :func:`launch`, so what
it would compile can be recorded there: `bench/builds.py` does, to count registers and spills without a GPU.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .numerics import INTERPRETED

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
"""The dtypes that the kernels take, with Triton's names."""


@dataclass(frozen=True)
class LaunchConfig:
    """How one launch is tiled.

    A matrix product gives a program `block_m` rows and `block_n` columns of the output and reduces `block_k`
    at a time; a row-wise kernel gives it `block_m` rows and reads `block_n` columns at a time.
    """

    block_m: int
    block_n: int
    block_k: int = 1
    num_warps: int = 4
    num_stages: int = 2


class Launch(NamedTuple):
    """What a launcher has decided about one launch: the grid and the keyword arguments of the kernel."""

    grid: tuple[int]
    options: dict[str, Any]


def plan(programs: int, config: LaunchConfig, **constexprs: Any) -> Launch:
    """A launch of `programs` programs. Raises ValueError where a grid does not hold as many."""
    if programs >= 2**31:
        raise ValueError(f"{programs} programs do not fit a launch grid of at most {2**31 - 1}")
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return Launch((programs,), constexprs | options)


def launch(kernel: Any, plan: Launch, *arguments: Any) -> None:
    """Launch `kernel` on the device of the first argument, a tensor, and on its current stream.

    Raises RuntimeError for a CPU tensor outside the interpreter.
    """
    tensor = arguments[0]
    if tensor.is_cpu:
        if not INTERPRETED:
            raise RuntimeError("the Triton kernels take CPU tensors only under TRITON_INTERPRET=1")
    elif tensor.get_device() != torch.accelerator.current_device_index():
        with torch.accelerator.device_index(tensor.get_device()):
            kernel[plan.grid](*arguments, **plan.options)
        return
    kernel[plan.grid](*arguments, **plan.options)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for a positive b."""
    return -(-a // b)
