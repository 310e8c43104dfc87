"""The names and signatures of the original: each is here as it is there, is refused by name, or is listed with why."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from macrobatch.errors import ArgumentError
from tests.accelerate.doors import ORIGINAL, OURS, entered

MODULES = [
    *["accelerator", "state", "optimizer", "scheduler", "data_loader", "launchers", "local_sgd", "logging", "tracking"],
    *[f"utils.{name}" for name in ("dataclasses", "operations", "random", "memory", "imports", "environment")],
    *[f"utils.{name}" for name in ("versions", "modeling", "other", "tqdm", "constants")],
]

DIFFERENT = {
    "accelerator.Accelerator": "split_batches: its default is a private object in the original, which ignores it",
    "accelerator.Accelerator.init_trackers": "the original hides its parameters behind a decorator",
    "accelerator.Accelerator.log": "the original hides its parameters behind a decorator",
    "accelerator.Accelerator.skip_first_batches": "num_batches=None: those of a loaded checkpoint; 0 for other loaders",
    "data_loader.skip_first_batches": "as above",
    "state.PartialState.on_last_process": "function=None, as for the other decorators, to be called with parentheses",
    "utils.dataclasses.GradientAccumulationPlugin": "defaults that can be told from the same values when passed",
    "utils.modeling.find_tied_parameters": "its kwargs are the original's own recursion",
}
"""Signatures that differ, and why."""

PARALLEL = "of tensor, context and pipeline parallelism, which are not part of macrobatch"
INTERNAL = "of the original's own making"
HARDWARE = "of hardware that macrobatch does not compute on"
MEGATRON = "of Megatron-LM, which is not part of macrobatch"
COMPILING = "models are compiled by the accelerator: dynamo_plugin="
NOT_THERE = {
    "accelerator.Accelerator.context_parallel_rank": PARALLEL,
    "accelerator.Accelerator.data_parallel_rank": PARALLEL,
    "accelerator.Accelerator.data_parallel_shard_rank": PARALLEL,
    "accelerator.Accelerator.deepspeed_ulysses_dl_adapter": PARALLEL,
    "accelerator.Accelerator.is_composable_parallelism_enabled": PARALLEL,
    "accelerator.Accelerator.lomo_backward": "LOMO steps inside the backward, where nothing can be accumulated",
    "accelerator.Accelerator.maybe_context_parallel": PARALLEL,
    "accelerator.Accelerator.pipeline_parallel_rank": PARALLEL,
    "accelerator.Accelerator.tensor_parallel_rank": PARALLEL,
    "accelerator.Accelerator.verify_device_map": "of big-model inference, which is not part of macrobatch",
    "state.ThreadLocalSharedDict": HARDWARE,
    "data_loader.DataLoaderAdapter": INTERNAL,
    "data_loader.DataLoaderDispatcher.adjust_state_dict_for_prefetch": INTERNAL,
    "data_loader.DataLoaderShard.adjust_state_dict_for_prefetch": INTERNAL,
    "data_loader.SkipDataLoader.adjust_state_dict_for_prefetch": INTERNAL,
    "launchers.test_launch": INTERNAL,
    "optimizer.move_to_device": INTERNAL,
    "optimizer.patch_optimizer_step": INTERNAL,
    "utils.dataclasses.EnumWithContains": INTERNAL,
    "utils.dataclasses.get_module_class_from_name": INTERNAL,
    **{f"utils.dataclasses.parse_{name}_config": MEGATRON for name in ("bert", "glm4_moe", "gpt2", "llama", "t5")},
    "utils.dataclasses.DynamoBackend.AOT_TORCHXLA_TRACE_ONCE": HARDWARE,
    "utils.dataclasses.DynamoBackend.TORCHXLA_TRACE_ONCE": HARDWARE,
    "utils.dataclasses.DynamoBackend.HPU_BACKEND": HARDWARE,
    "utils.dataclasses.DynamoBackend.NEURON": HARDWARE,
    **{
        f"utils.dataclasses.RNGType.{name}": HARDWARE
        for name in ["HPU", "MLU", "MUSA", "NEURON", "NPU", "SDAA", "XLA", "XPU"]
    },
    "utils.operations.chained_operation": INTERNAL,
    "utils.operations.gather_tensor_shape": INTERNAL,
    "utils.operations.get_shape": INTERNAL,
    "utils.operations.is_torch_xpu_tensor": HARDWARE,
    "utils.operations.verify_operation": INTERNAL,
    "utils.environment.CPUInformation": INTERNAL,
    "utils.environment.check_cuda_p2p_ib_support": INTERNAL,
    "utils.environment.get_cpu_distributed_information": INTERNAL,
    "utils.environment.get_current_device_type": INTERNAL,
    "utils.environment.get_driver_version": INTERNAL,
    "utils.environment.get_gpu_info": INTERNAL,
    "utils.environment.override_numa_affinity": INTERNAL,
    "utils.environment.set_numa_affinity": INTERNAL,
    "utils.modeling.convert_file_size_to_int": INTERNAL,
    "utils.modeling.get_grad_scaler": INTERNAL,
    "utils.modeling.id_tensor_storage": INTERNAL,
    "utils.other.check_os_kernel": INTERNAL,
    "utils.other.compile_regions": COMPILING,
    "utils.other.compile_regions_fsdp2": COMPILING,
    "utils.other.get_free_port": INTERNAL,
    "utils.other.get_module_children_bottom_up": INTERNAL,
    "utils.other.has_compiled_regions": COMPILING,
    "utils.other.has_repeated_blocks": COMPILING,
    "utils.other.is_repeated_blocks": COMPILING,
}
"""Names that are not here, and why; what a training script may import besides says so when it is asked for."""


def public_names(module: str) -> Iterator[tuple[str, Any]]:
    """What a module of the original defines itself; of classes that are here, the attributes too."""
    original = importlib.import_module(f"{ORIGINAL}.{module}")
    for name, value in vars(original).items():
        path = f"{module}.{name}"
        if name.startswith("_") or getattr(value, "__module__", None) != original.__name__:
            continue
        yield path, value
        is_here = inspect.isclass(value) and inspect.isclass(ours(path))
        for attribute in dir(value) if is_here else ():
            owner = next((kind for kind in value.__mro__ if attribute in vars(kind)), object)
            if not attribute.startswith("_") and owner.__module__.startswith(ORIGINAL):
                yield f"{path}.{attribute}", getattr(value, attribute)


def ours(path: str) -> Any:
    """The same of this door: None if it is not there, an ImportError if it is refused by name."""
    *parents, name = path.split(".")
    depth = 2 if parents[0] == "utils" else 1
    found = importlib.import_module(".".join([OURS, *parents[:depth]]))
    try:
        for part in [*parents[depth:], name]:
            found = getattr(found, part)
    except AttributeError:
        return None
    except ImportError as error:
        return error if len(parents) == depth else None
    return ... if found is None else found


ALL = [pair for module in MODULES for pair in public_names(module)]
ON_OBJECTS = (
    "state.AcceleratorState.",
    "scheduler.AcceleratedScheduler.",
    "utils.dataclasses.GradientAccumulationPlugin.",
    "utils.dataclasses.FullyShardedDataParallelPlugin.",
)
"""Classes whose objects pass attributes on; see `test_objects_have_the_attributes_of_the_originals`."""


def test_every_name_is_here_or_refused_or_listed():
    found = {path: ours(path) for path, _ in ALL if not path.startswith(ON_OBJECTS)}
    assert {path for path, mine in found.items() if mine is None} == set(NOT_THERE)
    refusals = [str(mine) for mine in found.values() if isinstance(mine, ImportError)]
    assert len(refusals) > 20
    assert all("To fix it" in refusal for refusal in refusals)


REQUIRED = "no default"


def _plain(default: Any) -> Any:
    """A default that compares equal to the other package's."""
    return getattr(default, "value", getattr(default, "__qualname__", default))


