"""One training, three ways of working a macro-batch off. Read from top to bottom; copy what you need.

Shape letters: B samples of a batch, C channels (1), H height (8), W width (8).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

import macrobatch as mb
from macrobatch.demo.data import Digits, make_loader
from macrobatch.demo.model import DigitResNet
from macrobatch.demo.options import DemoOptions
from macrobatch.demo.record import Recorder
from macrobatch.observe.progress import open_bar

__all__ = ["loss_fn", "make_model", "textbook_backward", "train_full_batch", "train_macrobatch", "train_textbook"]

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the samples of a batch `(images_BCHW, labels_B)`, 0-d."""
    images_BCHW, labels_B = batch
    return F.cross_entropy(model(images_BCHW), labels_B)


def make_model(seed: int) -> DigitResNet:
    """A model whose initial weights depend on the seed alone; the caller's random numbers are left as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitResNet()


def make_optimizer(
    model: nn.Module, options: DemoOptions, num_updates: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW with a one-cycle learning rate."""
    # There are only some hundred updates, of which each shrinks the weights by lr × weight_decay = 1 % at most.
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=2.0)
    return optimizer, OneCycleLR(optimizer, max_lr=options.lr, total_steps=num_updates)


def train_macrobatch(digits: Digits, options: DemoOptions, recorder: Recorder) -> None:
    """The exact gradient of each macro-batch, in micro-batches."""
    loader = make_loader(digits, options)
    model = make_model(options.seed)
    optimizer, scheduler = make_optimizer(model, options, len(loader))
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=options.micro_batch, scheduler=scheduler)
    for batch in mb.track(loader, step, desc="macrobatch"):
        with recorder.window(model, batch) as window:
            result = step(batch)
            window.loss = result.loss


def train_full_batch(digits: Digits, options: DemoOptions, recorder: Recorder) -> None:
    """The whole macro-batch at once: what the others are meant to equal, if the memory is there."""
    loader = make_loader(digits, options)
    model = make_model(options.seed)
    optimizer, scheduler = make_optimizer(model, options, len(loader))
    for batch in open_bar(loader, desc="full batch"):
        with recorder.window(model, batch) as window:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            scheduler.step()
            window.loss = loss.item()


def train_textbook(digits: Digits, options: DemoOptions, recorder: Recorder) -> None:
    """The loop that everybody writes. Right as long as there are N micro-batches of one size in every window."""
    loader = make_loader(digits, options)
    model = make_model(options.seed)
    optimizer, scheduler = make_optimizer(model, options, len(loader))
    for batch in open_bar(loader, desc="textbook"):
        with recorder.window(model, batch) as window:
            optimizer.zero_grad()
            window.loss = textbook_backward(model, batch, options)
            optimizer.step()
            scheduler.step()


def textbook_backward(model: nn.Module, batch: Batch, options: DemoOptions) -> float:
    """Mean of means over a constant N: adds its idea of the macro-batch's gradient to `.grad`, returns that loss.

    What it gets is Σ mean_k / N. In a short window there are fewer than N means, so their sum is too small; and the
    samples of a smaller last micro-batch count more than the others.
    """
    images_BCHW, labels_B = batch
    micro_batches = zip(images_BCHW.split(options.micro_batch), labels_B.split(options.micro_batch), strict=True)
    window_loss = 0.0
    for micro_batch in micro_batches:
        loss = loss_fn(model, micro_batch) / options.num_micro_batches
        loss.backward()
        window_loss += loss.item()
    return window_loss
