"""The small parts of `utils`: what they take, what they refuse, and where the original goes wrong."""

from __future__ import annotations

import importlib
import random
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from macrobatch.accelerate import utils
from macrobatch.accelerate.state import PartialState
from macrobatch.accelerate.utils import dataclasses as ours
from macrobatch.accelerate.utils import environment, imports, memory
from macrobatch.accelerate.utils.random import set_seed, synchronize_rng_states
from macrobatch.errors import ArgumentError
from tests.accelerate.doors import entered

pytestmark = pytest.mark.xdist_group("ranks")

SCRIPTS_IMPORT = [
    ("utils", "DistributedDataParallelKwargs set_seed ProjectConfiguration DistributedType is_wandb_available tqdm"),
    ("utils", "broadcast gather gather_object reduce pad_across_processes send_to_device DataLoaderConfiguration"),
    (
        "utils",
        "GradientAccumulationPlugin InitProcessGroupKwargs LoggerType TorchDynamoPlugin extract_model_from_parallel",
    ),
    ("utils", "is_xpu_available is_npu_available is_mlu_available is_torch_version release_memory str_to_bool save"),
    ("utils.dataclasses", "DistributedType PrecisionType LoggerType FullyShardedDataParallelPlugin ProfileKwargs"),
    ("utils.operations", "gather recursively_apply convert_outputs_to_fp32 find_batch_size honor_type"),
    ("utils.other", "is_compiled_module save load wait_for_everyone"),
    ("utils.memory", "find_executable_batch_size clear_device_cache"),
    ("utils.random", "set_seed synchronize_rng_state"),
    ("utils.imports", "is_bf16_available is_cuda_available is_comet_ml_available is_mps_available"),
    ("utils.versions", "compare_versions is_torch_version"),
    ("utils.modeling", "compute_module_sizes find_tied_parameters named_module_tensors"),
    ("utils.constants", "MODEL_NAME OPTIMIZER_NAME SAFE_WEIGHTS_NAME WEIGHTS_NAME RNG_STATE_NAME"),
    ("utils.environment", "parse_flag_from_env patch_environment are_libraries_initialized"),
    ("utils.tqdm", "tqdm"),
]


@pytest.mark.parametrize(("module", "names"), SCRIPTS_IMPORT)
def test_names_of_scripts_are_at_their_paths(module: str, names: str):
    theirs, mine = import_module(f"accelerate.{module}"), import_module(f"macrobatch.accelerate.{module}")
    for name in names.split():
        assert hasattr(theirs, name), "not a name of the original"
        assert callable(getattr(mine, name)) or getattr(mine, name) == getattr(theirs, name)


@pytest.mark.parametrize("name", ["DeepSpeedPlugin", "MegatronLMPlugin", "TorchTensorParallelPlugin", "dispatch_model"])
def test_absent_names_say_why_and_what_to_do(name: str):
    with pytest.raises(ImportError, match=r"not part of macrobatch. To fix it"):
        exec(f"from macrobatch.accelerate.utils import {name}")
    with pytest.raises(ImportError, match=r"not part of macrobatch. To fix it"):
        getattr(ours, name)
    with pytest.raises(ImportError, match=r"not part of macrobatch. To fix it"):
        exec(f"from macrobatch.accelerate import {name}")
    assert not hasattr(utils, "no_such_name")


# --- windows ---


@pytest.mark.parametrize("num_steps", [0, -3, 2.5, "4", None, True], ids=repr)
def test_plugin_refuses_what_is_no_number_of_steps(num_steps: Any):
    import_module("accelerate.utils").GradientAccumulationPlugin(num_steps=num_steps)  # the control: it takes all
    with pytest.raises(ArgumentError, match="num_steps: given"):
        ours.GradientAccumulationPlugin(num_steps=num_steps)


def test_plugin_keeps_what_is_passed():
    original = import_module("accelerate.utils").GradientAccumulationPlugin(num_steps=4, adjust_scheduler=True)
    assert "adjust_scheduler" not in original.to_kwargs()  # the control
    assert ours.GradientAccumulationPlugin(num_steps=4, adjust_scheduler=True).to_kwargs()["adjust_scheduler"] is True
    assert "adjust_scheduler" not in ours.GradientAccumulationPlugin(num_steps=4).to_kwargs()


