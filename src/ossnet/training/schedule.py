"""How learning rates move over a training."""

import math

from ossnet.training.settings import ScheduleSettings

ENOUGH_STEPS = 12_000
"""Of a training that is limited by time, at least. Whole scans, left atrium (64 cases): Dice 0.928 after 9,000 steps,
and after 12,000; hippocampus (176 cases): 0.889 after 7,000 steps, 0.888 after 12,000, 0.887 after 23,000."""


def enough_steps(schedule: ScheduleSettings, examples: int) -> float:
    """Steps after which a training that is limited by time ends before it.

    Args:
        examples: In a pass through the cases.
    """
    if schedule.minutes is None or schedule.passes == 0:
        return math.inf
    return float(max(ENOUGH_STEPS, math.ceil(schedule.passes * examples / schedule.batch_size)))


def rate_factor(schedule: ScheduleSettings, fraction: float, step: int, epoch: int) -> float:
    """What the initial learning rates are multiplied by.

    Args:
        schedule: Its kind, and the numbers of that kind.
        fraction: How much of the training is done, 0 to 1.
        step: Steps done.
        epoch: Epochs done.
    """
    fraction = min(fraction, 1.0)
    if schedule.kind == "cosine":
        warm = min(1.0, fraction / schedule.warmup + 1e-2) if schedule.warmup > 0 else 1.0
        return warm * 0.5 * (1 + math.cos(math.pi * fraction))
    if schedule.kind == "root":
        # The best rate falls with the root of the number of steps: so one peak suits minutes and hours.
        done = (step + 1) / schedule.hold
        return min(1.0, 10 * done) * min(1.0, 1 / math.sqrt(done)) * (1 - fraction)
    # With a time limit the paper's milestones keep their place in the training.
    reached = epoch if schedule.minutes is None else fraction * schedule.epochs
    passed = sum(reached >= milestone for milestone in schedule.milestones)
    return float(0.1**passed)
