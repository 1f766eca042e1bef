"""Models from the Hub: the real huggingface_hub client against a small stand-in for the Hub on loopback.

The client reads its endpoint and cache folder at import, so it runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import adapter_files, model_files, safetensors, sharded_files
from fake_hub import NEW, OLD, Hub, serving_hub

ROOT = Path(__file__).parents[2]
CLIENT = """
import json, logging, sys
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
from serve.errors import ServeError
from serve.weights import fetch_weights, locate
try:
    source = locate(sys.argv[1], sys.argv[2] or None)
    first = sorted(path.name for path in source.folder.iterdir())
    done = fetch_weights(source)
    result = {"origin": source.origin, "revision": done.revision, "folder": str(done.folder), "first": first,
              "num_bytes": done.num_bytes, "files": sorted(path.name for path in done.folder.iterdir()),
              "adapter": str(done.adapter)}
except ServeError as error:
    result = {"error": error.message, "kind": type(error).__name__}
result["heavy"] = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps(result))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_hub() as hub:
        yield hub


class Client:
    """Runs both stages in a process of its own, with one cache for all calls."""

    def __init__(self, hub: Hub, cache: Path) -> None:
        self.cache = cache
        self.env = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1",
        }
        self.log = ""

    def load(self, model: str, revision: str = "", **env: str) -> dict[str, Any]:
        command = [sys.executable, "-c", CLIENT, model, revision]
        done = subprocess.run(command, cwd=ROOT, env={**self.env, **env}, capture_output=True, text=True, check=True)
        self.log = done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "cache")


def weights_requested(hub: Hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("GET") and request.endswith(".safetensors")]


def test_download_brings_small_files_first_and_only_what_is_needed(hub: Hub, client: Client) -> None:
    unwanted = {"README.md": b"x", "pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "code.py": b"x"}
    hub.publish("owner/tiny", sharded_files() | unwanted)
    result = client.load("owner/tiny")
    small = {name for name in sharded_files() if not name.endswith(".safetensors")}
    assert set(result["first"]) == small
    assert set(result["files"]) == set(sharded_files())
    assert (result["origin"], result["revision"], result["heavy"]) == ("hub", NEW, [])
    assert result["num_bytes"] == sum(len(d) for name, d in sharded_files().items() if name.endswith(".safetensors"))
    assert "owner/tiny: hub" in client.log


def test_complete_cache_is_used_again(hub: Hub, client: Client) -> None:
    hub.publish("owner/tiny", model_files())
    first = client.load("owner/tiny")
    hub.requests.clear()

    assert client.load("owner/tiny")["origin"] == "cache"
    assert not weights_requested(hub)
    hub.requests.clear()
    assert client.load("owner/tiny", HF_HUB_OFFLINE="1")["folder"] == first["folder"]
    assert client.load("owner/tiny", NEW)["folder"] == first["folder"]
    assert not hub.requests


@pytest.mark.parametrize("refusal", [(401, "RepoNotFound"), (403, "GatedRepo"), (404, "RepoNotFound"), (400, "")])
def test_complete_cache_stands_in_for_the_hub_with_a_warning(
    hub: Hub, client: Client, refusal: tuple[int, str]
) -> None:
    hub.publish("owner/tiny", model_files())
    client.load("owner/tiny")
    hub.refusal = refusal
    assert client.load("owner/tiny")["origin"] == "cache"
    assert "WARNING" in client.log
    assert "Using the complete copy in the cache" in client.log


def test_unreachable_hub_is_named_unless_the_cache_is_complete(hub: Hub, client: Client) -> None:
    hub.publish("owner/tiny", model_files())
    nowhere = "http://127.0.0.1:9"
    message = client.load("owner/tiny", HF_ENDPOINT=nowhere)["error"]
    assert message.startswith(f"The Hub at {nowhere} cannot be reached for owner/tiny")
    client.load("owner/tiny")
    assert client.load("owner/tiny", HF_ENDPOINT=nowhere)["origin"] == "cache"


def test_offline_without_a_copy_is_refused(hub: Hub, client: Client) -> None:
    message = client.load("owner/tiny", HF_HUB_OFFLINE="1")["error"]
    assert "owner/tiny cannot be used from the cache" in message
    assert "has no complete copy" in message
    assert "HF_HUB_OFFLINE" in message
    assert not hub.requests


def test_revision_pins_the_commit(hub: Hub, client: Client) -> None:
    hub.publish("owner/tiny", model_files(version=1), OLD)
    hub.publish("owner/tiny", model_files(version=2), NEW)
    assert client.load("owner/tiny", OLD)["revision"] == OLD
    assert client.load("owner/tiny")["revision"] == NEW
    assert client.load("owner/tiny", OLD, HF_HUB_OFFLINE="1")["revision"] == OLD
    assert client.load("owner/tiny", HF_HUB_OFFLINE="1")["revision"] == NEW


def test_new_commit_is_followed_where_the_hub_answers(hub: Hub, client: Client) -> None:
    hub.publish("owner/tiny", model_files(version=1), OLD)
    assert client.load("owner/tiny")["revision"] == OLD
    hub.publish("owner/tiny", model_files(version=2), NEW)
    assert client.load("owner/tiny")["revision"] == NEW


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo"), "owner/tiny is gated: accept its licence at .*/owner/tiny and set HF_TOKEN"),
        ((401, "RepoNotFound"), "owner/tiny was not found: looked for a folder .*set HF_TOKEN"),
        ((403, ""), r"refused owner/tiny \(403\): set HF_TOKEN"),
        ((404, "RepoNotFound"), "owner/tiny was not found: .*Check the name"),
        ((404, "RevisionNotFound"), "owner/tiny has no revision 'v9'. Set SERVE_MODEL_REVISION"),
        ((418, ""), "The Hub answered 418 for owner/tiny: try again later"),
    ],
)
def test_refusal_of_the_hub_names_the_remedy(hub: Hub, client: Client, refusal: tuple[int, str], message: str) -> None:
    hub.refusal = refusal
    result = client.load("owner/tiny", "v9")
    assert result["kind"] == "ModelLoadError"
    assert re.search(message, result["error"]), result["error"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.gguf": b"GGUF"}, "owner/tiny holds GGUF files"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "owner/tiny has only pickle weights"),
        ({"config.json": b"{}", "model.bin": b"x"}, "spaces/safetensors/convert"),
        ({"config.json": b"{}"}, "owner/tiny has no weights"),
        ({"model.safetensors": b"x"}, "owner/tiny has no config.json"),
    ],
)
def test_repository_is_refused_before_any_weights_come(
    hub: Hub, client: Client, files: dict[str, bytes], message: str
) -> None:
    hub.publish("owner/tiny", files)
    assert message in client.load("owner/tiny")["error"]
    assert not [request for request in hub.requests if request.endswith((".bin", ".safetensors", ".gguf"))]


