"""In the shape of cross-validation with early stopping: one accelerator prepares model after model, and a rank may ask
all of them to stop."""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

RUNS = [[]]


class EarlyStopping:
    def __init__(self, patience: int) -> None:
        self.patience, self.best, self.num_bad = patience, float("inf"), 0

    def __call__(self, loss: float) -> bool:
        self.num_bad = 0 if loss < self.best else self.num_bad + 1
        self.best = min(loss, self.best)
        return self.num_bad >= self.patience


def main(arguments: list[str]) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    set_seed(5)
    data = TensorDataset(torch.randn(48, 6), torch.randint(0, 3, (48,)))
    weights: list[Any] = []
    history: list[Any] = []
    predictions: list[Any] = []
    for fold in range(3):
        held_out = set(range(fold, 48, 3))
        train = DataLoader(Subset(data, [i for i in range(48) if i not in held_out]), batch_size=4, shuffle=True)
        test = DataLoader(Subset(data, sorted(held_out)), batch_size=4)
        model = nn.Linear(6, 3).to(accelerator.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        model, optimizer, train, test, scheduler = accelerator.prepare(model, optimizer, train, test, scheduler)
        stopping = EarlyStopping(patience=1)
        for epoch in range(4):
            model.train()
            for inputs, targets in train:
                loss = F.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if accelerator.is_main_process and stopping(loss.item()):
                    accelerator.set_trigger()
                if accelerator.check_trigger():
                    break
            else:
                continue
            history.append((fold, epoch))
            break
        model.eval()
        fold_predictions = []
        for inputs, targets in test:
            with torch.no_grad():
                outputs = model(inputs)
            outputs, targets = accelerator.gather_for_metrics((outputs, targets))
            fold_predictions.append(outputs)
        predictions.append(torch.cat(fold_predictions))
        weights.extend(p.detach().clone() for p in accelerator.unwrap_model(model).parameters())
    ranks = gather_object([PartialState().process_index])
    return {"history": history, "weights": weights, "predictions": torch.stack(predictions).mean(0), "ranks": ranks}
