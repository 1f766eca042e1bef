"""Checks of what is refused: keys on every route, wrong parameters, wrong paths."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from trimaran.verify.outcome import Outcome, failed, passed, skipped
from trimaran.verify.target import COMPLETIONS, Target, error_defect

if TYPE_CHECKING:
    import httpx2 as httpx

OPEN_PATHS = {"/", "/health", "/ready", "/ping"}
"""Health for the platform, and a static page without data."""
KNOWN_ROUTES = [
    *(("GET", path) for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/docs")),
    *(("POST", path) for path in (COMPLETIONS, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize")),
    ("POST", "/v1/embeddings"),
    ("GET", "//v1/models"),
    ("GET", "/v1%2fmodels"),
]


def routes(target: Target) -> list[tuple[str, str]]:
    """Those that the server's own document lists, and those that servers of this kind have."""
    found = list(KNOWN_ROUTES)
    answer = target.ask("GET", "/openapi.json")
    if answer.status_code == 200 and "json" in answer.headers.get("content-type", ""):
        for path, methods in answer.json().get("paths", {}).items():
            plain = re.sub(r"\{[^}]*\}", "x", path)
            found += [(method.upper(), plain) for method in methods if method in ("get", "post", "delete")]
    return [route for route in dict.fromkeys(found) if route[1] not in OPEN_PATHS]


def check_keys(target: Target) -> Outcome:
    """No route answers without the key, or with a wrong one."""
    name = "keys"
    if not target.key:
        return skipped(name, "no key was given (--key, or SERVE_API_KEYS), so none was tried")
    asked, opened = routes(target), list[str]()
    for method, path in asked:
        for said, key in (("no key", ""), ("a wrong key", target.key + "x")):
            answer = target.ask(method, path, key=key, json={} if method == "POST" else None)
            # 404 and 405 tell nothing away; 3xx would have been followed.
            if answer.status_code not in (401, 403, 404, 405):
                opened.append(f"{method} {path} with {said}: {answer.status_code}")
    if opened:
        return failed(name, f"answered without the right key: {'; '.join(opened[:4])}", routes=opened)
    if target.edge:
        return passed(name, f"{len(asked)} routes refuse no key and a wrong key, by {target.edge} in front")
    refused = target.ask("GET", "/v1/models", key="")
    if defect := error_defect(refused):
        return failed(name, f"a request without a key is refused, but {defect}")
    return passed(name, f"{len(asked)} routes refuse no key and a wrong key")


WRONG: dict[str, tuple[dict[str, Any], int]] = {
    "temperature -1": ({"temperature": -1}, 400),
    "max_tokens -5": ({"max_tokens": -5}, 400),
    "top_p 7": ({"top_p": 7}, 400),
    "n 100000000": ({"n": 100_000_000}, 400),
    "no messages": ({"messages": []}, 400),
    "an unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400),
    "an unknown model": ({"model": "verify/no-such-model"}, 404),
}


def check_parameters(target: Target) -> Outcome:
    """Wrong requests are refused with the right status and a readable error, and the next one is answered."""
    name, wrong = "parameters", list[str]()
    tried = [(said, target.ask("POST", COMPLETIONS, json=target.chat("x", 1) | fields), status)
             for said, (fields, status) in WRONG.items()]  # fmt: skip
    headers = {"content-type": "application/json"}
    tried += [
        ("malformed JSON", target.ask("POST", COMPLETIONS, content=b'{"model": ', headers=headers), 400),
        ("an unknown path", target.ask("GET", "/v1/verify-no-such-path"), 404),
        ("a wrong method", target.ask("GET", COMPLETIONS), 405),
    ]
    for said, answer, status in tried:
        if target.is_queue:  # a failed job's status is the queue's choice
            if answer.status_code < 400 and not _has_error(answer):
                wrong.append(f"{said}: {answer.status_code} instead of an error")
        elif answer.status_code != status and not (status == 400 and answer.status_code == 422):
            wrong.append(f"{said}: {answer.status_code} instead of {status}")
        elif defect := error_defect(answer):
            wrong.append(f"{said}: {defect}")
    after = target.ask("POST", COMPLETIONS, json=target.chat("x", 1))
    if after.status_code != 200:
        wrong.append(f"a good request after them: {after.status_code}")
    if wrong:
        return failed(name, "; ".join(wrong), wrong=wrong)
    return passed(name, f"{len(tried)} wrong requests are refused, the next good one is answered")


def _has_error(answer: httpx.Response) -> bool:
    try:
        return bool(answer.json().get("error"))
    except (ValueError, AttributeError):
        return False