def test_interrupted_download_is_never_used(hub: Hub, client: Client) -> None:
    files = model_files() | {"model.safetensors": safetensors({"a": bytes(200_000)})}
    hub.publish("owner/tiny", files)
    hub.cut_after = 50_000
    assert "error" in client.load("owner/tiny")
    assert not list(client.cache.rglob("snapshots/*/model.safetensors"))
    assert "error" in client.load("owner/tiny", HF_HUB_OFFLINE="1")

    hub.cut_after = None
    assert client.load("owner/tiny")["num_bytes"] == len(files["model.safetensors"])


def test_truncated_cache_is_refused_with_the_file_to_delete(hub: Hub, client: Client) -> None:
    hub.publish("owner/tiny", model_files())
    blob = (Path(client.load("owner/tiny")["folder"]) / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    assert "it is cut short" in (message := client.load("owner/tiny")["error"])
    assert f"Delete {blob}" in message


def test_adapter_and_base_come_from_the_hub(hub: Hub, client: Client) -> None:
    hub.publish("owner/base", model_files(version=1), OLD)
    hub.publish("owner/base", model_files(version=2), NEW)
    hub.publish("owner/adapter", adapter_files("owner/base", revision=OLD))
    result = client.load("owner/adapter")
    assert result["revision"] == OLD
    assert "models--owner--base" in result["folder"]
    assert "models--owner--adapter" in result["adapter"]
    assert (Path(result["adapter"]) / "adapter_model.safetensors").exists()


def test_adapter_with_a_missing_base_names_both(hub: Hub, client: Client) -> None:
    hub.publish("owner/adapter", adapter_files("owner/base"))
    assert "whose base model owner/base cannot be used. owner/base was not" in client.load("owner/adapter")["error"]
