"""Who serves, and that explain and strict tell the truth about it."""

import copy
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from fusednn import CrossEntropyLoss, Decision, FallbackError, SimpleNN, dispatch, explain, functional, strict, warmup
from fusednn.kernels import cross_entropy as cross_entropy_kernels
from fusednn.kernels import linear as linear_kernels


def test_explain_names_each_operation(device: str) -> None:
    x, w = torch.randn(5, 6, device=device), torch.randn(4, 6, device=device)
    target = torch.zeros(5, dtype=torch.int64, device=device)

    def program() -> None:
        functional.cross_entropy(functional.linear(functional.linear_relu(x, w), torch.eye(4, device=device)), target)

    decisions = explain(program)
    assert [decision.operation for decision in decisions] == ["linear_relu", "linear", "cross_entropy"]
    name = "Triton interpreter" if device == "cpu" else "Triton"
    assert {decision.implementation for decision in decisions} == {name}
    assert str(decisions[0]).startswith(f"linear_relu: {name} (cpu" if device == "cpu" else "linear_relu: Triton (cuda")


def test_decisions_print_as_a_table(device: str) -> None:
    x, w = torch.randn(5, 6, device=device), torch.randn(4, 6, device=device)
    lines = str(explain(lambda: functional.linear(functional.linear_relu(x, w)[:, :4], w[:, :4]))).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("linear_relu  Triton")
    assert lines[1].startswith("linear       Triton")
    assert lines[0].index(device) == lines[1].index(device)
    assert str(explain(lambda: None)) == "no operation of fusednn"


def test_explain_does_not_train() -> None:
    model, x = SimpleNN(6, 8, 4), torch.randn(5, 6, requires_grad=True)
    explain(lambda: model(x).sum().requires_grad_() if torch.is_grad_enabled() else None)
    assert x.grad is None


def test_explain_nests_and_ends() -> None:
    x, w = torch.randn(5, 6), torch.randn(4, 6)
    inner: list[tuple[Decision, ...]] = []
    outer = explain(lambda: (functional.linear(x, w), inner.append(explain(functional.linear_relu, x, w))))
    assert [decision.operation for decision in outer] == ["linear"]
    assert [decision.operation for decision in inner[0]] == ["linear_relu"]
    with pytest.raises(TypeError):
        explain(functional.linear, x)
    functional.linear(x, w)
    assert explain(lambda: None) == ()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_strict_forbids_pytorch(dtype: torch.dtype) -> None:
    x, w = torch.ones(5, 6).to(dtype), torch.ones(4, 6).to(dtype)
    assert explain(functional.linear, x, w)[0] == Decision("linear", "PyTorch", f"no kernel for {dtype}")
    with strict(), pytest.raises(FallbackError, match=f"linear: PyTorch .no kernel for {dtype}"):
        functional.linear(x, w)
    functional.linear(x, w)


def test_strict_forbids_arguments_that_no_kernel_takes() -> None:
    x, w = torch.randn(5, 6), torch.randn(4, 6)
    with strict():
        functional.linear(x, w, torch.randn(4))
        with pytest.raises(FallbackError, match=r"linear_relu: PyTorch .*bias \[1\]"):
            functional.linear_relu(x, w, torch.randn(1))


def test_explain_tells_who_served_in_the_end() -> None:
    """The tensor alone would have been Triton's; another argument was not."""
    x, w, target = torch.randn(5, 6), torch.randn(4, 6), torch.zeros(5, dtype=torch.int64)
    (decision,) = explain(functional.linear, x, w, torch.randn(1))
    assert str(decision) == "linear: PyTorch (no kernel for weight [4, 6], bias [1])"
    (decision,) = explain(functional.cross_entropy, x, target, label_smoothing=np.float64(0.1))
    assert decision.implementation == "PyTorch"
    assert "label_smoothing" in decision.reason
    with strict(), pytest.raises(FallbackError, match="cross_entropy: PyTorch"):
        functional.cross_entropy(x, target, ignore_index=np.int64(1))


