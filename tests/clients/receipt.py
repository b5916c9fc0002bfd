"""Verifies receipts of the public database with SHA-256 and Ed25519 only.

Parses C2SP signed-note, tlog-checkpoint and tlog-proof strictly, so that each value has exactly one encoding.
"""

import base64
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

HEADER = "c2sp.org/tlog-proof@v1"
ED25519 = b"\x01"  # the signature type, C2SP signed-note
MAX_BYTES = 128 * 1024  # enough for 64 hashes and a checkpoint with many cosignatures
MAX_NUMBER = 2**64 - 1


class ReceiptError(Exception):
    """The receipt proves nothing."""


class Malformed(ReceiptError):
    """The input does not have the format that C2SP specifies."""


class NotSigned(ReceiptError):
    """The note has no signature by the log's key."""


class BadSignature(ReceiptError):
    """A signature with the log's name and key ID does not verify."""


class OtherLog(ReceiptError):
    """The checkpoint is of another log."""


class NotInTree(ReceiptError):
    """The hashes do not lead from the record to the root."""


@dataclass(frozen=True)
class LogKey:
    """The log's name and public key."""

    name: str
    public: bytes

    @classmethod
    def read(cls, vkey: bytes) -> "LogKey":
        """Parses NAME+ID+KEY, with or without a trailing newline."""
        parts = text_of(vkey, "vkey").removesuffix("\n").split("+", 2)
        well_formed(len(parts) == 3, "the vkey is not NAME+ID+KEY")
        name, key_id, key = parts
        well_formed(is_key_name(name), "the vkey's name is invalid")
        data = base64_of(key, "the vkey's key")
        well_formed(data[:1] == ED25519 and len(data) == 33, "the vkey's key is not an Ed25519 key of 32 bytes")
        found = cls(name, data[1:])
        well_formed(found.key_id.hex() == key_id, "the vkey's ID does not belong to its name and key")
        return found

    @property
    def key_id(self) -> bytes:
        return hashlib.sha256(self.name.encode() + b"\n" + ED25519 + self.public).digest()[:4]

    def verify(self, text: bytes, signature: bytes) -> None:
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text)
        except InvalidSignature:
            raise BadSignature(f"a signature by {self.name} does not verify") from None


def open_note(note: bytes, key: LogKey) -> str:
    """Returns the text of a signed note after verifying the key's signatures."""
    text, empty_line, signatures = text_of(note, "note").rpartition("\n\n")
    well_formed(empty_line != "", "no empty line ends the note's text")
    well_formed(signatures.endswith("\n"), "the note's last line does not end")
    text += "\n"
    signed = False
    # All lines must be well formed, and every signature by this key must verify. Signatures by other keys, such as cosignatures,
    # are ignored.
    for line in signatures.removesuffix("\n").split("\n"):
        name, key_id, signature = signature_line(line)
        if (name, key_id) == (key.name, key.key_id):
            key.verify(text.encode(), signature)
            signed = True
    if not signed:
        raise NotSigned(f"the note has no signature by {key.name} with the key ID {key.key_id.hex()}")
    return text


def signature_line(line: str) -> tuple[str, bytes, bytes]:
    """Parses a signature line into name, key ID and signature."""
    parts = line.split(" ")
    well_formed(len(parts) == 3 and parts[0] == "\N{EM DASH}" and is_key_name(parts[1]), "malformed signature line")
    data = base64_of(parts[2], "a signature")
    well_formed(len(data) > 4, "a signature has no bytes after its key ID")
    return parts[1], data[:4], data[4:]