def test_normalize_comes_from_argument_or_environment():
    assert ours.GradientAccumulationPlugin().normalize == "exact"
    with environment.patch_environment(macrobatch_normalize="constant"):
        assert ours.GradientAccumulationPlugin().normalize == "constant"
        assert ours.GradientAccumulationPlugin(normalize="uniform").normalize == "uniform"
    for wrong in ("mean", "", None, 4):
        with pytest.raises(ArgumentError, match="normalize"):
            ours.GradientAccumulationPlugin(normalize=wrong)


# --- other options ---

KWARGS: dict[str, dict[str, Any]] = {
    "DistributedDataParallelKwargs": {"find_unused_parameters": True, "bucket_cap_mb": 1},
    "GradScalerKwargs": {"init_scale": 8.0},
    "InitProcessGroupKwargs": {"timeout": timedelta(seconds=7)},
    "AutocastKwargs": {"enabled": False},
    "DataLoaderConfiguration": {"split_batches": True},
    "ProjectConfiguration": {"project_dir": "a folder", "total_limit": 2},
    "ProfileKwargs": {"activities": ["cpu"], "record_shapes": True},
}


def plain(value: Any) -> Any:
    return getattr(value, "value", value)


@pytest.mark.parametrize("name", KWARGS)
def test_options_hold_what_the_originals_hold(name: str):
    theirs = getattr(import_module("accelerate.utils"), name)(**KWARGS[name])
    mine = getattr(ours, name)(**KWARGS[name])
    for field in vars(mine).keys() - {"reads_ahead"}:  # the one setting of ours
        if name != "InitProcessGroupKwargs" or field != "timeout":
            assert plain(getattr(mine, field)) == plain(getattr(theirs, field)), field
    if hasattr(theirs, "to_kwargs"):
        assert mine.to_kwargs() == theirs.to_kwargs()


def test_profile_records():
    with ours.ProfileKwargs(activities=["cpu"]).build() as profile:
        torch.ones(8).sum()
    assert any("sum" in event.key for event in profile.key_averages())
    with pytest.raises(ArgumentError, match="activities"):
        ours.ProfileKwargs(activities=["gpu"]).build()


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: ours.DistributedDataParallelKwargs(comm_hook="fp8"), "comm_hook"),
        (lambda: ours.DistributedDataParallelKwargs(comm_wrapper="power_sgd"), "comm_wrapper"),
        (lambda: ours.ProjectConfiguration(total_limit=0), "total_limit"),
        (lambda: ours.TorchDynamoPlugin(backend="inductr"), "dynamo backend"),
        (lambda: ours.FullyShardedDataParallelPlugin(fsdp_version=1), "fsdp_version"),
        (lambda: ours.FullyShardedDataParallelPlugin(auto_wrap_policy="transformer"), "auto_wrap_policy"),
    ],
    ids=["hook", "wrapper", "limit", "backend", "version", "policy"],
)
def test_options_refuse_what_cannot_be(make: Any, what: str):
    with pytest.raises(ArgumentError, match=what):
        make()


def test_dynamo_options_become_those_of_compile():
    plugin = ours.TorchDynamoPlugin(backend="inductor", dynamic=False, mode="reduce-overhead")
    assert plugin.to_kwargs() == {"backend": "inductor", "dynamic": False, "mode": "reduce-overhead"}
    with environment.patch_environment(accelerate_dynamo_backend="EAGER", accelerate_dynamo_mode="default"):
        assert ours.TorchDynamoPlugin().to_kwargs() == {"backend": "eager"}
        assert ours.TorchDynamoPlugin(backend="no").to_kwargs() == {"backend": "no"}


def test_fsdp_policies_choose_blocks():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    def chosen(**options: Any) -> list[str]:
        policy = ours.FullyShardedDataParallelPlugin(**options).set_auto_wrap_policy(model)
        return [] if policy is None else [name for name, module in model.named_modules() if name and policy(module)]

    assert chosen() == []
    assert chosen(transformer_cls_names_to_wrap=["Linear"]) == ["0", "1.0"]
    assert chosen(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=70) == ["1", "1.0"]
    assert chosen(auto_wrap_policy=lambda module: isinstance(module, nn.ReLU)) == ["1.1"]
    with pytest.raises(ArgumentError, match="names of modules"):
        chosen(transformer_cls_names_to_wrap=["Block"])


