"""The config's `fp16`, as a precision of the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from macrobatch.colossalai.amp.amp_type import AMP_TYPE
from macrobatch.colossalai.context.config import ConfigException
from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.core.precision import Fp16, Precision

__all__ = ["checked_mode", "make_precision"]


def make_precision(fp16: object, device: torch.device) -> Precision | None:
    """The precision that a config's `fp16` asks for; None where it asks for none.

    With `mode=AMP_TYPE.TORCH` it is float16 autocast, and the other entries are those of torch.amp.GradScaler. NAIVE
    and APEX, which cast the model itself, are given the same with their settings of a dynamic loss scale; one line in
    the log says so, and what is left out.

    Args:
        fp16: a dict such as `dict(mode=AMP_TYPE.TORCH, init_scale=2**10)`, or None.
        device: what the model is on; a CPU will do.

    Raises:
        ConfigException: the mode is not an AMP_TYPE, or an entry is not one of its settings.

    ```pycon
    >>> make_precision({"mode": AMP_TYPE.TORCH, "init_scale": 1024.0}, torch.device("cpu")).scaler.get_scale()
    1024.0
    >>> make_precision({"mode": None}, torch.device("cpu"))

    ```
    """
    mode = checked_mode(fp16)
    if mode is None or not isinstance(fp16, Mapping):
        return None
    settings: dict[str, Any] = {name: value for name, value in fp16.items() if name != "mode"}
    if mode is AMP_TYPE.APEX and (settings.get("opt_level") == "O0" or settings.get("enabled") is False):
        return None  # both mean full precision there
    if mode is not AMP_TYPE.TORCH:
        settings = _translated(mode, settings)
    try:
        scaler = torch.amp.GradScaler(device.type, **settings)
    except (TypeError, AssertionError) as error:
        raise ConfigException(
            f"the config's fp16 with mode {mode.name}",
            given=f"{settings} ({error})",
            expected="settings of torch.amp.GradScaler",
            fix="keep to init_scale, growth_factor, backoff_factor, growth_interval and enabled",
        ) from None
    return Fp16(device.type, scaler)


def checked_mode(fp16: object) -> AMP_TYPE | None:
    """The mode of a config's `fp16`.

    Raises:
        ConfigException: it has none, or one that is no AMP_TYPE.
    """
    if fp16 is None:
        return None
    mode = fp16.get("mode", "missing") if isinstance(fp16, Mapping) else "missing"
    if not isinstance(mode, AMP_TYPE | None):
        raise ConfigException(
            "the config's key 'fp16'",
            given=fp16,
            expected="a dict with an AMP_TYPE as its mode",
            fix="write fp16 = dict(mode=AMP_TYPE.TORCH), after `from macrobatch.colossalai.amp import AMP_TYPE`",
        )
    return mode


_SETTINGS: Mapping[AMP_TYPE, Mapping[str, str]] = {
    AMP_TYPE.NAIVE: {
        "initial_scale": "init_scale",
        "growth_factor": "growth_factor",
        "backoff_factor": "backoff_factor",
        "growth_interval": "growth_interval",
    },
    AMP_TYPE.APEX: {},
}
"""What torch.amp.GradScaler calls the settings of the loss scale."""

_CONSTANT: Mapping[AMP_TYPE, tuple[str, object]] = {
    AMP_TYPE.NAIVE: ("dynamic_grad_scale", True),
    AMP_TYPE.APEX: ("loss_scale", "dynamic"),
}
"""The setting that may ask for a loss scale that stays, and its value if it does not."""

_WITHOUT_EFFECT: Mapping[AMP_TYPE, frozenset[str]] = {
    AMP_TYPE.NAIVE: frozenset({"dynamic_grad_scale", "hysteresis", "max_scale", "min_scale", "verbose"}),
    AMP_TYPE.APEX: frozenset(
        {
            "cast_model_outputs",
            "cast_model_type",
            "enabled",
            "keep_batchnorm_fp32",
            "loss_scale",
            "master_weights",
            "max_loss_scale",
            "min_loss_scale",
            "num_losses",
            "opt_level",
            "patch_torch_functions",
            "verbosity",
        }
    ),
}
"""Settings that the mode knows and autocast has no use for."""


def _translated(mode: AMP_TYPE, settings: Mapping[str, Any]) -> dict[str, Any]:
    names, ignored = _SETTINGS[mode], _WITHOUT_EFFECT[mode]
    unknown = sorted(settings.keys() - names.keys() - ignored)
    if unknown:
        raise ConfigException(
            f"the config's fp16 with mode {mode.name}",
            given=unknown,
            expected=f"settings of that mode: {sorted({*names, *ignored})}",
            fix="correct the name, or leave it out",
        )
    switch, dynamic = _CONSTANT[mode]
    if settings.get(switch, dynamic) not in (dynamic, None):
        raise ConfigException(
            f"the config's fp16 with mode {mode.name}",
            given=f"{switch}={settings[switch]!r}",
            expected="a loss scale that adapts itself",
            fix=f"leave {switch} out",
        )
    without = sorted((settings.keys() & ignored) - {switch, "enabled", "verbose", "verbosity"})
    get_dist_logger().info(
        f"fp16: {mode.name} runs as float16 autocast with fp32 weights and a dynamic loss scale, as TORCH does"
        + (f"; without effect: {', '.join(without)}" if without else ""),
        ranks=[0],
    )
    translated = {names[name]: value for name, value in settings.items() if name in names}
    if mode is AMP_TYPE.NAIVE:
        translated = {"growth_interval": 1000} | translated  # that mode's own default
    return translated
