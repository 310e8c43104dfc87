"""guide_tokens_plain.py with macrobatch: the guide's own loop, and a weight. Nothing is looked ahead at or undone."""

import inspect
import string

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from macrobatch.accelerate import Accelerator

IGNORED = -100


def collate(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = pad_sequence([torch.tensor(list(text.encode())) for text in texts], batch_first=True, padding_value=IGNORED)
    return ids[:, :-1].clamp_min(0), ids[:, 1:]


torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=4)
texts = [line.strip() for line in inspect.getsource(string).splitlines() if len(line.strip()) > 1][:120]
model = torch.nn.Sequential(torch.nn.Embedding(256, 32), torch.nn.Linear(32, 256))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(texts, batch_size=4, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(2):
    total_loss = total_tokens = torch.zeros((), device=accelerator.device)
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            num_tokens = (labels != IGNORED).sum()
            accelerator.backward(loss, weight=num_tokens)
            optimizer.step()
            optimizer.zero_grad()
        total_loss, total_tokens = total_loss + loss.detach(), total_tokens + num_tokens
    total_loss, total_tokens = accelerator.reduce(torch.stack([total_loss, total_tokens]), "sum").tolist()
    accelerator.print(f"epoch {epoch + 1}: loss per token {total_loss / total_tokens:.4f}")
