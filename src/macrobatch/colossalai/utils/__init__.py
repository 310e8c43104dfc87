"""What scripts use around a training loop: data, time, devices, checkpoints, and the ranks."""

from macrobatch.colossalai.utils.checkpointing import load_checkpoint, save_checkpoint
from macrobatch.colossalai.utils.common import (
    conditional_context,
    ensure_path_exists,
    free_port,
    is_ddp_ignored,
    is_dp_rank_0,
    is_no_pp_or_last_stage,
    is_tp_rank_0,
    is_using_ddp,
    is_using_pp,
    is_using_sequence,
    print_rank_0,
    sync_model_param,
)
from macrobatch.colossalai.utils.cuda import empty_cache, get_current_device, set_to_cuda, synchronize
from macrobatch.colossalai.utils.data_sampler import DataParallelSampler, get_dataloader
from macrobatch.colossalai.utils.gradients import clip_grad_norm_fp32, count_zeros_fp32
from macrobatch.colossalai.utils.memory import bytes_to_GB, bytes_to_MB, report_memory_usage
from macrobatch.colossalai.utils.timer import MultiTimer, Timer

__all__ = [
    "DataParallelSampler",
    "MultiTimer",
    "Timer",
    "bytes_to_GB",
    "bytes_to_MB",
    "clip_grad_norm_fp32",
    "conditional_context",
    "count_zeros_fp32",
    "empty_cache",
    "ensure_path_exists",
    "free_port",
    "get_current_device",
    "get_dataloader",
    "is_ddp_ignored",
    "is_dp_rank_0",
    "is_no_pp_or_last_stage",
    "is_tp_rank_0",
    "is_using_ddp",
    "is_using_pp",
    "is_using_sequence",
    "load_checkpoint",
    "print_rank_0",
    "report_memory_usage",
    "save_checkpoint",
    "set_to_cuda",
    "sync_model_param",
    "synchronize",
]
