"""Floating-point operations of training batches, by the multiplications that components estimate of themselves."""

from dataclasses import replace

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.components import Encoder, Generator, trained_share
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.estimates.costs import FLOP, passes_of


class TrainingFlops:
    """Counts what forward and backward of batches need, however they are computed: what checkpointing computes again is
    not counted, and neither are codecs. Tokens of padding are counted.

    Args:
        module: what is trained of it when this is made is what counts.
    """

    def __init__(self, module: PipelineModule) -> None:
        self._module = module
        self._known: dict[object, float] = {}
        trained = replace(module.trained_layers, recomputed=False)
        alone, more = (sum(trained.step(module.llm.costs(tokens)).parts) for tokens in (0, 1024))
        self._of_token, self._of_token_seen = alone, (more - alone) / 1024
        self._above = trained.passes[-1]  # whether gradients pass from generators to the LLM

    def of(self, batch: Batch) -> float:
        """The floating-point operations of a batch, of all ranks together."""
        tokens = batch.tokens
        found = tokens * (self._of_token + self._of_token_seen * tokens / max(batch.samples, 1))
        for microbatch in batch.microbatches:
            found += sum(self._of_media(item.encoder, item.rows) for item in microbatch.media)
            found += sum(self._of_target(item.generator, item.shape, item.rows) for item in microbatch.targets)
        return FLOP * found

    def _of_media(self, name: str, rows: int) -> float:
        encoder = self._module.encoders[name]
        if not isinstance(encoder, Encoder):
            return 0.0
        if (name, rows) not in self._known:
            share = trained_share(encoder.parameters())
            self._known[name, rows] = encoder.forward_cost(rows).multiplications * (1 + (share > 0) + share)
        return self._known[name, rows]

    def _of_target(self, name: str, shape: tuple[int, ...], rows: int) -> float:
        generator = self._module.generators[name]
        if not isinstance(generator, Generator):
            return 0.0
        key = (name, tuple(shape), rows)
        if key not in self._known:
            self._known[key] = generator.forward_cost(shape, rows).multiplications * passes_of([generator], self._above)
        return self._known[key]
