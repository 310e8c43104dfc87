"""Which keys of a config switch something on, and what is said about those that look as if they did."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch

from macrobatch.colossalai.amp.precision import checked_mode
from macrobatch.colossalai.context.config import ConfigException

__all__ = ["FEATURES", "check_config", "hidden_features"]


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what would have no effect, or not the one that its name promises.

    Keys that switch something on are `gradient_accumulation`, `clip_grad_norm`, `fp16`, `torch_ddp`,
    `gradient_handler`, `cudnn_benchmark`, `cudnn_deterministic`, `parallel` and, as an addition of this package,
    `torch_compile`. None as a value is the same as no key.
    All other keys are hyper-parameters, which only your script reads, with two exceptions among those that are not in
    upper case: a name that comes close to one of the above, such as `gradient_clipping`, and a feature that this
    package does not have, such as `zero`.

    Raises:
        ConfigException: naming the right key, or the way to get what was asked for.

    ```pycon
    >>> check_config({"gradient_accumulation": 4, "BATCH_SIZE": 128, "optimizer": {"lr": 0.1}})
    >>> check_config({"gradient_clipping": 1.0})
    Traceback (most recent call last):
    macrobatch.colossalai.context.config.ConfigException: the config's key 'gradient_clipping': given 1.0; expected
    'clip_grad_norm': 'gradient_clipping' has no effect. To fix it, call it clip_grad_norm, or in upper case if it is
    a hyper-parameter of your own.

    ```
    """
    for key, value in config.items():
        if value is None:
            continue
        if key in FEATURES:
            FEATURES[key](key, value)
        elif not key.isupper() and not key.startswith("_") and not callable(value):
            _check_name(key, value)


def hidden_features(config: Mapping[str, Any]) -> list[str]:
    """Keys within other keys' dicts that would be features at the top, where alone they have an effect.

    ```pycon
    >>> hidden_features({"CONFIG": {"clip_grad_norm": 1.0}, "gradient_accumulation": 4})
    ["CONFIG['clip_grad_norm']"]

    ```
    """
    return [
        f"{key}[{inner!r}]"
        for key, value in config.items()
        if isinstance(value, Mapping) and key not in FEATURES
        for inner in value
        if inner in FEATURES
    ]


def _check_name(key: str, value: object) -> None:
    lower = key.lower()
    if lower in _MISSING:
        raise _wrong(key, value, "no such key: it is not supported here", _MISSING[lower])
    near = _SYNONYMS.get(lower) or next(iter(difflib.get_close_matches(lower, FEATURES, n=1, cutoff=0.85)), None)
    if near is not None:
        raise _wrong(
            key,
            value,
            f"{near!r}: {key!r} has no effect",
            f"call it {near}, or in upper case if it is a hyper-parameter of your own",
        )


