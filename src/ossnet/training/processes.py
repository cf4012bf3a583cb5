"""Devices and processes that train together: how many there are, in which precision, and how they end."""

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException

from ossnet.errors import ResourceError, SettingsError
from ossnet.networks.machine import fast_bf16
from ossnet.networks.variants import PAPER_VARIANTS
from ossnet.training.settings import Settings

# What gloo and NCCL say when a process at the other end is gone.
_GONE = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "connection refused",
    "timed out",
    "remote process",
)


def with_processes(settings: Settings, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings with the numbers of devices and nodes that torchrun or SLURM started, where one did.

    A forgotten `--devices` would otherwise let every process train for itself, all into one folder.

    Raises:
        SettingsError: The settings ask for another number of processes than there are, or the processes cannot
            share a batch.
    """
    settings = _with_external(settings, environment)
    batch, world = settings.schedule.batch_size, settings.runtime.devices * settings.runtime.nodes
    if batch < world:
        # One for each: recipes of a single crop a step are for a single device.
        schedule = settings.schedule.model_copy(update={"batch_size": world})
        return settings.model_copy(update={"schedule": schedule})
    if batch % world:
        raise SettingsError(
            "schedule.batch_size",
            f"{batch} volumes cannot be shared by {world} processes",
            f"Use a multiple of {world}",
        )
    return settings


def _with_external(settings: Settings, environment: Mapping[str, str]) -> Settings:
    known = environment.get
    if "TORCHELASTIC_RUN_ID" in environment:
        local, world = int(known("LOCAL_WORLD_SIZE", "1")), int(known("WORLD_SIZE", "1"))
    elif "SLURM_NTASKS" in environment and known("SLURM_JOB_NAME") not in ("bash", "interactive"):
        world = int(known("SLURM_NTASKS", "1"))
        local = max(1, world // int(known("SLURM_NNODES", "1")))
    else:
        return settings
    wanted = settings.runtime.devices
    if wanted not in (1, local):
        raise SettingsError(
            "runtime.devices",
            f"{wanted} are wanted, but torchrun or SLURM started {local} process(es) on this machine",
            "Start as many, or leave --devices out",
        )
    runtime = settings.runtime.model_copy(update={"devices": local, "nodes": max(1, world // local)})
    return settings.model_copy(update={"runtime": runtime})


def waits_for(settings: Settings, environment: Mapping[str, str] = os.environ) -> str | None:
    """What to tell who waits: without `srun` SLURM starts one process, and the others never come."""
    world = settings.runtime.devices * settings.runtime.nodes
    ours = "SLURM_NTASKS" in environment and "TORCHELASTIC_RUN_ID" not in environment
    if world == 1 or not ours or environment.get("SLURM_PROCID", "0") != "0":
        return None
    return f"waiting for all of {world} processes: SLURM starts them with srun"


def quieten_fabric() -> None:
    """Keep Fabric's remarks on what it set up out of the messages for people."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning_fabric")


@contextmanager
def ending_together(fabric: Fabric) -> Iterator[None]:
    """One process tells what went wrong, and none stays behind.

    Raises:
        ResourceError: Another process ended before its time.
    """
    try:
        yield
    except BaseException as error:
        if fabric.world_size == 1:
            raise
        if fabric.is_global_zero:
            _end_launched(fabric)
        elif isinstance(error, KeyboardInterrupt):
            raise SystemExit(0) from None  # the first process writes the state and says so
        else:
            # The first process most likely met the same error; it tells it and ends this one meanwhile.
            time.sleep(5)
        if isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _GONE):
            raise ResourceError(
                "another process of this training ended. Its last state is kept: go on with --resume."
            ) from error
        raise
    if fabric.world_size > 1:
        # From here on the first process works alone, for longer than others would wait for it.
        fabric.barrier()
        dist.destroy_process_group()


def _end_launched(fabric: Fabric) -> None:
    """End the processes that Fabric launched from this one."""
    processes = getattr(fabric.strategy.launcher, "procs", [])
    for process in processes:
        process.kill()
    # Fabric watches this list and kills the whole program when one of them ends unexpectedly.
    processes.clear()


def make_fabric(settings: Settings) -> Fabric:
    """Devices, processes and precision as the settings say."""
    runtime = settings.runtime
    accelerator = runtime.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise SettingsError("runtime.accelerator", "there is no CUDA device", "Use auto or cpu")
    precision = runtime.precision
    if precision == "auto":
        # The paper's variants were trained in full precision; the others were tried in bf16.
        precision = (
            "bf16-mixed"
            if settings.variant not in PAPER_VARIANTS and fast_bf16(torch.device(accelerator))
            else "32-true"
        )
    several = runtime.devices * runtime.nodes > 1
    quieten_fabric()
    try:
        return Fabric(
            accelerator=accelerator,
            devices=runtime.devices,
            num_nodes=runtime.nodes,
            strategy="ddp" if several else "auto",
            precision=precision,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        # More devices than there are, or a cluster that started other processes than it was asked for.
        reason = " ".join(str(error).split()).rstrip(".")
        raise SettingsError(
            "runtime.devices", reason, "Use what the machine or the cluster offers"
        ) from error


def computes_on(fabric: Fabric) -> str:
    """The device, for people: who has a GPU wants to see that it is used."""
    if fabric.device.type == "cuda":
        name = torch.cuda.get_device_name(fabric.device)
    else:
        threads = torch.get_num_threads()
        name = f"the CPU with {threads} thread{'s' if threads > 1 else ''}"
    several = f", one of {fabric.world_size}" if fabric.world_size > 1 else ""
    half = fabric.strategy.precision.precision == "bf16-mixed"
    return f"on {name}{several}, in {'bfloat16 where that is enough' if half else 'float32'}"
