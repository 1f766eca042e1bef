"""What can be rented for a model: GPUs at Modal, pools at RunPod, plans at Render; and what each does with a model."""

from __future__ import annotations

from dataclasses import dataclass

from serve.cards import BFLOAT16, CARDS, MODAL, Card
from serve.engine.runner import CPU_CACHE_SHARE, CUDA_CACHE_SHARE, CUDA_SLOTS
from serve.placement import gains_from_snapshot, host_cores, host_memory_mib
from trimaran.plan.need import Need
from trimaran.platforms.prices import CPU, MEMORY, Price, PriceList
from trimaran.platforms.render.plans import PLANS, RUNTIME_MB, WEIGHTS_FACTOR, Plan, needed_mb
from trimaran.platforms.runpod.endpoint import DEFAULTS
from trimaran.platforms.runpod.pools import POOLS, weakest

GB = 1_000_000_000
USABLE_SHARE = 0.92
"""Of a card's memory; a guess until it is measured on a GPU."""

OVERHEAD_BYTES = GB
"""CUDA's context, workspaces, what the allocator cannot use; a guess until it is measured on a GPU."""

MODAL_IDLE_S, RENDER_FREE_IDLE_S = 300, 900
COLD_START_S, COLD_READ_BYTES_S = 20.0, GB
"""Of a boot: container and imports, and how fast weights arrive; guesses until they are measured on a platform."""

BANDWIDTH_SHARE, STEP_S = 0.7, 0.015
"""Of a step: what is reached of a card's memory bandwidth, and what Python adds; guesses likewise."""

