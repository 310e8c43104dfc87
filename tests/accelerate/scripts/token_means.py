"""In the shape of the recipe for token means: the window's batches are fetched ahead, and accumulated by hand."""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

RUNS = [[], ["unscaled"]]
STEPS = 3


def collate(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=-100)
    return {"input_ids": ids[:, :-1].clamp_min(0), "labels": ids[:, 1:]}


def main(arguments: list[str]) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    set_seed(3)
    documents = [torch.randint(0, 20, (3 + 5 * index % 17,)) for index in range(28)]
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loader = DataLoader(documents, batch_size=2, collate_fn=collate)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    remainder = len(loader) % STEPS or STEPS
    num_updates = math.ceil(len(loader) / STEPS)
    history = []
    for _ in range(2):
        batches = iter(loader)
        for update in range(num_updates):
            window = [next(batches) for _ in range(STEPS if update < num_updates - 1 else remainder)]
            num_tokens = sum((batch["labels"] != -100).sum() for batch in window)
            num_tokens = accelerator.gather(num_tokens).sum().item()
            losses = []
            for index, batch in enumerate(window):
                is_last = index == len(window) - 1
                context = contextlib.nullcontext if is_last or accelerator.num_processes == 1 else model.no_sync
                with context():
                    logits = model(batch["input_ids"])
                    labels = batch["labels"].flatten()
                    loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
                    loss = loss / num_tokens * STEPS * accelerator.num_processes
                    accelerator.backward(loss)
                    losses.append(loss.detach())
            if "unscaled" not in arguments:
                norm = accelerator.clip_grad_norm_(model.parameters(), 100.0)
                history.append(round(float(norm), 5))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total = accelerator.gather(sum(losses)).sum().item() / (accelerator.num_processes * STEPS)
            history.append(round(total, 5))
    return {"history": history, "weights": [p.detach().clone() for p in model.parameters()]}
