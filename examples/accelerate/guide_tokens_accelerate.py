"""guide_tokens_plain.py with Accelerate: it divides by N and by the ranks, which has to be undone, and `accumulate`,
which cannot look ahead, is left out."""

import contextlib
import inspect
import string

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

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
    batches = iter(loader)
    total_loss = total_tokens = torch.zeros((), device=accelerator.device)
    while window := [batch for _, batch in zip(range(accelerator.gradient_accumulation_steps), batches, strict=False)]:
        own_tokens = torch.stack([(labels != IGNORED).sum() for _, labels in window]).sum()
        num_tokens = accelerator.gather(own_tokens).sum().item()
        for index, (inputs, labels) in enumerate(window):
            is_last = index == len(window) - 1
            context = contextlib.nullcontext if is_last or accelerator.num_processes == 1 else model.no_sync
            with context():
                logits = model(inputs)
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
                scale = accelerator.gradient_accumulation_steps * accelerator.num_processes
                accelerator.backward(loss * scale / num_tokens)
            total_loss = total_loss + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        total_tokens = total_tokens + own_tokens
    total_loss, total_tokens = accelerator.reduce(torch.stack([total_loss, total_tokens]), "sum").tolist()
    accelerator.print(f"epoch {epoch + 1}: loss per token {total_loss / total_tokens:.4f}")
