"""DualPipeV (DeepSeek's DualPipe, arXiv 2412.19437, cut in half: github.com/deepseek-ai/DualPipe, dualpipev.py).

There are two stages per rank in V shape: rank r has the stages r (`down`) and 2P - 1 - r (`up`). In the steady phase a
forward of one stage stands next to a backward of the other, so that a runtime may overlap them. Backwards are split
into I and W in the warm-up and the cool-down only, where a W fills time in which the rank would wait.

The loops below are the steps of the upstream file in its order, which are called nF0, nF0F1, nB1W1F1, nF0B1F1B0,
nB1F1B0, nB1B0, nWB0 and nW there.
"""

from bigmac_lightning.schedule.backbones.base import Orders
from bigmac_lightning.schedule.backbones.lists import RankList


def dualpipev(pipeline_parallel_size: int, microbatches: int, virtual_stages: int = 2) -> Orders:
    """Return every rank's actions.

    The steps need at least 2P microbatches. For fewer, the list for 2P is built and the actions of the others are
    removed.
    """
    assert virtual_stages == 2
    size, full = pipeline_parallel_size, max(microbatches, 2 * pipeline_parallel_size)
    orders: Orders = []
    for rank in range(size):
        down, up, actions, later = rank, 2 * size - 1 - rank, RankList(), size - 1 - rank
        for _ in range(2 * later):
            actions.add(down, "F")
        for _ in range(rank + 1):
            actions.add(down, "F")
            actions.add(up, "F")
        for _ in range(later):
            actions.add(up, "I")
            actions.add_weights()
            actions.add(up, "F")
        for _ in range(full - 2 * size + rank + 1):
            actions.add(down, "F")
            actions.add(up, "BF")
            actions.add(down, "B")
        for _ in range(later):
            actions.add(up, "BF")
            actions.add(down, "B")
        for step in range(2 * (rank + 1)):  # the second half is split: lower ranks get their input gradients earlier
            actions.add(down if step % 2 else up, "I" if step > rank else "B")
        for _ in range(later):
            actions.add_weights()
            actions.add(down, "I")
        actions.add_weights(most=full)
        orders.append(actions.first(microbatches))
    return orders
