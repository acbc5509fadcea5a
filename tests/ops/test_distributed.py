"""Two processes that share the work, DDP and FSDP2, against one process of plain PyTorch that does it all.

Each test starts this file twice, as a program: two ranks over gloo, with the kernels in the Triton interpreter. They
train on a half of the batch each, and must end with the parameters that plain PyTorch has after the whole batch. What
only the ranks need is imported by them: it takes a second, and every process of pytest imports this file.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn import reference

ROOT = Path(__file__).parents[2]
LIMIT = 240  # seconds until a test whose ranks wait for each other for ever fails
STEPS = 3

Parameters = dict[str, Tensor]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def half(rank: int) -> tuple[Tensor, Tensor]:
    """Of equally many labels each, and none ignored: the mean of two halves' means is that of the whole."""
    x, target = batch()
    return x[4 * rank : 4 * rank + 4], target[4 * rank : 4 * rank + 4]


def made(model: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return model(6, 8, 4)


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def train(
    model: nn.Module,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    criterion: nn.Module,
    *batches: tuple[Tensor, Tensor],
    around: Callable[[], AbstractContextManager[Any]] = fusednn.strict,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Steps of `optimizer` on the mean over `batches`, all but the last one inside `no_sync`.

    PyTorch's own modules make no decision that strict would forbid: the same loop trains them.
    """
    optimize = optimizer(model.parameters())
    for _ in range(STEPS):
        optimize.zero_grad()
        for i, (x, target) in enumerate(batches, 1):
            with no_sync() if i < len(batches) else nullcontext():
                with around():
                    logits = model(x)
                with fusednn.strict():
                    loss = criterion(logits, target) / len(batches)
                loss.backward()
        optimize.step()


def alone(
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    model: Callable[..., nn.Module] = reference.SimpleNN,
) -> Parameters:
    """What `optimizer` makes of plain PyTorch's parameters, by the whole batch."""
    plain = made(model)
    train(plain, optimizer, nn.CrossEntropyLoss(), batch())
    return plain.state_dict()


def equal(model: nn.Module, right: Parameters, **tolerance: float) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(right), **tolerance)


def parallel(model: nn.Module, **options: Any) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, **options)


def ddp(rank: int) -> None:
    model = made(fusednn.SimpleNN)
    train(parallel(model), sgd, fusednn.CrossEntropyLoss(), half(rank))
    equal(model, alone(sgd))


def ddp_bucket_views(rank: int) -> None:
    """The gradients are views of DDP's buckets, and are accumulated there."""
    model = made(fusednn.SimpleNN)
    views = parallel(model, gradient_as_bucket_view=True, static_graph=True)
    train(views, adam, fusednn.CrossEntropyLoss(), half(rank))
    equal(model, alone(adam))


def ddp_no_sync(rank: int) -> None:
    model, (x, target) = made(fusednn.SimpleNN), half(rank)
    both, quarters = parallel(model), zip(x.split(2), target.split(2), strict=True)
    train(both, sgd, fusednn.CrossEntropyLoss(), *quarters, no_sync=both.no_sync)
    equal(model, alone(sgd))


class Branched(nn.Module):
    """A network with a linear layer beside it that only every second call goes through."""

    def __init__(self, model: Callable[..., nn.Module], linear: Callable[..., nn.Module], *sizes: int) -> None:
        super().__init__()
        self.model, self.shortcut, self.calls = model(*sizes), linear(sizes[0], sizes[-1]), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.model(x)
        return logits + self.shortcut(x) if self.calls % 2 == 0 else logits


def ddp_unused(rank: int) -> None:
    model = made(lambda *sizes: Branched(fusednn.SimpleNN, fusednn.Linear, *sizes))
    train(parallel(model, find_unused_parameters=True), sgd, fusednn.CrossEntropyLoss(), half(rank))
    equal(model, alone(sgd, lambda *sizes: Branched(reference.SimpleNN, nn.Linear, *sizes)))


