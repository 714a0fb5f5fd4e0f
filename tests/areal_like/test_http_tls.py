"""A daemon's HTTP server over TLS, and the operator's client, which trusts its certificate alone."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest

from areal_like.config.security import SecurityConfig
from areal_like.errors import ConfigError
from areal_like.security.tls import client_context, tls_files
from launch.observation.http_json import Operator, fetch_json
from tests.support.certificates import make_certificate
from tests.support.daemon_process import DaemonProcess
from tests.support.keys import make_keys
from tests.support.rollout_harness import wait_until


def test_only_clients_that_know_the_certificate_are_served(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "areal")
    other, _ = make_certificate(tmp_path, "other")
    make_keys(tmp_path / "keys")
    keys = str(tmp_path / "keys")
    daemon = DaemonProcess(
        tmp_path, "serve", f"security.keys={keys}", f"security.tls_certificate={certificate}",
        f"security.tls_private_key={key}",
    )  # fmt: skip
    try:
        address, endpoints = daemon.endpoint()["http"], daemon.run / "endpoints"

        def answer(**files: str) -> object:
            operator = Operator(SecurityConfig(keys=keys, **files), endpoints)
            return (fetch_json(address, "/status", operator=operator) or {}).get("answer")

        tls = {"tls_certificate": str(certificate), "tls_private_key": str(key)}
        wait_until(lambda: answer(**tls) == 42)  # an answer has a time limit
        assert answer(**tls | {"tls_certificate": str(other)}) is None
        assert answer() is None, "plain HTTP is not answered"

        silent = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(300)]

        def num_open() -> int:
            return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))

        # Handshakes are bounded in number. All connections that wait may be accepted before some are closed.
        wait_until(lambda: num_open() < 200)
        for connection in silent:
            connection.close()
        wait_until(lambda: answer(**tls) == 42)
    finally:
        daemon.close()


def test_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "areal")
    other, other_key = make_certificate(tmp_path, "other")
    good = {"tls_certificate": str(certificate), "tls_private_key": str(key)}
    assert tls_files(SecurityConfig(**good)) == (str(certificate), str(key))
    with pytest.raises(ConfigError, match="set both or none"):
        SecurityConfig(tls_certificate=str(certificate))
    for change, message in (
        ({"tls_private_key": str(other_key)}, "tls_private_key"),
        ({"tls_certificate": str(tmp_path / "absent")}, "No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            tls_files(SecurityConfig(**good | change))
    with pytest.raises(ConfigError, match="No such file"):
        client_context(SecurityConfig(**good | {"tls_certificate": str(tmp_path / "absent")}))
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        tls_files(SecurityConfig(**good))
    assert other.is_file()


def accepts(client: ssl.SSLContext, certificate: Path, key: Path) -> bool:
    """True if a client completes the handshake with a server that has this certificate."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return ends[0].version() is not None


def test_only_the_first_certificate_of_a_chain_is_trusted(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "areal")
    authority, authority_key = make_certificate(tmp_path, "authority")
    chain = tmp_path / "chain.pem"
    chain.write_text("areal\n" + certificate.read_text() + authority.read_text())
    client = client_context(SecurityConfig(tls_certificate=str(chain), tls_private_key=str(key)))
    assert client is not None
    assert accepts(client, certificate, key)
    assert not accepts(client, authority, authority_key)
    chain.write_text("no certificate")
    with pytest.raises(ConfigError, match="no certificate in PEM format"):
        client_context(SecurityConfig(tls_certificate=str(chain), tls_private_key=str(key)))