class Stateful(nn.Module):
    """A model whose forward moves buffers and draws random numbers."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.model, self.norm = SimpleNN(6, 8, 4, device=device), nn.BatchNorm1d(4, device=device)
        self.extra = nn.Parameter(torch.ones(3, device=device))  # which nothing uses

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.norm(self.model(nn.functional.dropout(x)))
        return {"logits": logits, "best": logits.argmax(1)}


def test_warmup_launches_what_training_does_and_leaves_no_trace(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    for module in (linear_kernels, cross_entropy_kernels):

        def launch(kernel: Any, *arguments: Any, original: Any = module.launch) -> None:
            names.append(kernel.__name__)
            original(kernel, *arguments)

        monkeypatch.setattr(module, "launch", launch)
    model, x = Stateful(device), torch.randn(5, 6, device=device)
    target = torch.tensor([0, 1, 2, 3, 0], device=device)
    model.extra.grad = torch.ones_like(model.extra)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    warmup(model, x)
    assert set(names) == {"linear_forward_kernel", "linear_input_grad_kernel", "linear_weight_grad_kernel"}
    warmup(lambda x, t: CrossEntropyLoss()(model.model(x), t), x, target)
    assert {"cross_entropy_kernel", "scale_gradient_kernel"} < set(names)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert torch.equal(model.extra.grad, torch.ones_like(model.extra))
    with torch.no_grad():  # compiles the backward all the same
        names.clear()
        warmup(model, x)
    assert "linear_weight_grad_kernel" in names


def test_warmup_restores_buffers_of_a_model_that_fails(device: str) -> None:
    model, before = Stateful(device), copy.deepcopy(Stateful(device).norm.state_dict())
    model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        warmup(model, torch.randn(5, 6, device=device))
    torch.testing.assert_close(dict(model.norm.state_dict()), dict(before), rtol=0, atol=0)


def test_what_pytorch_serves_by_the_kind_of_tensor(device: str) -> None:
    """Nested tensors, and torch.jit.trace, in which sizes are tensors."""
    x, w = torch.randn(5, 6, device=device), torch.randn(4, 6, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the one is a prototype, the other deprecated
        nested = torch.nested.nested_tensor([x, x[:2]])
        traced = torch.jit.trace(lambda x: functional.linear_relu(x, w), (x,))
    assert torch.equal(functional.linear(nested, w)[1], nn.functional.linear(nested, w)[1])
    assert explain(functional.linear, nested, w)[0].reason == "a nested tensor"
    torch.testing.assert_close(traced(x[:3]), functional.linear_relu(x[:3], w))


def test_explain_of_a_compiled_function() -> None:
    x, w = torch.randn(5, 6), torch.randn(4, 6)
    compiled = torch.compile(lambda x: functional.linear_relu(x, w), fullgraph=True, backend="eager")
    assert [decision.operation for decision in explain(compiled, x)] == ["linear_relu"]
    assert explain(lambda fn: functional.linear(fn, w), fn=x)


@pytest.mark.parametrize("silent", [False, True])
def test_explain_leaves_torch_compile_on(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from two threads, of which the first to begin ends first; and within a compiled function it works."""
    monkeypatch.setattr(dispatch, "_COMPILED_IS_SILENT", silent)
    begun, other_begun, ended = threading.Event(), threading.Event(), threading.Event()
    found: list[object] = []

    def first() -> None:
        found.append(explain(lambda: (begun.set(), other_begun.wait(60))))
        ended.set()

    def second() -> None:
        begun.wait(60)
        found.append(explain(lambda: (other_begun.set(), ended.wait(60))))

    torch._dynamo.reset()
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(), ()]
    counter, w = CompileCounter(), torch.randn(4, 6)

    def explained(x: torch.Tensor) -> torch.Tensor:
        explain(functional.linear_relu, x, w)
        return functional.linear_relu(x, w)

    x = torch.randn(5, 6)
    torch.testing.assert_close(torch.compile(explained, backend=counter)(x), torch.relu(x @ w.T))
    assert counter.frame_count >= 1


def test_strict_is_of_its_thread() -> None:
    x, w = torch.ones(5, 6, dtype=torch.int64), torch.ones(4, 6, dtype=torch.int64)
    results: list[object] = []
    with strict():
        thread = threading.Thread(target=lambda: results.append(functional.linear(x, w)))
        thread.start()
        thread.join()
    assert len(results) == 1


PLAIN = """
import torch
from fusednn import SimpleNN, CrossEntropyLoss, explain, strict, FallbackError
model, criterion = SimpleNN(6, 8, 4), CrossEntropyLoss()
x, target = torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)
for decision in explain(lambda: criterion(model(x), target)):
    assert decision.implementation == "PyTorch" and REASON in decision.reason, decision
try:
    with strict():
        model(x)
except FallbackError:
    pass
else:
    raise AssertionError("strict let a plain CPU tensor through")
criterion(model(x), target).backward()
import sys
assert "triton" not in sys.modules
print("plain")
"""


@pytest.mark.parametrize("hide_triton", ["", "import sys; sys.modules['triton'] = None; del sys.modules['triton']"])
def test_plain_cpu_is_pytorchs(hide_triton: str) -> None:
    """Without the interpreter CPU tensors are PyTorch's, and Triton is not even imported."""
    program = f"{hide_triton}\nREASON = 'a CPU tensor'\n{PLAIN}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "plain\n", result.stderr
