"""The image under each platform's environment, port, command and probes; RunPod's queue in its own target."""

from __future__ import annotations

import pytest
from containers import HARDENED, Image
from contracts import CONTRACTS, PROBE, check_probe, probe_arguments


@pytest.mark.parametrize("name", CONTRACTS)
def test_image_keeps_the_platforms_contract(thin: Image, name: str) -> None:
    contract = CONTRACTS[name]()
    options = (*HARDENED, *contract.options)
    with thin.running(*contract.command, options=options, **contract.without_model()) as container:
        check_probe(contract, container.python(PROBE, *probe_arguments(contract)))
        assert container.stop(timeout_s=10) == 0
