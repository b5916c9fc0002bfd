"""Tests the third-party device with envelopes built from RFC 9052 and RFC 9053, without a COSE library."""

import datetime
import hashlib
import secrets
import unittest

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

import device

SESSION, CERTIFICATE = bytes(16), b"a certificate"


def seal_by_hand(package: bytes, point: bytes, session: bytes, chip: bytes) -> bytes:
    """Builds a COSE_Encrypt (RFC 9052 §5.3, RFC 9053 §5.2, §6.4)."""
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    shared = ephemeral.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point))
    recipient_protected = cbor2.dumps({1: -31})
    context = cbor2.dumps([-5, [None] * 3, [None] * 3, [256, recipient_protected]])
    kek = HKDF(SHA256(), 32, salt=None, info=context).derive(shared)
    content_key, iv, protected = secrets.token_bytes(32), secrets.token_bytes(12), cbor2.dumps({1: 3})
    aad = cbor2.dumps(["Encrypt", protected, cbor2.dumps(["spp-package", 1, session, chip])])
    public = ephemeral.public_key().public_numbers()
    key = {1: 2, -1: 1, -2: public.x.to_bytes(32), -3: public.y.to_bytes(32)}
    recipient = [recipient_protected, {4: chip, -1: key}, aes_key_wrap(kek, content_key)]
    ciphertext = AESGCM(content_key).encrypt(iv, package, aad)
    return cbor2.dumps(cbor2.CBORTag(96, [protected, {5: iv}, ciphertext, [recipient]]))


class ThirdPartyDevice(unittest.TestCase):
    def setUp(self):
        self.chip = device.Chip(manufacturer=None)

    def test_sealed_package_decrypts_in_its_session_only(self):
        sealed = seal_by_hand(b"package", self.chip.transport_point(), SESSION, self.chip.chip_id)
        self.assertEqual(self.chip.unseal(sealed, SESSION), b"package")
        with self.assertRaises(Exception):
            self.chip.unseal(sealed, b"\x01" * 16)

    def test_backup_decrypts_with_its_certificate_only(self):
        backup = self.chip.back_up(b"package", CERTIFICATE)
        self.assertEqual(self.chip.restore(backup, CERTIFICATE), b"package")
        with self.assertRaises(Exception):
            self.chip.restore(backup, b"another certificate")

    def test_backup_is_canonical(self):
        backup = self.chip.back_up(b"package", CERTIFICATE)
        tagged = cbor2.loads(backup)
        self.assertEqual((tagged.tag, cbor2.loads(tagged.value[0])), (16, {1: 3, 4: self.chip.chip_id}))
        self.assertEqual(backup, cbor2.dumps(tagged, canonical=True))

    def test_confirmation_has_exactly_four_claims(self):
        keys = [("channel", secrets.token_bytes(32))]
        package = device.Package(b"package", "serial:1", CERTIFICATE, True, None, keys)
        tagged = cbor2.loads(self.chip.confirm(package, SESSION, b"backup"))
        self.assertEqual(tagged.tag, 17)
        hash_of = lambda data: hashlib.sha256(data).digest()  # noqa: E731
        expected = {1: SESSION, 2: self.chip.chip_id, 3: hash_of(b"package"), 4: hash_of(b"backup")}
        self.assertEqual(cbor2.loads(tagged.value[2]), expected)

    def test_cwt_verifies_for_its_chip_and_identity_only(self):
        manufacturer_key, manufacturer = manufacturer_by_hand()
        chip = device.Chip(manufacturer)
        claims = cbor2.dumps({1: "Maker", 2: "serial:1", 6: 0, -70001: chip.chip_id})
        cwt = sign_by_hand(claims, manufacturer_key, manufacturer)
        device.Package(b"", "serial:1", cwt, True, None, []).verify(chip)
        device.Package(b"", "serial:1", b"\xd8\x3d" + cwt, True, None, []).verify(chip)
        with self.assertRaises(device.Refused):
            device.Package(b"", "serial:2", cwt, True, None, []).verify(chip)
        with self.assertRaises(device.Refused):
            device.Package(b"", "serial:1", cwt, True, None, []).verify(device.Chip(manufacturer))
        with self.assertRaises(Exception):
            device.Package(b"", "serial:1", cwt, True, None, []).verify(device.Chip(manufacturer_by_hand()[1]))


def manufacturer_by_hand():
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Maker")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return key, builder.sign(key, SHA256())


def sign_by_hand(claims: bytes, key, certificate) -> bytes:
    """Builds a COSE_Sign1 (RFC 9052 §4.4)."""
    key_id = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    protected = cbor2.dumps({1: -7, 4: key_id})
    der = key.sign(cbor2.dumps(["Signature1", protected, b"", claims]), ec.ECDSA(SHA256()))
    signature = b"".join(number.to_bytes(32) for number in decode_dss_signature(der))
    return cbor2.dumps(cbor2.CBORTag(18, [protected, {}, claims, signature]))


if __name__ == "__main__":
    unittest.main()
