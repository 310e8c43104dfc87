"""An image classifier with a tracker, evaluation, checkpoints, and resuming anywhere: inside a window, too.

    python image_classifier.py --project /tmp/digits [--stop_after 37]
    python image_classifier.py --project /tmp/digits --resume

A run that was stopped and resumed ends with the same weights, to the bit, as one that was not; every image of the
epoch is seen once.
"""

import argparse
import hashlib

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from macrobatch.accelerate import Accelerator
from macrobatch.accelerate.utils import ProjectConfiguration, set_seed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--project", required=True, help="folder for checkpoints and metrics")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop_after", type=int, help="micro-batches after which to save and stop, as if killed")
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=4,
        log_with="jsonl",
        project_config=ProjectConfiguration(options.project, automatic_checkpoint_naming=True, total_limit=2),
    )
    accelerator.init_trackers("digits", config={"epochs": options.epochs})
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    data, targets = TensorDataset(images, torch.tensor(digits.target)), torch.tensor(digits.target)
    train, test = torch.utils.data.random_split(data, [1500, len(targets) - 1500], torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(1024, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs * 12)
    train_loader, test_loader = DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=100)
    model, optimizer, train_loader, test_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, test_loader, scheduler
    )
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if options.resume:
        accelerator.load_state()

    for epoch in range(progress.epoch, options.epochs):
        model.train()
        loader = accelerator.skip_first_batches(train_loader, progress.batch) if progress.batch else train_loader
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            progress.batch += 1
            progress.total += 1
            if progress.total == options.stop_after:
                accelerator.save_state()
                accelerator.print(f"stopped in epoch {epoch} after {progress.batch} micro-batches")
                accelerator.end_training()
                return
        progress.epoch, progress.batch = epoch + 1, 0
        accelerator.log({"accuracy": evaluate(accelerator, model, test_loader)}, step=progress.total)
        accelerator.save_state()

    digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()
    accelerator.print(f"accuracy {evaluate(accelerator, model, test_loader):.3f}, weights {digest[:16]}")
    accelerator.end_training()


def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    num_right = num_all = 0
    for inputs, labels in loader:
        with torch.no_grad():
            predicted = model(inputs).argmax(1)
        predicted, labels = accelerator.gather_for_metrics((predicted, labels))
        num_right += int((predicted == labels).sum())
        num_all += len(labels)
    return num_right / num_all


class Progress:
    """Where the loop is."""

    def __init__(self) -> None:
        self.epoch = self.batch = self.total = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


if __name__ == "__main__":
    main()
