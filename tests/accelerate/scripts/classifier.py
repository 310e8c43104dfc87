"""In the shape of the complete examples: checkpoints of epochs or steps, resuming by name, metrics, a tracker."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import get_scheduler

logger = get_logger(__name__)

RUNS = [
    ["--checkpointing_steps", "epoch", "--with_tracking", "--in_order"],
    ["--checkpointing_steps", "2", "--in_order"],
    ["--resume_from_checkpoint", "epoch_0", "--in_order"],
    ["--resume_from_checkpoint", "step_2", "--in_order"],
    ["--resume_from_checkpoint", "step_6", "--in_order"],
    ["--max_train_steps", "5"],
]


class Digits(Dataset):
    def __init__(self, rows: slice) -> None:
        digits = load_digits()
        self.images, self.targets = digits.data[rows] / 16, digits.target[rows]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": torch.tensor(self.images[index], dtype=torch.float32), "labels": int(self.targets[index])}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(pixels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def save_pretrained(self, folder: str, is_main_process: bool, save_function: Any) -> None:
        if is_main_process:
            os.makedirs(folder, exist_ok=True)
            save_function(self.state_dict(), os.path.join(folder, "weights.bin"))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--checkpointing_steps")
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--per_device_batch_size", type=int, default=8)
    parser.add_argument("--with_tracking", action="store_true")
    parser.add_argument("--in_order", action="store_true", help="the original resumes another order than it left")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> dict[str, Any]:
    args = parse_args(arguments)
    log_kwargs = {"log_with": "tensorboard", "project_dir": args.output_dir} if args.with_tracking else {}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps, **log_kwargs)
    logger.info(accelerator.state, main_process_only=False)
    set_seed(7)
    with accelerator.main_process_first():
        train_dataset, eval_dataset = Digits(slice(0, 96)), Digits(slice(96, 150))

    model = Classifier()
    if accelerator.distributed_type == DistributedType.XLA:
        raise RuntimeError("not here")
    no_decay = ["bias"]
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not any(nd in n for nd in no_decay)], "weight_decay": 0.1},
        {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    train_loader = DataLoader(train_dataset, shuffle=not args.in_order, batch_size=args.per_device_batch_size)
    eval_loader = DataLoader(eval_dataset, batch_size=args.per_device_batch_size)

    updates_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    is_given = args.max_train_steps is not None
    if not is_given:
        args.max_train_steps = args.num_train_epochs * updates_per_epoch
    lr_scheduler = get_scheduler(
        name="linear",
        optimizer=optimizer,
        num_warmup_steps=2 * accelerator.num_processes,
        num_training_steps=args.max_train_steps * (1 if is_given else accelerator.num_processes),
    )
    model, optimizer, train_loader, eval_loader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, lr_scheduler
    )
    updates_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    if not is_given:
        args.max_train_steps = args.num_train_epochs * updates_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / updates_per_epoch)
    checkpointing_steps = args.checkpointing_steps
    if checkpointing_steps is not None and checkpointing_steps.isdigit():
        checkpointing_steps = int(checkpointing_steps)
    if args.with_tracking:
        accelerator.init_trackers("classifier", {"lr": 1e-2, "epochs": args.num_train_epochs})

    progress_bar = tqdm(range(args.max_train_steps), disable=not accelerator.is_local_main_process)
    completed_steps = starting_epoch = 0
    resume_step = None
    if args.resume_from_checkpoint:
        accelerator.load_state(os.path.join(args.output_dir, args.resume_from_checkpoint))
        difference = os.path.splitext(os.path.basename(args.resume_from_checkpoint))[0]
        if "epoch" in difference:
            starting_epoch = int(difference.replace("epoch_", "")) + 1
            completed_steps = starting_epoch * updates_per_epoch
        else:
            resume_step = int(difference.replace("step_", "")) * args.gradient_accumulation_steps
            starting_epoch = resume_step // len(train_loader)
            completed_steps = resume_step // args.gradient_accumulation_steps
            resume_step -= starting_epoch * len(train_loader)
    progress_bar.update(completed_steps)

    history: list[Any] = []
    for epoch in range(starting_epoch, args.num_train_epochs):
        model.train()
        total_loss = 0.0
        if args.resume_from_checkpoint and epoch == starting_epoch and resume_step is not None:
            active_loader = accelerator.skip_first_batches(train_loader, resume_step)
        else:
            active_loader = train_loader
        for batch in active_loader:
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                total_loss += loss.detach().float()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                progress_bar.update(1)
                completed_steps += 1
            is_due = isinstance(checkpointing_steps, int) and completed_steps % checkpointing_steps == 0
            if is_due and accelerator.sync_gradients:
                accelerator.save_state(os.path.join(args.output_dir, f"step_{completed_steps}"))
            if completed_steps >= args.max_train_steps:
                break

        model.eval()
        losses: Any = []
        right = num_samples = 0
        for batch in eval_loader:
            with torch.no_grad():
                outputs = model(**batch)
            losses.append(accelerator.gather_for_metrics(outputs["loss"].repeat(len(batch["labels"]))))
            predictions, references = accelerator.gather_for_metrics(
                (outputs["logits"].argmax(dim=-1), batch["labels"])
            )
            right += int((predictions == references).sum())
            num_samples += len(references)
        history.append((epoch, completed_steps, right, num_samples, lr_scheduler.get_last_lr()[0]))
        logger.info(f"epoch {epoch}: {right} of {num_samples}, loss {torch.cat(losses).mean()}")
        if args.with_tracking:
            accelerator.log({"right": right, "train_loss": total_loss.item(), "epoch": epoch}, step=completed_steps)
        if checkpointing_steps == "epoch":
            accelerator.save_state(os.path.join(args.output_dir, f"epoch_{epoch}"))

    accelerator.wait_for_everyone()
    unwrapped_model = accelerator.unwrap_model(model)
    unwrapped_model.save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    if accelerator.is_main_process:
        (Path(args.output_dir) / "results.json").write_text(json.dumps(history))
    if args.with_tracking:
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.wait_for_everyone()
    return {
        "history": history,
        "weights": [p.detach().clone() for p in unwrapped_model.parameters()],
        "folders": sorted(path.name for path in Path(args.output_dir).iterdir()),
    }
