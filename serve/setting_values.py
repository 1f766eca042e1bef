"""The words that some settings may take."""

from __future__ import annotations

from enum import StrEnum


class EngineName(StrEnum):
    """Which engine answers."""

    TRANSFORMERS = "transformers"
    ECHO = "echo"
    REMOTE = "remote"


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class Dtype(StrEnum):
    """The model's number format."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class ToolParser(StrEnum):
    """Which family's tool calls the model writes; ``auto`` reads it off the chat template."""

    AUTO = "auto"
    NONE = "none"
    HERMES = "hermes"
    LLAMA = "llama"
    MISTRAL = "mistral"
    DEEPSEEK = "deepseek"
    KIMI = "kimi"
    KIMI_K3 = "kimi_k3"
    GEMMA = "gemma"
    HARMONY = "harmony"


class ToolPrompt(StrEnum):
    """How tools reach a model whose chat template knows none."""

    NONE = "none"
    GENERIC = "generic"


class LogFormat(StrEnum):
    """How log lines look; ``auto`` is text on a terminal and JSON elsewhere."""

    AUTO = "auto"
    TEXT = "text"
    JSON = "json"
