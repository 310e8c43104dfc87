"""The seed's own command, and the rows that it prints; the other ways to run the examples, in warm processes."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from macrobatch.colossalai.utils import free_port
from macrobatch.testing.scripts import Finished, run_script

pytestmark = pytest.mark.xdist_group("ranks")

FOLDER = Path(__file__).parents[2] / "examples" / "colossalai"
NOWHERE = "/nonexistent"
ROW = "-0.0208,  0.0189,  0.0234,  0.0047,  0.0116, -0.0283,  0.0071, -0.0359, -0.0267, -0.0006"


def test_seed_command_prints_its_rows():
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node", "1"]
    launcher += ["--master_addr", "localhost", "--master_port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launcher, "run_resnet_cifar10_with_engine.py"],
        cwd=FOLDER,
        env={**os.environ, "DATA": NOWHERE, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_rows(done.stdout + done.stderr)


def check_rows(output: str) -> None:
    rows = re.findall(r"iteration (\d), first 10 elements of param: tensor\(\[(.+?)\]\)", output)
    assert [index for index, _ in rows] == ["0", "1", "2", "3"]
    assert [row for _, row in rows[:3]] == [ROW] * 3
    assert rows[3][1] != ROW
    assert "scikit-learn's digits" in output


def in_batches_of(size: int, folder: Path) -> Path:
    """A copy of the examples with another size in their config."""
    copied = Path(shutil.copytree(FOLDER, folder / "examples"))
    config = (copied / "config.py").read_text(encoding="utf-8")
    assert config.count("BATCH_SIZE = 128\n") == 1
    (copied / "config.py").write_text(config.replace("= 128", f"= {size}"), encoding="utf-8")
    return copied


def run(path: Path, *arguments: str, num_ranks: int, data: str) -> str:
    done = run_script(path, *arguments, num_ranks=num_ranks, environ={"DATA": data})
    assert done.codes == [0] * num_ranks, "\n".join(done.stderr)[-3000:]
    return "".join([*done.stdout, *done.stderr])


def test_two_ranks_print_the_rows_too(tmp_path):
    path = in_batches_of(16, tmp_path) / "run_resnet_cifar10_with_engine.py"
    check_rows(run(path, num_ranks=2, data=NOWHERE))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_trainer_example_runs(tmp_path, num_ranks):
    images = np.random.default_rng(0).integers(0, 256, (16, 3072), np.uint8)
    cifar(tmp_path, pickle.dumps({"data": images, "labels": [*range(10), *range(6)]}))
    path = in_batches_of(4, tmp_path) / "run_resnet_cifar10_with_trainer.py"
    arguments = ("--epochs", "1", "--max_steps", "6", "--checkpoint_dir", str(tmp_path))
    output = run(path, *arguments, num_ranks=num_ranks, data=str(tmp_path))
    assert "data: CIFAR-10" in output
    assert "6 micro-iterations, 2 updates" in output
    assert "[Epoch 1 / Train]: " in output
    assert (tmp_path / "checkpoint.pt").exists()


def cifar(folder: Path, content: bytes) -> None:
    (folder / "cifar-10-batches-py").mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        (folder / "cifar-10-batches-py" / name).write_bytes(content)


def of_python_2(images: np.ndarray, labels: list[int]) -> bytes:
    """A pickle as Python 2 wrote the real batches: all strings are bytes, the array's content among them."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(" + b"".join(
        b"J" + size.to_bytes(4, "little") for size in images.shape
    )
    array += b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbI00\n"
    array += b"T" + images.nbytes.to_bytes(4, "little") + images.tobytes() + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x0bbatch_labelU\x01xU\x06labels" + listed + b"U\x04data" + array + b"u."


def loaded(folder: Path) -> Finished:
    """What a script beside the example's data module finds in this folder."""
    script = Path(shutil.copy(FOLDER / "data.py", folder)).with_name("script.py")
    script.write_text(
        "from data import load; train, test, what = load(); print(len(train), len(test), [*train[0][0].shape], what)\n"
        "print('labels', [int(y) for _, y in test])\n"
        "print('pixels', [round(p, 3) for p in test[3][0][2, 5, :3].tolist()])\n",
        encoding="utf-8",
    )
    return run_script(script, environ={"DATA": str(folder)})


IMAGES, LABELS = np.arange(4 * 3072).reshape(4, 3072).astype(np.uint8), [0, 1, 2, 9]


@pytest.mark.parametrize(
    "content",
    [of_python_2(IMAGES, LABELS), pickle.dumps({"data": IMAGES, "labels": LABELS}, protocol=2)],
    ids=["Python 2", "Python 3"],
)
def test_standard_batches_are_read(tmp_path, content):
    assert np.array_equal(pickle.loads(content, encoding="latin1")["data"], IMAGES)
    cifar(tmp_path, content)
    done = loaded(tmp_path)
    (printed,) = done.stdout
    assert printed.startswith("20 4 [3, 32, 32] CIFAR-10 from "), done.stderr
    assert f"labels {LABELS}" in printed
    pixels = (
        IMAGES[3].reshape(3, 32, 32)[2, 5, :3] / 255
    )  # blue, the sixth row: planes of rows, as the data set has them
    assert f"pixels {[round(float((pixel - 0.4465) / 0.2010), 3) for pixel in pixels]}" in printed


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_batch_with_code_in_it_is_refused(tmp_path):
    cifar(tmp_path, pickle.dumps(Evil(), protocol=2))
    done = loaded(tmp_path)
    assert done.codes != [0]
    assert "is not part of a CIFAR-10 batch" in done.stderr[0]
    assert "run" not in done.stdout[0]
