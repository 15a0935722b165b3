"""Plan and workload files: what is written, and what is said about malformed ones."""

import json
import re

import pytest

from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs, Plan, PlanError
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload

KEYS = [
    *(
        "format",
        "policy",
        "backbone",
        "pipeline_parallel_size",
        "virtual_stages",
        "microbatches",
        "stage_rank",
        "groups",
    ),
    *("encoder_shares", "generator_shares", "ranks", "costs", "makespan", "ideal", "peak"),
]


@pytest.fixture
def plan() -> Plan:
    return make_plan(PlanRequest(pipeline_parallel_size=3, microbatches=7, costs=Costs(F=1 / 3, G=0.1)))


def test_file_has_the_documented_keys_and_round_trips(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert list(data) == KEYS
    assert data["format"] == "bigmac-plan/1"
    assert data["ranks"][0][:3] == ["EF0", "EF1", "0F0"]
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "bigmac-plan/2", 'format: expected "bigmac-plan/1", found "bigmac-plan/2"'),
        ("policy", 3, "policy: expected a string, found 3"),
        ("microbatches", 0, "microbatches: expected an integer of at least 1, found 0"),
        ("microbatches", True, "microbatches: expected an integer of at least 1, found true"),
        (
            "stage_rank",
            [0, "1"],
            'stage_rank[1]: expected a list with the rank of each stage; this one is wrong, found "1"',
        ),
        ("groups", [[0], 1], "groups[1]: expected a list with a list of microbatches per group"),
        ("encoder_shares", [[0.5, -1]], "encoder_shares[0][1]: expected"),
        ("ranks", [["0F0", "0X0"]], "ranks[0][1]: '0X0' is not an action"),
        ("ranks", [["0F0", 7]], "ranks[0][1]: expected a list with a list of action texts per rank"),
        ("ranks", {}, "ranks: expected a list with a list of action texts per rank, found {}"),
        ("costs", [], "costs: expected a JSON object, found []"),
        ("costs", {"F": 1}, "costs: B is missing; expected a number of at least 0"),
        ("makespan", "long", 'makespan: expected a number of at least 0, found "long"'),
        ("ideal", float("nan"), "ideal: expected a number of at least 0, found NaN"),
        ("peak", {"encoder_units": []}, "peak: llm_microbatches is missing"),
        ("colour", "red", "colour: no such key; known are backbone, costs"),
    ],
)
def test_wrong_values_are_named(plan, tmp_path, key, value, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(plan.to_json()) | {key: value}))
    with pytest.raises(PlanError, match=re.escape(message)) as raised:
        Plan.load(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("key", KEYS)
def test_missing_keys_are_named(plan, key):
    data = json.loads(plan.to_json())
    del data[key]
    with pytest.raises(PlanError, match=f"^w.json: {key} is missing; expected"):
        Plan.from_json(json.dumps(data), "w.json")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "plan: not JSON: "), ("[]", "plan: expected a JSON object, found []")]
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan.from_json(text)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(PlanError, match=re.escape(f"{tmp_path / 'no.json'}: cannot be read: No such file")):
        Plan.load(tmp_path / "no.json")


def test_workload_keys_may_be_left_out():
    work = Workload.from_json('[{"llm": 2, "encoder": [1, 0.5]}, {}]')
    assert work.microbatches == (MicrobatchWork(2, (1, 0.5)), MicrobatchWork())
    assert (work.total("EF"), work.total("EF", [1]), work.total("G")) == (1.5, 0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "workload: expected a list with one object per microbatch"),
        ("[]", "workload: expected a list with one object per microbatch"),
        ('[{}, {"lm": 1}]', "workload: microbatch 1: lm: no such key; known are encoder, generator, llm"),
        ('[{"encoder": 1}]', "workload: microbatch 0: encoder: expected a list of item times of at least 0, found 1"),
        ('[{"encoder": [-1]}]', "workload: microbatch 0: encoder[0]: expected"),
        ('[{"llm": 0}]', "workload: microbatch 0: llm: expected a number above 0, found 0"),
    ],
)
def test_wrong_workloads_are_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Workload.from_json(text)
