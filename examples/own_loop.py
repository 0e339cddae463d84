"""ASGO in a loop of your own: one line in place of AdamW, and a checkpoint that resumes bit for bit."""

from pathlib import Path

import torch
from torch import nn

from asgo import ASGO, checkpoint, report, route


def main(steps: int = 60, folder: Path = Path("runs")) -> float:
    """Train a small network on a task with a known answer; return the last loss."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))

    optimizer = ASGO(route(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    print(report(optimizer))

    loss = torch.tensor(0.0)
    for step in range(steps):
        x = torch.randn(256, 16)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")

    folder.mkdir(parents=True, exist_ok=True)
    saved = {"model": model.state_dict(), "optimizer": checkpoint.named_state_dict(optimizer)}
    checkpoint.save(saved, folder / "own_loop.pt")
    saved = checkpoint.load(folder / "own_loop.pt")
    model.load_state_dict(saved["model"])
    checkpoint.load_named_state_dict(optimizer, saved["optimizer"])
    print(f"final loss {loss.item():.4f}; matrices that failed: {optimizer.failures() or 'none'}")
    return loss.item()


if __name__ == "__main__":
    main()
