"""Graphics cards that platforms rent out: how much memory, and what they compute in.

For those who deploy: here, because ``deploy`` and ``trimaran`` both need it and neither imports the other.
"""

from __future__ import annotations

from dataclasses import dataclass

BFLOAT16 = (8, 0)
"""The lowest compute capability that computes in bfloat16."""

FLOAT8 = (8, 9)
"""The lowest compute capability that multiplies matrices in fp8."""


@dataclass(frozen=True, slots=True)
class Card:
    """One card: gigabytes (10^9 bytes) of memory, compute capability, and gigabytes a second to its memory."""

    memory_gb: int
    capability: tuple[int, int]
    bandwidth_gb_s: int


CARDS = {
    "NVIDIA T4": Card(16, (7, 5), 320),
    "NVIDIA L4": Card(24, (8, 9), 300),
    "NVIDIA A10": Card(24, (8, 6), 600),
    "NVIDIA A40": Card(48, (8, 6), 696),
    "NVIDIA L40": Card(48, (8, 9), 864),
    "NVIDIA L40S": Card(48, (8, 9), 864),
    "NVIDIA A100 40GB": Card(40, (8, 0), 1555),
    "NVIDIA A100 80GB PCIe": Card(80, (8, 0), 1935),
    "NVIDIA A100-SXM4-80GB": Card(80, (8, 0), 2039),
    "NVIDIA H100 PCIe": Card(80, (9, 0), 2000),
    "NVIDIA H100 80GB HBM3": Card(80, (9, 0), 3350),
    "NVIDIA H100 NVL": Card(94, (9, 0), 3900),
    "NVIDIA H200": Card(141, (9, 0), 4800),
    "NVIDIA B200": Card(180, (10, 0), 8000),
    "NVIDIA B300": Card(270, (10, 3), 8000),
    "NVIDIA RTX A4000": Card(16, (8, 6), 448),
    "NVIDIA RTX A4500": Card(20, (8, 6), 640),
    "NVIDIA RTX A5000": Card(24, (8, 6), 768),
    "NVIDIA RTX A6000": Card(48, (8, 6), 768),
    "NVIDIA RTX 2000 Ada Generation": Card(16, (8, 9), 224),
    "NVIDIA RTX 4000 Ada Generation": Card(20, (8, 9), 360),
    "NVIDIA RTX 6000 Ada Generation": Card(48, (8, 9), 960),
    "NVIDIA GeForce RTX 3090": Card(24, (8, 6), 936),
    "NVIDIA GeForce RTX 4090": Card(24, (8, 9), 1008),
    "NVIDIA GeForce RTX 5090": Card(32, (12, 0), 1792),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": Card(96, (12, 0), 1597),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": Card(96, (12, 0), 1792),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": Card(96, (12, 0), 1792),
}
"""By the names that RunPod's catalogue has for them; memory and speed as their makers state them."""

MODAL = {
    "T4": "NVIDIA T4",
    "L4": "NVIDIA L4",
    "A10": "NVIDIA A10",
    "A10G": "NVIDIA A10",
    "L40S": "NVIDIA L40S",
    "A100": "NVIDIA A100 40GB",
    "A100-40GB": "NVIDIA A100 40GB",
    "A100-80GB": "NVIDIA A100-SXM4-80GB",
    "RTX-PRO-6000": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "H100": "NVIDIA H100 80GB HBM3",
    "H100!": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
    "B200+": "NVIDIA B200",
    "B300": "NVIDIA B300",
}
"""What Modal calls them; its client takes any name, and its cloud only these."""


def modal_card(name: str) -> Card:
    """The card that Modal rents out under ``name``.

    Raises:
        KeyError: it has none of that name.
    """
    return CARDS[MODAL[name]]
