"""The seed's own command, and the rows that it prints."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from macrobatch.colossalai.utils import free_port

FOLDER = Path(__file__).parents[2] / "examples" / "colossalai"
ROW = "-0.0208,  0.0189,  0.0234,  0.0047,  0.0116, -0.0283,  0.0071, -0.0359, -0.0267, -0.0006"


def command(num_ranks: int, script: str, *arguments: str, data: str = "/nonexistent") -> str:
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node", str(num_ranks)]
    launcher += ["--master_addr", "localhost", "--master_port", str(free_port())]
    environment = {**os.environ, "DATA": data, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *launcher, script, *arguments],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_seed_command_prints_its_rows(num_ranks):
    output = command(num_ranks, "run_resnet_cifar10_with_engine.py")
    rows = re.findall(r"iteration (\d), first 10 elements of param: tensor\(\[(.+?)\]\)", output)
    assert [index for index, _ in rows] == ["0", "1", "2", "3"]
    assert [row for _, row in rows[:3]] == [ROW] * 3
    assert rows[3][1] != ROW
    assert "scikit-learn's digits" in output


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_trainer_example_runs(tmp_path, num_ranks):
    output = command(
        num_ranks,
        "run_resnet_cifar10_with_trainer.py",
        "--epochs",
        "1",
        "--max_steps",
        "6",
        "--checkpoint_dir",
        str(tmp_path),
    )
    assert "6 micro-iterations, 2 updates" in output
    assert "[Epoch 1 / Train]: " in output
    assert (tmp_path / "checkpoint.pt").exists()


def cifar(folder: Path, content: bytes) -> str:
    (folder / "cifar-10-batches-py").mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        (folder / "cifar-10-batches-py" / name).write_bytes(content)
    return str(folder)


def of_python_2(images: np.ndarray, labels: list[int]) -> bytes:
    """A pickle as Python 2 wrote the real batches: all strings are bytes, the array's content among them."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(" + b"".join(
        b"J" + size.to_bytes(4, "little") for size in images.shape
    )
    array += b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbI00\n"
    array += b"T" + images.nbytes.to_bytes(4, "little") + images.tobytes() + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x0bbatch_labelU\x01xU\x06labels" + listed + b"U\x04data" + array + b"u."


def loaded(data: str) -> subprocess.CompletedProcess[str]:
    code = (
        "from data import load; train, test, what = load(); print(len(train), len(test), [*train[0][0].shape], what);"
    )
    code += "print('labels', [int(y) for _, y in test]);"
    code += "print('pixels', [round(p, 3) for p in test[3][0][2, 5, :3].tolist()])"
    environment = {**os.environ, "DATA": data}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, env=environment, capture_output=True, text=True, check=False
    )


IMAGES, LABELS = np.arange(4 * 3072).reshape(4, 3072).astype(np.uint8), [0, 1, 2, 9]


@pytest.mark.parametrize(
    "content",
    [of_python_2(IMAGES, LABELS), pickle.dumps({"data": IMAGES, "labels": LABELS}, protocol=2)],
    ids=["Python 2", "Python 3"],
)
def test_standard_batches_are_read(tmp_path, content):
    assert np.array_equal(pickle.loads(content, encoding="latin1")["data"], IMAGES)
    done = loaded(cifar(tmp_path, content))
    assert done.stdout.startswith("20 4 [3, 32, 32] CIFAR-10 from "), done.stderr
    assert f"labels {LABELS}" in done.stdout
    pixels = (
        IMAGES[3].reshape(3, 32, 32)[2, 5, :3] / 255
    )  # blue, the sixth row: planes of rows, as the data set has them
    assert f"pixels {[round(float((pixel - 0.4465) / 0.2010), 3) for pixel in pixels]}" in done.stdout


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_batch_with_code_in_it_is_refused(tmp_path):
    done = loaded(cifar(tmp_path, pickle.dumps(Evil(), protocol=2)))
    assert done.returncode != 0
    assert "is not part of a CIFAR-10 batch" in done.stderr
    assert "run" not in done.stdout
