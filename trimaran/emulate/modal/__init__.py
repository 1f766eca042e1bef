"""A stand-in for Modal's control plane, worker and web gateway, on loopback, for the real ``modal`` client.

Reads in this order: ``store`` (files), ``control`` (what a deploy asks for), ``deployments`` (apps and their versions),
``calls`` (what a container asks for), ``service`` (all behind gRPC, and the gateway), ``gateway``, ``container``,
``tree``, ``session``, ``command``.
"""
