"""What training scripts import from `utils`, at the paths that they know."""

from __future__ import annotations

from typing import Any

from macrobatch.accelerate.utils.absent import absent
from macrobatch.accelerate.utils.constants import *  # noqa: F403
from macrobatch.accelerate.utils.dataclasses import *  # noqa: F403
from macrobatch.accelerate.utils.environment import *  # noqa: F403
from macrobatch.accelerate.utils.imports import *  # noqa: F403
from macrobatch.accelerate.utils.memory import *  # noqa: F403
from macrobatch.accelerate.utils.modeling import *  # noqa: F403
from macrobatch.accelerate.utils.operations import *  # noqa: F403
from macrobatch.accelerate.utils.other import *  # noqa: F403
from macrobatch.accelerate.utils.random import *  # noqa: F403
from macrobatch.accelerate.utils.tqdm import *  # noqa: F403
from macrobatch.accelerate.utils.versions import *  # noqa: F403


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
