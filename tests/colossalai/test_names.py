"""The original's import lines, with `macrobatch.` in front."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

LINES = """
from colossalai.amp import AMP_TYPE
from colossalai.amp.amp_type import AMP_TYPE
from colossalai.context import Config, ConfigException, ParallelContext, ParallelMode
from colossalai.context.config import Config
from colossalai.context.parallel_mode import ParallelMode
from colossalai.core import global_context as gpc
from colossalai.engine import BaseGradientHandler, Engine
from colossalai.engine.gradient_accumulation import GradAccumDataloader, GradAccumGradientHandler
from colossalai.engine.gradient_accumulation import GradAccumLrSchedulerByStep, GradAccumOptimizer, accumulate_gradient
from colossalai.engine.gradient_handler import BaseGradientHandler, DataParallelGradientHandler
from colossalai.engine.schedule import BaseSchedule, NonPipelineSchedule
from colossalai.logging import DistributedLogger, disable_existing_loggers, get_dist_logger
from colossalai.nn import Accuracy, CosineAnnealingLR, LinearWarmupLR
from colossalai.nn.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmupLR, FlatAnnealingLR
from colossalai.nn.lr_scheduler import FlatAnnealingWarmupLR, LinearWarmupLR, MultiStepLR, MultiStepWarmupLR
from colossalai.nn.lr_scheduler import OneCycleLR, PolynomialLR, PolynomialWarmupLR
from colossalai.nn.lr_scheduler import ExponentialLR, LambdaLR, MultiplicativeLR, StepLR
from colossalai.nn.metric import Accuracy
from colossalai.registry import GRADIENT_HANDLER
from colossalai.trainer import Trainer, hooks
from colossalai.trainer.hooks import AccuracyHook, BaseHook, LogMemoryByEpochHook, LogMetricByEpochHook
from colossalai.trainer.hooks import LogMetricByStepHook, LogTimingByEpochHook, LossHook, LRSchedulerHook, MetricHook
from colossalai.trainer.hooks import SaveCheckpointHook, TensorboardHook, ThroughputHook
from colossalai.utils import MultiTimer, Timer, get_current_device, get_dataloader, is_dp_rank_0, print_rank_0
from colossalai.utils import load_checkpoint, save_checkpoint, free_port, synchronize, report_memory_usage
from colossalai.utils.checkpointing import load_checkpoint, save_checkpoint
from colossalai.utils.cuda import get_current_device
from colossalai.utils.timer import MultiTimer
""".strip().splitlines()


@pytest.mark.parametrize("line", LINES)
def test_import_line(line):
    exec(line.replace("from colossalai", "from macrobatch.colossalai"), {})


def test_attributes_after_one_import():
    names = ["launch", "launch_from_torch", "launch_from_slurm", "launch_from_openmpi", "get_default_parser"]
    names += ["initialize", "nn.lr_scheduler.CosineAnnealingLR", "trainer.hooks.LossHook", "amp.AMP_TYPE"]
    names += ["utils.get_dataloader", "core.global_context", "logging.get_dist_logger", "engine.schedule"]
    code = "import macrobatch.colossalai as colossalai\n" + "\n".join(f"colossalai.{name}" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["zero", "gemini", "pipeline"])
def test_what_is_not_there_is_no_module(name):
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"macrobatch.colossalai.{name}")):
        exec(f"import macrobatch.colossalai.{name}", {})