def ddp_compiled(rank: int) -> None:
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    model, backend = made(fusednn.SimpleNN), AotEagerAndRecordGraphs()
    train(
        torch.compile(parallel(model), backend=backend), sgd, fusednn.CrossEntropyLoss(), half(rank), around=nullcontext
    )
    assert "fusednn.linear" in "".join(str(graph.graph) for graph in backend.fw_graphs)
    equal(model, alone(sgd))


def shard(model: nn.Module, layers: bool, **options: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in (model.fc1, model.fc2, model) if layers else (model,):
        fully_shard(module, mesh=mesh, **options)
    return model


def gathered(model: nn.Module) -> Parameters:
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def fsdp(rank: int) -> None:
    """Sharded as a whole the model stays fused, which strict would tell."""
    model = shard(made(fusednn.SimpleNN), layers=False)
    train(model, adam, fusednn.CrossEntropyLoss(), half(rank))
    torch.testing.assert_close(gathered(model), dict(alone(adam)))


def fsdp_layers(rank: int) -> None:
    """FSDP hooks what it shards, fc1 too; its hooks do not look at the output, and the layer stays fused."""
    model = shard(made(fusednn.SimpleNN), layers=True)
    train(model, adam, fusednn.CrossEntropyLoss(), half(rank))
    torch.testing.assert_close(gathered(model), dict(alone(adam)))
    decisions = fusednn.explain(model, half(rank)[0])
    assert [(decision.operation, decision.implementation) for decision in decisions] == [
        ("linear_relu", "Triton interpreter"),
        ("linear", "Triton interpreter"),
    ]


def fsdp_bfloat16(rank: int) -> None:
    """The layers in bfloat16, against PyTorch's under the same policy: they round the same way, mostly."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layers in (False, True):
        ours, plain = (shard(made(model), layers, mp_policy=policy) for model in (fusednn.SimpleNN, reference.SimpleNN))
        train(ours, sgd, fusednn.CrossEntropyLoss(), half(rank))
        train(plain, sgd, nn.CrossEntropyLoss(), half(rank))
        torch.testing.assert_close(gathered(ours), gathered(plain), rtol=0, atol=5e-3)
        assert ours(half(rank)[0]).dtype is torch.bfloat16


def tensor_parallel(rank: int) -> None:
    """DTensors: each rank has a half of the weights and the whole batch. PyTorch serves them, and explain says so."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, halves = made(fusednn.SimpleNN), {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), halves)
    train(model, sgd, fusednn.CrossEntropyLoss(), batch(), around=nullcontext)
    torch.testing.assert_close(gathered(model), dict(alone(sgd)))
    assert {decision.implementation for decision in fusednn.explain(model, batch()[0])} == {"PyTorch"}


CASES: dict[str, tuple[Callable[[int], None], ...]] = {
    "ddp": (ddp, ddp_bucket_views, ddp_no_sync, ddp_unused, ddp_compiled),
    "fsdp": (fsdp, fsdp_layers, fsdp_bfloat16),
    "tensor parallel": (tensor_parallel,),
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, tmp_path: Path) -> None:
    """All of one kind in one start, which takes most of the time. The first case that fails ends its rank."""
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    logs, ranks = [tmp_path / "rank0", tmp_path / "rank1"], []
    deadline = time.monotonic() + LIMIT
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, __file__, name, str(rank), str(tmp_path / "store")]
            with log.open("w") as file:
                ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(max(0, deadline - time.monotonic())) for process in ranks]
        except subprocess.TimeoutExpired:
            codes = [process.poll() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(f"rank {rank}:\n{log.read_text()[-5000:]}" for rank, log in enumerate(logs))


def main(name: str, rank: str, store: str) -> None:
    import torch.distributed as dist

    patience = timedelta(seconds=LIMIT / 2)  # so that a rank whose partner is gone says where it waits
    dist.init_process_group("gloo", f"file://{store}", patience, world_size=2, rank=int(rank))
    for case in CASES[name]:
        case(int(rank))
        print(f"{case.__name__} passed at {time.process_time():.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
