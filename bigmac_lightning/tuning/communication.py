"""How long ranks send to each other, by the bytes that they send and a bandwidth. Latency is not counted."""

from dataclasses import dataclass

from bigmac_lightning.estimates.ranks import RankEstimate
from bigmac_lightning.training.options import PipelineOptions


@dataclass(frozen=True)
class Device:
    """What a process computes and sends in a second.

    Attributes:
        tflops: TFLOP that it computes in a second, in a training and not on paper.
        bandwidth: bytes that it sends to another process in a second.
    """

    tflops: float = 400.0
    bandwidth: float = 50e9


@dataclass(frozen=True)
class Sent:
    """Seconds that a rank sends.

    Attributes:
        forward: in the forward of a microbatch, by all stages of the mean rank together.
        backward: in its backward.
        message: until hidden states have arrived at the next rank.
        step: once in a step: sums of gradients, and weights that are gathered.
    """

    forward: float
    backward: float
    message: float
    step: float


def sent(
    options: PipelineOptions,
    size: int,
    replicas: int,
    layers: int,
    hidden: float,
    number_size: float,
    rank: RankEstimate,
    microbatches: int,
    again: bool,
    device: Device,
) -> Sent:
    """What a rank sends.

    Args:
        size, replicas: number of ranks of a pipeline, and of pipelines.
        layers: number of the LLM's layers.
        hidden: numbers of the hidden states of a process's part of a microbatch.
        number_size: bytes of each.
        rank: the rank that has the most parameters.
        again: whether forwards run again in backwards.
    """
    parallel, sharding = options.parallel, options.sharding
    state = hidden * number_size
    tensor = 2 * _all_reduced(state, parallel.tensor) * layers / size  # after attention and after the MLP
    context = 2 * state * (parallel.context - 1) * layers / size  # keys and values of the other slices
    around = tensor + context
    backward = around * (1 + again) + context  # the gradients of keys and values come back
    weights, replicated = rank.llm * number_size, rank.replicated * number_size
    copies = replicas * parallel.context
    step = _all_reduced(weights, copies)
    if sharding.stages == "fsdp" and copies > 1:  # gathered in each forward and backward, summed in each backward
        around += weights * (copies - 1) / copies
        backward += 2 * weights * (copies - 1) / copies
        step = 0.0
    everyone = size * parallel.peers * replicas
    step += _all_reduced(replicated, everyone)
    if "fsdp" in (sharding.encoders, sharding.generators):  # gathered and summed anew for each group
        groups = max(microbatches / size, 1)
        step += 3 * replicated * (everyone - 1) / everyone * (groups - 1)
    per_second = device.bandwidth
    return Sent(around / per_second, backward / per_second, state / per_second * (size > 1), step / per_second)


def _all_reduced(size: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring so that all have the sum of so many bytes."""
    return 2 * size * (ranks - 1) / ranks
