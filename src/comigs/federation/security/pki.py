"""This module makes keys and certificates: the federation's own authority, the server's
certificate, a device's key pair.

Nobody else is trusted: a device accepts this authority's certificates only, and the server accepts
registered keys only.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
RENEW_DAYS = 30  # days before its end at which the server makes itself a new certificate
# A device whose clock is a little slow accepts a new certificate, for it begins earlier than now.
EARLIER = timedelta(hours=1)


def new_authority(federation: str) -> tuple[str, str]:
    """Return (certificate, private key) of a federation's own authority, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"comigs federation {federation}")
    # Of the nine uses, it has these two: it signs certificates and lists of revoked ones.
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    made = (
        _certificate(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(made), _key_pem(key)


def new_server_certificate(
    authority: str, authority_key: str, hosts: Iterable[str]
) -> tuple[str, str]:
    """Return (certificate, private key) of the server, as PEM, for these names and addresses."""
    issuer = x509.load_pem_x509_certificate(authority.encode())
    signer = s.load_pem_private_key(authority_key.encode(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)

    # It can be nothing but a server's: a device's connection checks its use and its hosts.
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    made = (
        _certificate(_name("comigs server"), issuer.subject, key, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(signed_by, critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _pem(made), _key_pem(key)


def certificate_fits(certificate: str, hosts: Iterable[str]) -> bool:
    """Return whether a certificate names exactly these hosts and is valid for a while yet."""
    read = x509.load_pem_x509_certificate(certificate.encode())
    named = list(read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    renewal = read.not_valid_after_utc - timedelta(days=RENEW_DAYS)
    return named == [_host(host) for host in hosts] and renewal > datetime.now(UTC)


def valid_until(certificate: str) -> datetime:
    """Return the last moment of a certificate's validity. Raises ValueError where it is none."""
    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc


def new_device_key() -> tuple[str, str]:
    """Return (private key, public key) of a device, EC P-384 in OpenSSH's form, as Flower reads
    it.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption())
    public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
    return private.decode(), public.decode()


def check_device_key(private: str) -> None:
    """Raise ValueError where a text is no private key."""
    s.load_ssh_private_key(private.encode(), password=None)


def is_host(text: str) -> bool:
    """Return whether a text is a name or an address that a certificate can hold."""
    try:
        host = _host(text)
    except ValueError:
        return False
    return isinstance(host, x509.IPAddress) or (bool(text) and not set(text) & set(" /:@"))


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - EARLIER,
        not_valid_after=now + timedelta(days=days),
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(s.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()).decode()
