"""What is wrong between the model and the machine: names of GPUs, number formats, memory, disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace

from serve.cards import BFLOAT16, FLOAT8, MODAL, Card, modal_card
from serve.checkpoint import quantization_method, stored_dtype
from serve.engine.sizing import MIN_CONTEXT_TOKENS
from serve.errors import ServeError
from trimaran.doctor.finding import Finding, Findings, Situation
from trimaran.plan.machines import Machine
from trimaran.plan.need import examine
from trimaran.platforms.render.plans import PLANS
from trimaran.platforms.runpod.endpoint import DEFAULTS, IMAGE_GB, disk_for
from trimaran.platforms.runpod.pools import POOLS, weakest

GB = 1_000_000_000


def names(situation: Situation) -> Findings:
    """GPUs, pools and plans that the platform does not have."""
    known: Iterable[str] = {"modal": MODAL, "runpod": POOLS, "render": PLANS}[situation.platform or "modal"]
    asked = [situation.plan or ""] if situation.platform == "render" else situation.gpus
    for name in filter(None, asked):
        card, colon, _ = name.partition(":")
        if situation.platform == "modal" and colon and card in known:
            yield Finding(
                "several-gpus",
                f"{name} asks for more than one GPU",
                "The engine uses one GPU, and you would pay for all; the deploy would be refused.",
                _choose(situation, card),
            )
        elif name not in known and name.replace("_", " ") not in known:
            near = difflib.get_close_matches(name.upper(), [other.upper() for other in known], n=1, cutoff=0.3)
            right = next((other for other in known if near and other.upper() == near[0]), next(iter(known)))
            kind = "plan" if situation.platform == "render" else "GPU"
            yield Finding(
                f"unknown-{kind.lower()}",
                f"{situation.where} has no {kind} {name!r}; there are: {', '.join(known)}",
                "The deploy would fail in the cloud, after the build.",
                _choose(situation, right),
            )


def _choose(situation: Situation, name: str) -> str:
    if situation.platform == "modal":
        return f"export SERVE_MODAL_GPU={name}"
    return f"trimaran deploy {situation.platform} --{'plan' if situation.platform == 'render' else 'gpu'} '{name}' ..."


def cards(situation: Situation) -> list[tuple[str, Card]]:
    """The cards that were asked for, of those that exist."""
    if situation.platform == "modal":
        return [(name, modal_card(name)) for name in situation.gpus if name in MODAL]
    if situation.platform == "runpod":
        return [(name, weakest(name)) for name in situation.gpus or DEFAULTS["pools"] if name in POOLS]
    return []


def formats(situation: Situation) -> Findings:
    """bfloat16 and fp8 on cards that do not compute in them."""
    if situation.source is None:
        return
    config, wanted = dict(situation.source.config), situation.settings.dtype.value
    is_bfloat16 = wanted == "bfloat16" or (wanted == "auto" and stored_dtype(config) == "bfloat16")
    for name, card in cards(situation):
        if is_bfloat16 and card.capability < BFLOAT16:
            yield Finding(
                "no-bfloat16",
                f"the model is bfloat16, and {name} (compute capability {_dots(card)}) has no bfloat16",
                "It would run in float16, where large values overflow, or not at all with SERVE_DTYPE=bfloat16.",
                _choose(situation, "L4" if situation.platform == "modal" else "AMPERE_24")
                + ", or accept it: export SERVE_DTYPE=float16",
            )
        if quantization_method(config) in {"fp8", "mxfp8", "fbgemm_fp8"} and card.capability < FLOAT8:
            yield Finding(
                "no-fp8",
                f"the checkpoint is fp8, and {name} (compute capability {_dots(card)}) does not compute in fp8",
                "It would be unpacked to twice its size, or be refused.",
                _choose(situation, "L40S" if situation.platform == "modal" else "ADA_24"),
            )


def _dots(card: Card) -> str:
    return ".".join(map(str, card.capability))


def memory(situation: Situation) -> Findings:
    """Weights, context and batch that do not fit together."""
    if situation.source is None or situation.platform is None:
        return
    settings = situation.settings
    try:
        dtype = settings.dtype.value
        need = examine(settings.model, settings.model_revision, settings.max_model_len, dtype=dtype)
    except ServeError:  # found by another check
        return
    situation.need = need
    batch = settings.max_batch_size or 1
    for machine in _machines(situation):
        found = machine.max_concurrency(need)
        if found >= batch:
            continue
        name, mend = "batch-too-large", situation.as_variable("max_batch_size", found)
        if not found:
            shortest = replace(need, kv_bytes_per_sequence=need.kv_bytes_per_token * MIN_CONTEXT_TOKENS)
            fits_short = machine.max_concurrency(shortest)
            name = "context-beyond-fit" if fits_short else "machine-too-small"
            tokens = fits_short * MIN_CONTEXT_TOKENS
            mend = situation.as_variable("max_model_len", tokens) if fits_short else f"trimaran plan {settings.model}"
        # Without a setting the engine shortens the context by itself.
        if name != "context-beyond-fit" or settings.max_model_len:
            yield Finding(
                name,
                f"{machine.platform} {machine.name} {machine.refusal(need, batch)}",
                "The container would run out of memory at its start, and be started again and again.",
                mend,
            )


def _machines(situation: Situation) -> list[Machine]:
    platform = situation.platform or ""
    if platform == "render":
        plan = PLANS.get((situation.plan or "standard").replace("_", " "))
        return [] if plan is None else [Machine(platform=platform, name=plan.name, gpu="", plan=plan)]
    return [Machine(platform=platform, name=name, gpu="", card=card) for name, card in cards(situation)]


def disk(situation: Situation) -> Findings:
    """A disk at RunPod that image and weights do not fit on."""
    if situation.platform != "runpod" or situation.need is None:
        return
    has = situation.disk_gb or DEFAULTS["disk_gb"]
    weights_gb = situation.need.stored_bytes / GB
    wanted = disk_for(weights_gb)
    if has < wanted:
        yield Finding(
            "disk-too-small",
            f"a disk of {has} GB, for an image of {IMAGE_GB} GB and weights of {weights_gb:.0f} GB",
            "The download would fail, and the worker would start over and over.",
            f"trimaran deploy runpod --disk-gb {wanted} ...",
        )


ALWAYS = (names,)
OF_MODELS = (formats, memory, disk)
