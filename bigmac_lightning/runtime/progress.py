"""What this process is doing now, for whoever asks why nothing goes on.

The thread that trains writes it, which costs two assignments per instruction; a watchdog's thread reads it.
"""

import time
from dataclasses import dataclass, field

from bigmac_lightning.runtime.lowering import Compute, Instruction, Message


@dataclass
class Progress:
    """What one process is doing, and what it has done last.

    Attributes:
        beats: how many things it has begun; while this number stays the same, nothing goes on.
        since: when it has begun the last one, in seconds of `time.monotonic`.
        doing: an instruction of its program, or a few words.
        together: whether that is done together with other processes, so that it may be waiting for them.
        waiting: the message that it waits for, the global rank that sends or receives it, and whether it is sent.
        done: the last action that it has finished; ``None`` before the first one.
        batch: the number of the training batch; ``None`` before the first one.
    """

    beats: int = 0
    since: float = field(default_factory=time.monotonic)
    doing: Instruction | str = "the start of the run"
    together: bool = False
    waiting: tuple[Message, int, bool] | None = None
    done: Compute | None = None
    batch: int | None = None

    def begin(self, doing: Instruction | str, together: bool = False) -> None:
        """Note that something new begins."""
        if isinstance(self.doing, Compute):
            self.done = self.doing
        self.doing, self.together, self.waiting, self.since = doing, together, None, time.monotonic()
        self.beats += 1

    def wait(self, message: Message, peer: int, sending: bool = False) -> None:
        """Note that what was begun waits for a message from the global rank `peer`, or for one to it."""
        self.waiting = (message, peer, sending)

    def describe(self) -> str:
        """Say in half a sentence what the process is doing."""
        doing, waiting = self.doing, self.waiting
        text = doing if isinstance(doing, str) else f"{_name(doing)}"
        if waiting is not None:
            message, peer, sending = waiting
            text += f", waits {'until' if sending else 'for'} {_words(message)} "
            text += f"is taken by rank {peer}" if sending else f"from rank {peer}"
        return text if self.batch is None else f"{text} (batch {self.batch})"


def _name(instruction: Instruction) -> str:
    return f"action {instruction.action}" if isinstance(instruction, Compute) else str(instruction)


def _words(message: Message) -> str:
    whose = "microbatch" if message.kind.startswith("hidden") else "group"
    piece = f" piece {message.piece}" * bool(message.piece)
    return f"{message.kind} of {whose} {message.index}{piece}"
