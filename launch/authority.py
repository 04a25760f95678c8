"""A private certificate authority and the certificates of its nodes, as files.

    DIR/ca.pem            the authority's certificate: what every end trusts
    DIR/ca.key            its key, 0600: stays where certificates are made
    DIR/NODE/ca.pem       a copy; DIR/NODE is what a node gets, whole, as its --tls-dir
    DIR/NODE/node.pem     the node's certificate, for both ends of a connection
    DIR/NODE/node.key     its key, 0600

    create(directory)                                   # once; an authority that is there stays as it is
    issue(directory, ["trainer", "gpu1=10.0.0.1"])      # what is there and valid stays, too
    for each in issued(directory): print(each.node, each.not_after)

Nothing here opens a connection. Running processes take up new files without a restart.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from weight_update.errors import PlanError

CA, CA_KEY, NODE, NODE_KEY = "ca.pem", "ca.key", "node.pem", "node.key"
CA_DAYS, NODE_DAYS = 3650, 365
EARLIER = timedelta(minutes=5)  # certificates begin so long ago: clocks of nodes differ
SELF = ("localhost", "127.0.0.1", "::1")  # a node may always be dialed from itself
DNS_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A certificate on disk. node: its folder, "" for the authority's own. names: hosts and addresses it is for."""

    node: str
    names: tuple[str, ...]
    not_after: datetime
    path: Path

    @property
    def days_left(self) -> int:
        """Whole days until it expires; negative once it has."""
        return (self.not_after - datetime.now(UTC)).days


def create(directory: Path, *, days: int = CA_DAYS) -> bool:
    """Make the authority; False where the folder holds one already, which is never written over. PlanError where it
    holds half of one."""
    there = [(directory / name).exists() for name in (CA, CA_KEY)]
    if all(there):
        _authority(directory)
        return False
    if any(there):
        has, lacks = (CA, CA_KEY) if there[0] else (CA_KEY, CA)
        raise PlanError(f"{directory}: holds {has} and no {lacks}; put that back, or name an empty folder")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "transfuse authority")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / CA_KEY, _pem(key), 0o600, new=True)
    write_whole(directory / CA, certificate.public_bytes(Encoding.PEM), 0o644, new=True)
    return True


def issue(directory: Path, nodes: Sequence[str], *, days: int = NODE_DAYS, renew: bool = False) -> list[Issued]:
    """Certificates for nodes, "NODE" or "NODE=NAME,..." with further names and addresses that it is dialed by.

    One that is there, is valid, and is for these names stays unless renew is set. PlanError: no authority here, or no
    such name.
    """
    wanted = [_names(node) for node in nodes]
    key, authority = _authority(directory)
    found = []
    for node, names in wanted:
        path = directory / node / NODE
        present = _read(node, path) if path.exists() else None
        if renew or present is None or not _holds(present, names, authority):
            names = tuple(dict.fromkeys([*names, *(present.names if present is not None else ())]))
            _issue(directory / node, names, key, authority, days)
        found.append(_read(node, path))
    return found


def issued(directory: Path) -> list[Issued]:
    """Every certificate here, the authority's first. PlanError where there is none."""
    if not (directory / CA).exists():
        raise PlanError(f"{directory}: no {CA} here; 'transfuse certs init {directory}' makes an authority")
    if (directory / NODE).exists():  # the folder of one node
        return [_read("", directory / CA), _read(directory.name, directory / NODE)]
    return [_read("", directory / CA), *(_read(path.parent.name, path) for path in sorted(directory.glob(f"*/{NODE}")))]


def _holds(present: Issued, names: Sequence[str], authority: x509.Certificate) -> bool:
    ours = x509.load_pem_x509_certificate(present.path.read_bytes()).verify_directly_issued_by
    try:
        ours(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return present.days_left >= 0 and set(names) <= set(present.names) and present.path.with_name(NODE_KEY).exists()


def _issue(
    folder: Path, names: Sequence[str], signer: ec.EllipticCurvePrivateKey, authority: x509.Certificate, days: int
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name[:64])])
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CA, authority.public_bytes(Encoding.PEM), 0o644)
    write_whole(folder / NODE_KEY, _pem(key), 0o600)
    write_whole(folder / NODE, certificate.public_bytes(Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    start = datetime.now(UTC) - EARLIER
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + EARLIER + timedelta(days=days))
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
        " encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names.split()})


def _names(node: str) -> tuple[str, tuple[str, ...]]:
    """("gpu1", all names) of "gpu1=10.0.0.1,gpu1.local"; a node's name is also that of its folder."""
    name, _, others = node.partition("=")
    names = [name, *filter(None, others.split(","))]
    problems = [each for each in names if not (_is_address(each) or DNS_NAME.fullmatch(each))]
    if problems:
        told = ", ".join(map(repr, problems))
        raise PlanError(f"node {node!r}: {told} is neither a host name nor an address; expected HOST or HOST=NAME,...")
    return name, tuple(dict.fromkeys([*names, *SELF]))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _general(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if _is_address(name) else x509.DNSName(name)


def _authority(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = load_pem_private_key((directory / CA_KEY).read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((directory / CA).read_bytes())
    except FileNotFoundError as error:
        told = f"{error.filename} is not there; 'transfuse certs init {directory}' makes an authority"
        raise PlanError(told) from None
    except (ValueError, TypeError) as error:
        raise PlanError(f"{directory}: the authority cannot be read ({error}); put it back from a copy") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise PlanError(f"{directory}: {CA_KEY} is not the key of {CA}; put back the pair from a copy")
    return key, certificate


def _read(node: str, path: Path) -> Issued:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise PlanError(f"{path}: no certificate ({error}); 'transfuse certs add --renew' makes a new one") from None
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = [
            *names.get_values_for_type(x509.DNSName),
            *map(str, names.get_values_for_type(x509.IPAddress)),
        ]
    except x509.ExtensionNotFound:
        found = []
    return Issued(node=node, names=tuple(found), not_after=certificate.not_valid_after_utc, path=path)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write_whole(path: Path, data: bytes, mode: int, *, new: bool = False) -> None:
    """Whole or not at all, never readable by others first. new: refuse to replace a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        if new:
            os.link(beside, path)
        else:
            beside.replace(path)
    except FileExistsError:
        raise PlanError(f"{path}: is there already and is not written over; name an empty folder") from None
    finally:
        beside.unlink(missing_ok=True)
