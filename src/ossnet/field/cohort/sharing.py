"""Several processes that share the scans of one call."""

import os
from collections.abc import Mapping

import torch


def processes() -> tuple[int, int]:
    """This process and how many there are, as torchrun or SLURM say."""
    kinds = [("RANK", "WORLD_SIZE")]
    # A batch script or a shell has these too, of all tasks of its job; `srun` alone starts as many processes.
    if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        kinds.append(("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    for rank, world in kinds:
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def take_gpu(environment: Mapping[str, str] = os.environ) -> None:
    """Give each of several processes on a machine a GPU of its own, as far as there are so many."""
    count = torch.cuda.device_count()
    local = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID")
    if count > 1 and local is not None:
        torch.cuda.set_device(int(local) % count)