RENDER_BANDWIDTH_S = 8 * GB
"""Bytes that one of Render's CPUs reads in a second; a guess likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine: a ``card``, or a ``plan`` of CPUs; and how long it stays up without requests (None: always)."""

    platform: str
    name: str
    gpu: str
    card: Card | None = None
    plan: Plan | None = None
    idle_s: float | None = None

    @property
    def memory_bytes(self) -> int:
        """Of the card, or main memory."""
        return self.card.memory_gb * GB if self.card else self._plan.memory_mb * 2**20

    @property
    def memory(self) -> str:
        """The same in words, as the platform counts it."""
        return f"{self.card.memory_gb} GB" if self.card else f"{self._plan.memory_mb / 1024:g} GB"

    @property
    def _plan(self) -> Plan:
        if self.plan is None:
            raise ValueError(f"{self.name} has neither a card nor a plan")
        return self.plan

    def max_concurrency(self, need: Need) -> int:
        """Sequences of the whole context that fit at once beside the weights; 0: not even one."""
        if self.card is None:
            free = self.memory_bytes - (RUNTIME_MB << 20) - need.weight_bytes_on(None) * WEIGHTS_FACTOR
            budget = free * CPU_CACHE_SHARE
        else:
            weights = need.weight_bytes_on(self.card)
            step = need.activation_bytes(CUDA_SLOTS)
            budget = min(
                USABLE_SHARE * self.memory_bytes - weights - step - OVERHEAD_BYTES,
                (self.memory_bytes - OVERHEAD_BYTES - weights) * CUDA_CACHE_SHARE,  # what the engine itself takes
            )
        return max(0, int(budget // max(1, need.kv_bytes_per_sequence)))

    def refusal(self, need: Need, concurrency: int) -> str:
        """Why the model does not fit at ``concurrency``; empty: it does."""
        if self.card is None and need.cpu_refusal:
            return need.cpu_refusal
        found = self.max_concurrency(need)
        if found >= concurrency:
            return ""
        weights = need.weight_bytes_on(self.card)
        if self.card is None:
            wanted = needed_mb(weights, int(concurrency * need.kv_bytes_per_sequence / CPU_CACHE_SHARE)) / 1024
            return f"needs {wanted:.1f} GB of memory for {concurrency} at once, and has {self.memory}"
        if not found:
            wanted = (weights + need.kv_bytes_per_sequence + OVERHEAD_BYTES) / GB
            return f"needs {wanted:.0f} GB for one sequence, and has {self.memory}"
        return f"holds {found} sequences of {need.context} tokens at once, not {concurrency}"

    def remark(self, need: Need) -> str:
        """What is different on this machine."""
        if self.card and self.card.capability < BFLOAT16:
            return "no bfloat16: runs in float16"
        if need.weight_bytes_on(self.card) > need.weight_bytes:
            return f"no {need.quantization} here: unpacked to 16 bits"
        if self.card is None and need.value_bytes == 2:
            return "should its CPU lack bfloat16, the model runs in float32, in twice the memory"
        return ""

    @property
    def can_stay_up(self) -> bool:
        """Whether it can be kept from sleeping, for its price of an hour that is up."""
        return self.plan is None or not self.plan.is_free

    def service_s(self, need: Need, prompt_tokens: int, output_tokens: int) -> float:
        """Seconds of one request, from the bytes that each step reads; an estimate."""
        speed = self.card.bandwidth_gb_s * GB if self.card else self._plan.num_cpus * RENDER_BANDWIDTH_S
        step = need.weight_bytes_on(self.card) / (speed * BANDWIDTH_SHARE) + STEP_S
        return step * (output_tokens + 2 * -(-prompt_tokens // 512))

    def cold_s(self, need: Need) -> float:
        """Seconds of a boot until the first request runs; an estimate."""
        return boot_s(need.stored_bytes)

    def price(self, need: Need, prices: PriceList) -> Price | None:
        """Dollars an hour while it is up; None: not known.  At Modal with the cores and the memory that come along."""
        found = prices.get(self.platform, self.name)
        if found is None or self.platform != "modal":
            return found
        has_snapshot = gains_from_snapshot(need.stored_bytes, bool(need.quantization))
        extra = 0.0
        for name, amount in (
            (CPU, host_cores(need.stored_bytes, has_gpu=True)),
            (MEMORY, host_memory_mib(need.stored_bytes, True, has_snapshot) / 1024),
        ):
            unit = prices.get("modal", name)
            extra += unit.usd_per_hour * amount if unit else 0.0
        return Price(
            platform="modal",
            name=found.name,
            usd_per_hour=found.usd_per_hour + extra,
            day=found.day,
            source=found.source,
        )


def machines() -> list[Machine]:
    """All that are known, platform by platform."""
    found: list[Machine] = []
    for card in dict.fromkeys(MODAL.values()):  # once, not under its other names too
        name = _modal_name(card)
        found.append(Machine(platform="modal", name=name, gpu=card, card=CARDS[card], idle_s=MODAL_IDLE_S))
    for pool, cards in POOLS.items():
        gpu = " / ".join(card.removeprefix("NVIDIA ").removeprefix("GeForce ") for card in cards)
        idle_s = float(DEFAULTS["idle_s"])
        found.append(Machine(platform="runpod", name=pool, gpu=gpu, card=weakest(pool), idle_s=idle_s))
    sizes: set[tuple[float, int]] = set()
    for plan in PLANS.values():
        if plan.is_free or (plan.num_cpus, plan.memory_mb) not in sizes:
            sizes.add((plan.num_cpus, plan.memory_mb))
            gpu = f"{plan.num_cpus:g} CPU, {plan.memory_mb / 1024:g} GB"
            idle_s = RENDER_FREE_IDLE_S if plan.is_free else None
            found.append(Machine(platform="render", name=plan.name, gpu=gpu, plan=plan, idle_s=idle_s))
    return found


def _modal_name(card: str) -> str:
    """The most exact of Modal's names for a card: ``A100`` and ``H100`` may be given a larger one."""
    names = [name for name, other in MODAL.items() if other == card and name[-1] not in "!+"]
    return max(names, key=lambda name: ("-" in name, -len(name)))


def boot_s(stored_bytes: int) -> float:
    """Seconds of a boot with weights of that size; an estimate."""
    return COLD_START_S + stored_bytes / COLD_READ_BYTES_S