@dataclass(frozen=True)
class Checkpoint:
    """A tree's size and root, signed by its log."""

    size: int
    root: bytes

    @classmethod
    def verify(cls, note: bytes, key: LogKey) -> "Checkpoint":
        lines = open_note(note, key).removesuffix("\n").split("\n")
        # C2SP allows extension lines. This log writes none, and no auditor would check them.
        well_formed(len(lines) == 3, "the checkpoint does not have three lines: origin, size, root")
        origin, size, root = lines
        if origin != key.name:
            raise OtherLog(f"the checkpoint is of the log {origin!r}, not of {key.name!r}")
        return cls(number(size, "the tree's size"), hash_of_base64(root, "the root"))


@dataclass(frozen=True)
class Proof:
    """An entry's index and the hashes from it to the root. Untrusted until verified."""

    index: int
    hashes: list[bytes]
    checkpoint: bytes

    @classmethod
    def read(cls, data: bytes) -> "Proof":
        head, empty_line, checkpoint = text_of(data, "proof").partition("\n\n")
        well_formed(empty_line != "", "no empty line ends the proof's hashes")
        header, *lines = head.split("\n")
        well_formed(header == HEADER, f"the proof's first line is not {HEADER}")
        if lines and lines[0].startswith("extra "):
            # Must be well formed like the rest, but is discarded: no signature covers it.
            base64_of(lines.pop(0).removeprefix("extra "), "the extra data")
        well_formed(lines != [] and lines[0].startswith("index "), "the proof has no index line")
        index = number(lines[0].removeprefix("index "), "the index")
        return cls(index, [hash_of_base64(line, "a line of the proof") for line in lines[1:]], checkpoint.encode())

    def verify(self, record: bytes, key: LogKey) -> Checkpoint:
        """Returns the checkpoint if the log signed it and its tree has the record at the index."""
        checkpoint = Checkpoint.verify(self.checkpoint, key)
        check_inclusion(leaf_hash(record), self.index, self.hashes, checkpoint)
        return checkpoint


def check_inclusion(leaf: bytes, index: int, hashes: list[bytes], checkpoint: Checkpoint) -> None:
    """Verifies inclusion (RFC 9162 §2.1.3.2, with the RFC's variable names)."""
    if index >= checkpoint.size:
        raise NotInTree(f"there is no entry {index} in a tree of {checkpoint.size}")
    fn, sn, r = index, checkpoint.size - 1, leaf
    for p in hashes:
        if sn == 0:
            raise NotInTree("the proof has more hashes than there are levels")
        if fn & 1 or fn == sn:
            r = node_hash(p, r)
            # The last node of a level without a right sibling moves up unchanged.
            while not fn & 1 and fn != 0:
                fn, sn = fn >> 1, sn >> 1
        else:
            r = node_hash(r, p)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise NotInTree("the proof has fewer hashes than it needs")
    if r != checkpoint.root:
        raise NotInTree("the proof's root does not match the signed root")


def leaf_hash(record: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + record).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def well_formed(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Malformed(otherwise)


def text_of(data: bytes, what: str) -> str:
    well_formed(len(data) <= MAX_BYTES, f"the {what} has more than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed(f"the {what} is not UTF-8") from None
    well_formed(all(character >= " " or character == "\n" for character in text), f"the {what} has control characters")
    return text


def is_key_name(name: str) -> bool:
    return name != "" and not any(character.isspace() or character == "+" for character in name)


def number(digits: str, what: str) -> int:
    # Check the length first: int() is slow for long inputs, and raises ValueError for very long ones.
    is_number = len(digits) <= 20 and digits.isascii() and digits.isdigit()
    well_formed(is_number and str(int(digits)) == digits and int(digits) <= MAX_NUMBER, f"{what} is not a number")
    return int(digits)


def base64_of(text: str, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise Malformed(f"{what} is not base64") from None
    # b64decode ignores unused trailing bits, so several texts would decode to one value.
    well_formed(base64.b64encode(data).decode() == text, f"{what} is not canonical base64")
    return data


def hash_of_base64(text: str, what: str) -> bytes:
    data = base64_of(text, what)
    well_formed(len(data) == 32, f"{what} is not a hash of 32 bytes")
    return data
