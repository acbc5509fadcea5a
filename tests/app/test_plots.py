import struct

import pytest
from matplotlib.figure import Figure

from fusednn.app.loop import Epoch
from fusednn.app.plots import draw_curves

HISTORY = [Epoch(1, 0.9, 0.5, 0.8), Epoch(2, 0.3, 0.4, 0.9), Epoch(3, 0.1, 0.2, 0.95)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def watched(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def test_is_a_png_of_the_size_asked_for():
    picture = draw_curves(HISTORY, 0.96)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1500, 600)


def test_panels_show_the_history(drawn: list[Figure]):
    draw_curves(HISTORY, 0.96)
    losses, accuracy = drawn[0].axes
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in losses.lines}
    assert curves == {"training": ([1, 2, 3], [0.9, 0.3, 0.1]), "validation": ([1, 2, 3], [0.5, 0.4, 0.2])}
    validation, test = accuracy.lines
    assert list(validation.get_ydata()) == pytest.approx([80, 90, 95])
    assert list(test.get_ydata()) == [96, 96]
    assert test.get_label() == "test, after the last epoch: 96.0 %"


def test_axes_are_labelled_with_units(drawn: list[Figure]):
    draw_curves(HISTORY, 0.96)
    losses, accuracy = drawn[0].axes
    assert [panel.get_xlabel() for panel in drawn[0].axes] == ["epoch", "epoch"]
    assert "(nats)" in losses.get_ylabel()
    assert losses.get_yscale() == "log"
    assert "(%)" in accuracy.get_ylabel()
    assert all(panel.get_legend() for panel in drawn[0].axes)


@pytest.mark.parametrize(
    "history",
    [HISTORY[:1], [Epoch(1, 0.9, 0.0, 1.0), Epoch(2, 0.0, 0.0, 1.0)], [Epoch(1, 1e30, 1e30, 0.0)]],
    ids=["one epoch", "loss of zero", "huge loss"],
)
def test_odd_histories_draw_without_a_warning(history: list[Epoch]):
    assert draw_curves(history, 0.5).startswith(b"\x89PNG")


def test_equal_histories_are_equal_pictures():
    assert draw_curves(HISTORY, 0.96) == draw_curves(list(HISTORY), 0.96)
    assert draw_curves(HISTORY, 0.96) != draw_curves(HISTORY[:2], 0.96)
