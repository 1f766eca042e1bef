"""JWTs of an issuer on loopback: which open the server, what for, and what happens while the issuer is away."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import jwt
import pytest
import support
from cryptography.hazmat.primitives import serialization
from issuer import AUDIENCE, Issuer, serving_issuer
from support import chat, eventually, openai_error, serving

from serve import oidc
from serve.errors import ConfigError

COMPLETIONS = "/v1/chat/completions"
KEY = "sk-key"


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with serving_issuer() as found:
        found.exchange("one", "ec-two")
        yield found


@pytest.fixture(scope="module")
def served(issuer: Issuer) -> Iterator[support.Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oidc, "REFETCH_S", 0.0)
        with serving(oidc_issuer=issuer.url, oidc_audience=AUDIENCE, api_keys=KEY) as served:
            yield served


@pytest.fixture(scope="module")
def client(served: support.Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url) as client:
        yield client


def status(client: httpx.Client, token: str, path: str = "/v1/models") -> int:
    return client.get(path, headers={"authorization": f"Bearer {token}"}).status_code


def test_token_opens_what_its_scopes_name(issuer: Issuer, client: httpx.Client) -> None:
    for claims, statuses in [
        ({}, (200, 403, 200)),
        ({"scope": "admin"}, (403, 200, 200)),
        ({"scope": None, "scp": ["admin", "inference", 5]}, (200, 200, 200)),
        ({"scope": "Inference inferences"}, (403, 403, 200)),
        ({"scope": 5}, (403, 403, 200)),
        ({"aud": ["other", AUDIENCE]}, (200, 403, 200)),
    ]:
        token = issuer.token(**claims)
        found = tuple(status(client, token, path) for path in ("/v1/models", "/metrics", "/version"))
        assert found == statuses, claims
    assert status(client, issuer.token("ec-two")) == 200
    assert status(client, KEY, "/metrics") == 200
    answer = client.post(COMPLETIONS, json=chat("a"), headers={"x-api-key": issuer.token()})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"aud": "other"}, "audience"),
        ({"aud": None}, "aud"),
        ({"iss": "https://other"}, "issuer"),
        ({"iss": None}, "iss"),
        ({"exp": time.time() - 31}, "expired"),
        ({"exp": None}, "exp"),
        ({"nbf": time.time() + 600}, "not yet valid"),
        ({"sub": None}, "sub"),
        ({"sub": 5}, "subject"),
    ],
)
def test_token_with_a_wrong_claim_is_refused_with_the_reason(
    issuer: Issuer, client: httpx.Client, claims: dict[str, Any], words: str
) -> None:
    token = issuer.token(**claims)
    answer = client.get("/v1/models", headers={"authorization": f"Bearer {token}"})
    error = openai_error(answer.json())
    assert (answer.status_code, error["code"]) == (401, "invalid_api_key")
    assert words in error["message"].lower()
    assert token not in answer.text


def test_token_is_good_within_the_difference_of_clocks(issuer: Issuer, client: httpx.Client) -> None:
    assert status(client, issuer.token(exp=time.time() - 20)) == 200
    assert status(client, issuer.token(nbf=time.time() + 20)) == 200


def forged(issuer: Issuer) -> dict[str, str]:
    """Tokens that nobody signed who may."""
    good = issuer.token()
    head, body, signature = good.split(".")
    public = issuer.private["one"][1].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def part_of(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    def part(value: dict[str, Any]) -> str:
        return part_of(json.dumps(value).encode())

    hs_head = part({"alg": "HS256", "kid": "one"})
    hs_key = base64.urlsafe_b64encode(jwt.get_algorithm_by_name("HS256").sign(f"{hs_head}.{body}".encode(), pem))
    endless = part_of(b'{"a":' + b"[" * 5000)
    stranger = Issuer(1)
    claims: dict[str, Any] = jwt.decode(good, options={"verify_signature": False})
    return {
        "no signature": f"{head}.{body}.",
        "alg none": f"{part({'alg': 'none', 'kid': 'one'})}.{body}.",
        "the public key as a password": f"{hs_head}.{body}.{hs_key.rstrip(b'=').decode()}",
        "another's key": stranger.token(iss=issuer.url),
        "another's key in the header": stranger.token(iss=issuer.url, headers={"jwk": {}, "jku": "http://127.0.0.1:9"}),
        "changed": f"{head}.{part({**claims, 'scope': 'admin'})}.{signature}",
        "unknown kid": issuer.token(headers={"kid": "three"}),
        "symmetric kid": issuer.token(headers={"kid": "hmac"}),
        "kid of another kind of key": issuer.token(headers={"kid": "ec-two"}),
        "no kid, two keys": issuer.token(headers={"kid": None}),
        "not pinned": jwt.encode({"sub": "a"}, issuer.private["one"][1], "PS256", {"kid": "one"}),
        "unknown critical": issuer.token(headers={"crit": ["x"], "x": 1}),
        "nested without end": f"{endless}.{body}.{signature}",
        "infinite": issuer.token(exp=float("inf")),
        "rubbish": "eyJh.eyJh.x",
        "long": "eyJ" + "a" * 20_000 + ".a.a",
    }  # fmt: skip


def test_token_that_is_forged_is_refused(issuer: Issuer, client: httpx.Client) -> None:
    for kind, token in forged(issuer).items():
        assert status(client, token) == 401, kind
    assert status(client, issuer.token()) == 200


def test_token_of_a_new_key_is_good_and_of_an_old_one_is_not(issuer: Issuer, client: httpx.Client) -> None:
    old = issuer.token()
    assert status(client, old) == 200
    issuer.exchange("one", "ec-two", "three")
    assert status(client, issuer.token("three")) == 200
    assert status(client, old) == 401


def test_issuer_that_is_away_stops_nobody_whose_key_is_known(
    issuer: Issuer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status(client, issuer.token()) == 200
    issuer.is_up = False
    try:
        assert status(client, issuer.token()) == 200
        assert status(client, issuer.token(headers={"kid": "unknown"})) == 401
        monkeypatch.setattr(oidc, "REFETCH_S", 10.0)
        with (
            serving(oidc_issuer=issuer.url, oidc_audience=AUDIENCE, api_keys=KEY) as served,
            httpx.Client(base_url=served.url) as fresh,
        ):
            answer = fresh.get("/v1/models", headers={"authorization": f"Bearer {issuer.token()}"})
            assert (answer.status_code, openai_error(answer.json())["code"]) == (503, "issuer_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert status(fresh, KEY) == 200
            before = issuer.num_fetches
            assert {status(fresh, issuer.token()) for _ in range(5)} == {503}
            assert issuer.num_fetches == before  # not asked again at once
    finally:
        issuer.is_up = True


def test_issuer_that_hangs_delays_nobody_whose_key_is_known(
    issuer: Issuer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status(client, issuer.token()) == 200
    monkeypatch.setattr(oidc, "KEYS_LIVE_S", -1.0)
    before = issuer.num_fetches
    issuer.gate.clear()
    try:
        assert status(client, issuer.token()) == 200
        eventually(lambda: issuer.num_fetches > before)  # the keys are old, and asked for beside the requests
        assert status(client, issuer.token()) == 200
    finally:
        issuer.gate.set()


def test_issuer_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "FETCH_LIMIT_S", 0.2)
    with (
        serving_issuer() as issuer,
        serving(oidc_issuer=issuer.url, oidc_audience=AUDIENCE) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        issuer.gate.clear()
        assert status(client, issuer.token()) == 503
        issuer.gate.set()


def test_keys_that_are_none_take_no_other_key_along(client: httpx.Client, issuer: Issuer) -> None:
    issuer.exchange("one", "four")
    issuer.documents["/keys"]["keys"][:0] = [5, None, {"kty": "RSA", "kid": "x", "n": 5}, {"kty": "EC", "crv": "P-256"}]
    assert status(client, issuer.token("four")) == 200


def test_subjects_are_different_callers_however_long(issuer: Issuer, client: httpx.Client) -> None:
    """One caller must not read another's stored responses."""
    head = "a" * 200
    first, second = (issuer.token("four", sub=head + end) for end in "bc")
    stored = client.post("/v1/responses", json={"model": "echo", "input": "x"}, headers={"x-api-key": first}).json()
    place = f"/v1/responses/{stored['id']}"
    assert client.get(place, headers={"x-api-key": first}).status_code == 200
    assert client.get(place, headers={"x-api-key": second}).status_code == 404


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://other", "jwks_uri": "x"},
        {"jwks_uri": "http://192.0.2.1/keys"},
        {"jwks_uri": 5},
        {},
        [],
        b"[" * 100_000,
    ],
)
def test_issuer_that_describes_another_is_not_believed(document: Any) -> None:
    with serving_issuer() as issuer:
        described = {"issuer": issuer.url, **document} if isinstance(document, dict) and document else document
        issuer.documents["/.well-known/openid-configuration"] = described
        with (
            serving(oidc_issuer=issuer.url, oidc_audience=AUDIENCE) as served,
            httpx.Client(base_url=served.url) as client,
        ):
            assert status(client, issuer.token()) == 503


def test_openapi_tells_of_the_issuer_and_its_scopes(issuer: Issuer, client: httpx.Client) -> None:
    document = client.get("/openapi.json", headers={"x-api-key": KEY}).json()
    scheme = document["components"]["securitySchemes"]["OpenIdConnect"]
    assert (scheme["type"], scheme["openIdConnectUrl"]) == (
        "openIdConnect",
        f"{issuer.url}/.well-known/openid-configuration",
    )
    assert {"OpenIdConnect": ["admin"]} in document["paths"]["/metrics"]["get"]["security"]
    assert {"OpenIdConnect": ["inference"]} in document["paths"][COMPLETIONS]["post"]["security"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"oidc_issuer": "http://issuer.example", "oidc_audience": "a"}, "must begin with https://"),
        ({"oidc_issuer": "https://issuer.example"}, "SERVE_OIDC_AUDIENCE"),
        ({"oidc_issuer": "https://i", "oidc_audience": "a", "oidc_algorithms": "RS256,HS256"}, "names HS256"),
        ({"oidc_issuer": "https://i", "oidc_audience": "a", "oidc_algorithms": "none"}, "names none"),
    ],
)
def test_settings_that_would_be_unsafe_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words), serving(**settings):
        pass
