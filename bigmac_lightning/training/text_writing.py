"""Writes texts by the stages of a pipeline, token by token.

In each round every text gets one token. Stage by stage, the rank that has a stage runs it on one text after the other
and sends hidden states to the rank of the next stage. So ranks work on different texts at the same time. One rank of
the last stage chooses the tokens, and one broadcast tells them to all ranks of the pipeline.

Tensor peers run the same; context peers run slices of all tokens, without caches; each rank of the first stage encodes
the media of a prompt alone, unless all ranks have to gather an encoder's weights together.

Shape suffixes: V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, Microbatch
from bigmac_lightning.contracts.growing_text import GrowingText
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.outputs import StageOutput
from bigmac_lightning.contracts.slices import slice_of
from bigmac_lightning.runtime.autocast import one_cache
from bigmac_lightning.runtime.executor import Executor
from bigmac_lightning.runtime.lowering import Message
from bigmac_lightning.runtime.transport import Transport
from bigmac_lightning.training.hidden_messages import HiddenMessages
from bigmac_lightning.training.sharding import Sharding, Together

Contexts = Sequence[Callable[[], AbstractContextManager[object]]]


class TextWriter:
    """Writes texts on one rank of a pipeline.

    Args:
        stages: layers of each stage.
        executor: knows the mesh, the rank of each stage, and notes what this process is doing.
        dtype: type of hidden states in messages.
        forward_context: context manager that every forward runs in (for precision).
    """

    def __init__(
        self,
        module: PipelineModule,
        stages: Sequence[range],
        executor: Executor,
        dtype: torch.dtype,
        forward_context: Callable[[], AbstractContextManager[object]],
        sharding: Sharding,
    ) -> None:
        self._module, self._stages, self._executor, self._dtype = module, stages, executor, dtype
        self._forward_context, self._sharding = forward_context, sharding
        self._mesh, self._stage_rank = executor.mesh, executor.stage_rank
        self._own = [stage for stage, rank in enumerate(self._stage_rank) if rank == self._mesh.pp_rank]
        self._messages = HiddenMessages(module, stages, dtype)
        self._together = Together(sharding.calls, self._mesh.device)
        self._caches_work: bool | None = None

    def write(self, texts: Sequence[GrowingText], choose: Callable[[int, Tensor], int]) -> list[int]:
        """See `PipelineModule.write`. Collective over the pipeline."""
        self._executor.progress.begin("the next token of replies", together=True)
        self._sharding.hold()
        with one_cache(self._mesh.device) as caller:
            contexts = (caller, self._forward_context)
            for text in texts:
                if not text.begun:
                    with _entered(contexts):
                        text.begin(self._new_caches(), self._features(text))
            logits = self._run(texts, contexts)
        tokens = self._shared([choose(number, logits_V) for number, logits_V in enumerate(logits)], len(texts))
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        return tokens

    @property
    def _chooses(self) -> bool:
        """Whether this process chooses the tokens: one that has the last token in the last stage."""
        return dist.get_rank() == self._source

    @property
    def _source(self) -> int:
        mesh = self._mesh
        return mesh.replica_ranks[self._stage_rank[-1] * mesh.peers + (mesh.cp_size - 1) * mesh.tp_size]

    def _new_caches(self) -> dict[range, Any]:
        """A cache for each of this rank's stages; none if those of any rank of the pipeline do not work. Context peers
        have none, as these have slices of all tokens."""
        if self._mesh.cp_size > 1 or self._caches_work is False:
            return {}
        layers = [self._stages[stage] for stage in self._own]
        found = {one: self._module.llm.new_cache(one) for one in layers}
        if self._caches_work is None:
            work = torch.tensor(int(None not in found.values()))
            if self._mesh.host_group is not None:
                dist.all_reduce(work, dist.ReduceOp.MIN, group=self._mesh.host_group)
            self._caches_work = bool(work)
        return found if self._caches_work else {}

    def _features(self, text: GrowingText) -> Tensor | None:
        """The feature rows of a prompt's media where the first stage is. Collective over the pipeline if encoders
        gather their weights."""
        meeting = {item.encoder for item in text.media if self._sharding.meets(f"encoders.{item.encoder}")}
        media = text.media_on(self._mesh.device) if 0 in self._own else []
        if not media and not meeting:
            return None
        encoded = self._module.encode(media, meeting, self._together.encode)
        return torch.cat(encoded) if media else None

    def _given(self, text: GrowingText) -> Microbatch:
        """What this process runs of a text next."""
        microbatch = text.upcoming(self._module.llm)
        if self._mesh.cp_size > 1:
            microbatch = slice_of(microbatch, self._mesh.cp_rank, self._mesh.cp_size)
        return Batch([microbatch]).to(self._mesh.device).microbatches[0]

    def _run(self, texts: Sequence[GrowingText], contexts: Contexts) -> list[Tensor]:
        """Run this rank's stages on what comes next of each text.

        Returns: logits_V by text, where tokens are chosen.
        """
        transport = Transport(self._mesh, self._executor.progress)
        given, logits = [self._given(text) for text in texts], list[Tensor]()
        for stage in self._own:
            for number, (text, microbatch) in enumerate(zip(texts, given, strict=True)):
                hidden, extras = self._received(transport, stage, number, microbatch)
                features = text.features if microbatch.media else None
                layers = self._stages[stage]
                with _entered(contexts), self._module.llm.using_cache(text.caches.get(layers)):
                    out = self._module.run_stage(microbatch, layers, hidden, extras, features, "evaluate")
                    if out.last is not None and self._mesh.cp_rank == self._mesh.cp_size - 1:
                        logits.append(self._module.next_logits(out))  # tensor peers have slices of it
                if out.last is None:
                    self._send(transport, stage + 1, number, microbatch, out)
        transport.finish()
        return logits if self._chooses else []

    def _received(
        self, transport: Transport, stage: int, number: int, microbatch: Microbatch
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The hidden states and extras that go into a stage."""
        if stage == 0:
            return None, {}
        message = Message("hidden", number, stage)
        sender = self._stage_rank[stage - 1]
        if sender != self._mesh.pp_rank:
            transport.receive(message, sender, self._messages.shape(microbatch, stage), self._dtype)
        return self._messages.unpack(transport.take(message), microbatch, stage)

    def _send(self, transport: Transport, stage: int, number: int, microbatch: Microbatch, out: StageOutput) -> None:
        """Send a stage's output to the next one, which may be on this rank."""
        message = Message("hidden", number, stage)
        transport.put(message, self._messages.pack(out, microbatch, stage))
        if self._stage_rank[stage] != self._mesh.pp_rank:
            transport.send(message, self._stage_rank[stage])

    def _shared(self, chosen: Sequence[int], number: int) -> list[int]:
        """The chosen tokens on all ranks of the pipeline."""
        tokens = torch.tensor(chosen) if self._chooses else torch.zeros(number, dtype=torch.long)
        if self._mesh.host_group is not None:
            dist.broadcast(tokens, self._source, group=self._mesh.host_group)
        return tokens.tolist()


@contextmanager
def _entered(contexts: Contexts) -> Iterator[None]:
    first, second = contexts
    with first(), second():
        yield
