#!/usr/bin/env python3
"""Provisions and recovers one device; of this repository it uses only the .proto files.

Shows that the interfaces are sufficient without our own client: gRPC by grpcio, COSE by cwt, X.509 by cryptography, receipts by
receipt.py. Prints each verified step. Exit status 0 on success.
"""

import argparse
import hashlib
import secrets
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from device import Chip, Package, Refused, require
from receipt import Checkpoint, LogKey, Proof, ReceiptError

PROTO = Path(__file__).resolve().parents[2] / "proto"
TRANSPORT_P256 = 1  # TransportKeyType.TRANSPORT_KEY_TYPE_P256
ISSUED, ERASED = 2, 4  # SessionState


def main() -> int:
    arguments = parse_arguments()
    try:
        Tour(arguments).run()
    except (Refused, ReceiptError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"call failed: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--line", required=True, metavar="HOST:PORT", help="the listener of the stations")
    parser.add_argument("--public", required=True, metavar="HOST:PORT", help="the public listener")
    parser.add_argument("--tls", required=True, type=Path, help="directory with certificate.pem, key.pem and ca.pem")
    parser.add_argument("--manufacturer", required=True, type=Path, help="the manufacturer's CA certificate (PEM)")
    parser.add_argument("--log-key", required=True, type=Path, help="the public database's key (vkey)")
    parser.add_argument("--profile", default="phone")
    parser.add_argument("--identity", help="default: a random IMEI of TAC 49015423 for phone, else a random serial")
    parser.add_argument("--sealed", action="store_true", help="request delivery sealed to the chip's P-256 key")
    parser.add_argument("--csr", action="store_true", help="let the device generate its own key pair")
    parser.add_argument("--certificate-out", type=Path, help="write the device certificate here (PEM, or the CWT)")
    return parser.parse_args()


