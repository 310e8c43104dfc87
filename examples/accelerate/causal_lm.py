"""Fine-tuning a causal language model on documents of very different lengths: every token counts the same.

    python causal_lm.py [--updates 12] [--steps 4]

The loss of a micro-batch is a sum over its tokens, and `backward` is told how many there are. That is all: the
window's gradient is that of the mean over all of its tokens, on all ranks. The model is a small GPT-2, built from a
configuration; the text is the documentation of Python's standard library.
"""

import argparse
import inspect
import json
import string
import textwrap

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from macrobatch.accelerate import Accelerator
from macrobatch.accelerate.utils import set_seed

IGNORED = -100


def documents(max_tokens: int = 200) -> list[torch.Tensor]:
    """Docstrings, as numbers of their bytes."""
    found = {
        inspect.getdoc(value) or ""
        for module in (argparse, inspect, json, string, textwrap)
        for value in vars(module).values()
    }
    return [torch.tensor(list(text.encode()[:max_tokens])) for text in sorted(found) if len(text) > 1]


def collate(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids_BT = pad_sequence(samples, batch_first=True)
    lengths_B = torch.tensor([len(sample) for sample in samples])
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    return {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "labels": ids_BT.masked_fill(~mask_BT, IGNORED)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="micro-batches per update")
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=options.steps)
    config = GPT2Config(vocab_size=256, n_positions=200, n_embd=48, n_layer=2, n_head=4, loss_type="ForCausalLM")
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(documents(), batch_size=4, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    num_updates, window_loss, window_tokens = 0, 0.0, 0
    while num_updates < options.updates:
        for batch in loader:
            with accelerator.accumulate(model):
                logits_BTV = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                labels_BT = batch["labels"][:, 1:]
                loss = F.cross_entropy(
                    logits_BTV[:, :-1].flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                num_tokens = (labels_BT != IGNORED).sum()
                accelerator.backward(loss, weight=num_tokens)
                window_loss, window_tokens = window_loss + loss.detach(), window_tokens + num_tokens
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                num_updates += 1
                total, tokens = accelerator.reduce(torch.stack([window_loss, window_tokens]), "sum").tolist()
                accelerator.print(f"update {num_updates}: {tokens:.0f} tokens, loss {total / tokens:.3f}")
                window_loss, window_tokens = 0.0, 0
                if num_updates == options.updates:
                    break


if __name__ == "__main__":
    main()
