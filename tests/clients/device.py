"""A device from third-party libraries: CBOR by cbor2, COSE by cwt, X.509 by cryptography. See proto/data-package.cddl."""

import hashlib
import secrets
from dataclasses import dataclass

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cwt import COSE, COSEKey

# COSE algorithms, RFC 9053.
A256GCM, ES256, HMAC_256_256, A256KW, ECDH_ES_A256KW = 3, -7, 5, -5, -31
# Header parameters, RFC 9052 Table 3.
ALG, KID, IV = 1, 4, 5
HARDWARE_MODULE_NAME = x509.ObjectIdentifier("1.3.6.1.5.5.7.8.4")  # RFC 4108 §5
RECIPIENT_PROTECTED = cbor2.dumps({ALG: ECDH_ES_A256KW})
# COSE_KDF_Context of RFC 9053 §5.2: for A256KW, 256 bits, no party information.
KDF_CONTEXT = [A256KW, [None, None, None], [None, None, None], [256, RECIPIENT_PROTECTED]]


class Refused(Exception):
    """A delivered value is invalid."""


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Refused(otherwise)


class Chip:
    """The silicon: its ROM and its private keys."""

    def __init__(self, manufacturer: x509.Certificate):
        self.chip_id = secrets.token_bytes(16)
        self.manufacturer = manufacturer
        self._chip_key = COSEKey.from_symmetric_key(secrets.token_bytes(32), alg="A256GCM", kid=self.chip_id)
        self._transport_key = ec.generate_private_key(ec.SECP256R1())
        self._own_key = ec.generate_private_key(ec.SECP256R1())

    def transport_point(self) -> bytes:
        """Returns the transport public key as an uncompressed point (SEC 1 §2.3.3)."""
        form = serialization.PublicFormat.UncompressedPoint
        return self._transport_key.public_key().public_bytes(serialization.Encoding.X962, form)

    def request(self, name: str) -> bytes:
        """Returns a PKCS#10 request for the key pair that the device generated."""
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self._own_key, hashes.SHA256())
        return request.public_bytes(serialization.Encoding.DER)

    def unseal(self, sealed: bytes, session: bytes) -> bytes:
        """Opens a COSE_Encrypt with one recipient ECDH-ES+A256KW."""
        numbers = self._transport_key.private_numbers()
        key = COSEKey.new({
            1: 2, 2: self.chip_id, 3: ECDH_ES_A256KW, -1: 1,
            -2: numbers.public_numbers.x.to_bytes(32), -3: numbers.public_numbers.y.to_bytes(32),
            -4: numbers.private_value.to_bytes(32),
        })  # fmt: skip
        bound_to = cbor2.dumps(["spp-package", 1, session, self.chip_id])
        return COSE.new().decode(sealed, key, context=KDF_CONTEXT, external_aad=bound_to)

    def back_up(self, package: bytes, certificate: bytes) -> bytes:
        return COSE.new().encode_and_encrypt(
            package,
            self._chip_key,
            protected={ALG: A256GCM, KID: self.chip_id},
            unprotected={IV: secrets.token_bytes(12)},
            external_aad=self._backup_aad(certificate),
        )

    def restore(self, backup: bytes, certificate: bytes) -> bytes:
        return COSE.new().decode(backup, self._chip_key, external_aad=self._backup_aad(certificate))

    def _backup_aad(self, certificate: bytes) -> bytes:
        return cbor2.dumps(["spp-backup", 1, self.chip_id, hashlib.sha256(certificate).digest()])

    def confirm(self, package: "Package", session: bytes, backup: bytes) -> bytes:
        """Proves that the device holds its key, the package and the backup."""
        hash_of = lambda data: hashlib.sha256(data).digest()  # noqa: E731
        claims = cbor2.dumps({1: session, 2: self.chip_id, 3: hash_of(package.data), 4: hash_of(backup)})
        if package.is_cwt:
            key = COSEKey.from_symmetric_key(package.symmetric_keys[0][1], alg="HS256")
            return COSE.new().encode_and_mac(claims, key, protected={ALG: HMAC_256_256})
        key = cose_signing_key(package.private_key or self._own_key)
        return COSE.new().encode_and_sign(claims, key, protected={ALG: ES256})

    def own_public_key(self) -> ec.EllipticCurvePublicKey:
        return self._own_key.public_key()


