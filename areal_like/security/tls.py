"""TLS of the HTTP servers: one certificate for all daemons of a job, which clients trust directly.

Clients do not compare names: endpoint files hold numeric addresses, and whoever has the private key of
exactly this certificate is a daemon of the job. From a chain they trust only the first certificate: the
authority that signed it signs for others, too.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from areal_like.config.security import SecurityConfig
from areal_like.errors import ConfigError
from areal_like.paths import require_private

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def tls_files(security: SecurityConfig) -> tuple[str, str]:
    """The files of the certificate and of its private key; empty without TLS.

    Raises ConfigError if they cannot be used, or if other users can read the key.
    """
    if not security.tls_certificate:
        return "", ""
    certificate, key = (
        Path(security.tls_certificate).expanduser(),
        Path(security.tls_private_key).expanduser(),
    )
    try:
        require_private(key)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"security.tls_certificate={certificate}, tls_private_key={key}: {error.strerror or error}"
        ) from None
    return str(certificate), str(key)


def client_context(security: SecurityConfig) -> ssl.SSLContext | None:
    """A context that trusts the job's certificate and no other; None without TLS. Raises ConfigError."""
    return trusting(security.tls_certificate) if security.tls_certificate else None


def trusting(certificate: str) -> ssl.SSLContext:
    """A context that trusts the certificate in this PEM file and no other. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        text = Path(certificate).expanduser().read_text("latin-1")
        first = text[text.find(_BEGIN) :].partition(_END)[0] + _END
        context.load_verify_locations(cadata=ssl.PEM_cert_to_DER_cert(first))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = error.strerror if isinstance(error, OSError) else "it has no certificate in PEM format"
        raise ConfigError(f"security.tls_certificate={certificate}: {reason or error}") from None
    return context
