"""Every machine for one model under one load: whether it fits, what it costs, who waits.  Cheapest first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from serve.engine.runner import CPU_SLOTS, CUDA_SLOTS
from trimaran.plan.economics import Cost, Load, Terms, break_even, cost
from trimaran.plan.machines import Machine, machines
from trimaran.plan.need import Need
from trimaran.platforms.prices import Price, PriceList


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What was asked for.  ``service_s``, ``cold_s``, ``idle_s``, ``always_on``: None is our own estimate."""

    load: Load
    concurrency: int
    platforms: tuple[str, ...]
    service_s: float | None = None
    cold_s: float | None = None
    idle_s: float | None = None
    always_on: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One machine.  ``refusal`` says why the model does not fit; ``cost`` is None then, and without a price.

    ``break_even_per_hour``: requests an hour from which the plan's always-on machine is cheaper.
    """

    machine: Machine
    max_concurrency: int
    refusal: str
    remark: str
    price: Price | None
    terms: Terms | None
    cost: Cost | None
    break_even_per_hour: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the model runs there as asked for."""
        return not self.refusal

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: plain names and numbers."""
        described: dict[str, Any] = {
            "platform": self.machine.platform,
            "machine": self.machine.name,
            "gpu": self.machine.gpu if self.machine.card else None,
            "memory_gb": round(self.machine.memory_bytes / 1e9, 3),
            "fits": self.fits,
            "reason": self.refusal or None,
            "remark": self.remark or None,
            "max_concurrency": self.max_concurrency,
            "price_day": self.price.day.isoformat() if self.price else None,
            "price_source": self.price.source if self.price else None,
        }
        terms = asdict(self.terms) if self.terms else dict.fromkeys(Terms.__dataclass_fields__)
        costs = dict.fromkeys((*Cost.__dataclass_fields__, "usd_per_month"))
        if self.cost:
            costs = {**asdict(self.cost), "usd_per_month": self.cost.usd_per_month}
        return {**described, **terms, **costs, "break_even_per_hour": self.break_even_per_hour}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All offers, and the machine that an always-on deployment would take: the cheapest one that fits."""

    need: Need
    wishes: Wishes
    offers: tuple[Offer, ...]
    always_on_usd_per_hour: float | None
    always_on_name: str

    @property
    def fitting(self) -> list[Offer]:
        """Those on which it runs, cheapest first, those without a known price last."""
        return [offer for offer in self.offers if offer.fits]


def make_plan(need: Need, wishes: Wishes, prices: PriceList) -> Plan:
    """Compare all machines of the platforms that were asked for."""
    offers = [_offer(machine, need, wishes, prices) for machine in machines() if machine.platform in wishes.platforms]
    fitting = [offer for offer in offers if offer.fits and offer.terms]
    cheapest = min((offer for offer in fitting if offer.machine.can_stay_up), key=_up, default=None)
    always_on = wishes.always_on if wishes.always_on is not None else _up(cheapest) if cheapest else None
    name = "as given" if wishes.always_on is not None else _name(cheapest) if cheapest else ""
    done = tuple(sorted((_compared(offer, always_on) for offer in offers), key=_order))
    return Plan(need=need, wishes=wishes, offers=done, always_on_usd_per_hour=always_on, always_on_name=name)


def _up(offer: Offer) -> float:
    return offer.terms.usd_per_hour_up if offer.terms else 0.0


def _name(offer: Offer) -> str:
    return f"{offer.machine.platform} {offer.machine.name}"


def _offer(machine: Machine, need: Need, wishes: Wishes, prices: PriceList) -> Offer:
    refusal = machine.refusal(need, wishes.concurrency)
    price = machine.price(need, prices)
    found = machine.max_concurrency(need)
    terms = None
    if price is not None and not refusal:
        load = wishes.load
        idle_s = machine.idle_s if machine.idle_s is None or wishes.idle_s is None else wishes.idle_s
        estimate = machine.service_s(need, load.prompt_tokens, load.output_tokens)
        terms = Terms(
            usd_per_hour_up=price.usd_per_hour,
            service_s=estimate if wishes.service_s is None else wishes.service_s,
            cold_s=machine.cold_s(need) if wishes.cold_s is None else wishes.cold_s,
            idle_s=idle_s,
            slots=min(found, _most_slots(machine, need, wishes.concurrency)),
        )
    return Offer(
        machine=machine,
        max_concurrency=found,
        refusal=refusal,
        remark=machine.remark(need) if not refusal else "",
        price=price,
        terms=terms,
        cost=cost(wishes.load, terms) if terms else None,
    )


def _most_slots(machine: Machine, need: Need, wanted: int) -> int:
    """How many requests the engine computes together: as many as it takes by itself, or as ``wanted``.

    A model that does not run in batches computes one after the other, however many are admitted.
    """
    return 1 if not need.runs_in_batches else max(wanted, CUDA_SLOTS if machine.card else CPU_SLOTS)


def _compared(offer: Offer, always_on: float | None) -> Offer:
    if offer.terms is None or always_on is None:
        return offer
    return Offer(
        **{name: getattr(offer, name) for name in Offer.__dataclass_fields__ if name != "break_even_per_hour"},
        break_even_per_hour=break_even(offer.terms, always_on),
    )


def _order(offer: Offer) -> tuple[bool, bool, float, float]:
    month = offer.cost.usd_per_month if offer.cost else 0.0
    return offer.refusal != "", offer.cost is None, month, offer.machine.memory_bytes
