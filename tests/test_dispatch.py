"""Who serves, and that explain and strict tell the truth about it."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from fusednn import Decision, FallbackError, SimpleNN, explain, functional, strict


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


@pytest.mark.parametrize(
    ("hide_triton", "reason"),
    [
        ("", "TRITON_INTERPRET"),
        ("import sys; sys.modules['triton'] = None; del sys.modules['triton']", "TRITON_INTERPRET"),
    ],
)
def test_plain_cpu_is_pytorchs(hide_triton: str, reason: str) -> None:
    """Without the interpreter CPU tensors are PyTorch's, and Triton is not even imported."""
    program = f"{hide_triton}\nREASON = {reason!r}\n{PLAIN}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "plain\n", result.stderr
