"""The part of RunPod's REST API v2 that a deploy needs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx

from serve.errors import ConfigError, ServeError
from trimaran.platforms.runpod.endpoint import FLASHBOOT_SUFFIX

API = "https://api.runpod.io"
RETRIES, MAX_WAIT_S = 3, 30.0
RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})

Json = dict[str, Any]


class RunpodApi:
    """One account's serverless endpoints.

    Args:
        key: The API key; it is sent and never shown.
        url: Another address than RunPod's, for tests.
        timeout_s: Seconds for each request.

    Every method raises :class:`ServeError` with RunPod's own words when it refuses.
    """

    def __init__(self, key: str, url: str = API, timeout_s: float = 30.0) -> None:
        headers = {"authorization": f"Bearer {key}", "accept": "application/json, application/problem+json"}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        for attempt in range(RETRIES + 1):
            try:
                response = self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                if method == "GET" and attempt < RETRIES:
                    time.sleep(0.1 * 2**attempt)
                    continue
                raise ServeError(f"RunPod's API did not answer: {type(error).__name__} at {method} {path}") from None
            # Only what was certainly not carried out, or may be carried out twice, is tried again.
            is_safe = method == "GET" or response.status_code == 429
            if response.status_code not in RETRIED_STATUSES or not is_safe or attempt == RETRIES:
                return _content(response, method, path)
            time.sleep(_wait_s(response, attempt))
        raise AssertionError("the last attempt returns")

    def find(self, name: str, endpoint_id: str | None = None) -> Json | None:
        """The endpoint of that name, if there is one; ``endpoint_id`` chooses among several.

        Raises:
            ConfigError: several have the name; RunPod does not keep names apart.
        """
        endpoints: list[Json] = self._call("GET", "/v2/serverless")["endpoints"]
        found = [endpoint for endpoint in endpoints if endpoint["name"].removesuffix(FLASHBOOT_SUFFIX) == name]
        if endpoint_id:
            found = [endpoint for endpoint in endpoints if endpoint["id"] == endpoint_id]
        if len(found) > 1:
            ids = ", ".join(endpoint["id"] for endpoint in found)
            raise ConfigError(f"{len(found)} endpoints are named {name!r}: choose one with --id; there are {ids}")
        return self._call("GET", f"/v2/serverless/{found[0]['id']}") if found else None

    def get(self, name: str, endpoint_id: str | None = None) -> Json:
        """The endpoint of that name."""
        endpoint = self.find(name, endpoint_id)
        if endpoint is None:
            raise ConfigError(f"there is no endpoint {endpoint_id or repr(name)} that this key can see")
        return endpoint

    def create(self, body: Json) -> Json:
        """A new endpoint."""
        return self._call("POST", "/v2/serverless", body)

    def update(self, endpoint_id: str, body: Json) -> Json:
        """Change an endpoint; ``env`` in the body replaces the whole environment."""
        return self._call("PATCH", f"/v2/serverless/{endpoint_id}", body)

    def delete(self, endpoint_id: str) -> None:
        """Delete an endpoint: its workers end, its jobs are cancelled."""
        self._call("DELETE", f"/v2/serverless/{endpoint_id}")

    def workers(self, endpoint_id: str) -> Json:
        """The active workers and their counts."""
        return self._call("GET", f"/v2/serverless/{endpoint_id}/workers")

    def releases(self, endpoint_id: str) -> list[Json]:
        """The configurations so far, newest first."""
        return self._call("GET", f"/v2/serverless/{endpoint_id}/releases")["releases"]

    def gpus(self) -> list[Json]:
        """The types of GPU for serverless workers, each with its pool and its price an hour."""
        return self._call("GET", "/v2/catalog/gpus?include=AVAILABILITY&product=SERVERLESS")["gpus"]

    def newest_version(self, endpoint_id: str) -> str | None:
        """The newest release's version; None where RunPod does not (yet) say."""
        try:
            releases = self.releases(endpoint_id)
        except ServeError:
            return None
        version = releases[0].get("version") if releases else None
        return None if version is None else str(version)

    def logs(
        self, endpoint_id: str, worker_id: str, tail: int, quiet_s: float | None, after: str = ""
    ) -> Iterator[Json]:
        """A worker's log lines, the last ``tail`` first, or those after the time ``after``.

        Ends when none came for ``quiet_s`` seconds; without that, when RunPod ends the stream.
        """
        path = f"/v2/serverless/{endpoint_id}/workers/{worker_id}/logs"
        headers = {"accept": "text/event-stream", **({"last-event-id": after} if after else {})}
        timeout = httpx.Timeout(30.0, read=quiet_s)
        try:
            with self._client.stream("GET", path, params={"tail": tail}, headers=headers, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    _content(response, "GET", path)
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        yield json.loads(line.removeprefix("data:"))
        except httpx.ReadTimeout:  # the stream stays open for lines that are still to come
            return
        except httpx.HTTPError as error:
            raise ServeError(f"the logs broke off: {type(error).__name__}") from None


def _wait_s(response: httpx.Response, attempt: int) -> float:
    try:
        return min(float(response.headers.get("retry-after", 0.5 * 2**attempt)), MAX_WAIT_S)
    except ValueError:  # a date
        return 1.0


def _content(response: httpx.Response, method: str, path: str) -> Any:
    if response.status_code == 401:
        raise ConfigError("RunPod refuses the API key: set RUNPOD_API_KEY to one from Settings > API Keys")
    if response.is_error:
        raise ServeError(f"RunPod answered {response.status_code} to {method} {path}: {_problem(response)}")
    if not response.content:
        return {}
    try:
        return response.json()
    except ValueError:
        raise ServeError(f"RunPod's answer to {method} {path} is not JSON; is the address right?") from None


def _problem(response: httpx.Response) -> str:
    """Title, detail and each wrong field, as RFC 9457's problem+json has them."""
    try:
        problem: Any = response.json()
        lines = [f"{problem['title']}: {problem['detail']}", *map(str, problem.get("errors") or [])]
        return "\n  ".join(lines)
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.text[:200] or response.reason_phrase
