"""The tests of training run three times: in the interpreter, on a GPU, and on a CPU by the native engine."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts a job in the background with SIGINT ignored, and Python leaves it so: nothing would end a run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu), "native"],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a test's tensors live. The native engine has nothing of Triton, so the interpreter need not be off."""
    if request.param == "native":
        serve_natively(monkeypatch)
        return "cpu"
    return request.param


def serve_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the native engine serve CPU tensors, as it does outside of the interpreter, and nets of any size."""
    from fusednn.training import plan  # not before ../conftest.py has set TRITON_INTERPRET
    from fusednn.training.engines import native

    if not native.MACHINES:
        pytest.skip("the native engine was not built")
    monkeypatch.setattr(plan, "on_plain_cpu", lambda x: x.is_cpu)
    monkeypatch.setattr(native, "most_products", lambda threads, fused: 2**62)
