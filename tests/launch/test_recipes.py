"""The files of examples/launch: what can run on this machine runs, the rest is read."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "launch"
SCRIPTS = [*sorted(RECIPES.glob("*.sh")), RECIPES / "slurm.sbatch"]


def final_loss(text: str) -> str:
    """The digits of the last loss; the same ones for every number of ranks."""
    (found,) = set(re.findall(r"final loss ([\d.]+)", text))
    return found


@pytest.fixture(scope="module")
def loss() -> str:
    """What one process finds."""
    return f"{runpy.run_path(str(RECIPES / 'train.py'))['train'](1):.10f}"


@pytest.fixture
def run(start, tmp_path):
    """Runs a recipe where it finds this Python first; what it printed."""
    # As after `pip install macrobatch`, wherever the tests' own Python has it from.
    for name, arguments in (("python", ""), ("macrobatch", "-c 'from macrobatch.cli import main; main()' ")):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n', encoding="utf-8")
        program.chmod(0o755)

    def run_recipe(*command: str, **environ: str) -> str:
        program = start(*command, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environ)
        out, err = program.communicate(timeout=240)
        assert program.returncode == 0, f"{out}\n{err}"
        return out

    return run_recipe


def test_torchrun(run, loss):
    assert final_loss(run("bash", str(RECIPES / "torchrun.sh"), "--epochs", "1", NPROC="2")) == loss


def test_notebook(start, loss):
    # Without a file, as in a notebook; one epoch instead of two.
    source = (RECIPES / "notebook.py").read_text(encoding="utf-8")
    cells = source.replace("args=(2,)", "args=(1,)").replace(', start_method="fork"', "")
    assert cells.count("args=(1,)") == 1
    code = f"import sys; sys.path.insert(0, {str(RECIPES)!r}); exec({cells!r}, globals())"
    out, err = start(sys.executable, "-c", code).communicate(timeout=240)
    assert final_loss(out) == loss, err
    assert "the same on every rank" in out


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not on this machine")
def test_mpirun(run, loss):
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    out = run("bash", str(RECIPES / "mpirun.sh"), "--epochs", "1", HOSTS="localhost:2", **root)
    assert final_loss(out) == loss


def test_slurm(run, loss, tmp_path):
    if shutil.which("sbatch") is None or subprocess.run(["timeout", "20", "sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm runs on this machine")
    script = shutil.copy(RECIPES / "slurm.sbatch", tmp_path)
    shutil.copy(RECIPES / "train.py", tmp_path)
    here = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--output=out")
    conf = {"SLURM_CONF": os.environ["SLURM_CONF"]} if "SLURM_CONF" in os.environ else {}
    run("sbatch", "--wait", *here, script, "--epochs", "1", **conf)
    assert final_loss((tmp_path / "out").read_text(encoding="utf-8")) == loss


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray(run, loss):
    assert (
        final_loss(run("python", str(RECIPES / "ray_train.py"), "--epochs", "1", RAY_USAGE_STATS_ENABLED="0")) == loss
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_recipes_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True, capture_output=True)
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_python_recipes_compile(path):
    compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_the_pytorchjob_is_one():
    job = yaml.safe_load((RECIPES / "pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["command"] == ["macrobatch", "launch", "train.py"]
        # As many ranks as GPUs.
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}


def test_every_recipe_is_named_where_one_looks():
    overview = (RECIPES / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")
    for path in RECIPES.iterdir():
        if path.is_file() and path.name != "README.md":
            assert path.name in overview
            assert f"examples/launch/{path.name}" in page
