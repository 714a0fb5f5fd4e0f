"""The addresses of the HTTP servers of sessions, routers and score servers."""

from __future__ import annotations

import pytest

from areal_like.errors import ConfigError
from rollout_server.listening import listening, url_of


def test_an_address_that_cannot_be_bound_says_what_to_change() -> None:
    with listening("127.0.0.1", 0, 3, setting="scorer.host") as taken:
        port = taken.getsockname()[1]
        for host, asked, index, message in (
            ("127.0.0.1", 65535, 1, r"scorer\.port=65535 \+ 1 .* is above 65535: use a smaller scorer\.port"),
            ("127.0.0.1", port - 1, 1, f"port {port} .*in use.*set scorer.port to a port that is free"),
            ("203.0.113.7", 0, 1, r"cannot bind scorer\.host=203.*set scorer\.host to an address of this"),
        ):
            with pytest.raises(ConfigError, match=message):
                listening(host, asked, index, setting="scorer.host")


def test_a_url_has_a_host_that_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-3")
    with listening("127.0.0.1", 0, 0, setting="scorer.host") as listener:
        port = listener.getsockname()[1]
        for host, advertise_host, shown in (
            ("0.0.0.0", "", "https://node-3"), ("10.0.0.1", "", "https://10.0.0.1"),
            ("::", "gate", "https://gate"), ("fd00::1", "", "https://[fd00::1]"),
        ):  # fmt: skip
            url = url_of(listener, host=host, advertise_host=advertise_host, is_tls=True)
            assert url == f"{shown}:{port}"
