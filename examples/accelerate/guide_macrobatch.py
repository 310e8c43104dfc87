"""guide_accelerate.py, with `macrobatch.` in front of the import: the short last window is now exact."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from macrobatch.accelerate import Accelerator

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=4)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))

model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=60)
loader = DataLoader(data, batch_size=32)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

for _ in range(3):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

inputs, targets = (tensor.to(accelerator.device) for tensor in data.tensors)
accuracy = (model(inputs).argmax(1) == targets).float().mean().item()
accelerator.print(f"accuracy {accuracy:.3f}, learning rate {scheduler.get_last_lr()[0]:.5f}")
