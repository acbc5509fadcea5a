"""The textbook PyTorch script with its imports changed: SimpleNN and CrossEntropyLoss come from fusednn.

python examples/simple_nn.py
"""

import torch

from fusednn import CrossEntropyLoss, SimpleNN


def main() -> float:
    """Train on random data for ten epochs and return the last loss."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = SimpleNN(64, 128, 10).to(device)
    criterion = CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    inputs = torch.randn(320, 64, device=device)
    targets = torch.randint(0, 10, (320,), device=device)

    num_epochs = 10
    for epoch in range(num_epochs):
        outputs = model(inputs)
        loss = criterion(outputs, targets)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"epoch {epoch + 1}/{num_epochs}, loss {loss.item():.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
