"""The textbook PyTorch script with its loop over epochs and batches replaced by one call.

python examples/train_steps.py
"""

import torch

from fusednn import SimpleNN, train_steps


def main() -> float:
    """Train on random data for ten epochs of five batches and return the mean loss of the last epoch."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = SimpleNN(64, 128, 10).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    inputs = torch.randn(320, 64, device=device)
    targets = torch.randint(0, 10, (320,), device=device)

    num_epochs = 10
    losses = train_steps(model, optimizer, inputs, targets, batch_size=64, epochs=num_epochs)  # one loss a step

    means = losses.reshape(num_epochs, -1).mean(dim=1).tolist()
    for epoch, loss in enumerate(means):
        print(f"epoch {epoch + 1}/{num_epochs}, mean loss {loss:.4f}")
    return means[-1]


if __name__ == "__main__":
    main()
