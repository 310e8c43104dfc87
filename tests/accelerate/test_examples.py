"""Every script of examples/accelerate runs and says what it should, on one rank and on two.

One of them is started by Python and by torchrun; the others in processes like theirs, which are warm.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from macrobatch.testing.scripts import run_script

pytestmark = pytest.mark.xdist_group("ranks")

EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(script: str, *arguments: str, num_ranks: int = 1) -> str:
    # Without ACCELERATE_USE_CPU, the original runs as many jobs of one rank.
    environ = {"ACCELERATE_USE_CPU": "1"} if script.endswith("_accelerate.py") else {}
    done = run_script(EXAMPLES / script, *arguments, num_ranks=num_ranks if num_ranks > 1 else None, environ=environ)
    assert done.codes == [0] * num_ranks, "\n".join(done.stderr)[-3000:]
    return "".join(done.stdout)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_self_contained_prints_the_same_weight_twice(num_ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"] if num_ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / "self_contained.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights = re.findall(r"is (\d\.\d{5})", done.stdout)
    assert weights == ["2.04000"] * 2 * num_ranks


@pytest.mark.parametrize(
    ("script", "num_ranks"),
    [("guide_plain.py", 1), *((f"guide_{door}.py", num) for door in ("accelerate", "macrobatch") for num in (1, 2))],
)
def test_guide(script, num_ranks):
    output = run(script, num_ranks=num_ranks)
    ((accuracy, rate),) = re.findall(r"accuracy (0\.\d+), learning rate (\S+)", output)  # of one rank
    assert float(accuracy) > 0.85
    # From 0.01 down to 0.001 in 60: 15 updates an epoch in one process; over two ranks 8, which count twice.
    assert rate == {1: "0.00325", 2: "0.00280"}[num_ranks]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_guide_to_token_means(num_ranks):
    scripts = ["guide_tokens_plain.py", "guide_tokens_accelerate.py", "guide_tokens_macrobatch.py"]
    outputs = [run(script, num_ranks=num_ranks) for script in scripts[num_ranks - 1 :]]  # plain is for one process
    assert set(outputs) == {outputs[-1]}
    first, last = map(float, re.findall(r"loss per token (\d\.\d{4})", outputs[-1]))
    assert last < 0.95 * first


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_causal_lm_learns(num_ranks):
    losses = [
        float(x) for x in re.findall(r"loss (\d+\.\d+)", run("causal_lm.py", "--updates", "8", num_ranks=num_ranks))
    ]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("num_ranks", "num_micro_batches", "num_updates"), [(1, 29, 15), (2, 15, 8)])
def test_gan_updates_both_networks_once_per_window(num_ranks, num_micro_batches, num_updates):
    output = run("gan.py", "--epochs", "1", num_ranks=num_ranks)
    assert f"{num_micro_batches} micro-batches an epoch, {num_updates} updates expected" in output
    assert f"'generator': {num_updates}, 'discriminator': {num_updates}" in output


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_contrastive_pair_learns_and_keeps_replicas_equal(num_ranks):
    output = run("contrastive.py", num_ranks=num_ranks)
    first, last = map(float, re.search(r"loss (\S+) to (\S+);", output).groups())
    assert last < first
    assert "replicas are equal: True" in output


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_image_classifier_resumes_in_a_window_to_the_bit(tmp_path, num_ranks):
    def train(folder: str, *options: str) -> str:
        arguments = ("--project", str(tmp_path / folder), "--epochs", "1", *options)
        return run("image_classifier.py", *arguments, num_ranks=num_ranks)

    whole = train("whole")
    stopped = train("parts", "--stop_after", "18")
    assert "stopped in epoch 0 after 18 micro-batches" in stopped  # 2 of 4 into the fifth window
    assert train("parts", "--resume") == whole


def test_every_script_is_run_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert SCRIPTS
    assert [script for script in SCRIPTS if f'"{script}"' not in source] == []


def test_migration_is_the_import():
    """The guide's script differs from the original's by its import line (and by what it says about itself)."""
    before, after = (
        (EXAMPLES / name).read_text(encoding="utf-8") for name in ("guide_accelerate.py", "guide_macrobatch.py")
    )
    code = [list(filter(None, text.split('"""', 2)[2].splitlines())) for text in (before, after)]
    assert set(code[1]) - set(code[0]) == {"from macrobatch.accelerate import Accelerator"}
    assert len(code[0]) == len(code[1])
