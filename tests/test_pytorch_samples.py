"""PyTorch's own samples and error inputs, from its OpInfo and ModuleInfo databases, put to our functions and modules.

Twice: as a plain CPU tensor goes, to PyTorch's functions, and to the kernels. How many ran is printed at the end of the
run, and a test fails when it is fewer than there were with torch 2.13.
"""

import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn import dispatch, functional
from tests.accuracy import DTYPES

pytestmark = [
    pytest.mark.filterwarnings("ignore:linear_cross_entropy"),  # PyTorch's, of options that it ignores
    pytest.mark.filterwarnings("ignore:Possible nested set"),  # PyTorch's, of its regular expressions
]


def internals(name: str) -> ModuleType:
    """A module of torch.testing._internal. Importing one forbids to set flags of torch.backends, which others do."""
    import importlib

    module = importlib.import_module(f"torch.testing._internal.{name}")
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return module


@pytest.fixture(params=["plain CPU", "interpreter"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who serves."""
    monkeypatch.setattr(dispatch, "INTERPRETED", request.param == "interpreter")
    return request.param


OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    # ours, PyTorch's, and how many samples there are of each dtype
    "nn.functional.linear": (functional.linear, F.linear, 18),
    "nn.functional.cross_entropy": (functional.cross_entropy, F.cross_entropy, 21),
    "nn.functional.linear_cross_entropy": (
        functional.linear_cross_entropy, getattr(F, "linear_cross_entropy", functional.linear_cross_entropy), 329,
    ),
}  # fmt: skip
MODULES: dict[str, tuple[type[nn.Module], int]] = {
    "nn.Linear": (fusednn.Linear, 3),
    "nn.CrossEntropyLoss": (fusednn.CrossEntropyLoss, 105),
    "nn.LinearCrossEntropyLoss": (fusednn.LinearCrossEntropyLoss, 857),
}


def gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of a sum with weights, so that no gradient is 1 or the same for all."""
    weights = torch.linspace(0.5, 2, output.numel(), dtype=torch.float64).reshape(output.shape)
    return torch.autograd.grad((output.double() * weights).sum(), leaves, allow_unused=True)


def same(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=tolerance, atol=tolerance)


def leaves_of(*arguments: Any) -> list[Tensor]:
    return [tensor for tensor in arguments if isinstance(tensor, Tensor) and tensor.requires_grad]


def cases(names: dict[str, Any], dtypes: list[torch.dtype], quick: tuple[str, torch.dtype]) -> list[Any]:
    """Each name with each dtype. The many samples of linear_cross_entropy, but `quick`, are for `make test-full`."""

    def marks(name: str, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
        many = name in ("nn.functional.linear_cross_entropy", "nn.LinearCrossEntropyLoss")
        return [pytest.mark.slow] if many and (name, dtype) != quick else []

    return [pytest.param(name, dtype, marks=marks(name, dtype)) for name in names for dtype in dtypes]


@pytest.mark.parametrize(
    ("name", "dtype"), cases(OPERATIONS, DTYPES, ("nn.functional.linear_cross_entropy", torch.float32)), ids=str
)
def test_samples(name: str, dtype: torch.dtype, path: str, record_property: Callable[[str, Any], None]) -> None:
    ours, theirs, least = OPERATIONS[name]
    count = 0
    for info in internals("common_methods_invocations").op_db:
        if info.name != name:
            continue
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            arguments = (sample.input, *sample.args)
            plain = sample.kwargs | ({"options": None} if "options" in sample.kwargs else {})
            value, right = ours(*arguments, **sample.kwargs), theirs(*arguments, **plain)
            same(value, right, dtype)
            leaves = leaves_of(*arguments, *sample.kwargs.values())
            same(gradients(value, leaves), gradients(right, leaves), dtype)
            count += 1
    record_property("samples", (name, path, count))
    assert count >= least or not hasattr(F, name.split(".")[-1])


def module_info(name: str) -> Any:
    """None where PyTorch is too old to have it."""
    return next((info for info in internals("common_modules").module_db if info.name == name), None)


@pytest.mark.parametrize(
    ("name", "dtype"), cases(MODULES, [torch.float64, torch.float32], ("", torch.float32)), ids=str
)
def test_module_samples(name: str, dtype: torch.dtype, path: str, record_property: Callable[[str, Any], None]) -> None:
    (kind, least), info, count = MODULES[name], module_info(name), 0
    if info is None:
        pytest.skip(f"{name} is not in this PyTorch")
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    for sample in samples:
        constructor = dict(sample.constructor_input.kwargs)
        if "Linear" in name:
            constructor |= {"device": "cpu", "dtype": dtype}
        ours = kind(*sample.constructor_input.args, **constructor)
        theirs = info.module_cls(*sample.constructor_input.args, **constructor)
        theirs.load_state_dict(ours.state_dict())
        arguments = (*sample.forward_input.args, *sample.forward_input.kwargs.values())
        value, right = ours(*arguments), theirs(*arguments)
        same(value, right, dtype)
        for tensor, other in zip(
            gradients(value, leaves_of(*arguments, *ours.parameters())),
            gradients(right, leaves_of(*arguments, *theirs.parameters())),
            strict=True,
        ):
            same(tensor, other, dtype)
        count += 1
    record_property("samples", (name, path, count))
    assert count >= least


def test_module_errors(path: str, record_property: Callable[[str, Any], None]) -> None:
    """The class of the exception and what PyTorch says."""
    count = 0
    for name, (kind, _) in MODULES.items():
        info = module_info(name)
        if info is None or info.module_error_inputs_func is None:
            continue
        errors = info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
        for error in errors:
            made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
            with pytest.raises(error.error_type, match=error.error_regex):
                kind(*made.args, **made.kwargs)(*given.args, **given.kwargs)
            count += 1
    record_property("samples", ("error inputs of modules", path, count))
    if not count and torch.__version__ < "2.13":
        pytest.skip("this torch has none")
    assert count >= 7


def operation_errors() -> Iterator[tuple[Callable[..., Tensor], Any]]:
    for info in internals("common_methods_invocations").op_db:
        if info.name in OPERATIONS and info.error_inputs_func is not None and not info.variant_test_name:
            for error in info.error_inputs("cpu"):
                yield OPERATIONS[info.name][0], error


def test_operation_errors(path: str, record_property: Callable[[str, Any], None]) -> None:
    count = 0
    for operation, error in operation_errors():
        sample = error.sample_input
        with pytest.raises(error.error_type, match=re.compile(error.error_regex)):
            operation(sample.input, *sample.args, **sample.kwargs)
        count += 1
    record_property("samples", ("error inputs of operations", path, count))
    assert count >= 6 or not hasattr(F, "linear_cross_entropy")
