"""Training with `FullyShardedDataParallelPlugin`, which the original ignores on CPUs: the same as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.accelerate.doors import OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")


def train(
    is_sharded: bool, each_batch: bool, stop: int | None, folder: Path | None
) -> tuple[dict[str, Tensor], float, list[Any]]:
    """Weights, the last norm, and what strategy held between micro-batches, after two epochs of ragged batches.

    Saves and ends after `stop` micro-batches; with a folder and no stop, goes on from there.
    """
    with entered(OURS) as door:
        torch.manual_seed(0)
        accelerator = door.Accelerator(
            cpu=True,
            gradient_accumulation_plugin=door.GradientAccumulationPlugin(num_steps=3, sync_each_batch=each_batch),
            fsdp_plugin=door.FullyShardedDataParallelPlugin() if is_sharded else None,
        )
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = TensorDataset(torch.randn(34, 6), torch.randint(0, 3, (34,)))
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4))
        num_seen, norm = 0, 0.0
        if folder is not None and stop is None:
            accelerator.load_state(str(folder))
            loader, num_seen = accelerator.skip_first_batches(loader), 4
        for _ in range(2):
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(x), y))
                    if accelerator.sync_gradients:
                        norm = float(accelerator.clip_grad_norm_(model.parameters(), 0.5))
                    optimizer.step()
                    optimizer.zero_grad()
                num_seen += 1
                if num_seen == stop:
                    accelerator.save_state(str(folder))
                    return {}, norm, []
            loader = accelerator._dataloaders[0]  # whole again
        policies = [getattr(window.sync, "policy", None) for window in accelerator._counting.windows.all]
        return accelerator.get_state_dict(model), norm, policies


@pytest.mark.parametrize("each_batch", [False, True])
def test_sharded_training_is_the_same(ranks: Any, each_batch: bool):
    (plain, norm, _), _ = ranks(2).run(train, False, each_batch, None, None)
    for weights, sharded_norm, (policy,) in ranks(2).run(train, True, each_batch, None, None)[:1]:
        assert weights.keys() == plain.keys()
        for name, weight in weights.items():
            # Sums of float32 in another order, and twelve steps of AdamW, which divides by gradients' own size.
            torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-5)
        assert sharded_norm == pytest.approx(norm, rel=1e-5)
        assert policy.reduce_last is policy.keep_parameters is (not each_batch)


@pytest.mark.parametrize("each_batch", [False, True])
def test_sharded_training_goes_on_in_the_middle_of_a_window(ranks: Any, tmp_path: Path, each_batch: bool):
    whole = ranks(2).run(train, True, each_batch, None, None)[0][0]
    ranks(2).run(train, True, each_batch, 4, tmp_path)
    resumed = ranks(2).run(train, True, each_batch, None, tmp_path)[0][0]
    assert whole
    for name, weight in whole.items():
        # Without sync_each_batch, a run chooses what to hold after its second window, and from then on adds up in
        # another order: a few roundings of 6e-8.
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0 if each_batch else 1e-6)
