"""Colossal-AI's config, Engine and Trainer (v0.2.8) on macrobatch: put `macrobatch.` before the import.

```python
import macrobatch.colossalai as colossalai
```

What differs, and why, is on the pages "Coming from Colossal-AI" and "Compatibility".
"""

from macrobatch.colossalai import amp, context, core, engine, logging, nn, registry, trainer, utils
from macrobatch.colossalai.initialize import initialize
from macrobatch.colossalai.launching import (
    LaunchError,
    get_default_parser,
    launch,
    launch_from_openmpi,
    launch_from_slurm,
    launch_from_torch,
)

__all__ = [
    "LaunchError",
    "amp",
    "context",
    "core",
    "engine",
    "get_default_parser",
    "initialize",
    "launch",
    "launch_from_openmpi",
    "launch_from_slurm",
    "launch_from_torch",
    "logging",
    "nn",
    "registry",
    "trainer",
    "utils",
]