# --- random numbers, memory ---


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"sharding_strategy": "FULL_SHARD"}, True),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, False),
        ({"sharding_strategy": 1}, True),
        ({"reshard_after_forward": "false"}, False),
        ({"reshard_after_forward": True, "sharding_strategy": "SHARD_GRAD_OP"}, True),
    ],
    ids=str,
)
def test_fsdp_says_in_old_and_new_words_when_to_reshard(options: dict[str, Any], expected: Any):
    assert ours.FullyShardedDataParallelPlugin(**options).reshard_after_forward is expected


@pytest.mark.parametrize(
    "options",
    [
        {"fsdp_version": 1},
        {"sharding_strategy": "HYBRID_SHARD"},
        {"use_orig_params": False},
        {"ignored_modules": []},
        {"cpu_ram_efficient_loading": True},
        {"mixed_precision_policy": "fp8"},
    ],
    ids=str,
)
def test_fsdp_refuses_what_it_does_not_do(options: dict[str, Any]):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        ours.FullyShardedDataParallelPlugin(**options)


def test_fsdp_takes_a_precision_by_name():
    policy = ours.FullyShardedDataParallelPlugin(mixed_precision_policy="bf16").mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def recomputed(checkpoints: bool) -> tuple[int, list[float], list[str]]:
    """How often a block's forward runs in one step, its gradients, and the model's names."""
    torch.manual_seed(0)
    calls: list[int] = []

    class Block(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(input).tanh()

    with entered("macrobatch.accelerate") as door:
        plugin = door.FullyShardedDataParallelPlugin(
            transformer_cls_names_to_wrap=["Block"], activation_checkpointing=checkpoints
        )
        accelerator = door.Accelerator(cpu=True, fsdp_plugin=plugin)
        model = nn.Sequential(Block(4, 4), Block(4, 4))
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        weights = accelerator.get_state_dict(model).get("0.weight", torch.empty(0)).flatten().tolist()
        return len(calls), weights, sorted(model.state_dict())


def test_fsdp_recomputes_activations_if_asked_to(ranks: Any):
    plain, again = (ranks(2).run(recomputed, flag)[0] for flag in (False, True))
    assert (plain[0], again[0]) == (2, 4)
    assert plain[1:] == again[1:]


def test_seed_is_the_originals():
    set_seed(7)
    mine = drawn()
    import_module("accelerate.utils").set_seed(7)
    assert mine == drawn()


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", None], ids=repr)
def test_seed_that_is_none_changes_nothing(seed: Any):
    before = random.getstate()
    with pytest.raises(ArgumentError, match="seed"):
        set_seed(seed)
    assert random.getstate() == before


def one_stream() -> tuple[int, float]:
    import torch.distributed as dist

    set_seed(5, device_specific=True)
    generator = torch.Generator().manual_seed(dist.get_rank())
    synchronize_rng_states(["torch", "generator"], generator=generator)
    return int(torch.randint(10**6, (), generator=generator)), float(torch.rand(()))


def test_synchronised_generators_draw_the_same(ranks: Any):
    first, second = ranks(2).run(one_stream)
    assert first == second


def test_batch_size_shrinks_by_a_tenth_until_it_fits():
    tried: list[int] = []

    @memory.find_executable_batch_size(starting_batch_size=30)
    def train(batch_size: int, extra: str) -> tuple[int, str]:
        tried.append(batch_size)
        if batch_size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch_size, extra

    assert train("extra") == (18, "extra")
    assert train("again") == (18, "again")
    assert tried == [30, 27, 24, 21, 18] * 2
    with pytest.raises(TypeError, match="leave the batch size out"):
        train(128, "extra")


def test_batch_size_follows_a_function_down_to_nothing():
    sizes = iter([6, 3, 0])

    @memory.find_executable_batch_size(starting_batch_size=8, reduce_batch_size_fn=lambda: next(sizes))
    def train(batch_size: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="No executable batch size"):
        train()


def test_other_errors_are_passed_on():
    @memory.find_executable_batch_size
    def train(batch_size: int) -> None:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        train()


# --- environment, packages ---


@pytest.mark.parametrize("value", ["1", "TRUE", "y", "on", "0", "no", "False", "off"])
def test_flags_are_the_originals(value: str):
    assert environment.str_to_bool(value) == import_module("accelerate.utils").str_to_bool(value)


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MACROBATCH_TEST", "before")
    with environment.patch_environment(macrobatch_test=1, macrobatch_other=2):
        assert environment.get_int_from_env(["MACROBATCH_MISSING", "MACROBATCH_TEST"], 5) == 1
    assert environment.parse_choice_from_env("MACROBATCH_TEST") == "before"
    assert environment.parse_choice_from_env("MACROBATCH_OTHER") == "no"
    with environment.clear_environment():
        assert environment.parse_choice_from_env("MACROBATCH_TEST", "gone") == "gone"
    with pytest.raises(ValueError, match="truth value"):
        environment.parse_flag_from_env("MACROBATCH_TEST")


def test_packages_are_looked_up_once(monkeypatch: pytest.MonkeyPatch):
    imports.is_package_available.cache_clear()
    assert imports.is_transformers_available()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail("looked up again"))
    assert imports.is_transformers_available()


