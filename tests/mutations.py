"""Small faults, each of which some test must find: ``python -m tests.mutations`` puts one after another into the code.

It changes files of the working tree and puts them back, also when it is interrupted. Run it in a clone with nothing to
commit. A fault that is not found tells which test is missing.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """
    Attributes:
        name: what goes wrong.
        file: that is changed.
        code, instead: what stands there once, and what is put there.
        tests: that may find it; arguments of pytest.
    """

    name: str
    file: str
    code: str
    instead: str
    tests: str


PACKAGE = "bigmac_lightning"
FAULTS = [
    Fault(
        "a tensor of an exported folder that nothing reads is dropped",
        "models/exported.py",
        "for name in sorted(unread) if whole]",
        "for name in sorted(unread) if not whole]",
        "tests/cli/test_exported.py -k nothing_reads",
    ),
    Fault(
        "components of an exported model keep the weights that they started from before",
        "models/exported.py",
        "                part.source = str(self.path)\n",
        "                pass\n",
        "tests/cli/test_exported.py -k starts_from_what",
    ),
    Fault(
        "adapters are written beside weights that they were not trained with",
        "models/multimodal_lm.py",
        "return not others and len(",
        "return len(",
        "tests/cli/test_exported.py -k beside_other_weights",
    ),
    Fault(
        "a config asks for adapters that an exported folder has in its weights",
        f"{PACKAGE}/run_config.py",
        "if k not in TRAINING}",
        "if k not in ()}",
        "tests/cli/test_exported.py -k folder_alone",
    ),
    Fault(
        "orders of a few numbers are all even permutations",
        "datamodules/permutation.py",
        "    found[swapped] ^= _hashed(keys[swapped]) & np.uint64(1)\n",
        "",
        "tests/datamodules/test_packing.py -k random_orders",
    ),
    Fault(
        "examples after a broken one are taken for others",
        "datamodules/left_out.py",
        'side="right")',
        'side="left")',
        "tests/datamodules/test_packing.py",
    ),
    Fault(
        "a source of an interleaved order comes after itself",
        "datamodules/packing/order.py",
        "(2 * count) + 1 if other < source else",
        "(2 * count) + 1 if other > source else",
        "tests/datamodules/test_packing.py -k parts_of_an_order",
    ),
    Fault(
        "bins of a buffer are taken from its start",
        "datamodules/packing/epoch.py",
        "self._last.bins[number - int(self._ends[at])]",
        "self._last.bins[int(self._ends[at]) - 1 - number]",
        "tests/datamodules/test_packing.py",
    ),
    Fault(
        "a small room is kept that a sample of its size still fits",
        "datamodules/packing/packing.py",
        "        if room >= least:\n",
        "        if room > least:\n",
        "tests/datamodules/test_packing.py -k every_sample_once",
    ),
    Fault(
        "a run continues with the part whose step it had last",
        "datamodules/loading/stream_loader.py",
        '"next": (progress.part + 1) % len(parts)',
        '"next": progress.part',
        "tests/datamodules/test_streams.py -k parts",
    ),
    Fault(
        "workers take steps of parts that they do not read first",
        "datamodules/loading/stream_steps.py",
        "if (part - self.first - worker) % shared == 0",
        "if (part - worker) % shared == 0",
        "tests/datamodules/test_streams.py -k parts",
    ),
    Fault(
        "samples of different parts have the same number",
        "datamodules/loading/stream_steps.py",
        "number = drawn * len(self.positions) + part",
        "number = drawn",
        "tests/datamodules/test_streams.py -k parts",
    ),
    Fault(
        "all ranks say that their number is wrong",
        f"{PACKAGE}/commands/config.py",
        "                if strategy.global_rank == 0:\n",
        "                if strategy.global_rank >= 0:\n",
        "tests/cli/test_commands.py -k world_size_under_torchrun",
    ),
    Fault(
        "a new run that is stopped replaces the checkpoint of the run before",
        f"{PACKAGE}/callbacks/preemption_checkpoint.py",
        "    return resumed_from is not None and place.resolve() == Path(resumed_from).resolve()\n",
        "    return True\n",
        "tests/training/test_second_run.py -k background",
    ),
    Fault(
        "a run that goes on keeps every checkpoint of its stops",
        f"{PACKAGE}/callbacks/preemption_checkpoint.py",
        "    return resumed_from is not None and place.resolve() == Path(resumed_from).resolve()\n",
        "    return False\n",
        "tests/training/test_second_run.py -k goes_on",
    ),
    Fault(
        "the table of the model counts a tied copy twice",
        f"{PACKAGE}/training/whole_summary.py",
        "                known_as = tied_copies.get(known_as, known_as)\n",
        "",
        "tests/training/test_model_summary.py -k tied",
    ),
    Fault(
        "the table of the model has the placeholders of other ranks' layers",
        f"{PACKAGE}/training/whole_summary.py",
        " or (layer.has_weights and not layers[layer.name].has_weights)",
        "",
        "tests/training/test_model_summary.py -k adapters",
    ),
    Fault(
        "a text goes on at the position of its last token",
        "models/writing.py",
        "    last = positions[..., -1:] + 1\n",
        "    last = positions[..., -1:]\n",
        "tests/models/test_writing.py",
    ),
    Fault(
        "a text goes on after the last row of an image, and not after the largest",
        "models/writing.py",
        "(positions[1:].max() + 1)",
        "(positions[1:, :, -1].max() + 1)",
        "tests/models/test_writing.py",
    ),
    Fault(
        "a cache is taken that gives other logits",
        "models/llm/probe_cache.py",
        "    return bool(error < TOLERANCE)\n",
        "    return True\n",
        "tests/models/test_sweep.py -k moshi",
    ),
    Fault(
        "a prompt leaves out the ends of replies that were learnt",
        "datamodules/encoding/replies.py",
        "        return replace(self._text(example, self._read(example, asks=True)), learnt=[])\n",
        "        reading = self._read(example, asks=True)\n        return Text(reading.text, _given(reading), [])\n",
        "tests/datamodules/test_prompts.py -k llava",
    ),
    Fault(
        "replies after different texts are taken to begin alike",
        "datamodules/encoding/reading.py",
        '        key = ("start", gap, before is None, self._form(i - 1), self._form(i))\n',
        '        key = ("start", before is None, self._form(i - 1), self._form(i))\n',
        "tests/datamodules/test_replies.py -k alike",
    ),
    Fault(
        "a loaded run keeps the weights that were drawn",
        f"{PACKAGE}/loaded_run.py",
        "    weights.read_into({name: tensor for name, tensor in state.items() if name not in copies})\n",
        "",
        "tests/cli/test_chat.py -k test_digits",
    ),
    Fault(
        "samples without labels are matched exactly",
        "models/evaluation.py",
        "    whole = ((labels > 0) & (wrong == 0)).sum()\n",
        "    whole = (wrong == 0).sum()\n",
        "tests/models/test_multimodal_lm.py -k exact_match",
    ),
    Fault(
        "expected bytes do not grow with rows",
        f"{PACKAGE}/training/activation_bytes.py",
        "fmean(sizes) * alive if alive",
        "fmean(sizes) if alive",
        "tests/training/test_activation_bytes.py",
    ),
    Fault(
        "the busiest rank's idle time is logged",
        f"{PACKAGE}/callbacks/pipeline_monitor.py",
        "1 - fmean(busy.seconds for busy in ranks) / seconds",
        "1 - max(busy.seconds for busy in ranks) / seconds",
        "tests/training/test_monitor.py -k idle_time_of_ranks",
    ),
    Fault(
        "sounds of a batch take the windows of the first",
        "models/audio/audio_encoder.py",
        '            first += len(sound["windows"])\n',
        "",
        "tests/models/test_audio.py",
    ),
    Fault(
        "rows are made of the silence after a sound",
        "datamodules/encoding/audio.py",
        "        rows = -(-rest // of_row)\n",
        "        rows = (self.features.n_samples if rest else 0) // of_row\n",
        "tests/datamodules/test_sounds.py",
    ),
    Fault(
        "a sound that is cut off is filled with silence",
        "datamodules/media/sounds.py",
        "    if not pieces or abs(number - wanted) > TOLERANCE * rate:\n",
        "    if not pieces:\n",
        "tests/datamodules/test_sounds.py -k refused",
    ),
    Fault(
        "an item of one modality takes the place of another",
        "datamodules/encoding/placeholders.py",
        "            left[self.tokens[modality_of(item).name]].append(i)\n",
        "            left[next(iter(self.tokens.values()))].append(i)\n",
        "tests/datamodules/test_modalities.py",
    ),
    Fault(
        "mended examples get the sizes of others",
        "datamodules/packing/measuring.py",
        '        counts[list(examples)] += np.diff(own["first"])\n',
        "",
        "tests/datamodules/test_measuring.py",
    ),
    Fault(
        "replicas are balanced by the LLM's costs alone",
        "datamodules/packing/packing.py",
        "(costs, *further), replicas)",
        "(costs,), replicas)",
        "tests/datamodules/test_packing.py",
    ),
    Fault(
        "waiting counts as time of an action",
        f"{PACKAGE}/runtime/measure/trace.py",
        "                found[number] -= self._between(start, end)\n",
        "                pass\n",
        "tests/runtime/test_timing.py",
    ),
    Fault(
        "only the model's computing counts as time of an action",
        f"{PACKAGE}/runtime/measure/trace.py",
        "zip(begins, ends, strict=True)]",
        "((start, end) for _, start, end in self._marks)]",
        "tests/runtime/test_timing.py",
    ),
    Fault(
        "ranks meet at a time when one of them is busy for long",
        f"{PACKAGE}/schedule/placing/common_cuts.py",
        "return min(times, key=lambda time: _left(time, bare, tolerance))",
        "return max(times, key=lambda time: _left(time, bare, tolerance))",
        "tests/schedule/test_meeting.py -k takes_little",
    ),
    Fault(
        "common cuts keep more groups alive",
        f"{PACKAGE}/schedule/placing/common_cuts.py",
        "    before, after = [-inf] * alive + list(ready), [*due, *[inf] * alive]\n",
        "    alive += 1\n    before, after = [-inf] * alive + list(ready), [*due, *[inf] * alive]\n",
        "tests/schedule/test_meeting.py",
    ),
    Fault(
        "a simulated rank does not wait for the others",
        f"{PACKAGE}/schedule/simulate.py",
        "        start = max(self._starts[other] for other in together)\n",
        "        start = min(self._starts[other] for other in together)\n",
        "tests/schedule/test_meeting.py",
    ),
    Fault(
        "gradients of zero1 stages wait for the end of the batch",
        f"{PACKAGE}/training/runner.py",
        "Reductions(self.places, self.mesh, self.sharding.early(self._splits))",
        "Reductions(self.places, self.mesh)",
        "tests/training/test_sharding.py -k gradients_of_stages",
    ),
    Fault(
        "weights of a backward are gathered in the order of a forward",
        f"{PACKAGE}/training/batch_computation.py",
        'backward = kind == "EB" and not self._recomputes',
        "backward = False",
        "tests/runtime/test_gathering.py",
    ),
    Fault(
        "messages pile up until the end of a step",
        f"{PACKAGE}/runtime/transport.py",
        "        while len(self._sending) >= MOST_SENDING:\n",
        "        while False:\n",
        "tests/runtime/test_transport.py",
    ),
    Fault(
        "a second run takes meshes of the first one",
        f"{PACKAGE}/runtime/mesh.py",
        "    _clear_sharding_prop_cache()\n",
        "",
        "tests/training/test_sharding.py -k second_training",
    ),
    Fault(
        "an arrow ends at the last action that needs a message",
        f"{PACKAGE}/schedule/dataflow.py",
        "                found.setdefault((need, self.ranks[number]), number)",
        "                found[need, self.ranks[number]] = number",
        "tests/training/test_monitor.py -k arrows",
    ),
    Fault(
        "operations of a backward are not counted",
        f"{PACKAGE}/estimates/flops.py",
        "sum(trained.step(module.llm.costs(tokens)).parts)",
        "sum(module.llm.costs(tokens).parts)",
        "tests/test_estimates.py -k operations_of_a_batch",
    ),
    Fault(
        "a rank receives before it has sent what the other waits for",
        f"{PACKAGE}/runtime/lowering.py",
        "                programs[receiver].append(Receive(message, rank))",
        "                last = len(programs[receiver]) - isinstance((programs[receiver] or [0])[-1], Send)\n"
        "                programs[receiver].insert(last, Receive(message, rank))",
        "tests/runtime/test_lowering.py",
    ),
    Fault(
        "fp16 scalers of ranks differ",
        f"{PACKAGE}/training/strategy.py",
        "if scaler is not None and not isinstance(scaler, PipelineGradScaler):",
        "if False:",
        "tests/training/test_precision.py -k overflows",
    ),
    Fault(
        "replicas start with weights of their own",
        f"{PACKAGE}/training/strategy.py",
        "        self._synchronize_initial_state(module)\n",
        "",
        "tests/training/test_training.py -k start_equal",
    ),
    Fault(
        "gradients of 16-bit whole weights are added up in 16 bits",
        f"{PACKAGE}/runtime/sharding.py",
        "        parameter.grad_dtype = torch.float32\n",
        "        pass\n",
        "tests/training/test_master_weights.py -k loop",
    ),
    Fault(
        "master weights start from rounded values",
        f"{PACKAGE}/training/master_weights.py",
        "        return _DtypeContextManager(torch.float32)",
        "        return _DtypeContextManager(self.computing)",
        "tests/training/test_master_weights.py -k small",
    ),
    Fault(
        "a parameter is frozen though it has gradients of this step",
        f"{PACKAGE}/training/trained.py",
        "        if within_step and",
        "        if False and",
        "tests/training/test_freezing.py -k within",
    ),
    Fault(
        "a checkpoint is written over the one before",
        f"{PACKAGE}/training/writing.py",
        "        return files.unfinished(path)",
        "        return files.remove(path) or path",
        "tests/training/test_checkpoint_files.py",
    ),
    Fault(
        "a copy for a save in the background is the tensor itself",
        f"{PACKAGE}/training/copying.py",
        "        return self._made\n",
        "        return Copied(values)\n",
        "tests/training/test_copying.py",
    ),
    Fault(
        "the next save deletes the only complete checkpoint",
        f"{PACKAGE}/checkpoints/files.py",
        "if not path.exists() and is_whole(place):",
        "if False:",
        "tests/training/test_saving.py -k next_save",
    ),
    Fault(
        "checksums are not compared",
        f"{PACKAGE}/checkpoints/marker.py",
        "(crc := part_of(file).crc32) != part.crc32",
        "(crc := part_of(file).crc32) is None",
        "tests/training/test_whole_checkpoints.py -k not_whole",
    ),
    Fault(
        "the metadata of a checkpoint may hold any class",
        f"{PACKAGE}/checkpoints/safe.py",
        "        if found is None:\n            raise",
        "        if found is None:\n            return super().find_class(module, name)\n        if found is None:\n"
        "            raise",
        "tests/training/test_whole_checkpoints.py -k hostile",
    ),
    Fault(
        "pickled entries of a checkpoint are read whatever they are",
        f"{PACKAGE}/checkpoints/safe.py",
        'loaded = load_file(value, f"{self._folder} ({name})", self._weights_only)',
        'loaded = load_file(value, f"{self._folder} ({name})", False)',
        "tests/training/test_whole_checkpoints.py -k hostile",
    ),
    Fault(
        "untied weights are loaded into a tied model",
        f"{PACKAGE}/training/checkpoint.py",
        "    if untied:",
        "    if False:",
        "tests/training/test_whole_checkpoints.py -k untied",
    ),
    Fault(
        "an older checkpoint is deleted before the new one is whole",
        f"{PACKAGE}/training/background.py",
        "if self._save is None or not self._save.add(function):",
        "if True:",
        "tests/training/test_saving.py -k older_one_stays",
    ),
    Fault(
        "what is saved in the background changes with training",
        f"{PACKAGE}/training/saving.py",
        "partial(write, contents.copied(self._copies), self._saving_group)",
        "partial(write, contents, self._saving_group)",
        "tests/training/test_saving.py -k saved_at_once",
    ),
    Fault(
        "what is unfrozen in mid-epoch is not seen",
        f"{PACKAGE}/training/trained.py",
        "changed = self._flags != flags",
        "changed = self._flags is None",
        "tests/training/test_freezing.py",
    ),
    Fault(
        "gradients of tied copies are not summed",
        f"{PACKAGE}/training/sharding.py",
        "copied = {name: p for name, p in llm.items() if name in tied}",
        "copied = {}",
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "gradients do not reach encoders through frozen layers",
        f"{PACKAGE}/runtime/lowering.py",
        "return self.encoded[microbatch] or any(self.weights[: stage + 1])",
        "return any(self.weights[: stage + 1])",
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "encoders' gradients are not summed over the ranks of a pipeline",
        f"{PACKAGE}/training/sharding.py",
        "found.append(SharedParameters(names, world, world, _ranks(), part=part))",
        "found.append(SharedParameters(names, replicas, replicas, _ranks(), part=part))",
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "both copies of a tied weight count in the norm",
        f"{PACKAGE}/training/sharding.py",
        '((single, data, 1, "llm"), (copied, mesh.tied_group, 2, "rest"))',
        '((single, data, 1, "llm"), (copied, mesh.tied_group, 1, "rest"))',
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "layers on different ranks share their dropout masks",
        f"{PACKAGE}/training/runner.py",
        "return seeded(self.mesh.device, self.seed, step, self.mesh.dp_rank, self.mesh.pp_rank, *context)",
        "return seeded(self.mesh.device, self.seed, step)",
        "tests/runtime/test_randomness.py",
    ),
    Fault(
        "float64 weights of a checkpoint are read into float32",
        f"{PACKAGE}/training/stepping.py",
        "        if isinstance(self.precision_plugin, DoublePrecision):",
        "        if False and isinstance(self.precision_plugin, DoublePrecision):",
        "tests/training/test_precision.py -k float64",
    ),
    Fault(
        "a process may be locked for long after a save",
        f"{PACKAGE}/training/watching.py",
        "            self._watchdog.enter_loops()  # which looks",
        "            self._watchdog.in_loops = True  # which looks",
        "tests/training/test_stopping.py -k patience",
    ),
    Fault(
        "a disturbed action counts in measured times",
        f"{PACKAGE}/schedule/rates.py",
        "if ratio <= FAR * middle]",
        "if True]",
        "tests/schedule/test_rates.py",
    ),
    Fault(
        "ranks do not exchange what they have measured",
        f"{PACKAGE}/training/measuring.py",
        "self._ranks.exchange(own)()[0]",
        "[own]",
        "tests/training/test_measuring.py",
    ),
    Fault(
        "workers do not hear of measured times",
        f"{PACKAGE}/training/work.py",
        "dtype=torch.float64).share_memory_()\n\n    def set(self, rates",
        "dtype=torch.float64)\n\n    def set(self, rates",
        "tests/training/test_measuring.py",
    ),
    Fault(
        "what a layer draws depends on what was drawn before",
        f"{PACKAGE}/training/batch_computation.py",
        '        self._seed("llm", stage, microbatch)\n',
        "",
        "tests/runtime/test_randomness.py",
    ),
    Fault(
        "smallest items of fsdp have gradients",
        f"{PACKAGE}/training/sharding.py",
        "return tensor.flatten()[:0].sum()",
        "return tensor.sum()",
        "tests/models/test_sharded.py",
    ),
    Fault(
        "shards' gradients are not summed over replicas",
        f"{PACKAGE}/training/sharding.py",
        "summed, copies = (replicas, mesh.dp_size) if self.meets(prefix) else (None, 1)",
        "summed, copies = (None, mesh.dp_size) if self.meets(prefix) else (None, 1)",
        "tests/training/test_training.py -k fsdp-P2xdp2",
    ),
    Fault(
        "weights that no rank used have gradients, because they lie in shards",
        f"{PACKAGE}/runtime/gradients.py",
        "                    parameter.grad = None  # no rank has used it: these are zeros",
        "                    pass",
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "gradients that an encoder adds to the LLM's weights come after their sum",
        f"{PACKAGE}/training/sharding.py",
        "return {name for name, parameter in names if len(kinds[id(parameter)]) > 1}",
        "return set()",
        "tests/runtime/test_matrix.py -k together",
    ),
    Fault(
        "sums over the same ranks start in different orders",
        f"{PACKAGE}/training/runner.py",
        "            reductions.all_computed()",
        "            pass",
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "pipelines that gather the LLM's weights together run different microbatches",
        f"{PACKAGE}/training/planner.py",
        "return batch.useful() if self.alike is None else batch.useful_media()",
        "return batch.useful()",
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "microbatches without media have no graph where others have one",
        f"{PACKAGE}/training/batch_computation.py",
        "features = self._no_rows().requires_grad_(self._trains_encoders)",
        "features = None",
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "microbatches without a loss have no backward where others have one",
        f"{PACKAGE}/training/batch_computation.py",
        "            losses.append(nothing_of(out.last))",
        "            pass",
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "a pipeline without a loss counts as using the LLM's weights",
        f"{PACKAGE}/runtime/sharding.py",
        "            self.used = self._used_before",
        "            pass",
        "tests/runtime/test_matrix.py",
    ),
    Fault(
        "gradients of features are those of one slice",
        f"{PACKAGE}/runtime/peers.py",
        "        if ctx.peers.cp_group is not None:",
        "        if False:",
        "tests/layouts/test_layouts.py -k process",
    ),
    Fault(
        "adapters beside weights in slices have the shape of a slice",
        "models/lora.py",
        "[(m, n, p) for m in component.modules() for n, p in m._parameters.items() if isinstance(p, DTensor)]",
        "[]",
        "tests/layouts/test_layouts.py -k adapters",
    ),
    Fault(
        "slices of packed weights are taken for one piece",
        f"{PACKAGE}/checkpoints/packed.py",
        "return isinstance(value, DTensor) and isinstance(value.placements[-1], _StridedShard)",
        "return False",
        "tests/training/test_peers.py -k experts",
    ),
    Fault(
        "pieces of packed weights are read from one place",
        f"{PACKAGE}/checkpoints/packed.py",
        "offsets[0] = i * matrix + own + start - i * length",
        "offsets[0] = own + start",
        "tests/training/test_reading.py",
    ),
    Fault(
        "rows are read of what the library joins",
        "models/loading.py",
        "    cut_rows(whole, mesh, inside, stays)",
        "    cut_rows(whole, mesh, inside)",
        "tests/models/test_rows.py -k decoders",
    ),
    Fault(
        "rows of weights are drawn anew",
        "models/rows.py",
        "            raise DrawnAgainError(name)",
        "            pass",
        "tests/models/test_rows.py -k anew",
    ),
    Fault(
        "the first rank's rows are sent to all",
        f"{PACKAGE}/training/strategy.py",
        "            if is_rows(tensor):",
        "            if False:",
        "tests/training/test_rows.py",
    ),
    Fault(
        "layers are drawn whole",
        "models/loading.py",
        'if cut is not None and name.rpartition(".")[0] in outermost:',
        "if False:",
        "tests/models/test_host_memory.py -k tower-drawn",
    ),
    Fault(
        "optimizer states of slices are not cut into shards",
        f"{PACKAGE}/runtime/sharding.py",
        "        if whole.device_mesh == mesh or mesh.ndim == 1:",
        "        if True:",
        "tests/training/test_peers.py -k experts",
    ),
    Fault(
        "layers of Qwen3-VL are not cut",
        "models/llm/tensor_parallel.py",
        '    "qwen3_vl_text": {',
        '    "": {',
        "tests/layouts/test_layouts.py -k qwen3_vl",
    ),
    Fault(
        "estimates count whole weights where there are slices",
        f"{PACKAGE}/estimates/ranks.py",
        "(_part(shape, rank, shards) // cut)",
        "_part(shape, rank, shards)",
        "tests/test_estimates.py -k several",
    ),
    Fault(
        "sums of offloaded gradients over replicas stay on the device",
        f"{PACKAGE}/runtime/gradients.py",
        "            _copy_into(bucket, flat.to(bucket[0].device))\n",
        "",
        "tests/training/test_training.py -k offload-fsdp",
    ),
    Fault(
        "what is offloaded stays whole on a rank that has no others to share it with",
        f"{PACKAGE}/training/sharding.py",
        "(over.size() > 1 or options.master_weights or options.offloads(name))",
        "(over.size() > 1 or options.master_weights)",
        "tests/test_estimates.py -k memory_of_shards",
    ),
    Fault(
        "estimates count what is offloaded on the device",
        f"{PACKAGE}/estimates/ranks.py",
        "static = sum(bytes_of.values()) - offloaded",
        "static = sum(bytes_of.values())",
        "tests/test_estimates.py -k memory_of_shards",
    ),
    Fault(
        "optimizers step whole weights and shards at once, where torch does so by default",
        f"{PACKAGE}/training/optimizers.py",
        "if len(kinds) > 1 and group",
        "if False and group",
        "tests/training/test_sharding.py -k one_by_one",
    ),
    Fault(
        "auxiliary losses count once for each context peer",
        f"{PACKAGE}/training/batch_computation.py",
        'return self.mesh.tp_rank == 0 and (name == "text" or self.mesh.cp_rank == 0)',
        "return self.mesh.tp_rank == 0",
        "tests/layouts/test_layouts.py -k experts",
    ),
    Fault(
        "router sums travel in bfloat16",
        f"{PACKAGE}/training/batch_computation.py",
        "parts.append(apart(extra, self.dtype) if name in exact else extra.to(self.dtype).flatten())",
        "parts.append(apart(extra.to(self.dtype), self.dtype) if name in exact else extra.to(self.dtype).flatten())",
        "tests/models/test_router.py",
    ),
    Fault(
        "decoders are cut whatever they are",
        "models/llm/decoder.py",
        "if reason := probe_cut.why_not_cut(decoder, self._names, self.width):",
        'if reason := "":',
        "tests/models/test_sweep.py tests/models/test_probe.py",
    ),
    Fault(
        "packed samples are not kept apart, and nobody looks",
        "models/llm/probe_packing.py",
        "    if reason := why_not_packed(decoder, names, width, position_rows):",
        '    if reason := "":',
        "tests/models/test_sweep.py tests/models/test_probe.py",
    ),
    Fault(
        "a resumed run forgets where its loader stood",
        f"{PACKAGE}/checkpoints/resuming.py",
        "            loader.load_state_dict(state)\n",
        "            pass\n",
        "tests/datamodules/test_resumed_runs.py",
    ),
    Fault(
        "a validation that was due when a checkpoint was saved is left out",
        f"{PACKAGE}/checkpoints/after_batch.py",
        "    if validates:\n",
        "    if False:\n",
        "tests/training/test_killed.py -k validation",
    ),
    Fault(
        "a validation that was stopped goes on with as many batches as were left",
        f"{PACKAGE}/checkpoints/after_batch.py",
        "    if is_within_validation(trainer):\n        _note",
        "    if False:\n        _note",
        "tests/training/test_stopping.py -k validation",
    ),
    Fault(
        "a save of the same tensors keeps old checksums",
        f"{PACKAGE}/training/repeating.py",
        "        for place in self.checksums:",
        "        for place in ():",
        "tests/training/test_repeating.py",
    ),
    Fault(
        "a save of other tensors is written like the one before",
        f"{PACKAGE}/training/copying.py",
        "value.dtype, value.shape, value.stride(),",
        "value.dtype,",
        "tests/training/test_repeating.py",
    ),
    Fault(
        "an epoch that was due to end begins anew",
        f"{PACKAGE}/checkpoints/after_batch.py",
        "        fetcher.done = True\n",
        "        pass\n",
        "tests/training/test_killed.py -k epoch",
    ),
    Fault(
        "schedules that follow a metric stand still at the end of a resumed epoch",
        f"{PACKAGE}/checkpoints/after_batch.py",
        "    loop._restarting = False",
        "    pass",
        "tests/training/test_killed.py -k validation",
    ),
    Fault(
        "a resumed run sums gradients in another type",
        f"{PACKAGE}/training/strategy.py",
        "            self._float32_before if self._float32_gradients is None else self._float32_gradients,\n",
        "            self._float32_gradients,\n",
        "tests/training/test_killed.py -k validation",
    ),
    Fault(
        "random numbers of a step depend on the steps before",
        f"{PACKAGE}/training/runner.py",
        'step = self.step if mode == "train" else',
        'step = torch.rand(()) if mode == "train" else',
        "tests/runtime/test_randomness.py",
    ),
    Fault(
        "loaders of others do not go back to the last optimizer step",
        f"{PACKAGE}/training/accumulation_loader.py",
        "    return RewindingLoader(loader, trainer) if foreign else loader",
        "    return loader",
        "tests/datamodules/test_resumed_runs.py -k others",
    ),
    Fault(
        "read-ahead batches count as used",
        f"{PACKAGE}/training/accumulation_loader.py",
        "state = self._before if uncounted(self._trainer) else self._state",
        "state = self._state",
        "tests/datamodules/test_resumed_runs.py -k tokens",
    ),
    Fault(
        "each stage does what the decoder does before its first layer",
        "models/llm/stage.py",
        "        return self.hidden\n\n\nclass _Exit",
        "        return hidden_of(args, kwargs)\n\n\nclass _Exit",
        "tests/models/test_sweep.py -k granite",
    ),
    Fault(
        "the sweep's multipliers are those of the default config",
        "tests/models/tiny.py",
        "made[name] = 0.8 * value if value else value",
        "made[name] = value",
        "tests/models/test_sweep.py -k multipliers",
    ),
    Fault(
        "padding counts in load balancing",
        "models/llm/context_parallel.py",
        'mask_BS = inputs.get("attention_mask", inputs.get(attention.TOKENS))',
        'mask_BS = inputs.get("attention_mask")',
        "tests/models/test_sweep.py -k qwen3_vl_moe",
    ),
    Fault(
        "experts' samples in a packed row see one another",
        "models/llm/decoder.py",
        "if mask is None and self._needs_masks and positions is not None:",
        "if False:",
        "tests/models/test_sweep.py -k gpt_oss",
    ),
    Fault(
        "load balancing of packed rows leaves a layer out",
        "models/llm/router.py",
        "sums_2E = sums_2E.float() + layer_2E",
        "sums_2E = layer_2E",
        "tests/models/test_sweep.py -k qwen3_vl_moe",
    ),
    Fault(
        "peaks of memory are never reset",
        f"{PACKAGE}/callbacks/pipeline_monitor.py",
        "    memory.reset_peak()\n",
        "",
        "tests/training/test_monitor.py",
    ),
    Fault(
        "throughput is over the time since the start",
        f"{PACKAGE}/callbacks/pipeline_monitor.py",
        "        self._samples, self._tokens, self._flops, self._since, self._plans = 0, 0, 0.0, now, []\n",
        "        self._samples, self._tokens, self._flops, self._plans = 0, 0, 0.0, []\n",
        "tests/training/test_monitor.py",
    ),
    Fault(
        "the step after is traced",
        f"{PACKAGE}/callbacks/pipeline_monitor.py",
        "trainer.global_step >= self._trace_next",
        "trainer.global_step > self._trace_next",
        "tests/training/test_monitor.py",
    ),
    Fault(
        "traced actions begin when they end",
        f"{PACKAGE}/runtime/measure/trace.py",
        "        start = self._now()\n        yield\n        self._marks.append(",
        "        yield\n        start = self._now()\n        self._marks.append(",
        "tests/training/test_monitor.py",
    ),
    Fault(
        "shapes of a checkpoint are not compared",
        f"{PACKAGE}/checkpoints/mismatches.py",
        "and stored[name] != shape",
        "and False",
        "tests/models/test_init_from.py tests/training/test_checkpoint.py",
    ),
    Fault(
        "vectors have weight decay",
        "models/optimization.py",
        "for d in (decay, 0.0)]",
        "for d in (decay, decay)]",
        "tests/models/test_multimodal_lm.py -k optimizer",
    ),
    Fault(
        "checkpointed layers are estimated to take no second forward",
        f"{PACKAGE}/estimates/costs.py",
        "B=2 * forward + again,",
        "B=2 * forward,",
        "tests/test_estimates.py -k frozen_parts",
    ),
    Fault(
        "weight gradients forget the factor of a product",
        f"{PACKAGE}/runtime/split_backward.py",
        'if name == "AddmmBackward0" and node._saved_alpha != 1:',
        "if False:",
        "tests/runtime/test_split_backward.py",
    ),
    Fault(
        "graphs of another structure are split alike",
        f"{PACKAGE}/runtime/split_backward.py",
        "            row += (positions[following], output)",
        "            row.append(None)",
        "tests/runtime/test_split_backward.py",
    ),
    Fault(
        "every forward waits for the device to find packed samples",
        "models/llm/decoder.py",
        "        with recording as router_logits, known_samples(inputs), whole_rows as whole_BSD:",
        "        with recording as router_logits, whole_rows as whole_BSD:",
        "tests/runtime/test_host_waits.py",
    ),
    Fault(
        "packed samples are taken for one",
        "models/llm/text_inputs.py",
        "inputs[SAMPLES] = text_BS[:, :0] if sample_BS is None else sample_BS",
        "inputs[SAMPLES] = text_BS[:, :0]",
        "tests/runtime/test_families.py",
    ),
    Fault(
        "a stage is taken for as long as all the stages of its rank",
        f"{PACKAGE}/schedule/request.py",
        "return (self.given_costs or Costs()).per_stage(self.stages_per_rank)",
        "return self.given_costs or Costs()",
        "tests/schedule/test_choose.py",
    ),
    Fault(
        "media items are cut",
        f"{PACKAGE}/schedule/make.py",
        "pieces = request.pieces if request.group_pieces is None else request.group_pieces",
        "pieces = request.pieces",
        "tests/training/test_planning.py",
    ),
    Fault(
        "auto forgets the limit on LLM microbatches",
        f"{PACKAGE}/schedule/make.py",
        "timeline = verify(placed, request.max_encoder_units, request.max_llm_microbatches, workload, request.memory)",
        "timeline = verify(placed, request.max_encoder_units, None, workload, request.memory)",
        "tests/schedule/test_choose.py",
    ),
    Fault(
        "each rank keeps its own heads' part of a norm's gradient",
        "models/llm/tensor_parallel.py",
        "{name: with_summed_gradient(p, mesh.get_group()) for name, p in own.items()}",
        "own",
        "tests/models/test_tensor_parallel.py -k against",
    ),
    Fault(
        "norms of heads that a plan leaves out are forgotten",
        "models/llm/tensor_parallel.py",
        '            plan[path] = "replicated_with_grad_allreduce"',
        "            pass",
        "tests/models/test_tensor_parallel.py -k vision",
    ),
    Fault(
        "the padding token is looked for in every slice of the vocabulary",
        "models/llm/vocabulary_parallel.py",
        "own = None if padding is None else padding - part.first",
        "own = padding",
        "tests/models/test_tensor_parallel.py -k against",
    ),
    Fault(
        "the label's logit is taken from every slice",
        "models/llm/vocabulary_parallel.py",
        "shares.scatter_add_(1, own, -mine.to(shares.dtype)[:, None])",
        "shares.scatter_add_(1, own, -torch.ones_like(own, dtype=shares.dtype))",
        "tests/models/test_tensor_parallel.py -k against",
    ),
    Fault(
        "gradients of hidden states are those of one slice of the vocabulary",
        "models/llm/vocabulary_parallel.py",
        "        dist.all_reduce(by_hidden, group=self.mesh.get_group())",
        "        pass",
        "tests/models/test_tensor_parallel.py -k against",
    ),
    Fault(
        "adapters of sliced layers are whole",
        "models/llm/tensor_parallel.py",
        "return list(layer.lora_A.values())",
        "return []",
        "tests/models/test_tensor_parallel.py -k against",
    ),
    Fault(
        "ranks with different tokens sum their experts' outputs",
        "models/llm/expert_parallel.py",
        "if same_tokens else",
        "if True else",
        "tests/models/test_expert_parallel.py -k against",
    ),
    Fault(
        "ranks do not compare their labels",
        f"{PACKAGE}/training/batch_facts.py",
        '            "labels": microbatch.labels,\n',
        "",
        "tests/training/test_agreement.py -k batch",
    ),
    Fault(
        "the number that all ranks must have alike is compared for the largest only",
        f"{PACKAGE}/training/batch_agreement.py",
        "numbers[1 + 2 * place], numbers[2 + 2 * place] = mine, -mine",
        "numbers[1 + 2 * place], numbers[2 + 2 * place] = 0, 0",
        "tests/training/test_agreement.py -k batch",
    ),
    Fault(
        "only the rank with a bad gradient knows of it",
        f"{PACKAGE}/training/runner.py",
        "        sums, bad = sums[:-1], sums[-1]",
        "        sums, bad = sums[:-1], bad.sum()",
        "tests/training/test_nonfinite.py",
    ),
    Fault(
        "a bad loss of an accumulated batch is forgotten",
        f"{PACKAGE}/training/nonfinite.py",
        "self._losses = losses if self._losses is None else self._losses + losses",
        "self._losses = losses",
        "tests/training/test_nonfinite.py",
    ),
    Fault(
        "a skipped step keeps its gradients",
        f"{PACKAGE}/training/lightning_steps.py",
        "                parameter.grad = None  # optimizers pass over it",
        "                pass",
        "tests/training/test_nonfinite.py -k skipped",
    ),
    Fault(
        "nobody looks whether the next process has ended",
        f"{PACKAGE}/runtime/watchdog.py",
        "self._next is not None and self._next.has_ended()",
        "False",
        "tests/training/test_errors.py -k kill",
    ),
    Fault(
        "each rank obeys its own signals",
        f"{PACKAGE}/training/stopping.py",
        "work = None if group is None else dist.all_reduce(wish",
        "work = None if True else dist.all_reduce(wish",
        "tests/training/test_stopping.py",
    ),
    Fault(
        "process groups stay when their strategy is gone",
        f"{PACKAGE}/groups.py",
        "            dist.destroy_process_group(group)",
        "            pass",
        "tests/training/test_processes.py -k groups",
    ),
    Fault(
        "processes meet under the name of an attempt before",
        f"{PACKAGE}/runtime/meeting.py",
        '            if end is not None and self._own.token in end["tokens"] and end["error"] is None:',
        '            if end is not None and end["error"] is None:',
        "tests/runtime/test_meeting.py",
    ),
    Fault(
        "a run uses what an attempt before has left in the store",
        f"{PACKAGE}/training/processes.py",
        "timeout=self._timeout, store=store)",
        "timeout=self._timeout)",
        "tests/training/test_elastic.py",
    ),
    Fault(
        "torchrun believes that a run which was told to end is over",
        f"{PACKAGE}/training/stepping.py",
        "            exception.code = STOPPED\n",
        "            pass\n",
        "tests/training/test_stopping.py",
    ),
]


def found(fault: Fault) -> bool:
    """Whether a test fails with it.

    Raises:
        ValueError: the code is not there, or several times; or the tests cannot run.
    """
    path = ROOT / fault.file
    text = path.read_text()
    if text.count(fault.code) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has this {text.count(fault.code)} times: {fault.code!r}")
    try:
        path.write_text(text.replace(fault.code, fault.instead))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise ValueError(f"{fault.name}: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 1
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    only = parser.parse_args().only
    survivors = 0
    for fault in FAULTS:
        if only in fault.name:
            caught = found(fault)
            survivors += not caught
            print(f"{'found    ' if caught else 'NOT FOUND'} {fault.name}", flush=True)
    return survivors


if __name__ == "__main__":
    sys.exit(main())
