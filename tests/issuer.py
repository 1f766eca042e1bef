"""An OpenID Connect issuer on loopback: its discovery document, its keys, and tokens signed with them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

AUDIENCE = "trimaran"


class Issuer:
    """Signs with keys that it may exchange, and may be told to fail, or to hang while ``gate`` is not set."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.private: dict[str, tuple[str, Any]] = {}
        self.documents: dict[str, Any] = {}
        self.is_up = True
        self.gate = threading.Event()
        self.gate.set()
        self.num_fetches = 0
        self.exchange("one")

    def exchange(self, *names: str) -> None:
        """Have new RSA keys of these names, and no others; names that begin with ec are elliptic curves."""
        self.private = {name: _new_key(name) for name in names}
        public = [
            {**json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key())), "kid": name, "use": "sig"}
            for name, (algorithm, key) in self.private.items()
        ]
        self.documents = {
            "/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": f"{self.url}/keys"},
            "/keys": {"keys": [*public, {"kty": "oct", "kid": "hmac", "k": "c2VjcmV0"}]},
        }

    def token(self, name: str = "one", *, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """A good token, but for what ``claims`` change; None takes one out."""
        now = time.time()
        given: dict[str, Any] = {
            "iss": self.url, "aud": AUDIENCE, "sub": "alice", "exp": now + 60, "iat": now, "scope": "openid inference",
        }  # fmt: skip
        given = {claim: value for claim, value in {**given, **claims}.items() if value is not None}
        algorithm, key = self.private[name]
        named = {"kid": name, **(headers or {})}
        return jwt.encode(
            given, key, algorithm, {header: value for header, value in named.items() if value is not None}
        )


def _new_key(name: str) -> tuple[str, Any]:
    if name.startswith("ec"):
        return "ES256", ec.generate_private_key(ec.SECP256R1())
    return "RS256", rsa.generate_private_key(65537, 2048)


@contextmanager
def serving_issuer() -> Iterator[Issuer]:
    """An issuer on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.num_fetches += 1
            found = issuer.documents.get(self.path) if issuer.is_up else None
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            issuer.gate.wait(30)
            self.send_response(503 if found is None else 200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    issuer = Issuer(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield issuer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
