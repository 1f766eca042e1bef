"""What is wrong with the model itself, wherever it is served: files, code, template, adapter."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

from serve import checkpoint, weights
from serve.errors import HubUnreachable, InvalidRequest, ServeError
from trimaran.doctor.finding import Finding, Findings, Situation
from trimaran.plan.dry_run import misfit
from trimaran.plan.need import stored_in

KINDS = (
    ("pickle", "pickle-weights", "Pickle files can run code when they are read; the server refuses them."),
    ("gated", "gated-model", "The container would be refused by the Hub, and start over and over."),
    ("HF_TOKEN", "gated-model", "The container would be refused by the Hub, and start over and over."),
    ("readable", "unreadable-file", "The upload, or the container, would fail at this file."),
    ("looked up", "unreadable-file", "The upload, or the container, would fail at this file."),
    ("cannot be reached", "hub-unreachable", "Nothing can be said about the model, and this machine could not deploy."),
    ("cannot be used", "broken-weights", "Loading would fail after everything else has started."),
    ("which is missing", "broken-weights", "Loading would fail after everything else has started."),
    ("GGUF", "gguf", "The engine serves safetensors checkpoints."),
)
"""What a message of the loader says, what the finding is called, and why it hurts."""


def files(situation: Situation) -> Findings:
    """Whether everything is there, whole and readable; keeps what it has found in ``situation.source``."""
    settings = situation.settings
    try:
        source = weights.locate(settings.model, settings.model_revision, settings.trust_remote_code)
        if source.origin != "hub":
            for one in (source, source.adapter_source):
                if one is not None:
                    weights.fetch_weights(one)
    except HubUnreachable as error:
        yield Finding(
            "hub-unreachable",
            error.message,
            "Nothing can be said about the model, and this machine could not deploy it.",
            "check the network, or name a folder",
        )
    except ServeError as error:
        yield _of(error.message)
    else:
        situation.source = source


def _of(message: str) -> Finding:
    name, why = next(
        ((name, why) for word, name, why in KINDS if word in message),
        ("unusable-model", "The server would end with status 3, and the platform would start it again and again."),
    )
    what, _, mend = message.partition(". ")
    if not mend and ";" in message:
        what, _, mend = message.rpartition("; ")
    elif not mend:
        what, _, mend = message.partition(": ")
    if what.endswith("does not exist"):
        mend = "name a folder that is there, or a Hub id: owner/name"
    return Finding(name, what, why, mend or "name another model")


def code(situation: Situation) -> Findings:
    """Code that comes with the model, and architectures that transformers does not know."""
    if situation.source is None:
        return
    try:
        checkpoint.check_architecture(situation.source.config, situation.settings.trust_remote_code)
    except ServeError as error:
        is_code = "Python code" in error.message
        yield Finding(
            "remote-code" if is_code else "unknown-architecture",
            error.message.partition(". ")[0],
            "Loading would end with status 3, and the platform would start it again and again.",
            "read that code, then: " + situation.as_variable("trust_remote_code", "true")
            if is_code
            else error.message.partition(". ")[2] or "take a model that transformers knows",
        )


def shape(situation: Situation) -> Findings:
    """A configuration that no model can be built from, or that describes another one than the weights."""
    source = situation.source
    if source is None:
        return
    try:
        checkpoint.eos_token_ids(source.folder, source.config)
        checkpoint.default_sampling(source.folder)
        stored = {} if checkpoint.is_quantized(source.config) else stored_in(source)
    except ServeError as error:
        yield _of(error.message)
        return
    if why := misfit(source.folder, {name: tensor.shape for name, tensor in stored.items()}):
        yield Finding(
            "unusable-model",
            f"{source.model}: {why}",
            "The server would end with status 3, and the platform would start it again and again.",
            "take config.json and weights from the same place: download both again",
        )


def template(situation: Situation) -> Findings:
    """A chat template: none, or one that does what no template may."""
    from serve.chat.template import ChatTemplate  # noqa: PLC0415
    from serve.chat.tokenizer import HubTokenizer  # noqa: PLC0415

    if situation.source is None:
        return
    try:
        tokenizer = HubTokenizer(situation.source.tokenizer_folder)
    except ServeError as error:
        yield Finding("no-tokenizer", error.message, "The server would not start.", "download the model again")
        return
    own = situation.settings.chat_template
    try:
        text = own.read_text(encoding="utf-8") if own is not None else tokenizer.chat_template
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        mend = situation.as_variable("chat_template", "FILE.jinja")
        what = f"SERVE_CHAT_TEMPLATE={own} cannot be read: {why}"
        yield Finding("no-chat-template", what, "The server would not start.", mend)
        return
    if text is None:
        yield Finding(
            "no-chat-template",
            "the model has no chat template",
            "Every chat request would be answered with 400; only /v1/completions would work.",
            situation.as_variable("chat_template", "FILE.jinja"),
        )
    else:
        try:
            ChatTemplate(text, tokenizer.special_tokens).render([{"role": "user", "content": "Hello"}])
        except (ServeError, InvalidRequest) as error:
            yield Finding(
                "unsafe-chat-template",
                f"the chat template does not render a plain message: {error.message}",
                "Templates run in a sandbox, without access to Python; every chat request would be answered with 400.",
                situation.as_variable("chat_template", "FILE.jinja"),
            )


def adapter(situation: Situation) -> Findings:
    """A LoRA adapter that was not trained on this base."""
    source = situation.source
    if source is None or source.adapter_source is None:
        return
    try:
        base, changes = stored_in(source), stored_in(source.adapter_source)
    except ServeError as error:
        yield _of(error.message)
        return
    for name, tensor in changes.items():
        prefix, part, _ = name.partition(".lora_")
        target = prefix.removeprefix("base_model.model.")
        if not part:
            continue
        weight = base.get(f"{target}.weight")
        side = 1 if ".lora_A." in name else 0
        is_wrong = (
            weight is not None
            and len(tensor.shape) == len(weight.shape) == 2
            and (tensor.shape[side] != weight.shape[side])
        )
        if weight is None or is_wrong:
            shapes = "" if weight is None else f" of shape {tensor.shape} on {weight.shape}"
            yield Finding(
                "lora-base-mismatch",
                f"the adapter changes {target}{shapes}, which {source.model} does not have in that form",
                "Merging would fail after the base was downloaded and loaded.",
                "set base_model_name_or_path in adapter_config.json to the model that it was trained on",
            )
            return


def context(situation: Situation) -> Findings:
    """A context longer than the model's."""
    wanted = situation.settings.max_model_len
    own = checkpoint.longest_context(situation.source.config) if situation.source else None
    if wanted and own and wanted > own:
        yield Finding(
            "context-too-long",
            f"SERVE_MAX_MODEL_LEN={wanted} exceeds the model's context of {own} tokens",
            "The server would not start.",
            situation.as_variable("max_model_len", own),
        )


