"""Certificates and keys for a trial of TLS and node authentication on one machine, as Flower's guide makes them.

In earnest the SuperLink's certificate comes from your own authority, and each client makes its own key and hands over
the public half alone.
"""

import datetime
import ipaddress
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


def write(directory: pathlib.Path, clients: int) -> None:
    """``ca.crt``, the SuperLink's certificate and key, and a P-384 key pair for each client."""
    directory.mkdir()
    authority = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedjax_clip trial")])
    _save(directory / "ca.crt", _certificate(name, authority.public_key(), name, authority, True))
    own = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    _save(directory / "superlink.crt", _certificate(subject, own.public_key(), name, authority, False))
    _save(directory / "superlink.key", _private(own, serialization.PrivateFormat.PKCS8))
    for number in range(clients):
        key = ec.generate_private_key(ec.SECP384R1())
        _save(directory / f"client-{number}.key", _private(key, serialization.PrivateFormat.OpenSSH))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _save(directory / f"client-{number}.pub", public)


def _certificate(subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name, signer, root: bool) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(root, None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    return built.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _save(path: pathlib.Path, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content)