@dataclass
class Package:
    """A parsed and validated data package."""

    data: bytes
    identity: str
    certificate: bytes
    is_cwt: bool
    private_key: ec.EllipticCurvePrivateKey | None
    symmetric_keys: list[tuple[str, bytes]]

    @classmethod
    def read(cls, data: bytes, chip: Chip, session: bytes, identity: str, profile: str) -> "Package":
        fields = cbor2.loads(data)
        require(cbor2.dumps(fields, canonical=True) == data, "the package is not in deterministic CBOR")
        require(set(fields) <= set(range(1, 11)), f"the package has unknown keys: {sorted(fields)}")
        expected = {1: 1, 2: session, 3: chip.chip_id, 4: identity, 5: profile}
        for key, value in expected.items():
            require(fields.get(key) == value, f"package key {key} is {fields.get(key)!r}, not {value!r}")
        require((7 in fields) != (8 in fields), "the package must have exactly one of certificate chain and CWT")
        chain = fields.get(7, fields.get(8))
        return cls(
            data=data,
            identity=identity,
            certificate=chain[0] if isinstance(chain, list) else chain,
            is_cwt=8 in fields,
            private_key=private_key(fields[9]) if 9 in fields else None,
            symmetric_keys=[symmetric_key(key) for key in fields.get(10, [])],
        )

    def verify(self, chip: Chip) -> None:
        """Verifies the certificate as a device does, with its ROM only."""
        if self.is_cwt:
            self._verify_cwt(chip)
        else:
            self._verify_x509(chip)

    def _verify_x509(self, chip: Chip) -> None:
        certificate = x509.load_der_x509_certificate(self.certificate)
        certificate.verify_directly_issued_by(chip.manufacturer)
        own = self.private_key.public_key() if self.private_key else chip.own_public_key()
        require(certificate.public_key() == own, "the certificate is for another key than the device's")
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        modules = [name.value for name in names.get_values_for_type(x509.OtherName) if name.type_id == HARDWARE_MODULE_NAME]
        require(len(modules) == 1, f"the certificate has {len(modules)} hardware module names, not one")
        serial = b"\x04" + bytes([len(chip.chip_id)]) + chip.chip_id
        require(modules[0].endswith(serial), "the certificate is for another chip")
        if self.identity.startswith("imei:"):
            digits = self.identity.removeprefix("imei:")
            urn = f"urn:gsma:imei:{digits[:8]}-{digits[8:14]}-0"  # RFC 7254 §4: the spare digit, not the check digit
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
            require(uris == [urn], f"the certificate names {uris}, not {urn}")

    def _verify_cwt(self, chip: Chip) -> None:
        key = COSEKey.from_pem(
            chip.manufacturer.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
            alg="ES256",
            kid=chip.manufacturer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest,
        )
        data = self.certificate
        if data.startswith(b"\xd8\x3d"):  # the CWT tag 61, RFC 8392 §6
            data = data[2:]
        values = list(leaves(cbor2.loads(COSE.new().decode(data, key))))
        require(chip.chip_id in values, "the CWT is for another chip")
        require(self.identity in values, "the CWT is for another identity")


def private_key(cose: dict) -> ec.EllipticCurvePrivateKey:
    require(cose.get(1) == 2 and cose.get(-1) == 1, "unsupported key pair: this client supports P-256 only")
    key = ec.derive_private_key(int.from_bytes(cose[-4]), ec.SECP256R1())
    point = key.public_key().public_numbers()
    require((point.x.to_bytes(32), point.y.to_bytes(32)) == (cose[-2], cose[-3]), "the private key does not match the public key")
    return key


def symmetric_key(cose: dict) -> tuple[str, bytes]:
    require(cose.get(1) == 4, "a symmetric key does not have COSE key type 4")
    require(16 <= len(cose[-1]) <= 64, "a symmetric key does not have 16 to 64 bytes")
    return cose[2].decode(), cose[-1]


def cose_signing_key(key: ec.EllipticCurvePrivateKey):
    form = serialization.PrivateFormat.PKCS8
    return COSEKey.from_pem(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()), alg="ES256")


def leaves(value):
    """Yields all values in nested maps and arrays."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value