@pytest.mark.parametrize("operation", ["<", "<=", "==", "!=", ">=", ">"])
def test_versions_compare_as_in_the_original(operation: str):
    theirs = import_module("accelerate.utils")
    assert utils.is_torch_version(operation, "2.11") == theirs.is_torch_version(operation, "2.11")
    assert utils.compare_versions("numpy", operation, "2.0") == theirs.compare_versions("numpy", operation, "2.0")


# --- models, files ---


def test_facts_of_a_model_are_the_originals():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.BatchNorm1d(3), "c": nn.Linear(2, 3)})
    model["c"].weight = model["a"].weight
    theirs = import_module("accelerate.utils")
    assert utils.find_tied_parameters(model) == theirs.find_tied_parameters(model) == [["a.weight", "c.weight"]]
    del model["c"]
    assert utils.compute_module_sizes(model) == dict(theirs.compute_module_sizes(model))


def test_what_is_unwrapped_stays_compiled_if_asked_to():
    model = nn.Linear(1, 1)
    compiled: Any = torch.compile(nn.DataParallel(model))
    kept: Any = utils.extract_model_from_parallel(compiled, keep_torch_compile=True)
    assert kept._orig_mod is model
    assert compiled._orig_mod.module is model  # what was passed is as before
    assert utils.extract_model_from_parallel(compiled, keep_torch_compile=False) is model
    outer = nn.Sequential(nn.DataParallel(model))
    assert utils.extract_model_from_parallel(outer, recursive=True)[0] is model


def test_wrappers_are_taken_off():
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert utils.extract_model_from_parallel(nn.DataParallel(model)) is model
    assert utils.extract_model_from_parallel(compiled) is compiled
    assert utils.extract_model_from_parallel(compiled, keep_torch_compile=False) is model


def test_files_hold_what_was_saved(tmp_path: Path):
    weight = torch.arange(6.0).view(2, 3)
    tensors = {"weight": weight, "tied": weight, "part": weight[1:], "turned": weight.t()}
    utils.save(tensors, tmp_path / "model.safetensors", safe_serialization=True)
    loaded = utils.load(tmp_path / "model.safetensors")
    assert set(loaded) == {"weight", "part", "turned"}
    assert all(torch.equal(loaded[name], tensors[name]) for name in loaded)
    utils.save(tensors, tmp_path / "model.bin")
    assert torch.equal(utils.load(tmp_path / "model.bin")["part"], weight[1:])
    with pytest.raises(ArgumentError, match="weights_only"):
        utils.load(tmp_path / "model.bin", weights_only=False)
    PartialState._reset_state()


def saves_by_rank(folder: Path) -> bool:
    import torch.distributed as dist

    path = folder / str(dist.get_rank())
    utils.save({"a": 1}, path)
    PartialState._reset_state()
    return path.exists()


def test_main_process_saves(tmp_path: Path, ranks: Any):
    assert ranks(2).run(saves_by_rank, tmp_path) == [True, False]


def test_progress_bar_is_silent_on_other_ranks(ranks: Any, capsys: pytest.CaptureFixture[str]):
    assert ranks(2).run(is_silent) == [False, True]
    with pytest.raises(TypeError, match="main_process_only"):
        utils.tqdm(True, range(3))
    assert list(utils.tqdm(range(3), disable=True)) == [0, 1, 2]
    PartialState._reset_state()


def is_silent() -> bool:
    import io

    out = io.StringIO()
    list(utils.tqdm(range(3), file=out))
    PartialState._reset_state()
    return out.getvalue() == ""
