"""The files of RunPod's Hub, made from the settings, so that they cannot drift: ``scripts/reference`` writes them.

Users of the Hub have nothing but environment variables, so every setting that means something there is listed.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from trimaran.platforms.runpod.endpoint import DEFAULTS, TORCH_CUDA

FOLDER = ".runpod"
LEFT_OUT = frozenset(
    {"host", "port", "api_keys", "api_keys_file", "allow_anonymous", "cors_origins", "model_folders", "log_format"}
    | {"oidc_issuer", "oidc_audience", "oidc_algorithms", "oidc_leeway_s"}
    | {"engine", "remote_url", "remote_api_key", "remote_timeout_s"}
)
"""Settings that mean nothing to a queue worker with a model: no port is opened, RunPod checks the key."""

SIMPLE = frozenset({"model", "model_revision", "max_model_len", "max_batch_size", "dtype"})
"""Shown at once; the others are under "advanced"."""

SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

HANDLER = '''\
"""RunPod's Hub looks for a handler here; the worker itself is deploy/runpod/handler.py.  Made by scripts/reference."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "deploy" / "runpod" / "handler.py"), run_name="__main__")
'''

SERVE_STAGE = "\n# Last, and so the default."
"""Where the Dockerfile's last stage begins; the Hub builds the last stage, and that must be RunPod's."""


def files(root: Path) -> dict[str, str]:
    """Every file by its path from the repository's root."""
    return {
        f"{FOLDER}/hub.json": _json(hub()),
        f"{FOLDER}/tests.json": _json(tests()),
        f"{FOLDER}/handler.py": HANDLER,
        f"{FOLDER}/Dockerfile": dockerfile((root / "Dockerfile").read_text(encoding="utf-8")),
    }


def dockerfile(text: str) -> str:
    """The image's Dockerfile without its last stage.

    Raises:
        ValueError: the stages are not in the order that this relies on.
    """
    before, found, _ = text.partition(SERVE_STAGE)
    if not found or "AS runpod" not in before:
        raise ValueError(f"the Dockerfile has no stage runpod before {SERVE_STAGE.strip()!r}")
    return f"# Made by scripts/reference from the Dockerfile: RunPod's Hub builds the last stage.\n{before}"


def hub() -> dict[str, Any]:
    """``hub.json``: what the Hub's form asks for."""
    return {
        "title": "Trimaran",
        "description": "Serve a Hugging Face language model over an OpenAI-compatible API, streamed and batched.",
        "type": "serverless",
        "category": "language",
        "config": {
            "runsOn": "GPU",
            "containerDiskInGb": DEFAULTS["disk_gb"],
            "gpuIds": ",".join(DEFAULTS["pools"]),
            "gpuCount": DEFAULTS["gpu_count"],
            "allowedCudaVersions": [TORCH_CUDA],
            "presets": [
                {"name": "SmolLM2 135M", "defaults": {"SERVE_MODEL": SMALL_MODEL}},
                {"name": "Qwen3 4B", "defaults": {"SERVE_MODEL": "Qwen/Qwen3-4B"}},
            ],
            "env": [{"key": "SERVE_RUNPOD_MODE", "value": "queue"}, *_inputs(), _token()],
        },
    }


def tests() -> dict[str, Any]:
    """``tests.json``: what the Hub runs against a new release."""
    message = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": SMALL_MODEL, "messages": message, "max_tokens": 16}
    inputs: dict[str, Any] = {
        "chat": {"openai_route": "/v1/chat/completions", "openai_input": body},
        "stream": {"openai_route": "/v1/chat/completions", "openai_input": {**body, "stream": True}},
        "native": {"messages": message, "sampling_params": {"max_tokens": 16}},
        "models": {"openai_route": "/v1/models"},
    }
    return {
        "tests": [{"name": name, "input": job_input, "timeout": 60_000} for name, job_input in inputs.items()],
        "config": {
            "gpuTypeId": "NVIDIA GeForce RTX 4090",
            "gpuCount": 1,
            "env": [{"key": "SERVE_MODEL", "value": SMALL_MODEL}, {"key": "SERVE_RUNPOD_MODE", "value": "queue"}],
            "allowedCudaVersions": [TORCH_CUDA],
        },
    }


def _inputs() -> list[dict[str, Any]]:
    from serve.settings import PREFIX, Settings  # noqa: PLC0415

    entries: list[dict[str, Any]] = []
    for name, field in Settings.model_fields.items():
        if name in LEFT_OUT:
            continue
        kind, options = _kind(name, field.annotation)
        words = name.replace("_", " ")
        given: dict[str, Any] = {"name": words[:1].upper() + words[1:], "type": kind, "description": field.description}
        if options:
            given["options"] = [{"label": option, "value": option} for option in options]
        if field.default not in (None, "", ()):
            given["default"] = field.default.value if isinstance(field.default, Enum) else field.default
        entries.append(
            {
                "key": f"{PREFIX}{name.upper()}",
                "input": {**given, "required": name == "model", "advanced": name not in SIMPLE},
            }
        )
    return entries


def _kind(name: str, annotation: Any) -> tuple[str, list[str]]:
    if name == "model":
        return "huggingface", []
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] if _is_union(annotation) else [annotation]
    kind = kinds[0]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "string", [str(member.value) for member in kind]
    return "boolean" if kind is bool else "number" if kind in (int, float) else "string", []


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, UnionType)


def _token() -> dict[str, Any]:
    words = "For gated and private models. Better a RunPod secret: {{ RUNPOD_SECRET_hf }}."
    given = {"name": "Hugging Face token", "type": "string", "description": words, "required": False, "advanced": False}
    return {"key": "HF_TOKEN", "input": given}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
