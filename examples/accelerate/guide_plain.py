"""The loop of the gradient accumulation guide, in plain PyTorch. Beside it: guide_accelerate.py, guide_macrobatch.py.

Here, as in most hand-written loops, the short last window (of 2 micro-batches instead of 4, the last of them short)
counts as if it were full.
"""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
gradient_accumulation_steps = 4
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))

model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=60)
loader = DataLoader(data, batch_size=32)

for _ in range(3):
    for index, (inputs, targets) in enumerate(loader, start=1):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        (loss / gradient_accumulation_steps).backward()
        if index % gradient_accumulation_steps == 0 or index == len(loader):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

accuracy = (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()
print(f"accuracy {accuracy:.3f}, learning rate {scheduler.get_last_lr()[0]:.5f}")
