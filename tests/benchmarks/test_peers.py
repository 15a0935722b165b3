"""The comparison of peers: all of them train the same, and the documents say what the results say."""

import json
from dataclasses import replace
from itertools import product

import pytest

from benchmarks import paper_workload
from benchmarks.peers import __main__ as command
from benchmarks.peers import computing_run, report
from benchmarks.peers.case import ENCODERS, GENERATORS, MEASURING, PEERS, SIGMAS, Case, default_cases
from benchmarks.peers.data import media_costs, target_costs
from benchmarks.peers.documents import DOCUMENTS, ROOT, marked, replaced
from benchmarks.peers.results import check_agreement, joined, peer_row
from benchmarks.peers.running import sleep
from benchmarks.peers.simulated import SIMULATED, makespan
from bigmac_lightning.schedule.costs import Costs

UNEVEN = Case("sleep", 2, 4, encoder=1.0, generator=0.0, sigma=1.0)


def test_all_peers_train_the_same_in_real_processes():
    kinds = tuple(kind for kind in PEERS if kind != MEASURING)
    found = sleep(UNEVEN, kinds, unit=1e-4, repeats=1)
    row = joined(UNEVEN, 1e-4, {kind: peer_row(found[kind], 1e-4, UNEVEN) for kind in kinds})
    assert all("seconds" in peer for peer in row["peers"].values())
    losses = [peer["losses"][0] for peer in row["peers"].values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_generators_train_the_same_and_reasons_are_given():
    case = replace(UNEVEN, generator=3.0, sigma=0.5)
    kinds = ("ddp", "torch_interleaved", "disaggregated", "filled")
    found = sleep(case, kinds, unit=1e-4, repeats=1)
    row = joined(case, 1e-4, {kind: peer_row(found[kind], 1e-4, case) for kind in kinds})
    assert "expects at least 3" in row["peers"]["disaggregated"]["reason"]
    assert sum("seconds" in peer for peer in row["peers"].values()) == 3
    # one microbatch after the other: all layers, its media, and the forward of its targets
    assert row["peers"]["ddp"]["activations"] == pytest.approx(2 + _largest(case), rel=1e-5)


def _largest(case: Case) -> float:
    media, targets = media_costs(case, 0), target_costs(case, 0)
    return max(sum(m) + sum(t) / 3 for m, t in zip(media, targets, strict=True))


def test_disagreement_is_refused():
    peers = {kind: {"losses": [1.0], "gradient_norm": 2.0} for kind in ("ddp", "nested")}
    check_agreement(peers)
    peers["nested"]["gradient_norm"] = 2.01
    with pytest.raises(ValueError, match=r"gradient_norm of ddp are 2\.0, but those of nested are 2\.01"):
        check_agreement(peers)


def test_the_command_writes_tables(tmp_path):
    options = "--only sleep --quick --ranks 4 --encoder 0.1 --generator 0 --unit_ms 0.3 --repeats 1"
    options += " --peers ddp torch_1f1b filled"
    command.main([*options.split(), "--output", str(tmp_path)])
    results = json.loads((tmp_path / report.RESULTS).read_text())
    assert [row["case"]["encoder"] for row in results["rows"]] == [0.1]
    text = (tmp_path / report.TABLES).read_text()
    assert "| P | encoder | generator | sigma | ddp | torch_1f1b | filled |" in text
    assert (tmp_path / report.PICTURE).stat().st_size > 1000


def test_verdicts_name_cases_in_which_filled_is_slower():
    peer = {"least": 1.0, "most": 1.1, "activations": 1.0, "bubbles": 0.1}
    row = {
        "case": vars(UNEVEN),
        "ideal": 1.0,
        "peers": {"upfront": {**peer, "seconds": 1.05}, "filled": {**peer, "seconds": 1.3, "least": 1.2}},
    }
    text = "\n".join(report.verdict_texts({"rows": [row]}))
    assert "| upfront (Optimus, LoongForge) | 0.81 (0.81 to 0.81) | in 1 of 1 |" in text
    assert (
        "P = 2, encoder 1, generator 0, sigma 1: upfront (Optimus, LoongForge) took 0.808 of the time of filled" in text
    )
    row["peers"]["filled"]["seconds"] = 1.0
    assert "No pipeline had a shorter median" in report.verdict_texts({"rows": [row]})[1]


def test_documents_have_the_tables_of_the_results():
    texts = report.blocks(report.load())
    texts["paper-workload"] = paper_workload.text(paper_workload.load())
    seen = set[str]()
    for name in DOCUMENTS:
        for mark, content in marked((ROOT / name).read_text()):
            assert content == texts[mark].strip("\n"), (
                f"{name}: {mark} is old: python -m benchmarks.peers.report --write"
            )
            seen.add(mark)
    assert seen == texts.keys()


def test_marked_parts_are_replaced():
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb"
    new = replaced(text, {"x": r"new \1", "y": "other"})
    assert new == "a\n<!-- x -->\n\nnew \\1\n\n<!-- end of x -->\nb"
    assert dict(marked(new)) == {"x": r"new \1"}


def test_larger_pipelines_see_each_pair_of_values():
    cases = [case for case in default_cases((4, 8)) if case.size == 8]
    assert {(case.encoder, case.generator) for case in cases} == set(product(ENCODERS, GENERATORS))
    assert {(case.encoder, case.sigma) for case in cases} == set(product(ENCODERS, SIGMAS))
    assert {(case.generator, case.sigma) for case in cases} == set(product(GENERATORS, SIGMAS))


def test_simulations_follow_the_policies():
    case = Case("sleep", 4, 16, encoder=1.0, generator=0.0, sigma=0.0)
    found = {kind: makespan(case, kind) / case.ideal for kind in SIMULATED}
    assert found["nested"] == pytest.approx(1)
    assert found["torch_1f1b"] == found["first_stage"]
    assert found["filled_interleaved"] < found["filled"] < 1 < found["recompute"] < found["first_stage"]


def test_cutting_the_llm_anew_evens_out_stages():
    costs = Costs(F=1, B=2, EF=0.5, EB=1.0, G=1.5)
    alone = replace(costs, EF=0.0, EB=0.0, G=0.0)
    even = paper_workload.seconds(alone, 4, "first_stage")
    assert paper_workload.rebalanced(alone, 4) == pytest.approx(even)
    anew = paper_workload.rebalanced(costs, 4)
    assert paper_workload.seconds(costs, 4, "filled") < anew < paper_workload.seconds(costs, 4, "first_stage")


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "torch_1f1b", "torch_interleaved", "filled", "filled_interleaved"])
def test_layers_that_compute(kind):
    case = Case("compute", 2, 4, encoder=1.0, generator=1.0, sigma=0.0)
    one, other = (computing_run.compute(case, name, case.costs, 1) for name in ("nested", kind))
    check_agreement({name: peer_row(found, 1, case) for name, found in (("nested", one), (kind, other))})
