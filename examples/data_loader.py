"""A loop over the batches of a DataLoader, with a learning rate schedule and an evaluation after each epoch.

python examples/data_loader.py
"""

import torch
from torch.utils.data import DataLoader, TensorDataset

from fusednn import SimpleNN, make_train_step


def main() -> float:
    """Train on random data for ten epochs of five batches and return the loss of the last evaluation."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = SimpleNN(64, 128, 10).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, epochs=10, steps_per_epoch=5)

    data = TensorDataset(torch.randn(320, 64), torch.randint(0, 10, (320,)))
    held_out = torch.randn(64, 64, device=device), torch.randint(0, 10, (64,), device=device)
    loader = DataLoader(data, batch_size=64, shuffle=True)

    step = make_train_step(model, optimizer, lr_schedule=schedule)  # forward, loss, backward, Adam, schedule
    for epoch in range(10):
        model.train()
        losses = [step(x.to(device), y.to(device)) for x, y in loader]
        model.eval()
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(held_out[0]), held_out[1]).item()
        mean = torch.stack(losses).mean().item()  # the losses are on the device: nobody waited for them until here
        print(f"epoch {epoch + 1}/10, mean loss {mean:.4f}, held out {loss:.4f}")
    return loss


if __name__ == "__main__":
    main()
