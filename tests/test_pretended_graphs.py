"""The CUDA graph of the pretended card: capturing changes nothing, replaying does what was captured."""

import pytest
import torch

from .pretended_graphs import CUDAGraph, graph


def test_a_capture_runs_nothing_and_a_replay_all() -> None:
    x, w = torch.ones(3), torch.full((3,), 2.0, requires_grad=True)
    captured = CUDAGraph()
    with graph(captured):
        y = (w * x).relu()
        (grad,) = torch.autograd.grad(y.sum(), w)
        x.add_(1)
        halves = y.view(3, 1)[:2] / 2
    assert x.tolist() == [1, 1, 1]
    for step in (1.0, 2.0, 3.0):
        captured.replay()
        assert y.tolist() == [2 * step] * 3
        assert grad.tolist() == [step] * 3
        assert halves.tolist() == [[step], [step]]
        assert x.tolist() == [step + 1] * 3


def test_a_capture_may_not_wait() -> None:
    with pytest.raises(RuntimeError, match="not permitted"), graph(CUDAGraph()):
        torch.ones(()).item()
