"""Means over tokens, in plain PyTorch: the window's tokens have to be counted before its first backward.

Beside it: guide_tokens_accelerate.py, guide_tokens_macrobatch.py. All three print the same losses.
"""

import inspect
import string

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

IGNORED = -100


def collate(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = pad_sequence([torch.tensor(list(text.encode())) for text in texts], batch_first=True, padding_value=IGNORED)
    return ids[:, :-1].clamp_min(0), ids[:, 1:]


torch.manual_seed(0)
gradient_accumulation_steps = 4
texts = [line.strip() for line in inspect.getsource(string).splitlines() if len(line.strip()) > 1][:120]
model = torch.nn.Sequential(torch.nn.Embedding(256, 32), torch.nn.Linear(32, 256))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(texts, batch_size=4, collate_fn=collate)

for epoch in range(2):
    batches = iter(loader)
    total_loss = total_tokens = 0.0
    while window := [batch for _, batch in zip(range(gradient_accumulation_steps), batches, strict=False)]:
        num_tokens = sum(int((labels != IGNORED).sum()) for _, labels in window)
        for inputs, labels in window:
            logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            (loss / num_tokens).backward()
            total_loss += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        total_tokens += num_tokens
    print(f"epoch {epoch + 1}: loss per token {total_loss / total_tokens:.4f}")
