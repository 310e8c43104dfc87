"""Configs: how they are read, and which of their keys are refused."""

from __future__ import annotations

import copy
import pickle
import random
import sys

import numpy as np
import pytest
import torch

from macrobatch.colossalai.amp import AMP_TYPE
from macrobatch.colossalai.amp.precision import make_precision
from macrobatch.colossalai.context import Config, ConfigException, ParallelMode
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.engine.gradient_handler import BaseGradientHandler, build_gradient_handlers
from macrobatch.colossalai.keys import check_config, hidden_features
from macrobatch.colossalai.registry import GRADIENT_HANDLER, Registry
from macrobatch.core.precision import Fp16

CPU = torch.device("cpu")


# --- Config ----------------------------------------------------------------------------------------------------------


def test_keys_are_attributes_in_dicts_within_it_too():
    config = Config({"a": 1, "parallel": {"tensor": {"size": 1}}, "items_of_a_list": [{"type": "A"}]})
    assert config.parallel.tensor.size == config["parallel"]["tensor"]["size"] == 1
    config.model = {"depth": 2}
    config["data"] = {"path": "p"}
    assert (config.model.depth, config.data.path) == (2, "p")
    assert type(config.items_of_a_list[0]) is dict
    assert config.update({"a": 2}) is config
    assert config.a == 2
    assert not hasattr(config, "missing")
    assert config.get("missing", 3) == 3
    with pytest.raises(KeyError):
        config["missing"]
    del config.model
    assert "model" not in config


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda c: c.copy(), lambda c: pickle.loads(pickle.dumps(c))],
    ids=["copy", "deepcopy", "method", "pickle"],
)
def test_a_copy_is_a_config(copied):
    config = copied(Config({"a": {"b": 1}}))
    assert type(config) is type(config.a) is Config
    assert config == {"a": {"b": 1}}


def test_a_file_is_relative_to_the_working_directory_and_may_import_its_neighbours(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "neighbour_of_config.py").write_text("BATCH_SIZE = 128\n")
    (folder / "config.py").write_text(
        "from __future__ import annotations\n"
        "import math\nfrom dataclasses import dataclass\nfrom neighbour_of_config import *\n"
        "from macrobatch.colossalai.amp import AMP_TYPE\n"
        "@dataclass\nclass C:\n    x: int = 1\n"
        "def double(x): return 2 * x * SCALE\n"
        "SCALE = 3\nNUM_EPOCHS = 2\n_private = 1\n__dunder = 1\nmodel = dict(depth=dict(a=1))\n"
        "fp16 = dict(mode=AMP_TYPE.TORCH)\ngradient_accumulation = 4\n"
    )
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    config = Config.from_file("configs/config.py")
    assert set(sys.modules) == before
    assert sys.path == path
    assert set(config) == {
        "BATCH_SIZE", "NUM_EPOCHS", "SCALE", "_private", "dataclass", "double", "fp16", "gradient_accumulation", "model"
    }  # fmt: skip
    assert (config.BATCH_SIZE, config.model.depth.a, config.double(2)) == (128, 1, 12)
    assert config.fp16.mode is AMP_TYPE.TORCH
    check_config(config)


def test_a_file_is_read_as_it_is_now(tmp_path):
    path = tmp_path / "config.py"
    for value in (4, 8):  # of one length, within one second
        path.write_text(f"gradient_accumulation = {value}\n")
        assert Config.from_file(path).gradient_accumulation == value
    assert not (tmp_path / "__pycache__").exists()


def test_an_error_in_a_file_leaves_nothing(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("x = 1 / 0\n")
    before, search = set(sys.modules), list(sys.path)
    with pytest.raises(ZeroDivisionError):
        Config.from_file(path)
    assert set(sys.modules) == before
    assert sys.path == search


def test_a_neighbour_that_the_script_can_import_itself_is_imported_once(tmp_path, monkeypatch):
    (tmp_path / "shared_with_script.py").write_text("class Marker: ...\nMARK = Marker()\n")
    (tmp_path / "config.py").write_text("from shared_with_script import MARK\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Config.from_file(tmp_path / "config.py")
    import shared_with_script  # type: ignore[import-not-found]

    assert isinstance(config.MARK, shared_with_script.Marker)
    monkeypatch.delitem(sys.modules, "shared_with_script")


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "config"])
def test_only_python_files(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigException, match=r"expected a \.py file"):
        Config.from_file(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigException, match="there is none in"):
        Config.from_file("config.py")


