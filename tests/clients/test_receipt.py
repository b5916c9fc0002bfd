"""Tests the receipt verifier with trees and notes built from RFC 6962 §2.1 and C2SP signed-note."""

import base64
import hashlib
import unittest

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import receipt
from receipt import BadSignature, Checkpoint, LogKey, Malformed, NotInTree, NotSigned, OtherLog, Proof, ReceiptError

NAME = "log.example/test"


def entry(n: int) -> bytes:
    return b"entry %d" % n


def root_by_hand(entries: list[bytes]) -> bytes:
    """MTH of RFC 6962 §2.1."""
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = split(len(entries))
    return hashlib.sha256(b"\x01" + root_by_hand(entries[:k]) + root_by_hand(entries[k:])).digest()


def path_by_hand(m: int, entries: list[bytes]) -> list[bytes]:
    """PATH of RFC 6962 §2.1.1."""
    if len(entries) == 1:
        return []
    k = split(len(entries))
    if m < k:
        return path_by_hand(m, entries[:k]) + [root_by_hand(entries[k:])]
    return path_by_hand(m - k, entries[k:]) + [root_by_hand(entries[:k])]


def split(n: int) -> int:
    """The largest power of two smaller than n."""
    return 1 << (n - 1).bit_length() - 1


def key_id_by_hand(name: str, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n\x01" + public).digest()[:4]


class Log:
    """A log that signs any text."""

    def __init__(self, name: str = NAME):
        self.name = name
        self._key = Ed25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()

    def vkey(self, kind: bytes = b"\x01") -> str:
        key = base64.b64encode(kind + self.public).decode()
        return f"{self.name}+{key_id_by_hand(self.name, self.public).hex()}+{key}"

    def key(self) -> LogKey:
        return LogKey.read(self.vkey().encode())

    def note(self, text: str) -> str:
        return f"{text}\n{self.signature(text)}"

    def signature(self, text: str, name: str | None = None, key_id: bytes | None = None) -> str:
        data = (key_id or key_id_by_hand(self.name, self.public)) + self._key.sign(text.encode())
        return f"— {name or self.name} {base64.b64encode(data).decode()}\n"

    def checkpoint(self, size: int, root: bytes, origin: str | None = None) -> str:
        return self.note(f"{origin or self.name}\n{size}\n{base64.b64encode(root).decode()}\n")

    def proof(self, index: int, size: int) -> str:
        entries = [entry(n) for n in range(size)]
        return proof_by_hand(index, path_by_hand(index, entries), self.checkpoint(size, root_by_hand(entries)))


def proof_by_hand(index: int, hashes: list[bytes], checkpoint: str) -> str:
    lines = "".join(base64.b64encode(hash).decode() + "\n" for hash in hashes)
    return f"c2sp.org/tlog-proof@v1\nindex {index}\n{lines}\n{checkpoint}"


class Receipts(unittest.TestCase):
    def setUp(self):
        self.log = Log()
        self.key = self.log.key()

    def verify(self, proof: str, record: bytes) -> Checkpoint:
        return Proof.read(proof.encode()).verify(record, self.key)

    def replaced(self, text: str, old: str, new: str) -> str:
        self.assertIn(old, text)
        return text.replace(old, new, 1)

    def test_proof_verifies_only_its_entry_at_its_index(self):
        for size in range(1, 21):
            for index in range(size):
                proof = self.log.proof(index, size)
                root = root_by_hand([entry(n) for n in range(size)])
                self.assertEqual(self.verify(proof, entry(index)), Checkpoint(size, root))
                for other in {*range(size + 1)} - {index}:
                    with self.assertRaises(NotInTree):
                        self.verify(proof, entry(other))
                    with self.assertRaises(NotInTree):
                        self.verify(self.replaced(proof, f"index {index}\n", f"index {other}\n"), entry(index))

    def test_proof_with_missing_extra_or_changed_hashes_is_refused(self):
        for size in range(1, 21):
            entries = [entry(n) for n in range(size)]
            checkpoint = self.log.checkpoint(size, root_by_hand(entries))
            for index in range(size):
                right = path_by_hand(index, entries)
                wrong = [right + [bytes(32)], [bytes(32)] + right, right + right[-1:] * 64 + [bytes(32)]]
                for at in range(len(right)):
                    wrong.append(right[:at] + right[at + 1 :])
                    wrong.append(right[:at] + [bytes(32)] + right[at + 1 :])
                    wrong.append(right[:at] + [right[at]] + right[at:])
                if len(right) > 1:
                    wrong.append(right[::-1])
                for hashes in wrong:
                    with self.assertRaises(NotInTree):
                        self.verify(proof_by_hand(index, hashes, checkpoint), entry(index))

    def test_node_or_root_is_not_accepted_as_entry(self):
        # Leaf and node hashes have different prefixes, so that no node passes for an entry (RFC 6962 §2.1).
        left, right = (hashlib.sha256(b"\x00" + entry(n)).digest() for n in (0, 1))
        checkpoint = self.log.checkpoint(1, root_by_hand([entry(0), entry(1)]))
        with self.assertRaises(NotInTree):
            self.verify(proof_by_hand(0, [], checkpoint), left + right)
        with self.assertRaises(NotInTree):
            self.verify(proof_by_hand(0, [], self.log.checkpoint(1, bytes(32))), bytes(32))

    def test_empty_tree_contains_no_entry(self):
        checkpoint = self.log.checkpoint(0, hashlib.sha256().digest())
        self.assertEqual(Checkpoint.verify(checkpoint.encode(), self.key).size, 0)
        with self.assertRaises(NotInTree):
            self.verify(proof_by_hand(0, [], checkpoint), entry(0))

    def test_checkpoint_not_signed_by_log_is_refused(self):
        proof, root = self.log.proof(2, 5), root_by_hand([entry(n) for n in range(5)])
        signed = f"{NAME}\n5\n{base64.b64encode(root).decode()}\n"
        with self.subTest("size"), self.assertRaises(BadSignature):
            self.verify(self.replaced(proof, "\n5\n", "\n6\n"), entry(2))
        with self.subTest("root"), self.assertRaises(BadSignature):
            nothing = base64.b64encode(bytes(32)).decode()
            self.verify(self.replaced(proof, base64.b64encode(root).decode(), nothing), entry(2))
        with self.subTest("size, signed"), self.assertRaises(NotInTree):
            self.verify(proof_by_hand(2, Proof.read(proof.encode()).hashes, self.log.checkpoint(4, root)), entry(2))
        with self.subTest("root, signed"), self.assertRaises(NotInTree):
            self.verify(proof_by_hand(2, Proof.read(proof.encode()).hashes, self.log.checkpoint(5, bytes(32))), entry(2))
        with self.subTest("origin"), self.assertRaises(BadSignature):
            self.verify(self.replaced(proof, f"\n{NAME}\n", "\nlog.example/other\n"), entry(2))
        with self.subTest("an empty line more"), self.assertRaises(BadSignature):
            self.verify(self.replaced(proof, "=\n\n— ", "=\n\n\n— "), entry(2))
        with self.subTest("origin, signed"), self.assertRaises(OtherLog):
            self.verify(proof_by_hand(2, [], self.log.checkpoint(5, root, origin="log.example/other")), entry(2))
        other = self.log.signature("another text\n")
        with self.subTest("signature"), self.assertRaises(BadSignature):
            self.verify(self.replaced(proof, self.log.signature(signed), other), entry(2))
        for cut in (1, 32, 63):
            data = base64.b64decode(self.log.signature(signed).split(" ")[2])[:-cut]
            short = f"— {NAME} {base64.b64encode(data).decode()}\n"
            with self.subTest("cut off", cut=cut), self.assertRaises(BadSignature):
                self.verify(self.replaced(proof, self.log.signature(signed), short), entry(2))
        other = self.log.signature(signed, key_id=b"\1\2\3\4")
        with self.subTest("key ID"), self.assertRaises(NotSigned):
            self.verify(self.replaced(proof, self.log.signature(signed), other), entry(2))
        other = self.log.signature(signed, name="log.example/other")
        with self.subTest("name"), self.assertRaises(NotSigned):
            self.verify(self.replaced(proof, self.log.signature(signed), other), entry(2))
        with self.subTest("another log of that name"), self.assertRaises(NotSigned):
            self.verify(Log().proof(2, 5), entry(2))
        with self.subTest("another key with that ID"), self.assertRaises(BadSignature):
            forged = Log().signature(signed, key_id=self.key.key_id)
            self.verify(self.replaced(proof, self.log.signature(signed), forged), entry(2))

    def test_other_signatures_are_ignored_but_every_log_signature_must_verify(self):
        proof, witness = self.log.proof(2, 5), Log("witness.example/w1")
        cosigned = proof + witness.signature("what a witness signs") + Log().signature("of the same name")
        self.assertEqual(self.verify(cosigned, entry(2)).size, 5)
        lines = proof.split("\n")
        first = "\n".join([*lines[:-2], witness.signature("text").strip(), *lines[-2:]])
        self.assertEqual(self.verify(first, entry(2)).size, 5)
        with self.assertRaises(BadSignature):
            self.verify(proof + self.log.signature("another text"), entry(2))
        with self.assertRaises(Malformed):
            self.verify(proof + "— no signature\n", entry(2))

    def test_proof_with_changed_or_missing_bytes_is_refused(self):
        data = self.log.proof(2, 5).encode()
        for at in range(len(data)):
            for mask in (1, 0x20, 0x80):
                changed = data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
                with self.subTest(at=at, mask=mask), self.assertRaises(ReceiptError):
                    Proof.read(changed).verify(entry(2), self.key)
        for end in range(len(data)):
            with self.subTest(end=end), self.assertRaises(ReceiptError):
                Proof.read(data[:end]).verify(entry(2), self.key)

    def test_non_canonical_proof_is_refused(self):
        proof = self.log.proof(2, 5)
        with_extra = self.replaced(proof, "\nindex", "\nextra AAAA\nindex")
        self.assertEqual(self.verify(with_extra, entry(2)).size, 5)
        last_hash = proof.split("\n\n")[0].split("\n")[-1]
        # The last base64 character of 32 bytes carries four data bits and two unused bits.
        loose = last_hash[:-2] + chr(ord(last_hash[-2]) + 1) + "="
        self.assertEqual(base64.b64decode(loose), base64.b64decode(last_hash))
        for old, new in [
            ("@v1\n", "@v2\n"),
            ("c2sp.org", "\nc2sp.org"),
            ("index 2\n", ""),
            ("index", "Index"),
            ("index 2\n", "index 02\n"),
            ("index 2\n", "index -2\n"),
            ("index 2\n", "index +2\n"),
            ("index 2\n", "index ٢\n"),
            ("index 2\n", "index  2\n"),
            ("index 2\n", f"index {2**64}\n"),
            ("index 2\n", "index " + "9" * 10_000 + "\n"),
            ("\nindex", "\nextra\nindex"),
            ("\nindex", "\nextra A\nindex"),
            ("\nindex", "\nextra AAAA\nextra AAAA\nindex"),
            ("index 2\n", "index 2\nextra AAAA\n"),
            (f"{last_hash}\n", f"{last_hash}\r\n"),
            (f"\n{last_hash}", f"\n {last_hash}"),
            (f"{last_hash}\n\n", f"{last_hash}\n"),
            (last_hash, loose),
            (last_hash, last_hash[:-1]),
            (last_hash, "AAAA"),
            ("=\n\n—", "=\n—"),
            ("\n— ", "\n- "),
            ("— ", "—  "),
            (f"— {NAME} ", f"— {NAME}"),
            (f"— {NAME}", "— log+example"),
        ]:
            with self.subTest(f"{old!r} -> {new[:40]!r}"), self.assertRaises(Malformed):
                self.verify(self.replaced(proof, old, new), entry(2))
        for changed in (proof + "\n", proof + "x", proof[:-1], proof + " \n"):
            with self.subTest(changed[-4:]), self.assertRaises(Malformed):
                self.verify(changed, entry(2))
        with self.assertRaises(Malformed):
            Proof.read(b"\xff" + proof.encode())
        with self.assertRaises(Malformed):
            Proof.read(proof.encode() + b"\n" * receipt.MAX_BYTES)

    def test_non_canonical_checkpoint_is_refused(self):
        root = base64.b64encode(bytes(32)).decode()
        for text in (
            f"{NAME}\n5\n",
            f"{NAME}\n05\n{root}\n",
            f"{NAME}\n-5\n{root}\n",
            f"{NAME}\n 5\n{root}\n",
            f"{NAME}\n\n{root}\n",
            f"{NAME}\n{2**64}\n{root}\n",
            f"{NAME}\n5\nAAAA\n",
            f"{NAME}\n5\n{root[:-1]}\n",
            f"{NAME}\n5\n{root[:-2]}B=\n",
            f"{NAME}\n5\n{root}\nan extension\n",
        ):
            with self.subTest(text), self.assertRaises(Malformed):
                Checkpoint.verify(self.log.note(text).encode(), self.key)
        self.assertEqual(Checkpoint.verify(self.log.note(f"{NAME}\n5\n{root}\n").encode(), self.key).size, 5)

    def test_inconsistent_vkey_is_refused(self):
        vkey = self.log.vkey()
        self.assertEqual(LogKey.read(f"{vkey}\n".encode()), self.key)
        name, key_id, key = vkey.split("+", 2)
        for wrong in (
            "",
            "a+b",
            f"{name}+{key_id}",
            f"+{key_id}+{key}",
            f"{name}2+{key_id}+{key}",
            f"log example+{key_id}+{key}",
            f"{name}+00000000+{key}",
            f"{name}+0{key_id}+{key}",
            f"{name}+{key_id}+{key[:-4]}",
            f"{name}+{key_id}+{key}AAAA",
            f"{name}+{key_id}+{key}\n\n",
            f" {vkey}",
            Log().vkey(kind=b"\x04"),
        ):
            with self.subTest(wrong), self.assertRaises(Malformed):
                LogKey.read(wrong.encode())


class PublishedVectors(unittest.TestCase):
    """Published test vectors, which catch errors that this file and the verifier share."""

    def test_roots_match_certificate_transparency(self):
        leaves = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
        entries = [bytes.fromhex(leaf) for leaf in leaves]
        roots = {
            1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
            7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        }
        for size, root in roots.items():
            self.assertEqual(root_by_hand(entries[:size]).hex(), root)

    def test_note_from_go_documentation_verifies(self):
        # golang.org/x/mod/sumdb/note
        key = LogKey.read(b"PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
        text = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
        signature = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
        note = f"{text}\n— PeterNeumann {signature}\n"
        self.assertEqual(receipt.open_note(note.encode(), key), text)
        with self.assertRaises(BadSignature):
            receipt.open_note(note.replace("don't", "do").encode(), key)


if __name__ == "__main__":
    unittest.main()