class Tour:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.profile = arguments.profile
        self.identity = arguments.identity or random_identity(self.profile)
        self.chip = Chip(x509.load_pem_x509_certificate(arguments.manufacturer.read_bytes()))
        self.log_key = LogKey.read(arguments.log_key.read_bytes())
        self.spp, self.spp_recovery, line_service, recovery_service = generated_code()
        self.line = line_service.LineStub(station_channel(arguments.line, arguments.tls))
        self.public = recovery_service.RecoveryStub(public_channel(arguments.public, arguments.tls))

    def run(self) -> None:
        say(f"chip {self.chip.chip_id.hex()}, {self.identity}, profile {self.profile}")
        self.refuses_bad_orders()
        order, package, session = self.assemble()
        backup = self.chip.back_up(package.data, package.certificate)
        self.refuses_a_wrong_confirmation(package, session, backup)
        receipts = self.complete(order, package, session, backup)
        published = self.recover(package, session, backup)
        self.verify_receipts(receipts, published)
        self.write_certificate(package)

    def order(self) -> dict:
        fields = {"chip_id": self.chip.chip_id, "identity": self.identity, "profile": self.profile}
        if self.arguments.csr:
            fields["csr"] = self.chip.request(self.identity)
        if self.arguments.sealed:
            key = {"type": TRANSPORT_P256, "public_key": self.chip.transport_point()}
            fields["transport_key"] = self.spp.TransportKey(**key)
        return fields

    def refuses_bad_orders(self) -> None:
        good = self.order()
        for what, change in {
            "a chip ID of 7 bytes": {"chip_id": bytes(7)},
            "an IMEI with a wrong check digit": {"identity": "imei:490154203237519"},
            "an unknown kind of identity": {"identity": "name:x"},
        }.items():
            bad = self.spp.AssembleRequest(**{**good, **change})
            refused(lambda bad=bad: self.line.Assemble(bad, timeout=10), grpc.StatusCode.INVALID_ARGUMENT, what)
        say("invalid orders are refused as INVALID_ARGUMENT")

    def assemble(self) -> tuple[object, Package, bytes]:
        order = self.spp.AssembleRequest(**self.order())
        answer = self.line.Assemble(order, timeout=30)
        package = self.read(answer)
        package.verify(self.chip)
        require(answer.certificate == package.certificate, "the answer and the package hold different certificates")
        require((answer.certificate_format == 2) == package.is_cwt, "certificate_format does not match the certificate")
        kind = "CWT" if package.is_cwt else "certificate"
        say(f"the {kind} verifies with the manufacturer's key; it binds this chip, this identity and this key")
        purposes = ", ".join(f"{purpose} ({8 * len(key)} bits)" for purpose, key in package.symmetric_keys)
        say(f"the package is deterministic CBOR; symmetric keys: {purposes or 'none'}")

        again = self.line.Assemble(order, timeout=30)
        require(again.session_id == answer.session_id, "a repeated order opened another session")
        require(self.read(again).data == package.data, "a repeated order got another package")
        say("a repeated order gets the same package")
        return order, package, answer.session_id

    def read(self, answer) -> Package:
        sealed = answer.WhichOneof("delivery") == "sealed_package"
        require(sealed == self.arguments.sealed, "the delivery (sealed or plain) does not match the order")
        data = answer.data_package
        if sealed:
            data = self.chip.unseal(answer.sealed_package, answer.session_id)
            say("the chip decrypts the sealed package")
        return Package.read(data, self.chip, answer.session_id, self.identity, self.profile)

    def refuses_a_wrong_confirmation(self, package: Package, session: bytes, backup: bytes) -> None:
        confirmation = self.chip.confirm(package, session, backup + b"\0")
        wrong = self.spp.CompleteRequest(session_id=session, backup_package=backup, key_confirmation=confirmation)
        refused(
            lambda: self.line.Complete(wrong, timeout=30),
            grpc.StatusCode.FAILED_PRECONDITION,
            "a confirmation of another backup",
        )
        self.expect_state(session, ISSUED)
        say("an invalid confirmation is refused as FAILED_PRECONDITION and changes nothing")

    def complete(self, order, package: Package, session: bytes, backup: bytes) -> list:
        confirmation = self.chip.confirm(package, session, backup)
        request = self.spp.CompleteRequest(session_id=session, backup_package=backup, key_confirmation=confirmation)
        receipt = self.line.Complete(request, timeout=30).receipt
        say(f"backup and confirmation are accepted: record {receipt.record_index}")
        again = self.line.Complete(request, timeout=30).receipt
        require(again == receipt, "a repeated Complete got another receipt")
        say("a repeated Complete gets the same receipt")
        self.expect_state(session, ERASED)
        refused(
            lambda: self.line.Assemble(order, timeout=30),
            grpc.StatusCode.ALREADY_EXISTS,
            "the order of a completed device",
        )
        say("the key pair is erased, and a further Assemble is refused")
        return [receipt, again]

    def expect_state(self, session: bytes, state: int) -> None:
        found = self.line.GetSession(self.spp.GetSessionRequest(session_id=session), timeout=10).state
        require(found == state, f"the session is in state {found}, not {state}")

    def recover(self, package: Package, session: bytes, backup: bytes):
        published = self.public.GetRecord(self.spp_recovery.GetRecordRequest(chip_id=self.chip.chip_id), timeout=10)
        record = published.record
        for name, value in {
            "chip_id": self.chip.chip_id,
            "identity": self.identity,
            "profile": self.profile,
            "certificate": package.certificate,
            "backup_package": backup,
            "session_id": session,
        }.items():
            require(getattr(record, name) == value, f"the public record has another {name}")
        hash_of_record = hashlib.sha256(published.record_bytes).digest()
        require(hash_of_record == published.receipt.record_hash, "the receipt is for another record")
        restored = self.chip.restore(record.backup_package, record.certificate)
        require(restored == package.data, "the backup does not hold the package")
        say("the backup from the public database restores the package, byte for byte")
        return published

    def verify_receipts(self, receipts: list, published) -> None:
        """Verifies receipts with the record and the log's key only."""
        for receipt in receipts:
            require(place(receipt) == place(published.receipt), "Complete and GetRecord return different positions of the record")
        seen = [self.verify_proof(receipt.tlog_proof, published) for receipt in receipts]
        index = published.receipt.record_index
        say(f"the receipt proves record {index} in the log {self.log_key.name} of {seen[0].size} by the log's key alone")

        for which in ({"chip_id": self.chip.chip_id}, {"record_index": index}):
            answer = self.public.GetProof(self.spp_recovery.GetProofRequest(**which), timeout=10)
            require(answer.record_index == index, f"GetProof answers for record {answer.record_index}, not {index}")
            seen.append(self.verify_proof(answer.tlog_proof, published))
        say("GetProof proves the same, by chip and by index")

        newest = self.newest_checkpoint()
        require(newest.size >= max(checkpoint.size for checkpoint in seen), "the newest checkpoint is older than a proof's")
        # Without a consistency proof, this is the only possible check: two trees of the same size must have the same root.
        roots = {(checkpoint.size, checkpoint.root) for checkpoint in [*seen, newest]}
        require(len(roots) == len(dict(roots)), "the log has signed two trees of the same size")
        say(f"the newest checkpoint verifies and covers them all: {newest.size} entries")

    def verify_proof(self, data: bytes, published) -> Checkpoint:
        proof = Proof.read(data)
        index = published.receipt.record_index
        require(proof.index == index, f"the proof is for record {proof.index}, not {index}")
        return proof.verify(published.record_bytes, self.log_key)

    def newest_checkpoint(self) -> Checkpoint:
        answer = self.public.GetCheckpoint(self.spp_recovery.GetCheckpointRequest(), timeout=10)
        checkpoint = Checkpoint.verify(answer.checkpoint, self.log_key)
        fields = Checkpoint(answer.size, answer.root_hash)
        require(fields == checkpoint, "GetCheckpoint's size or root does not match its checkpoint")
        return checkpoint

    def write_certificate(self, package: Package) -> None:
        if self.arguments.certificate_out is None:
            return
        data = package.certificate
        if not package.is_cwt:
            data = x509.load_der_x509_certificate(data).public_bytes(Encoding.PEM)
        self.arguments.certificate_out.write_bytes(data)