@pytest.mark.parametrize("config", [None, [1], 4, b"config.py"], ids=str)
def test_what_is_no_config(config):
    with pytest.raises(ConfigException, match="the path of a"):
        gpc.load_config(config)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_what_is_right_is_taken():
    check_config(
        {
            "gradient_accumulation": np.int64(4),
            "clip_grad_norm": 0.0,
            "fp16": {"mode": None},
            "torch_ddp": {"static_graph": True},
            "gradient_handler": [{"type": "DataParallelGradientHandler"}],
            "cudnn_benchmark": False,
            "cudnn_deterministic": True,
            "torch_compile": {"mode": "reduce-overhead"},
            "parallel": {"pipeline": 1, "tensor": {"size": 1, "mode": None}},
            "zero": None,
            "GRADIENT_CLIPPING": 1.0,
            "BATCH_SIZE": 128,
            "seed": 1024,
            "amp": {"x": 1},
            "optimizer": {"type": "SGD", "lr": 0.1},
            "lr_scheduler": {},
            "model": {},
            "loss": {},
            "hooks": [],
            "logging": {},
            "epochs": 3,
            "warmup_steps": 10,
            "gradient_checkpointing": True,
            "torch_dtype": "float32",
            "gradient_scale": 1.0,
            "norm": 1,
            "_gradient_clipping": 1,
            "clip_grad": len,
        }
    )
    check_config(dict.fromkeys(["gradient_accumulation", "clip_grad_norm", "fp16", "parallel", "gradient_handler"]))


@pytest.mark.parametrize("value", [0, -1, 2.5, 4.0, "4", True, float("nan"), [4]], ids=str)
def test_a_number_of_micro_batches_that_is_none(value):
    with pytest.raises(ConfigException, match=r"'gradient_accumulation'.* an integer >= 1"):
        check_config({"gradient_accumulation": value})


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1.0", True], ids=str)
def test_a_norm_that_is_none(value):
    with pytest.raises(ConfigException, match="'clip_grad_norm'"):
        check_config({"clip_grad_norm": value})


@pytest.mark.parametrize("value", ["torch", True, {}, {"mode": "torch"}, {"init_scale": 1.0}], ids=str)
def test_fp16_without_a_mode(value):
    with pytest.raises(ConfigException, match="AMP_TYPE"):
        check_config({"fp16": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch_ddp", True),
        ("gradient_handler", {"type": "DataParallelGradientHandler"}),
        ("gradient_handler", ["DataParallelGradientHandler"]),
        ("cudnn_benchmark", 1),
        ("torch_compile", True),
        ("torch_compile", {"modus": "reduce-overhead"}),
        ("parallel", 2),
    ],
)
def test_other_values_of_the_wrong_kind(key, value):
    with pytest.raises(ConfigException, match=key):
        check_config({key: value})


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("gradient_clipping", "clip_grad_norm"),
        ("max_grad_norm", "clip_grad_norm"),
        ("clip_grad_norms", "clip_grad_norm"),
        ("grad_accumulation", "gradient_accumulation"),
        ("gradient_accumulation_steps", "gradient_accumulation"),
        ("gradient_acumulation", "gradient_accumulation"),
        ("gradient_handlers", "gradient_handler"),
        ("cudnn_benchmarks", "cudnn_benchmark"),
        ("torch_dpp", "torch_ddp"),
        ("fp_16", "fp16"),
        ("Gradient_Accumulation", "gradient_accumulation"),
        ("accum_steps", "gradient_accumulation"),
    ],
)
def test_a_near_miss_is_told_the_right_key(key, right):
    with pytest.raises(ConfigException, match=rf"expected '{right}'.*call it {right}"):
        check_config({key: 2.0})


@pytest.mark.parametrize("key", ["zero", "Zero", "moe", "bf16", "gemini", "clip_grad_value"])
def test_a_feature_that_is_not_there_is_told_the_way(key):
    with pytest.raises(ConfigException, match=r"not supported here.*leave it out"):
        check_config({key: {"stage": 2}})


@pytest.mark.parametrize(
    "parallel",
    [{"pipeline": 2}, {"pipeline": {"size": 2}}, {"tensor": {"size": 4, "mode": "2d"}}, {"data": 2}, {"tensor": True}],
    ids=str,
)
def test_only_data_parallel(parallel):
    with pytest.raises(ConfigException, match="parallel"):
        check_config({"parallel": parallel})


def test_features_that_another_key_hides():
    config = {"CONFIG": {"fp16": {}, "x": 1}, "parallel": {"tensor": 1}, "model": {"depth": 2}}
    assert hidden_features(config) == ["CONFIG['fp16']"]


# --- fp16 ------------------------------------------------------------------------------------------------------------


def test_torch_settings_reach_the_scaler():
    precision = make_precision({"mode": AMP_TYPE.TORCH, "init_scale": 8.0, "growth_interval": 7}, CPU)
    assert isinstance(precision, Fp16)
    assert (precision.scaler.get_scale(), precision.scaler.get_growth_interval()) == (8.0, 7)
    assert make_precision(None, CPU) is make_precision({"mode": None}, CPU) is None


