"""The door for scripts written for Hugging Face Accelerate: put `macrobatch.` before the import.

```python
from macrobatch.accelerate import Accelerator
```

The names, arguments and files are those of accelerate 1.15; what differs, and how to get the original's numbers back,
is on the page "Compatibility".
"""

from typing import Any

from macrobatch.accelerate.accelerator import Accelerator
from macrobatch.accelerate.data_loader import skip_first_batches
from macrobatch.accelerate.launchers import debug_launcher, notebook_launcher
from macrobatch.accelerate.local_sgd import LocalSGD
from macrobatch.accelerate.state import PartialState
from macrobatch.accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    find_executable_batch_size,
    synchronize_rng_states,
)
from macrobatch.accelerate.utils.absent import absent

__all__ = [
    "Accelerator",
    "AutocastKwargs",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "LocalSGD",
    "PartialState",
    "ProfileKwargs",
    "debug_launcher",
    "find_executable_batch_size",
    "notebook_launcher",
    "skip_first_batches",
    "synchronize_rng_states",
]

__version__ = "1.15.0"  # of the accelerate that it stands in for: scripts ask before they use a feature


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
