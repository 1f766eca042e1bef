"""The part of Render's REST API that a deploy needs.  Shapes as in Render's own client, version 1.5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx

from serve.errors import ConfigError, ServeError
from trimaran.platforms.render.service import GENERATED_KEY, ServiceSpec, create_body

API = "https://api.render.com/v1"
ENDED = frozenset({"live", "deactivated", "build_failed", "update_failed", "canceled", "pre_deploy_failed"})
"""States in which a deploy stays."""

LOG_PAGE = 100
"""Lines that Render gives at once."""

VARIABLES_PAGE = 100

Json = dict[str, Any]


class RenderApi:
    """One workspace's services.

    Args:
        key: The API key; it is sent and never shown.
        url: Another address than Render's, for tests.

    Every method raises :class:`ServeError` with Render's own words when it refuses.
    """

    def __init__(self, key: str, url: str = API) -> None:
        headers = {"authorization": f"Bearer {key}", "accept": "application/json"}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=30)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        try:
            response = self._client.request(method, path, json=body, params={k: v for k, v in query.items() if v})
        except httpx.HTTPError as error:
            raise ServeError(f"Render's API cannot be reached: {type(error).__name__}: {error}") from error
        if response.status_code == 401:
            raise ConfigError("Render refuses the API key: set RENDER_API_KEY to one from Account Settings > API Keys")
        if response.is_error:
            raise ServeError(f"Render answered {response.status_code} to {method} {path}: {_message(response)}")
        return response.json() if response.content else {}

    def owner(self, wanted: str | None = None) -> str:
        """The workspace's id: ``wanted``, or the only one that the key can see."""
        if wanted:
            return wanted
        owners = [entry["owner"] for entry in self._call("GET", "/owners", limit=20)]
        if len(owners) == 1:
            return str(owners[0]["id"])
        names = ", ".join(f"{owner['id']} ({owner['name']})" for owner in owners) or "none"
        raise ConfigError(f"name the workspace with --owner; this key sees: {names}")

    def find(self, name: str) -> Json | None:
        """The service of that name, if there is one."""
        entries = self._call("GET", "/services", name=name, limit=20)
        found = [entry["service"] for entry in entries if entry["service"]["name"] == name]
        return found[0] if found else None

    def get(self, name: str) -> Json:
        """The service of that name."""
        service = self.find(name)
        if service is None:
            raise ConfigError(f"there is no service named {name!r} that this key can see")
        return service

    def create(self, spec: ServiceSpec, owner: str) -> tuple[Json, str]:
        """A new service, and the id of its first deploy."""
        answer = self._call("POST", "/services", create_body(spec, owner))
        return answer["service"], str(answer["deployId"])

    def change(self, service_id: str, body: Json) -> None:
        """Change an existing service's image, source or size; the next deploy has it."""
        self._call("PATCH", f"/services/{service_id}", body)

    def variables(self, service_id: str) -> dict[str, str]:
        """A service's variables with their values, secrets too."""
        found: dict[str, str] = {}
        cursor = ""
        while True:
            page = self._call("GET", f"/services/{service_id}/env-vars", limit=VARIABLES_PAGE, cursor=cursor)
            found |= {entry["envVar"]["key"]: entry["envVar"]["value"] for entry in page}
            if len(page) < VARIABLES_PAGE:
                return found
            cursor = page[-1]["cursor"]

    def set_variable(self, service_id: str, key: str, value: str | None) -> None:
        """Give a variable its value, or remove it; the next deploy has it."""
        path = f"/services/{service_id}/env-vars/{key}"
        if value is None:
            self._call("DELETE", path)
        else:
            self._call("PUT", path, {"value": value})

    def start_deploy(self, service_id: str, image: str | None) -> str:
        """Deploy a service as it is configured; the deploy's id, empty where Render does not tell it."""
        body = {"imageUrl": image} if image else {}
        return str(self._call("POST", f"/services/{service_id}/deploys", body).get("id", ""))

    def delete(self, service_id: str) -> None:
        """Delete a service, with its disk and its variables."""
        self._call("DELETE", f"/services/{service_id}")

    def api_key(self, service: Json) -> str:
        """The server's own key, as Render generated it."""
        answer = self._call("GET", f"/services/{service['id']}/env-vars/{GENERATED_KEY}")
        return str(answer["value"])

    def deploy(self, service_id: str, deploy_id: str) -> Json:
        """One deploy."""
        return self._call("GET", f"/services/{service_id}/deploys/{deploy_id}")

    def deploys(self, service_id: str, limit: int = 20) -> list[Json]:
        """The latest deploys, newest first."""
        return [entry["deploy"] for entry in self._call("GET", f"/services/{service_id}/deploys", limit=limit)]

    def logs(self, service: Json, limit: int = LOG_PAGE) -> list[Json]:
        """The latest lines, oldest first: each with ``timestamp`` and ``message``."""
        lines: list[Json] = []
        window: dict[str, Any] = {}
        while True:
            page = self._log_page(service, "backward", min(limit - len(lines), LOG_PAGE), **window)
            lines += page["logs"]
            if len(lines) >= limit or not page["logs"] or not page.get("hasMore"):
                return list(reversed(lines))
            window = {"startTime": page["nextStartTime"], "endTime": page["nextEndTime"]}

    def logs_since(self, service: Json, moment: str) -> Iterator[Json]:
        """Lines from ``moment`` (a line's ``timestamp``; empty: an hour ago) on, oldest first."""
        window: dict[str, Any] = {"startTime": moment}
        while True:
            page = self._log_page(service, "forward", LOG_PAGE, **window)
            yield from page["logs"]
            if not page["logs"] or not page.get("hasMore"):
                return
            window = {"startTime": page["nextStartTime"], "endTime": page["nextEndTime"]}

    def _log_page(self, service: Json, direction: str, limit: int, **window: str) -> Json:
        query = {"ownerId": service["ownerId"], "resource": service["id"], "limit": limit, "direction": direction}
        return self._call("GET", "/logs", **query, **window)

    def rollback(self, service: Json, deploy_id: str | None = None) -> Json:
        """Return to an earlier deploy: the last one that was live, unless ``deploy_id`` names another."""
        if deploy_id is None:
            earlier = [deploy["id"] for deploy in self.deploys(service["id"]) if deploy["status"] == "deactivated"]
            if not earlier:
                raise ConfigError(f"{service['name']} has no earlier deploy that was live; nothing to return to")
            deploy_id = str(earlier[0])
        return self._call("POST", f"/services/{service['id']}/rollback", {"deployId": deploy_id})


def artifact(deploy: Json) -> str | None:
    """What a deploy runs: its image, with the digest where Render tells it, or its commit."""
    image: Json = deploy.get("image") or {}
    commit: Json = deploy.get("commit") or {}
    ref, sha = str(image.get("ref") or ""), str(image.get("sha") or "")
    if ref and sha and "@" not in ref:
        return f"{ref}@{sha if ':' in sha else f'sha256:{sha}'}"
    return ref or commit.get("id")


def address(service: Json) -> str:
    """Where a service is reached, as well as Render tells."""
    return str(service.get("serviceDetails", {}).get("url") or service.get("dashboardUrl") or service["id"])


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json().get("message"))
    except (ValueError, AttributeError):
        return response.text[:200]
