"""What fusednn.functional takes and refuses, held against torch.nn.functional."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn import functional
from tests.accuracy import DTYPES


def _calls() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Bad calls by name: the operation, its arguments, and its keyword arguments."""
    x, w, b = torch.randn(4, 9), torch.randn(5, 9), torch.randn(5)
    logits, target = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
    return {
        "features": ("linear", (torch.randn(4, 8), w, b), {}),
        "features, unbatched": ("linear", (torch.randn(8), w, b), {}),
        "weight of another dtype": ("linear", (x, w.double(), b), {}),
        "bias of another dtype": ("linear", (x, w, b.double()), {}),
        "input of another dtype": ("linear", (x.bfloat16(), w, b), {}),
        "bias too short": ("linear", (x, w, b[:4]), {}),
        "0-d input": ("linear", (torch.tensor(1.0), w, b), {}),
        "3-d weight": ("linear", (x, w[None], b), {}),
        "list as weight": ("linear", (x, [1.0], b), {}),
        "list as input": ("linear", ([1.0], w, b), {}),
        "label too large": ("cross_entropy", (logits, torch.tensor([0, 10, 2, 3])), {}),
        "label negative": ("cross_entropy", (logits, torch.tensor([0, -1, 2, 3])), {}),
        "batch sizes": ("cross_entropy", (logits, target[:3]), {}),
        "target of one column": ("cross_entropy", (logits, target[:, None]), {}),
        "long target like the input": ("cross_entropy", (logits, torch.zeros(4, 10, dtype=torch.int64)), {}),
        "float labels": ("cross_entropy", (logits, target.float()), {}),
        "bool labels": ("cross_entropy", (logits, target.bool()), {}),
        "integer logits": ("cross_entropy", (logits.long(), target), {}),
        "reduction": ("cross_entropy", (logits, target), {"reduction": "avg"}),
        "no reduction": ("cross_entropy", (logits, target), {"reduction": None}),
        "smoothing": ("cross_entropy", (logits, target), {"label_smoothing": 1.1}),
        "target on another device": ("cross_entropy", (logits, target.to("meta")), {}),
        "list as target": ("cross_entropy", (logits, [0, 1, 2, 3]), {}),
        "bool ignore_index": ("cross_entropy", (logits, target), {"ignore_index": True}),
        "ignore_index past 64 bits": ("cross_entropy", (logits, target), {"ignore_index": 2**63}),
        "float ignore_index": ("cross_entropy", (logits, target), {"ignore_index": 1.5}),
        "no ignore_index": ("cross_entropy", (logits, target), {"ignore_index": None}),
        "no ignore_index, probabilities": ("cross_entropy", (logits, logits.softmax(1)), {"ignore_index": None}),
        "ignore_index, probabilities": ("cross_entropy", (logits, logits.softmax(1)), {"ignore_index": 1}),
        "class weights, too few": ("cross_entropy", (logits, target, torch.ones(9)), {}),
        "class weights, a matrix": ("cross_entropy", (logits, target, torch.ones(10, 1)), {}),
        "class weights, a list": ("cross_entropy", (logits, target, [1.0] * 10), {}),
        "class weights of another dtype": ("cross_entropy", (logits, target, torch.ones(10).double()), {}),
        "class weights on another device": ("cross_entropy", (logits, target, torch.ones(10, device="meta")), {}),
        "blocks of another size": ("cross_entropy", (torch.randn(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64)), {}),
        "blocks, no labels for them": ("cross_entropy", (torch.randn(2, 3, 5), torch.zeros(2, dtype=torch.int64)), {}),
        "blocks, label too large": ("cross_entropy", (torch.randn(1, 3, 2), torch.tensor([[0, 3]])), {}),
        "no classes": ("cross_entropy", (torch.randn(4, 0), target), {}),
        "probabilities with ignore_index": (
            "linear_cross_entropy",
            (x, torch.randn(10, 9), logits.softmax(1)),
            {"ignore_index": -100},
        ),
        "classes of another weight": ("linear_cross_entropy", (x, torch.randn(10, 8), target), {}),
        "linear label too large": ("linear_cross_entropy", (x, w, torch.tensor([0, 5, 2, 3])), {}),
        "0-d logits": ("cross_entropy", (torch.tensor(1.0), torch.tensor(0)), {}),
    }


def _outcome(call: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    with contextlib.suppress(AttributeError):
        try:
            return call(*arguments, **options)
        except Exception as error:
            return type(error), str(error)
    raise AssertionError("an AttributeError is nobody's answer to a bad argument")


@pytest.mark.parametrize("name", _calls())
def test_bad_calls_raise_what_pytorch_raises(name: str) -> None:
    operation, arguments, options = _calls()[name]
    if not hasattr(F, operation):
        pytest.skip(f"this PyTorch has no {operation}")
    right = _outcome(getattr(F, operation), arguments, options)
    assert isinstance(right, tuple), f"PyTorch accepts it: {right}"
    assert _outcome(getattr(functional, operation), arguments, options) == right
    if operation == "linear":
        assert _outcome(functional.linear_relu, arguments, options) == right


@pytest.mark.parametrize("operand", ["weight", "bias"])
def test_devices_differ(operand: str) -> None:
    """PyTorch itself reads whatever lies in memory where a CPU tensor meets a meta one."""
    arguments = {"input": torch.randn(4, 9), "weight": torch.randn(5, 9), "bias": torch.randn(5)}
    arguments[operand] = arguments[operand].to("meta")
    for operation in (functional.linear, functional.linear_relu):
        with pytest.raises(RuntimeError, match=f"same device.*input is on cpu.*{operand} is on meta"):
            operation(**arguments)
    target = torch.tensor([0, 1, 2, 3])
    arguments = {f"linear_{name}": arguments[name] for name in ("weight", "bias")} | {"input": arguments["input"]}
    for labels in (target, torch.rand(4, 5)):
        with pytest.raises(RuntimeError, match=f"same device.*input is on cpu.*linear_{operand} is on meta"):
            functional.linear_cross_entropy(target=labels, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_pytorchs_result_dtype(dtype: torch.dtype, device: str) -> None:
    x, w = torch.randn(4, 3, device=device).to(dtype), torch.randn(5, 3, device=device).to(dtype)
    y = functional.linear_relu(x, w)
    loss = functional.cross_entropy(y, torch.tensor([0, 1, 2, 3], device=device))
    assert y.dtype == loss.dtype == dtype
