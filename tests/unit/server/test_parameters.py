"""Parameters of the server."""

from __future__ import annotations

import pytest

from qedcore.errors import RequestError
from qedcore.server.parameters import Parameters


@pytest.mark.parametrize("value", ["true", "1", "yes", "On", "FALSE", "0", "off", "n"])
def test_booleans(value: str) -> None:
    parameters = Parameters(print, print)
    for name, text in (("file", "x"), ("create", value)):
        parameters.take(name, text)
    if value in ("FALSE", "0", "off", "n"):
        parameters.complete()
        assert parameters.new is None
    else:
        with pytest.raises(RequestError, match="size="):
            parameters.complete()
