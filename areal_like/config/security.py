"""Settings of authentication and encryption."""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.config.common import NAME, NAME_RULE, Section, require


@dataclass(frozen=True, kw_only=True)
class SecurityConfig(Section, key="security"):
    """Keys and tokens of the job's daemons. Without keys every daemon listens on loopback only."""

    keys: str = ""
    """Directory made by `areal-like keys init`; every daemon then authenticates and encrypts its connections.
    Empty: no keys, and only loopback addresses are bound."""
    identity: str = ""
    """Name of this daemon's key, for the file `<keys>/<identity>.secret`; empty: the daemon's role (`buffer`,
    `trainer`, `rollout`, `router` or `scorer`)."""
    insecure: bool = False
    """Allow addresses other than loopback without keys. Everyone who can reach the ports can then change the
    run."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that HTTP requests may have in their Host header, in addition to the bound and advertised
    addresses."""

    tls_certificate: str = ""
    """PEM file with the certificate (chain) of the daemons' HTTP servers, which then speak TLS only. This
    project's own commands trust exactly this certificate, whatever name is in it."""
    tls_private_key: str = ""
    """PEM file with the private key of `tls_certificate`, readable by its owner only."""

    def check(self) -> None:
        """Checks names, the list of host names, and that a certificate has its key."""
        require(
            bool(self.tls_certificate) == bool(self.tls_private_key),
            "security.tls_certificate and security.tls_private_key belong together: set both or none",
        )
        require(
            not self.identity or NAME.fullmatch(self.identity) is not None,
            f"security.identity={self.identity}: {NAME_RULE}",
        )
        require(
            not (self.identity and not self.keys),
            "security.identity names a key, and security.keys is empty: name the directory of the keys",
        )
        require(
            all(isinstance(host, str) and host for host in self.allowed_hosts),
            "security.allowed_hosts: give a list of host names",
        )