def parameters(function: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    return [
        (p.name, p.kind.name, REQUIRED if p.default is p.empty else _plain(p.default))
        for p in inspect.signature(function).parameters.values()
    ]


def fits(original: Callable[..., Any], own: Callable[..., Any]) -> bool:
    """Whether every call of the original's is one of ours, with the same defaults; what else it takes is optional."""
    theirs, mine = parameters(original), parameters(own)
    several = {"VAR_POSITIONAL", "VAR_KEYWORD"}
    kinds = {kind for _, kind, _ in mine}
    if kinds == several and len(mine) == 2:
        return True  # it takes anything
    named = [each for each in theirs if each[1] not in several]
    own_named = [each for each in mine if each[1] not in several]
    optional = all(default != REQUIRED for _, _, default in own_named[len(named) :])
    open_ended = {kind for _, kind, _ in theirs if kind in several}
    return own_named[: len(named)] == named and optional and open_ended <= kinds


def is_plain(value: Any) -> bool:
    """Whether it is an enum or an error, whose signatures are Python's."""
    return inspect.isclass(value) and issubclass(value, str | Exception)


def test_signatures_are_the_originals_but_for_those_that_are_listed():
    pairs = {path: (value, ours(path)) for path, value in ALL if callable(value) and callable(ours(path))}
    enums = {
        path for path, (value, _) in pairs.items() if inspect.isclass(value) and issubclass(value, str | Exception)
    }
    compared = {path: pair for path, pair in pairs.items() if path not in enums and pair[1] is not ...}
    assert {path for path, (theirs, mine) in compared.items() if not fits(theirs, mine)} == set(DIFFERENT)
    assert len(compared) > 150


def test_the_rule_for_signatures_tells_them_apart():
    def original(a, b=1): ...

    assert fits(original, lambda a, b=1: ...)
    assert fits(original, lambda a, b=1, c=2: ...)
    assert fits(original, lambda *args, **kwargs: ...)
    for other in (lambda a, b=2: ..., lambda b=1, a=1: ..., lambda a: ..., lambda a, b=1, *, c: ...):
        assert not fits(original, other)


def test_objects_have_the_attributes_of_the_originals(tmp_path: Any):
    import torch

    kinds = {"GradientAccumulationPlugin": {}, "FullyShardedDataParallelPlugin": {}}
    seen: dict[str, dict[str, set[str]]] = {}
    for package in (ORIGINAL, OURS):
        with entered(package) as door:
            accelerator = door.Accelerator(cpu=True)
            model = torch.nn.Linear(1, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            prepared = accelerator.prepare(model, optimizer, scheduler)
            objects = {"state": accelerator.state, "optimizer": prepared[1], "scheduler": prepared[2]}
            objects |= {name: getattr(door.utils, name)(**options) for name, options in kinds.items()}
            names = {"state": {*dir(accelerator.state), *vars(accelerator.state)}}
            names |= {name: set(dir(value)) for name, value in objects.items() if name != "state"}
            seen[package] = {
                key: {name for name in each if not name.startswith("_") and hasattr(objects[key], name)}
                for key, each in (names if package == ORIGINAL else seen[ORIGINAL]).items()
            }
    missing = {f"{key}.{name}" for key, each in seen[ORIGINAL].items() for name in each - seen[OURS][key]}
    assert missing == {
        "optimizer.accelerator_state",
        "optimizer.gradient_state",
        "scheduler.gradient_state",
        "scheduler.print_lr",  # nor has torch's any more
        "state.deepspeed_plugins",
        "state.device_mesh",
        "state.get_deepspeed_plugin",
        "state.select_deepspeed_plugin",
        "FullyShardedDataParallelPlugin.set_cpu_offload",
        "FullyShardedDataParallelPlugin.set_mixed_precision",
        "FullyShardedDataParallelPlugin.set_state_dict_type",
        "FullyShardedDataParallelPlugin.validate_cpu_offload",
        "FullyShardedDataParallelPlugin.validate_mixed_precision_policy",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"deepspeed_plugin": object()},
        {"megatron_lm_plugin": object()},
        {"torch_tp_plugin": object()},
        {"parallelism_config": object()},
        {"deepspeed_plugins": {"a": object()}},
        {"mixed_precision": "fp8"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_makes_no_sense_is_refused_with_what_to_use(options: dict[str, Any]):
    with entered(OURS) as door, pytest.raises(ArgumentError, match="To fix it, "):
        door.Accelerator(**options)


@pytest.mark.parametrize("name", ["DeepSpeedPlugin", "MegatronLMPlugin", "FP8RecipeKwargs", "load_and_quantize_model"])
def test_importing_what_is_not_part_of_it_says_what_to_use(name: str):
    with pytest.raises(ImportError, match=rf"{name}: .* To fix it, "):
        exec(f"from macrobatch.accelerate.utils import {name}")


MERELY_HELPERS = {
    *["prepare_data_loader", "prepare_optimizer", "prepare_scheduler", "initialize"],  # of Megatron-LM
    *["get_parameter_device", "get_parameters_from_modules", "env_var_path_add"],
}


@pytest.mark.parametrize(
    "module",
    [
        *["big_modeling", "hooks", "inference", "parallelism_config"],
        *[f"utils.{name}" for name in ("deepspeed", "megatron_lm", "bnb", "offload", "ao", "transformer_engine")],
        *["utils.fsdp_utils", "utils.launch"],
    ],
)
def test_modules_of_what_is_not_part_of_it_say_what_to_use(module: str):
    names = {path.removeprefix(f"{module}.") for path, _ in public_names(module)}
    assert len(names - MERELY_HELPERS) >= 1
    for name in names - MERELY_HELPERS:
        with pytest.raises(ImportError, match=rf"{name}: .* To fix it, "):
            exec(f"from {OURS}.{module} import {name}")


def test_constants_are_the_originals():
    theirs, mine = (vars(importlib.import_module(f"{package}.utils.constants")) for package in (ORIGINAL, OURS))
    names = {name for name in mine if name.isupper()}
    assert len(names) > 10
    assert {name: mine[name] for name in names} == {name: theirs[name] for name in names}


def test_plugins_can_be_imported_from_the_module_of_the_accelerator():
    from macrobatch.accelerate.accelerator import DataLoaderConfiguration, GradientAccumulationPlugin

    assert DataLoaderConfiguration().even_batches
    assert GradientAccumulationPlugin(num_steps=3).num_steps == 3
