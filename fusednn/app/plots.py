"""The curves of a training run as a picture."""

from collections.abc import Sequence
from io import BytesIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .loop import Epoch


def draw_curves(history: Sequence[Epoch], test_accuracy: float) -> bytes:
    """A PNG of two panels over the epochs: both losses, and the validation accuracy with the test accuracy beside it.

    `history` has an epoch at least. Drawn without pyplot, so neither a display nor a global figure is involved.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracy = figure.subplots(1, 2)
    epochs = [row.epoch for row in history]

    losses.plot(epochs, [row.train_loss for row in history], ".-", label="training")
    losses.plot(epochs, [row.validation_loss for row in history], ".-", label="validation")
    losses.set(title="Loss", xlabel="epoch", ylabel="cross entropy, mean over the images (nats)", yscale="log")

    accuracy.plot(epochs, [100 * row.validation_accuracy for row in history], ".-C1", label="validation")
    test_label = f"test, after the last epoch: {100 * test_accuracy:.1f} %"
    accuracy.axhline(100 * test_accuracy, color="C2", linestyle="--", label=test_label)
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="images named right (%)")

    for panel in (losses, accuracy):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend()
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()
