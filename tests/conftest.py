"""How every test runs: kernels in the Triton interpreter on the CPU, or compiled, on the GPU, under `pytest -m gpu`.

A test that launches kernels takes the `device` fixture and so exists twice: for the interpreter and, marked gpu, for
a GPU. One process cannot do both, since Triton reads TRITON_INTERPRET once.
"""

import os
from collections.abc import Iterator
from types import ModuleType

import pytest


def _wants_gpu(config: pytest.Config) -> bool:
    return config.option.markexpr == "gpu"


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TRITON_INTERPRET"] = "0" if _wants_gpu(config) else "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or poisoned_memory makes cuBLAS complain


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    reason = None
    if not _wants_gpu(config):
        reason = "needs a GPU: run `pytest -m gpu` on a machine that has one"
    elif not torch.cuda.is_available():
        reason = "needs a GPU, and this machine has none"
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "gpu" in report.keywords]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests need a GPU and did not run")
    samples: dict[tuple[str, str], int] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "samples":
                what, path, count = value
                samples[what, path] = samples.get((what, path), 0) + count
    for (what, path), count in samples.items():
        terminalreporter.write_line(f"PyTorch's samples of {what}: {count} passed, {path}")


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's tensors live: the kernels serve both."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element nobody wrote is seen; and seed the generators."""
    import torch

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(not request.node.get_closest_marker("unpoisoned"), warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _clear_plans(*modules: ModuleType) -> None:
    for module in modules:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Configurations so small that 33 of anything takes several programs and several trips through every loop."""
    from fusednn.kernels import cross_entropy, linear, mlp_training, updates
    from fusednn.kernels.launch import LaunchConfig

    for key in linear.CONFIGS:
        monkeypatch.setitem(linear.CONFIGS, key, ((16, 16, 16, 4, 2),) * len(linear.ROW_LIMITS))
    monkeypatch.setattr(linear, "SPLIT_TRIPS", 1)
    monkeypatch.setattr(linear, "SUM_CONFIG", LaunchConfig(1, 64))
    for key in cross_entropy.CONFIGS:
        monkeypatch.setitem(cross_entropy.CONFIGS, key, {(4, 4): 4, (2, 8): 4})
    for key in cross_entropy.LONG_CONFIGS:
        monkeypatch.setitem(cross_entropy.LONG_CONFIGS, key, LaunchConfig(1, 8))
        monkeypatch.setitem(cross_entropy.APART_CONFIGS, key, LaunchConfig(4, 4))
    monkeypatch.setattr(cross_entropy, "COUNT_CONFIG", LaunchConfig(4, 1))
    monkeypatch.setattr(cross_entropy, "SUM_CONFIG", LaunchConfig(4, 1))
    monkeypatch.setattr(cross_entropy, "SCALE_CONFIG", LaunchConfig(16, 1))
    monkeypatch.setattr(cross_entropy, "MOST_SCALERS", 2)
    monkeypatch.setattr(cross_entropy, "MOST_COUNTS", 4)
    for key in mlp_training.CONFIGS:
        monkeypatch.setitem(mlp_training.CONFIGS, key, ((None, None, None, ("streamed", 16, 16, 16, 4, 1)),))
    monkeypatch.setattr(updates, "STEP_CONFIG", LaunchConfig(1, 16))
    kernels = (linear, cross_entropy, mlp_training, updates)
    _clear_plans(*kernels)
    yield
    _clear_plans(*kernels)


@pytest.fixture
def long_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Configurations in which rows of two classes are longer than a program of cross entropy holds."""
    from fusednn.kernels import cross_entropy
    from fusednn.kernels.launch import LaunchConfig

    for key in cross_entropy.CONFIGS:
        monkeypatch.setitem(cross_entropy.CONFIGS, key, {(16, 1): 4})
    for key in cross_entropy.LONG_CONFIGS:
        monkeypatch.setitem(cross_entropy.LONG_CONFIGS, key, LaunchConfig(8, 16))
        monkeypatch.setitem(cross_entropy.APART_CONFIGS, key, LaunchConfig(16, 4))
    _clear_plans(cross_entropy)
    yield
    _clear_plans(cross_entropy)
