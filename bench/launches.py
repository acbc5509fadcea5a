"""What a launch costs in Python, for a GPU that is not there: ours, and Triton's own `kernel[grid](...)`.

`python -m bench.launches`, without TRITON_INTERPRET. Triton compiles and does all that it does for a launch; only the
launcher, which would call the CUDA driver, does nothing. Tensors are on the CPU and deny it.
"""

import os
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget


class Driver:
    """A driver for an H100, or another, that is not there: what reached a launcher is the last of `launches`."""

    def __init__(self, architecture: int = 90) -> None:
        self.target = GPUTarget("cuda", architecture, 32)
        self.device = self.home = 0
        self.stream = 7
        self.loaded = 0
        self.launches: list[tuple[Any, ...]] = []
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    def install(self) -> None:
        """Triton launches with this driver, and PyTorch's tensors say that they are on its device `home`."""
        triton.runtime.driver.set_active(self)
        torch.Tensor.is_cpu = False
        torch.Tensor.get_device = lambda tensor: self.home  # type: ignore[assignment, method-assign]
        torch.accelerator.current_device_index = self.get_current_device
        torch.accelerator.device_index = self.switched_to  # type: ignore[assignment, misc]

    def record(self) -> None:
        """From now on the launchers write down their arguments, and call the hooks as Triton's do."""

        def launcher(*arguments: Any) -> None:
            metadata, enter, leave = arguments[6:9]
            for hook in (enter, leave):
                if hook is not None:
                    hook(metadata)
            self.launches.append(arguments)

        self.launcher_cls = lambda source, metadata: launcher

    @contextmanager
    def switched_to(self, device: int) -> Iterator[None]:
        """That device is current."""
        before, self.device = self.device, device
        yield
        self.device = before

    def get_current_device(self) -> int:
        """Triton asks at each launch."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """Another one for each device."""
        return self.stream + 1000 * device

    def get_current_target(self) -> GPUTarget:
        """An H100, or another."""
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton asks about."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and the most threads; the function is another for each binary."""
        self.loaded += 1
        return 1, 1000 + self.loaded, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing."""


def microseconds(call: Callable[[], Any]) -> float:
    """The least of many short runs: others use this machine too."""
    return min(timeit.repeat(call, number=300, repeat=300)) / 300 * 1e6


def main() -> None:
    """Print the table."""
    Driver().install()
    from fusednn.kernels import cross_entropy, launch, linear, numerics

    if numerics.INTERPRETED:
        raise SystemExit("not under TRITON_INTERPRET=1")
    launches: list[tuple[Any, ...]] = []
    for module in (linear, cross_entropy):
        module.launch = lambda *arguments: launches.append(arguments)  # type: ignore[attr-defined]
    x, w, b = torch.randn(64, 64), torch.randn(128, 64), torch.randn(128)
    linear.linear_forward(x, w, b, True)
    labels = torch.randint(0, 10, (64,))
    cross_entropy.cross_entropy_forward(torch.randn(64, 10), labels, None, -100, "mean", 0.0, True)
    kept = "kept" if launch.DIRECT else "NOT kept"
    print(f"Triton {triton.__version__}, PyTorch {torch.__version__}, {os.cpu_count()} CPUs; kernels are {kept}")
    for kernel, plan, *arguments in launches:
        ours = microseconds(lambda k=kernel, p=plan, a=arguments: launch.launch(k, p, *a))  # type: ignore[misc]
        theirs = microseconds(lambda k=kernel, p=plan, a=arguments: k[p.grid](*a, **p.options))  # type: ignore[misc]
        print(f"{kernel.fn.__name__}: launch {ours:.2f} us, kernel[grid] {theirs:.2f} us")


if __name__ == "__main__":
    main()