def packages(situation: Situation) -> Findings:
    """Packages that an adapter or a quantised checkpoint needs, where the model is to be loaded."""
    source, platform = situation.source, situation.platform
    if source is None:
        return
    has_gpu = {"runpod": True, "render": False, "modal": bool(situation.gpus)}.get(
        platform or "", shutil.which("nvidia-smi") is not None
    )
    try:
        wanted = list(checkpoint.quantization_packages(source.config, "cuda" if has_gpu else "cpu"))
    except ServeError as error:
        yield _of(error.message)
        return
    if platform == "modal":  # the deploy adds them to its image
        return
    if source.adapter_source is not None:
        wanted.append(("peft", "peft"))
    if platform is None:
        names = [pip for module, pip in wanted if importlib.util.find_spec(module.partition(".")[0]) is None]
    else:
        names = [pip for _, pip in wanted if pip not in _of_image(situation)]
    if names:
        where = "here" if platform is None else f"in the image (EXTRAS={_extras(situation)})"
        yield Finding(
            "missing-package",
            f"{situation.settings.model} needs {' and '.join(names)}, not installed {where}",
            "Loading would end with status 3; a platform would start it again and again.",
            f"pip install {' '.join(names)}" if platform is None else _mended_build(names),
        )


def _extras(situation: Situation) -> str:
    """Of the image's build: as told, else the Dockerfile's default."""
    if situation.extras is not None:
        return situation.extras
    try:
        found = re.search(r"^ARG EXTRAS=(.*)$", Path("Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        found = None
    return found[1].strip() if found else "engine"


def _of_image(situation: Situation) -> frozenset[str]:
    has_peft = "lora" in _extras(situation).split(",")
    return frozenset({"peft", "accelerate"}) if has_peft else frozenset[str]()  # peft brings accelerate


def _mended_build(names: list[str]) -> str:
    if set(names) <= {"peft", "accelerate"}:
        return "docker build --build-arg EXTRAS=engine,lora ..., and then tell it: --extras engine,lora"
    return (
        "build an image upon ours (FROM it, USER root, RUN pip install " + " ".join(names) + "), or take the checkpoint"
        " that this one was quantised from"
    )


CHECKS = (files, code, shape, template, adapter, packages, context)
