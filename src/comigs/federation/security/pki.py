"""Keys and certificates: the federation's own authority, the server's certificate, a device's key
pair.

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
EARLIER = timedelta(
    hours=1
)  # before now, so that a device whose clock is a little slow accepts a new certificate


def new_authority(federation: str) -> tuple[str, str]:
    """(certificate, private key) of a federation's own authority, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"comigs federation {federation}")
    usage = x509.KeyUsage(
        False, False, False, False, False, True, True, False, False
    )  # signs certificates and CRLs
    made = (
        _certificate(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(made), _key_pem(key)


def new_server_certificate(
    authority: str, authority_key: str, hosts: Iterable[str]
) -> tuple[str, str]:
    """(certificate, private key) of the server, as PEM, for these names and addresses."""
    issuer = x509.load_pem_x509_certificate(authority.encode())
    signer = s.load_pem_private_key(authority_key.encode(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    made = (
        _certificate(_name("comigs server"), issuer.subject, key, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    return _pem(made), _key_pem(key)


def certificate_fits(certificate: str, hosts: Iterable[str]) -> bool:
    """It names exactly these hosts and is good for a while yet."""
    read = x509.load_pem_x509_certificate(certificate.encode())
    named = list(read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    return named == [_host(host) for host in hosts] and _end(read) > datetime.now(UTC) + timedelta(
        days=RENEW_DAYS
    )


def valid_until(certificate: str) -> datetime:
    """The last moment at which it is valid. Raises ValueError where it is no certificate."""
    return _end(x509.load_pem_x509_certificate(certificate.encode()))


def new_device_key() -> tuple[str, str]:
    """(private key, public key) of a device in OpenSSH's form, which is what Flower reads: EC
    P-384.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption())
    public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
    return private.decode(), public.decode()


def check_device_key(private: str) -> None:
    """Raises ValueError where it is no private key."""
    s.load_ssh_private_key(private.encode(), password=None)


def is_host(text: str) -> bool:
    """A name or an address that a certificate can hold."""
    try:
        _host(text)
    except ValueError:
        return False
    return _is_address(text) or (bool(text) and not set(text) & set(" /:@"))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _host(text: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(text)) if _is_address(text) else x509.DNSName(text)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + timedelta(days=days))
    )


def _end(certificate: x509.Certificate) -> datetime:
    return certificate.not_valid_after_utc


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(s.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()).decode()