def _check_accumulation(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise _wrong(key, value, "the number of micro-batches of an update, an integer >= 1", "write 4, for example")


def _check_norm(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise _wrong(key, value, "the largest norm of a gradient, a number >= 0, 0.0 for any", "write 1.0, for example")


def _check_fp16(_: str, value: object) -> None:
    checked_mode(value)


def _check_ddp(key: str, value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _wrong(
            key, value, "a dict of arguments for DistributedDataParallel", "write dict(static_graph=True), for example"
        )


def _check_compile(key: str, value: object) -> None:
    allowed = [name for name in inspect.signature(torch.compile).parameters if name != "model"]
    if not isinstance(value, Mapping) or not all(name in allowed for name in value):
        raise _wrong(
            key,
            value,
            f"a dict of arguments for torch.compile: {', '.join(allowed)}",
            'write dict(mode="reduce-overhead"), for example',
        )


def _check_handlers(key: str, value: object) -> None:
    if not isinstance(value, list | tuple) or not all(
        isinstance(each, Mapping) and isinstance(each.get("type"), str) for each in value
    ):
        raise _wrong(
            key,
            value,
            "a list of dicts, each with the name of a gradient handler as its type",
            f'write {key} = [dict(type="DataParallelGradientHandler")]',
        )


def _check_flag(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _wrong(key, value, "True or False", f"write {key} = True")


def _check_parallel(key: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise _wrong(key, value, "a dict of the parallel dimensions", "leave it out: all ranks are data parallel")
    for dimension, setting in value.items():
        if dimension not in ("pipeline", "tensor"):
            raise _wrong(
                f"{key}[{dimension!r}]",
                setting,
                "'pipeline' or 'tensor'; what is left of the ranks is data parallel",
                "leave it out",
            )
        size: object = setting.get("size", 1) if isinstance(setting, Mapping) else setting
        if size is None or (size == 1 and not isinstance(size, bool)):
            continue
        raise _wrong(
            f"{key}[{dimension!r}]",
            setting,
            "size 1: macrobatch accumulates over data-parallel ranks and does not cut models",
            "leave it out; for a model that is too large for a device, see macrobatch.ShardedSync",
        )


def _wrong(key: str, value: object, expected: str, fix: str) -> ConfigException:
    what = f"the config's {key}" if "[" in key else f"the config's key {key!r}"
    return ConfigException(what, given=f"{value!r:.200}", expected=expected, fix=fix)


FEATURES = {
    "gradient_accumulation": _check_accumulation,
    "clip_grad_norm": _check_norm,
    "fp16": _check_fp16,
    "torch_ddp": _check_ddp,
    "gradient_handler": _check_handlers,
    "cudnn_benchmark": _check_flag,
    "cudnn_deterministic": _check_flag,
    "torch_compile": _check_compile,
    "parallel": _check_parallel,
}
"""Every key that switches something on, with what checks its value."""

_SYNONYMS = {
    **dict.fromkeys(
        (
            "accum_iter",
            "accum_steps",
            "accumulate_grad_batches",
            "accumulate_size",
            "accumulation",
            "accumulation_steps",
            "grad_accum",
            "grad_accum_steps",
            "grad_accumulation",
            "grad_accumulation_steps",
            "gradient_accumulation_steps",
        ),
        "gradient_accumulation",
    ),
    **dict.fromkeys(
        (
            "clip_grad",
            "clip_gradient",
            "clip_gradients",
            "clip_norm",
            "grad_clip",
            "grad_clip_norm",
            "grad_clipping",
            "grad_norm_clip",
            "gradient_clip",
            "gradient_clip_norm",
            "gradient_clip_val",
            "gradient_clipping",
            "max_grad_norm",
            "max_norm",
        ),
        "clip_grad_norm",
    ),
    **dict.fromkeys(("amp_type", "float16", "half", "mixed_precision"), "fp16"),
    **dict.fromkeys(("ddp", "distributed_data_parallel"), "torch_ddp"),
    **dict.fromkeys(("compile", "dynamo", "cuda_graph", "cuda_graphs"), "torch_compile"),
}
"""Other names that people give to what a key does."""

_SHARDED = "leave it out; macrobatch.TrainStep with ShardedSync shards parameters and optimizer state (FSDP2)"
_DATA_PARALLEL = "leave it out: all ranks are data parallel"
_MISSING = {
    "zero": _SHARDED,
    "gemini": _SHARDED,
    "bf16": 'leave it out; macrobatch.TrainStep takes precision="bf16"',
    "bfloat16": 'leave it out; macrobatch.TrainStep takes precision="bf16"',
    "max_ep_size": _DATA_PARALLEL,
    "moe": _DATA_PARALLEL,
    "clip_grad_value": "leave it out; macrobatch.TrainStep takes clip_value",
    "sequence_parallel": _DATA_PARALLEL,
    "tensor_parallel": _DATA_PARALLEL,
    "pipeline_parallel": _DATA_PARALLEL,
}
"""Features that are not there, and the way to get them."""