def place(receipt) -> tuple:
    """Returns a receipt without its proof, whose checkpoint may be newer in each answer."""
    return receipt.record_index, receipt.record_hash, receipt.published


def refused(call, expected: grpc.StatusCode, what: str) -> None:
    try:
        call()
    except grpc.RpcError as error:
        require(error.code() == expected, f"{what}: {error.code().name} ({error.details()}), not {expected.name}")
    else:
        raise Refused(f"{what} was accepted")


def generated_code():
    """Generates message and service classes from the .proto files."""
    from grpc_tools import protoc

    folder = tempfile.mkdtemp(prefix="spp-proto-")
    well_known = Path(protoc.__file__).parent / "_proto"
    files = ["spp/v1/line.proto", "spp/v1/recovery.proto"]
    status = protoc.main(
        ["protoc", f"-I{PROTO}", f"-I{well_known}", f"--python_out={folder}", f"--grpc_python_out={folder}", *files]
    )
    require(status == 0, "protoc cannot compile the .proto files")
    sys.path.insert(0, folder)
    modules = ("line_pb2", "recovery_pb2", "line_pb2_grpc", "recovery_pb2_grpc")
    return tuple(import_module(f"spp.v1.{name}") for name in modules)


def station_channel(address: str, tls: Path) -> grpc.Channel:
    files = [(tls / name).read_bytes() for name in ("ca.pem", "key.pem", "certificate.pem")]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*files))


def public_channel(address: str, tls: Path) -> grpc.Channel:
    return grpc.secure_channel(address, grpc.ssl_channel_credentials((tls / "ca.pem").read_bytes()))


def random_identity(profile: str) -> str:
    if profile != "phone":
        return f"serial:PY-{secrets.token_hex(6)}"
    digits = f"49015423{secrets.randbelow(10**6):06}"
    doubled = [int(digit) * (2 if place % 2 else 1) for place, digit in enumerate(digits)]
    return f"imei:{digits}{-sum(n // 10 + n % 10 for n in doubled) % 10}"


def say(what: str) -> None:
    print(f"   ok: {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
