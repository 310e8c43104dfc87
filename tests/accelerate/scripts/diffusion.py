"""In the shape of the trainers of diffusion models: frozen parts, an average of the weights, hooks that save models
in a way of their own, and checkpoints by the main process alone."""

import argparse
import logging
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from packaging import version
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

logger = get_logger(__name__, log_level="INFO")

RUNS = [
    ["--max_train_steps", "6", "--checkpointing_steps", "2", "--checkpoints_total_limit", "2"],
    ["--max_train_steps", "9", "--resume_from_checkpoint", "latest"],
    ["--max_train_steps", "3", "--mixed_precision", "bf16", "--train_encoder"],
]


class Denoiser(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.config = {"width": width}
        self.body = nn.Sequential(nn.Linear(16 + 1 + 8, width), nn.SiLU(), nn.Linear(width, 16))

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat([latents, timesteps[:, None] / 10, states], dim=1))

    def save_pretrained(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        torch.save({"config": self.config, "weights": self.state_dict()}, os.path.join(folder, "denoiser.pt"))

    @classmethod
    def from_pretrained(cls, folder: str) -> "Denoiser":
        saved = torch.load(os.path.join(folder, "denoiser.pt"), weights_only=True)
        model = cls(**saved["config"])
        model.load_state_dict(saved["weights"])
        return model


class MovingAverage:
    def __init__(self, parameters: Any, decay: float = 0.9) -> None:
        self.decay = decay
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step(self, parameters: Any) -> None:
        for mine, param in zip(self.shadow, parameters, strict=True):
            mine.lerp_(param.to(mine.device, mine.dtype), 1 - self.decay)

    def to(self, device: torch.device) -> None:
        self.shadow = [mine.to(device) for mine in self.shadow]

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay, self.shadow = state["decay"], [mine.clone() for mine in state["shadow"]]


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, required=True)
    parser.add_argument("--checkpointing_steps", type=int, default=100)
    parser.add_argument("--checkpoints_total_limit", type=int)
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"])
    parser.add_argument("--train_encoder", action="store_true")
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> dict[str, Any]:
    args = parse_args(arguments)
    project_config = ProjectConfiguration(
        project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")
    )
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with="tensorboard",
        project_config=project_config,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=600))],
    )
    logging.basicConfig(level=logging.WARNING)
    logger.info(accelerator.state, main_process_only=False)
    set_seed(0)
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)

    def deepspeed_zero_init_disabled_context_manager() -> Any:
        plugin = AcceleratorState().deepspeed_plugin if accelerate.state.is_initialized() else None
        return [] if plugin is None else [plugin.zero3_init_context_manager(enable=False)]

    assert deepspeed_zero_init_disabled_context_manager() == []
    encoder, vae, denoiser = nn.Linear(64, 8), nn.Linear(64, 16), Denoiser()
    vae.requires_grad_(False)
    if not args.train_encoder:
        encoder.requires_grad_(False)
    average = MovingAverage(denoiser.parameters())

    def unwrap_model(model: nn.Module) -> nn.Module:
        return accelerator.unwrap_model(model)

    if version.parse(accelerate.__version__) >= version.parse("0.16.0"):

        def save_model_hook(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
            if accelerator.is_main_process:
                torch.save(average.state_dict(), os.path.join(output_dir, "average.pt"))
                for model in models:
                    unwrap_model(model).save_pretrained(os.path.join(output_dir, "denoiser"))
                    weights.pop()  # so that it is not saved again

        def load_model_hook(models: list[nn.Module], input_dir: str) -> None:
            average.load_state_dict(torch.load(os.path.join(input_dir, "average.pt"), weights_only=True))
            average.to(accelerator.device)
            while len(models) > 0:
                model = models.pop()
                loaded = Denoiser.from_pretrained(os.path.join(input_dir, "denoiser"))
                unwrap_model(model).load_state_dict(loaded.state_dict())

        if not args.train_encoder:
            accelerator.register_save_state_pre_hook(save_model_hook)
            accelerator.register_load_state_pre_hook(load_model_hook)

    trained = [*denoiser.parameters(), *(encoder.parameters() if args.train_encoder else [])]
    optimizer = torch.optim.AdamW(trained, lr=1e-2 * accelerator.num_processes)
    images = torch.tensor(load_digits().data[:64] / 16, dtype=torch.float32)
    train_loader = DataLoader(images, batch_size=args.train_batch_size)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (2 * accelerator.num_processes))
    )
    if args.train_encoder:
        denoiser, encoder, optimizer, train_loader, lr_scheduler = accelerator.prepare(
            denoiser, encoder, optimizer, train_loader, lr_scheduler
        )
    else:
        denoiser, optimizer, train_loader, lr_scheduler = accelerator.prepare(
            denoiser, optimizer, train_loader, lr_scheduler
        )
    average.to(accelerator.device)

    # What is not trained is kept in the precision of the computation.
    weight_dtype = torch.float32
    if accelerator.mixed_precision == "bf16":
        weight_dtype = torch.bfloat16
    vae.to(accelerator.device, dtype=weight_dtype)
    if not args.train_encoder:
        encoder.to(accelerator.device, dtype=weight_dtype)

    updates_per_epoch = -(-len(train_loader) // args.gradient_accumulation_steps)
    if accelerator.is_main_process:
        accelerator.init_trackers("diffusion", config={"steps": args.max_train_steps})
    global_step = first_epoch = 0
    if args.resume_from_checkpoint:
        dirs = [d for d in os.listdir(args.output_dir) if d.startswith("checkpoint")]
        path = sorted(dirs, key=lambda x: int(x.split("-")[1]))[-1]
        accelerator.print(f"Resuming from checkpoint {path}")
        accelerator.load_state(os.path.join(args.output_dir, path))
        global_step = int(path.split("-")[1])
        first_epoch = global_step // updates_per_epoch
    progress_bar = tqdm(range(args.max_train_steps), initial=global_step, disable=not accelerator.is_local_main_process)

    history: list[Any] = []
    num_train_epochs = -(-args.max_train_steps // updates_per_epoch)
    for _ in range(first_epoch, num_train_epochs):
        denoiser.train()
        train_loss = 0.0
        for batch in train_loader:
            models_to_accumulate = [denoiser, encoder] if args.train_encoder else [denoiser]
            with accelerator.accumulate(*models_to_accumulate):
                latents = vae(batch.to(dtype=weight_dtype))
                # In place of random numbers, which a checkpoint of the main process has of no other rank.
                noise = torch.sin(7 * latents.float())
                timesteps = (batch.sum(dim=1) % 10).long()
                noisy = latents.float() + noise * (timesteps[:, None] / 10)
                states = encoder(batch.to(dtype=weight_dtype if not args.train_encoder else torch.float32))
                predicted = denoiser(noisy.to(weight_dtype), timesteps, states.to(weight_dtype))
                loss = F.mse_loss(predicted.float(), noise.float(), reduction="none")
                loss = loss.mean(dim=list(range(1, len(loss.shape)))) * (1 + timesteps)
                loss = loss.mean()
                average_loss = accelerator.gather(loss.repeat(args.train_batch_size)).mean()
                train_loss += average_loss.item() / args.gradient_accumulation_steps
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 100.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad(set_to_none=True)

            if accelerator.sync_gradients:
                average.step(denoiser.parameters())
                progress_bar.update(1)
                global_step += 1
                accelerator.log({"train_loss": train_loss}, step=global_step)
                history.append((global_step, lr_scheduler.get_last_lr()[0]))
                train_loss = 0.0
                if global_step % args.checkpointing_steps == 0 and accelerator.is_main_process:
                    if args.checkpoints_total_limit is not None:
                        checkpoints = [d for d in os.listdir(args.output_dir) if d.startswith("checkpoint")]
                        checkpoints = sorted(checkpoints, key=lambda x: int(x.split("-")[1]))
                        for old in checkpoints[: len(checkpoints) - args.checkpoints_total_limit + 1]:
                            shutil.rmtree(os.path.join(args.output_dir, old))
                    accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{global_step}"))
            progress_bar.set_postfix(step_loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])
            if global_step >= args.max_train_steps:
                break
        if accelerator.is_main_process:
            validate(accelerator, unwrap_model(denoiser), global_step)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unwrap_model(denoiser).save_pretrained(args.output_dir)
    accelerator.wait_for_everyone()
    checkpoints = sorted(Path(args.output_dir).glob("checkpoint-*"))
    return {
        "history": history,
        "weights": [p.detach().clone() for p in trained],
        "average": average.shadow,
        "folders": sorted(os.listdir(args.output_dir)),
        "by hooks": [(f.name, (f / "average.pt").exists(), (f / "denoiser").is_dir()) for f in checkpoints],
    }


def validate(accelerator: Accelerator, denoiser: nn.Module, step: int) -> None:
    with torch.no_grad(), accelerator.autocast():
        image = denoiser(torch.zeros(1, 16), torch.zeros(1), torch.zeros(1, 8))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_scalar("validation", float(image.float().mean()), step)
    accelerator.get_tracker("tensorboard", unwrap=True).add_scalar("again", 1.0, step)
