"""Every knob of the container, in one class, read from the environment.

Precedence: argument > environment > ``.env`` > ``trimaran.toml`` > default.  Read only by the composition roots
(``serve.__main__``, ``serve.api.app``, the adapters under ``deploy/``); everything deeper gets plain values.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from serve.engine.base import EngineConfig
from serve.limits import Allowance
from serve.setting_file import FileSource
from serve.setting_values import (
    Device,
    Dtype,
    EngineName,
    ImageInput,
    LogFormat,
    ToolParser,
    ToolPrompt,
    cache_if_any,
    check_sharing,
    is_loopback,
    name_of,
    no_address,
    only_origins,
    variables,
    with_mounted_model,
    wrong_values,
)

PREFIX = "SERVE_"


class Settings(BaseSettings):
    """The container's configuration.  Frozen: resolved once, then only read."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    model: str = Field("", description="Model to serve: a local folder or a Hugging Face id such as Qwen/Qwen3-4B.")
    model_folders: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="Folders, separated by commas, where platforms mount a model: the first that has one is served"
        " when SERVE_MODEL is not set.",
    )
    model_revision: str | None = Field(None, description="Commit, tag or branch of a Hugging Face model.")
    model_name: str = Field("", description="The model's id in the API. Default: the id, or the folder's name.")
    chat_template: Path | None = Field(None, description="Jinja file that replaces the model's own chat template.")
    embedding_model: str = Field("", description="Second model, for /v1/embeddings: a folder or a Hugging Face id.")
    embedding_revision: str | None = Field(None, description="Commit, tag or branch of the embedding model.")
    embedding_model_name: str = Field("", description="Its id in the API. Default: the id, or the folder's name.")
    fold_messages: bool = Field(
        False,
        description="When the chat template refuses them, fold system messages into the user's and join neighbours "
        "of one role, instead of 400.",
    )
    allow_control_tokens: bool = Field(
        False, description="Obey control tokens such as <|im_end|> that callers write in messages; else they are text."
    )
    tool_parser: ToolParser = Field(
        ToolParser.AUTO,
        description="Family of the model's tool calls: hermes (Qwen and GLM too), llama, mistral, deepseek, kimi, "
        "kimi_k3, gemma, harmony, or none. auto: read off the chat template.",
    )
    tool_prompt: ToolPrompt = Field(
        ToolPrompt.NONE,
        description="generic: explain tools in a system message to a model whose chat template knows none. none: 400.",
    )
    image_input: ImageInput = Field(
        ImageInput.REFUSE,
        description="An image in a message: refuse is 400; note puts a text in its place that the model cannot see it.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    engine: EngineName = Field(EngineName.TRANSFORMERS, description="transformers; echo (no model); remote (gateway).")
    device: Device = Field(Device.AUTO, description="auto: CUDA when there is a usable GPU, else CPU.")
    dtype: Dtype = Field(Dtype.AUTO, description="auto: bfloat16 where the device has it, else what it can do.")
    cache_dir: Path | None = Field(
        None, description="Folder for what later starts use again. Default: trimaran in the user's cache folder."
    )
    cuda_graphs: bool = Field(True, description="Decode through CUDA graphs where the model allows it.")
    overlap_steps: bool = Field(True, description="On a GPU, launch each step before the last one was read.")
    itl_target_ms: int = Field(
        200, ge=1, le=60_000, description="Gap in running streams, in ms, that prompts may make."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads. Default: the container's CPU quota.")

    remote_url: str = Field(
        "",
        description="With SERVE_ENGINE=remote: the OpenAI-compatible server to pass requests on to, or RunPod's queue "
        "as https://api.runpod.ai/v2/ENDPOINT.",
    )
    remote_api_key: SecretStr | None = Field(None, description="The key that the gateway sends to SERVE_REMOTE_URL.")
    remote_timeout_s: float = Field(600.0, gt=0, le=86400, description="Seconds that the remote may stay silent.")

    host: str = Field("127.0.0.1", description="Address to bind. Beyond loopback, keys are needed.")
    port: Annotated[int, BeforeValidator(no_address)] = Field(
        8000,
        ge=0,
        le=65535,
        description="Port to bind; PORT is honoured too.",
        validation_alias=AliasChoices("SERVE_PORT", "PORT"),
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field((), description="Accepted keys, or sha256: hashes.")
    api_keys_file: Path | None = Field(None, description="File of `trimaran keys`; read again whenever it changes.")
    oidc_issuer: str = Field(
        "", description="OpenID Connect issuer whose JWTs are accepted too: https://... Needs the extra oidc."
    )
    oidc_audience: str = Field("", description="What a JWT must be for (aud).")
    oidc_algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        ("RS256", "ES256"), description="Signatures of JWTs that count, separated by commas."
    )
    oidc_leeway_s: float = Field(30.0, ge=0, le=600, description="Seconds by which the issuer's clock may differ.")
    cors_origins: Annotated[tuple[str, ...], NoDecode, AfterValidator(only_origins)] = Field(
        (), description="Web pages that may read answers: origins such as https://app.example, by commas, or *."
    )
    allow_anonymous: bool = Field(False, description="Answer requests without a key on a public address.")

    max_batch_size: int | None = Field(
        None, ge=1, le=1024, description="Requests that run at once. Default: what fits."
    )
    max_model_len: int | None = Field(
        None, ge=16, description="Tokens of prompt and completion together. Default: the model's, at most 8192."
    )
    strict: bool = Field(False, description="Refuse unknown request fields with 400 instead of ignoring them.")
    max_queue: int = Field(64, ge=0, le=100_000, description="Requests that may wait for a slot; more get 429.")
    limit_requests_per_minute: int | None = Field(None, ge=1, description="Requests that each caller may send.")
    limit_tokens_per_minute: int | None = Field(None, ge=1, description="Prompt and completion tokens of each caller.")
    limit_tokens_per_day: int | None = Field(None, ge=1, description="The same for a day, which begins at 0:00 UTC.")
    limit_usd_per_day: float | None = Field(
        None, gt=0, description="Dollars of machine time of each caller, by SERVE_USD_PER_HOUR, from 0:00 UTC on."
    )
    limit_concurrency: int | None = Field(None, ge=1, description="Requests that each caller may have running at once.")
    limits_shared: bool = Field(False, description="Share limits among replicas, in SERVE_RECORDS_URL's PostgreSQL.")
    stored_responses: int = Field(1000, ge=0, le=10**6, description="Responses kept for each key; 0 keeps none.")
    stored_response_bytes: int = Field(64 * 2**20, ge=0, description="Bytes of them for each key; the oldest go first.")
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="Largest request body in bytes; more gets 413.")
    load_wait_s: float = Field(100.0, ge=0, le=3600, description="Seconds an early request waits for the model.")
    request_deadline_s: float | None = Field(
        None, gt=0, le=86400, description="Seconds that a request may take in all; what still runs then ends with 504."
    )
    keep_alive_s: float = Field(10.0, gt=0, le=3600, description="Seconds between comments until the first token.")
    stream_writes_per_s: int | None = Field(
        None, ge=1, description="Writes to all streams together; faster tokens share one. Default: no limit."
    )
    step_timeout_s: float = Field(
        300.0, gt=0, le=86400, description="Seconds after which a step of the engine hangs: the process ends with 70."
    )
    drain_timeout_s: float = Field(25.0, ge=0, le=3600, description="Seconds that running requests get on SIGTERM.")
    records_url: SecretStr | None = Field(
        None,
        description="Database of usage records: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME. Needs the "
        "extra records. Default: only the log has them.",
    )
    records_buffer: int = Field(10_000, ge=1, le=10**7, description="Records that wait while the database is away.")
    usd_per_hour: float | None = Field(None, gt=0, le=10_000, description="Price of this machine, for estimated costs.")
    traces_url: str = Field("", description="OpenTelemetry collector, http://HOST:4318/v1/traces. Needs extra traces.")
    log_format: LogFormat = Field(LogFormat.AUTO, description="auto, text or json.")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error.")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Argument, environment, ``.env``, ``trimaran.toml``, default."""
        return (*sources, *named.values(), FileSource(settings_cls))

    @model_validator(mode="before")
    @classmethod
    def _find_mounted_model(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_mounted_model(values)

    @field_validator("api_keys", "model_folders", "cors_origins", "oidc_algorithms", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(item for part in value.split(",") if (item := part.strip()))
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine is EngineName.TRANSFORMERS and not self.model:
            raise ValueError("SERVE_MODEL is not set: name a model folder or a Hugging Face id (or SERVE_ENGINE=echo)")
        if self.engine is EngineName.REMOTE and not self.remote_url.startswith(("http://", "https://")):
            raise ValueError("SERVE_ENGINE=remote needs SERVE_REMOTE_URL: the address of a server, https://...")
        if not (self.knows_callers or self.allow_anonymous or is_loopback(self.host)):
            raise ValueError(
                f"SERVE_HOST={self.host} is reachable from other machines: "
                "set SERVE_API_KEYS, or SERVE_ALLOW_ANONYMOUS=true to answer everyone"
            )
        if self.embedding_name and self.embedding_name == self.served_name:
            raise ValueError(f"both models are called {self.served_name}: set SERVE_MODEL_NAME")
        if self.limit_usd_per_day is not None and self.usd_per_hour is None:
            raise ValueError("SERVE_LIMIT_USD_PER_DAY needs the machine's price: set SERVE_USD_PER_HOUR")
        if self.limits_shared:
            check_sharing(self.records_url)
        return self

    @property
    def knows_callers(self) -> bool:
        """Whether a request must show a key or a token."""
        return bool(self.api_keys or self.api_keys_file or self.oidc_issuer)

    @cached_property
    def served_name(self) -> str:
        """The model's id in the API."""
        if self.model_name:
            return self.model_name
        if self.engine is not EngineName.TRANSFORMERS and not self.model:
            return self.engine.value
        return name_of(self.model)

    @cached_property
    def embedding_name(self) -> str:
        """The embedding model's id in the API; empty: there is none."""
        return (self.embedding_model_name or name_of(self.embedding_model)) if self.embedding_model else ""

    def environment(self) -> tuple[dict[str, str], dict[str, str]]:
        """What was set, as variables for a container: the public ones, and the secret ones."""
        return variables(self, PREFIX)

    @property
    def patience_s(self) -> float:
        """Seconds that an early request waits for the model."""
        return min(self.load_wait_s, self.request_deadline_s or self.load_wait_s)

    @property
    def loaded_from(self) -> tuple[object, ...]:
        """Everything that decides which model is in memory, and how."""
        return self.model, self.model_revision, self.chat_template, self.engine, self.engine_config()

    def allowance(self) -> Allowance:
        """What each caller may use."""
        return Allowance(
            requests_per_minute=self.limit_requests_per_minute,
            tokens_per_minute=self.limit_tokens_per_minute,
            tokens_per_day=self.limit_tokens_per_day,
            usd_per_day=self.limit_usd_per_day,
            concurrency=self.limit_concurrency,
        )

    def engine_config(self) -> EngineConfig:
        """The settings that concern the engine, as plain values."""
        return EngineConfig(
            device=self.device.value,
            dtype=self.dtype.value,
            max_batch_size=self.max_batch_size,
            max_model_len=self.max_model_len,
            max_queue=self.max_queue,
            itl_target_s=self.itl_target_ms / 1000,
            num_threads=self.threads,
            trust_remote_code=self.trust_remote_code,
            cache_dir=self.cache_dir or cache_if_any(),
            cuda_graphs=self.cuda_graphs,
            overlap=None if self.overlap_steps else False,
        )


def load_settings(**overrides: Any) -> Settings:
    """Read the environment; ``overrides`` win.

    Raises:
        ConfigError: names every wrong variable, its value (secrets left out) and the remedy.
    """
    try:
        return Settings(**overrides)
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise wrong_values(error, Settings) from None


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """One warning for each ``SERVE_*`` variable that no setting has, with the nearest name.

    Only warnings: platforms inject names of their own (``SERVE_SERVICE_HOST``).
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    warnings: list[str] = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known and not name.startswith(("SERVE_MODAL_", "SERVE_RUNPOD_")):
            near = difflib.get_close_matches(name, known, n=1)
            warnings.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else " and is ignored"))
    return warnings