def test_naive_and_apex_are_the_same_with_one_line(capsys):
    naive = make_precision({"mode": AMP_TYPE.NAIVE, "initial_scale": 16.0, "hysteresis": 2, "verbose": True}, CPU)
    assert isinstance(naive, Fp16)
    assert naive.scaler.get_scale() == 16.0
    (line,) = capsys.readouterr().err.splitlines()
    assert "NAIVE" in line
    assert line.endswith("without effect: hysteresis")
    assert isinstance(make_precision({"mode": AMP_TYPE.APEX, "opt_level": "O2", "verbosity": 1}, CPU), Fp16)
    assert make_precision({"mode": AMP_TYPE.APEX, "opt_level": "O0"}, CPU) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": AMP_TYPE.TORCH, "initial_scale": 1.0},
        {"mode": AMP_TYPE.TORCH, "growth_factor": 0.5},
        {"mode": AMP_TYPE.NAIVE, "init_scale": 1.0},
        {"mode": AMP_TYPE.NAIVE, "dynamic_grad_scale": False},
        {"mode": AMP_TYPE.APEX, "loss_scale": 128.0},
        {"mode": "torch"},
    ],
    ids=str,
)
def test_settings_that_a_mode_has_not(settings):
    with pytest.raises(ConfigException, match="fp16"):
        make_precision(settings, CPU)


# --- gradient handlers -----------------------------------------------------------------------------------------------


def test_handlers_are_built_from_their_names():
    class Doubling(BaseGradientHandler):
        def __init__(self, model, optimizer, factor=1):
            super().__init__(model, optimizer)
            self.factor = factor

        def handle_gradient(self):
            for param in self._model.parameters():
                assert param.grad is not None
                param.grad.mul_(self.factor)

    GRADIENT_HANDLER.register_module(Doubling)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    (handler,) = build_gradient_handlers([{"type": "Doubling", "factor": 2}], model, optimizer)
    model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
    handler.handle_gradient()
    assert model.bias.grad.item() == 2
    with pytest.raises(ConfigException, match="ZeROGradientHandler"):
        build_gradient_handlers([{"type": "ZeROGradientHandler"}], model, optimizer)
    assert build_gradient_handlers(None, model, optimizer) == []


def test_a_registry_has_one_class_of_a_name():
    registry = Registry("gradient_handler")
    registry.register_module(type("A", (), {"__module__": "one"}))
    registry.register_module(type("A", (), {"__module__": "one"}))  # a cell of a notebook, run again
    with pytest.raises(ValueError, match="a second A"):
        registry.register_module(type("A", (), {"__module__": "two"}))
    with pytest.raises(ValueError, match=r"one of \['A'\]"):
        registry.get_module("B")


# --- the context -----------------------------------------------------------------------------------------------------


def test_alone_without_launch():
    assert (gpc.world_size, gpc.data_parallel_size, gpc.get_global_rank()) == (1, 1, 0)
    for mode in ParallelMode:
        assert (gpc.get_local_rank(mode), gpc.get_world_size(mode), gpc.get_ranks_in_group(mode)) == (0, 1, [0])
        assert not gpc.is_initialized(mode)
        assert gpc.is_first_rank(mode)
        assert gpc.is_last_rank(mode)
    with pytest.raises(ValueError, match="before launch"):
        gpc.get_group(ParallelMode.DATA)
    with pytest.raises(ValueError, match="a ParallelMode"):
        gpc.get_world_size("data")
    gpc.destroy()  # nothing to do


def test_one_seed_for_all_random_numbers():
    def draw():
        gpc.set_seed(1024)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw() == draw()
    with pytest.raises(ValueError, match="seed"):
        gpc.set_seed(-1)


def job_of_context():
    """On every rank: what the context says of it."""
    group = gpc.get_group(ParallelMode.TENSOR)
    return (
        gpc.get_local_rank(ParallelMode.DATA),
        gpc.get_world_size(ParallelMode.GLOBAL),
        gpc.get_world_size(ParallelMode.TENSOR),
        group.size(),
        gpc.get_next_global_rank(ParallelMode.DATA),
        gpc.get_group(ParallelMode.DATA).size(),
        gpc.is_last_rank(ParallelMode.DATA),
        gpc.is_initialized(ParallelMode.DATA),
        gpc.is_initialized(ParallelMode.PIPELINE),
    )


@pytest.mark.xdist_group("ranks")
def test_two_ranks_are_data_parallel(ranks):
    assert ranks(2).run(job_of_context) == [
        (0, 2, 1, 1, 1, 2, False, True, False),
        (1, 2, 1, 1, 0, 2, True, True, False),
    ]
