"""A stand-in for Modal's control plane, worker and web gateway, on loopback, for the real ``modal`` client.

Reads in this order: ``store`` (files), ``control`` (what a deploy asks for), ``calls`` (what a container asks for),
``service`` (both behind gRPC, and the gateway), ``gateway``, ``container``, ``tree``, ``session``, ``command``.
"""
