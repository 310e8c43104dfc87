"""In the shape of the examples on memory: a batch size is looked for, the rest of the batch is accumulated."""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RUNS = [[]]
OBSERVED_BATCH_SIZE = 16


def main(arguments: list[str]) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    set_seed(1)
    data = TensorDataset(torch.randn(64, 6), torch.randint(0, 3, (64,)))
    tried: list[int] = []
    result: dict[str, Any] = {}

    @find_executable_batch_size(starting_batch_size=OBSERVED_BATCH_SIZE, reduce_batch_size_fn=lambda: halve(tried))
    def inner_training_loop(batch_size: int) -> None:
        tried.append(batch_size)
        accelerator.free_memory()
        if batch_size > 4:
            raise RuntimeError("CUDA out of memory.")
        accelerator.gradient_accumulation_steps = OBSERVED_BATCH_SIZE // batch_size
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(data, batch_size=batch_size)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        num_updates = 0
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                num_updates += accelerator.sync_gradients
        weights = [p.detach().clone() for p in accelerator.unwrap_model(model).parameters()]
        result.update(weights=weights, num_updates=num_updates)

    inner_training_loop()
    return {"tried": tried, **result}


def halve(tried: list[int]) -> int:
    return tried[-1] // 2
