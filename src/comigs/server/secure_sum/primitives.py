"""This module holds what the protocol is built from: key agreement, sealed boxes, shares, streams.

Key agreement, boxes and shares are Flower's (`flwr.common.secure_aggregation.crypto`): ECDH with
HKDF-SHA256, Fernet (AES-CBC with HMAC-SHA256), and Shamir's shares over GF(2^128). Masks are
streams of ChaCha20 (RFC 8439).
"""

from __future__ import annotations

import base64
import hashlib
import secrets

import numpy as np
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)

CURVE = ec.SECP256R1()
# The number of points of P-256 (FIPS 186-5): private keys are from 1 to this number less 1.
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
# Bytes of a seed. Flower pads a secret to the next multiple of 16, at least by one byte.
SEED = 31
SHARE = 4 + 32  # bytes of a seed's share: the number of its holder, and two elements of GF(2^128)
BOX = 228  # bytes of a sealed box: of two shares, and of the 32 that say whose they are
PrivateKey = ec.EllipticCurvePrivateKey


class SumError(ValueError):
    """Something of a sum is not as it should be, in a few words that hold nothing of it."""


def new_seed() -> bytes:
    """Return SEED bytes from the operating system."""
    return secrets.token_bytes(SEED)


def private_key(seed: bytes) -> PrivateKey:
    """Return the private key of a seed."""
    # 128 bits more than the order has: every key is as likely as any other.
    wide = HKDF(hashes.SHA256(), 48, salt=None, info=b"comigs: key of a sum").derive(seed)
    return ec.derive_private_key(int.from_bytes(wide, "big") % (ORDER - 1) + 1, CURVE)


def public_name(key: PrivateKey) -> str:
    """Return a key's public half, a point in 33 bytes, as hex: members of a sum are called so."""
    point = key.public_key().public_bytes(s.Encoding.X962, s.PublicFormat.CompressedPoint)
    return point.hex()


def public_key(name: str) -> ec.EllipticCurvePublicKey:
    """Return the public key of that name. Raises SumError where it is no point of the curve."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(CURVE, bytes.fromhex(name))
    except ValueError:
        raise SumError("a public key that is none") from None


def fingerprint(public: str) -> str:
    """Return what people compare of a public key: 80 bits of its SHA-256, as 5 groups of hex."""
    text = hashlib.sha256(bytes.fromhex(public)).hexdigest()[:20]
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def agreed_key(own: PrivateKey, public: str) -> bytes:
    """Return the key that two parties agree on, each from its own and the other's public half.

    Raises SumError where `public` is none.
    """
    return generate_shared_key(own, public_key(public))


def seal_box(key: bytes, content: bytes) -> bytes:
    """Return content that only who has the key can read, or make."""
    return encrypt(key, content)


def open_box(key: bytes, box: bytes) -> bytes:
    """Return what a box holds. Raises SumError where another key made it, or none."""
    try:
        return decrypt(key, box)
    except InvalidToken:
        raise SumError("a sealed share that nobody made for this client") from None


def split(seed: bytes, threshold: int, count: int) -> list[bytes]:
    """Return `count` shares of a seed, any `threshold` of which give it back; fewer tell nothing.

    A share has SHARE bytes.
    """
    return create_shares(seed, threshold, count)


def combine(shares: list[bytes]) -> bytes:
    """Return the seed of as many shares as the threshold is. Raises SumError for any others."""
    try:
        seed = combine_shares(shares)
    except ValueError:
        seed = b""
    # From too few shares comes something, mostly with a padding that is none.
    if len(seed) != SEED:
        raise SumError("shares that do not fit together")
    return seed


def mask_of_pair(own: PrivateKey, public: str, count: int) -> np.ndarray:
    """Return the mask of a pair of clients: `count` numbers, uint32.

    The key behind it is used for one sum only.
    """
    return _stream(base64.urlsafe_b64decode(agreed_key(own, public)), count)


def mask_of_own(seed: bytes, count: int) -> np.ndarray:
    """Return the mask that a client draws for itself: `count` numbers, uint32."""
    return _stream(hashlib.sha256(b"comigs: own mask" + seed).digest(), count)


def _stream(key: bytes, count: int) -> np.ndarray:
    # A key gives one stream and no other, so it may begin at zero.
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * count)), dtype="<u4")
