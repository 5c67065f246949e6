"""Everything in this package keeps its contract."""

import pytest

from seqbench.suite.contract.plugin import check_plugin


@pytest.mark.parametrize("name", ["parity", "moving-average", "smoothie", "parity-smoke"])
def test_it_keeps_the_contract(name: str) -> None:
    (report,) = check_plugin(name)
    assert not report.broken
