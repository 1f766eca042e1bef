"""What a plan makes of a model's need, machine by machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from serve.cards import CARDS
from trimaran.cli import main
from trimaran.plan.economics import Load
from trimaran.plan.machines import machines
from trimaran.plan.need import Need
from trimaran.plan.offers import Plan, Wishes, make_plan
from trimaran.platforms.prices import load_prices

NEED = Need(
    model="me/tiny",
    num_parameters=10**6,
    stored_bytes=2 * 10**6,
    weight_bytes=2 * 10**6,
    quantization="",
    adapter_bytes=0,
    context=1024,
    kv_bytes_per_token=1000,
    kv_bytes_per_sequence=1_024_000,
    own_cache_bytes=1_024_000,
    method="formula",
    runs_in_batches=True,
    hidden_size=64,
    vocab_size=1000,
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def planned(need: Need = NEED, per_hour: float = 60, **wishes: Any) -> Plan:
    load = Load(per_hour=per_hour, prompt_tokens=100, output_tokens=50)
    given = {"concurrency": 1, "platforms": ("modal", "runpod", "render"), **wishes}
    return make_plan(need, Wishes(load=load, **given), load_prices())


def test_machine_that_must_sleep_is_not_compared_with_as_always_on(monkeypatch: pytest.MonkeyPatch):
    from trimaran.plan import machines as known

    monkeypatch.setattr(known, "RUNTIME_MB", 100)  # so that Render's free plan, which sleeps, holds the model
    made = planned()
    assert any(offer.machine.name == "free" for offer in made.fitting)
    assert made.always_on_name == "render starter"
    assert made.always_on_usd_per_hour == pytest.approx(7 / 730)


def test_model_that_runs_alone_needs_a_machine_for_each_request_at_once():
    batched, alone = (
        planned(need, per_hour=3600, service_s=5) for need in (NEED, replace(NEED, runs_in_batches=False))
    )
    assert {offer.cost.num_replicas for offer in batched.fitting if offer.cost} == {1}
    assert {offer.cost.num_replicas for offer in alone.fitting if offer.cost} == {5}


def test_batch_that_is_asked_for_is_what_a_machine_runs_at_once():
    made = planned(per_hour=3600, service_s=100, concurrency=100)
    assert {offer.cost.num_replicas for offer in made.fitting if offer.cost} == {1}


def test_what_no_image_computes_in_is_unpacked():
    packed = replace(NEED, quantization="mxfp4", weight_bytes=600_000)
    assert {packed.weight_bytes_on(card) for card in (None, *CARDS.values())} == {2 * 10**6}
    fp8 = replace(NEED, quantization="fp8", weight_bytes=10**6)
    assert fp8.weight_bytes_on(CARDS["NVIDIA L4"]) == 10**6
    assert fp8.weight_bytes_on(None) == 2 * 10**6


def test_checkpoint_that_needs_a_gpu_fits_on_none_of_renders_plans():
    made = planned(replace(NEED, quantization="eetq", cpu_refusal="has no GPU, which eetq needs"))
    assert {offer.machine.platform for offer in made.fitting} == {"modal", "runpod"}
    assert {offer.refusal for offer in made.offers if offer.machine.platform == "render"} == {
        "has no GPU, which eetq needs"
    }


def test_remark_of_many_plans_is_one_line():
    from trimaran.plan.report import as_text

    lines = [line for line in as_text(planned(), False).splitlines() if "lack bfloat16" in line]
    assert len(lines) == 1
    assert len([machine for machine in machines() if machine.platform == "render" and machine.name in lines[0]]) > 5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seconds", "nan"), ("--seconds", "inf"), ("--idle", "nan"), ("--cold-start", "inf"), ("--always-on", "nan"),
        ("--load", "9" * 400 + "/h"), ("--load", "1e9/h"), ("--load", "0/h"), ("--concurrency", "0"),
        ("--context", "9" * 30), ("--prompt", "9" * 400),
    ],
)  # fmt: skip
def test_plan_refuses_what_cannot_be_computed_with(option: str, value: str):
    done = CliRunner().invoke(main, ["plan", "me/tiny", option, value])
    assert done.exit_code == 2
    assert option in done.stderr
