"""RunPod's pools of GPUs, as its documentation and its own tools named them in August 2026.

Its sources disagree about some members; the API refuses pools that it does not know, and its catalogue is the truth.
"""

from __future__ import annotations

from serve.cards import CARDS, Card

POOLS: dict[str, tuple[str, ...]] = {
    "AMPERE_16": (
        "NVIDIA RTX A4000",
        "NVIDIA RTX A4500",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA RTX 2000 Ada Generation",
    ),
    "AMPERE_24": ("NVIDIA L4", "NVIDIA RTX A5000", "NVIDIA GeForce RTX 3090"),
    "ADA_24": ("NVIDIA GeForce RTX 4090",),
    "ADA_32_PRO": ("NVIDIA GeForce RTX 5090",),
    "AMPERE_48": ("NVIDIA A40", "NVIDIA RTX A6000"),
    "ADA_48_PRO": ("NVIDIA L40", "NVIDIA L40S", "NVIDIA RTX 6000 Ada Generation"),
    "AMPERE_80": ("NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"),
    "ADA_80_PRO": ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL"),
    "BLACKWELL_96": (
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    ),
    "HOPPER_141": ("NVIDIA H200",),
    "BLACKWELL_180": ("NVIDIA B200",),
}
"""Pool to the types of GPU in it."""


def weakest(pool: str) -> Card:
    """What every card of a pool has at least: a worker may get any of them.

    Raises:
        KeyError: there is no such pool.
    """
    cards = [CARDS[name] for name in POOLS[pool]]
    return Card(
        memory_gb=min(card.memory_gb for card in cards),
        capability=min(card.capability for card in cards),
        bandwidth_gb_s=min(card.bandwidth_gb_s for card in cards),
    )
