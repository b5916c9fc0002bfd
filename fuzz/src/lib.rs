//! Fuzz targets: one function per parser of untrusted bytes. No function may panic, and accepted input must satisfy its
//! assertions.
//!
//! The same functions run under libFuzzer (`fuzz_targets/`) and, with damaged samples, in `cargo test --test integration
//! parsers`. Each returns whether it accepted the bytes, so that tests can check that the samples are valid.

pub mod samples;

use spp_format::certificate::{
    IssuerCertificate, Profile, parse_caller_certificate, verify_csr, verify_device_certificate,
};
use spp_format::keys::{KeyType, PublicKey, SignatureAlgorithm};
use spp_format::names::{ChipId, DeviceIdentity, KeyName, OfficerName, ProfileName, SessionId, StationName};
use spp_format::package::{
    BackupFormat, BackupPackage, BackupRules, ConfirmationKey, DataPackage, MAX_BACKUP_LEN, TransportCurve,
    TransportPublicKey, open, open_backup, verify_confirmation,
};
use spp_format::record::{AuditCheckpoint, DeviceRecord, LogEntry};
use spp_format::tlog::{self, LogKey, LogProof, Origin, SignedCheckpoint, TileId, WitnessKey};

use samples::{CONTEXT, MAC_CONTEXT};

/// A fuzzed parser.
pub struct Target {
    /// The target's name, equal to its file name in `fuzz_targets/`.
    pub name: &'static str,
    /// Parses the bytes and returns whether they were accepted.
    pub parse: fn(&[u8]) -> bool,
    /// Valid inputs.
    pub samples: fn() -> Vec<Vec<u8>>,
}

/// All fuzz targets.
pub const TARGETS: &[Target] = &[
    Target { name: "data_package", parse: data_package, samples: samples::data_packages },
    Target { name: "sealed_package", parse: sealed_package, samples: samples::sealed_packages },
    Target { name: "backup", parse: backup, samples: samples::backups },
    Target { name: "confirmation", parse: confirmation, samples: samples::confirmations },
    Target { name: "csr", parse: csr, samples: samples::csrs },
    Target { name: "caller", parse: caller, samples: samples::callers },
    Target { name: "x509", parse: x509, samples: samples::x509 },
    Target { name: "cwt", parse: cwt, samples: samples::cwts },
    Target { name: "record", parse: record, samples: samples::records },
    Target { name: "audit_checkpoint", parse: audit_checkpoint, samples: samples::audit_checkpoints },
    Target { name: "names", parse: names, samples: samples::names },
    Target { name: "profile", parse: profile, samples: samples::profiles },
    Target { name: "issuer", parse: issuer, samples: samples::issuers },
    Target { name: "keys", parse: keys, samples: samples::keys },
    Target { name: "log_proof", parse: log_proof, samples: samples::log_proofs },
    Target { name: "checkpoint", parse: checkpoint, samples: samples::checkpoints },
    Target { name: "tile", parse: tile, samples: samples::tiles },
    Target { name: "bundle", parse: bundle, samples: samples::bundles },
    Target { name: "vkey", parse: vkey, samples: samples::vkeys },
];

/// A package has one encoding: re-encoding yields the same bytes.
pub fn data_package(bytes: &[u8]) -> bool {
    let Ok(package) = DataPackage::decode(bytes) else { return false };
    let written = package.encode().expect("a decoded package can be encoded");
    assert!(written.expose() == bytes, "the encoding must be deterministic");
    true
}

/// A package that opens was sealed to this chip for this session.
pub fn sealed_package(bytes: &[u8]) -> bool {
    let Ok(opened) = open(bytes, &CONTEXT.transport, &CONTEXT.package.session, &CONTEXT.package.chip) else {
        return false;
    };
    assert!(opened.expose() == CONTEXT.bytes.expose(), "only the sample package was sealed");
    true
}

/// An accepted backup is published unchanged and contains no secret in clear.
pub fn backup(bytes: &[u8]) -> bool {
    let package = &CONTEXT.package;
    let certificate = package.certificate.device_certificate();
    if let Ok(opened) = open_backup(bytes, &CONTEXT.chip_key, &package.chip, certificate) {
        assert!(opened.expose() == CONTEXT.bytes.expose(), "only the sample package was encrypted");
    }
    let accept = |format| {
        let rules = BackupRules { format, max_bytes: MAX_BACKUP_LEN };
        BackupPackage::accept(bytes, &rules, &package.chip, &CONTEXT.bytes, &package.secrets())
    };
    let opaque = accept(BackupFormat::Opaque);
    let Ok(accepted) = accept(BackupFormat::Cose) else { return false };
    assert!(opaque.is_ok(), "the opaque rules are weaker");
    assert!(accepted.as_bytes() == bytes && bytes.len() <= MAX_BACKUP_LEN);
    true
}

/// A verified confirmation contains exactly the claims of the delivery.
pub fn confirmation(bytes: &[u8]) -> bool {
    let pair = CONTEXT.package.key_pair.as_ref().expect("the sample has a pair");
    let symmetric = MAC_CONTEXT.package.symmetric_keys[0].key();
    let by_pair = verify_confirmation(bytes, &CONTEXT.claims, &ConfirmationKey::Pair(pair.public()));
    let by_mac = verify_confirmation(bytes, &MAC_CONTEXT.claims, &ConfirmationKey::Symmetric(symmetric));
    match (by_pair, by_mac) {
        (Ok(confirmed), Err(_)) => assert!(*confirmed.claims() == CONTEXT.claims),
        (Err(_), Ok(confirmed)) => assert!(*confirmed.claims() == MAC_CONTEXT.claims),
        (Err(_), Err(_)) => return false,
        (Ok(_), Ok(_)) => panic!("one confirmation for two devices"),
    }
    true
}

/// The key of an accepted request can be encoded and decoded.
pub fn csr(bytes: &[u8]) -> bool {
    let Ok(key) = verify_csr(bytes) else { return false };
    assert!(PublicKey::from_spki_der(key.spki_der()).as_ref() == Ok(&key));
    true
}

/// A client certificate.
pub fn caller(bytes: &[u8]) -> bool {
    parse_caller_certificate(bytes).is_ok()
}

/// An X.509 device certificate of the manufacturer.
pub fn x509(bytes: &[u8]) -> bool {
    device_certificate(bytes, false)
}

/// A CWT of the manufacturer.
pub fn cwt(bytes: &[u8]) -> bool {
    device_certificate(bytes, true)
}

fn device_certificate(bytes: &[u8], is_cwt: bool) -> bool {
    let package = &CONTEXT.package;
    let verified = verify_device_certificate(bytes, is_cwt, samples::manufacturer(), &package.chip);
    let Ok(certificate) = verified else { return false };
    assert!(certificate.binds_identity(&package.identity), "the manufacturer signed no other identity");
    true
}

/// A record has one encoding: re-encoding yields the same bytes.
pub fn record(bytes: &[u8]) -> bool {
    let Ok(record) = DeviceRecord::from_bytes(bytes) else { return false };
    assert!(record.to_bytes().as_deref() == Ok(bytes), "the encoding must be deterministic");
    assert!(matches!(LogEntry::from_bytes(bytes), Ok(LogEntry::Device(_))), "it is a device record");
    true
}

/// An audit checkpoint has one encoding, and it is not a device record.
pub fn audit_checkpoint(bytes: &[u8]) -> bool {
    let Ok(checkpoint) = AuditCheckpoint::from_bytes(bytes) else { return false };
    assert!(checkpoint.to_bytes().as_deref() == Ok(bytes), "the encoding must be deterministic");
    assert!(matches!(LogEntry::from_bytes(bytes), Ok(LogEntry::Audit(_))), "it is an audit checkpoint");
    true
}

/// A name's text form parses to the same name.
pub fn names(bytes: &[u8]) -> bool {
    fn stable<T: std::str::FromStr + ToString + PartialEq>(text: &str) -> bool {
        let Ok(name) = text.parse::<T>() else { return false };
        assert!(name.to_string().parse::<T>().is_ok_and(|again| again == name), "a name must parse from its own text");
        true
    }
    let from_bytes = ChipId::from_bytes(bytes).is_ok() | SessionId::from_bytes(bytes).is_ok();
    let Ok(text) = std::str::from_utf8(bytes) else { return from_bytes };
    let accepted = [
        stable::<ChipId>(text),
        stable::<DeviceIdentity>(text),
        stable::<StationName>(text),
        stable::<OfficerName>(text),
        stable::<ProfileName>(text),
        stable::<KeyName>(text),
        stable::<SessionId>(text),
    ];
    accepted.contains(&true)
}

/// A profile, or all its faults.
pub fn profile(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let name: ProfileName = "fuzz".parse().expect("a valid name");
    match Profile::from_toml(name, "fuzz.toml", text) {
        Ok(_) => true,
        Err(faults) => {
            assert!(!faults.to_string().is_empty(), "an error has a message");
            false
        }
    }
}

/// An issuer chain as an offline root returns it.
pub fn issuer(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    IssuerCertificate::from_pem(text, SignatureAlgorithm::EcdsaP256Sha256).is_ok()
}

/// Public keys of devices, and transport keys.
pub fn keys(bytes: &[u8]) -> bool {
    let curves = [TransportCurve::P256, TransportCurve::X25519];
    let transport = curves.into_iter().any(|curve| TransportPublicKey::new(curve, bytes).is_ok());
    let point = [KeyType::P256, KeyType::P384].into_iter().any(|kind| PublicKey::from_ec_point(kind, bytes).is_ok());
    let spki = PublicKey::from_spki_der(bytes);
    if let Ok(key) = &spki {
        assert!(PublicKey::from_spki_der(key.spki_der()).as_ref() == Ok(key));
    }
    transport || point || spki.is_ok()
}

/// A proof re-encodes to an equal proof, except for extra data, and proves only the sample record.
pub fn log_proof(bytes: &[u8]) -> bool {
    let Ok(proof) = LogProof::from_bytes(bytes) else { return false };
    let written = proof.to_bytes();
    assert!(LogProof::from_bytes(&written).as_ref() == Ok(&proof), "an encoded proof decodes to itself");
    if let Ok(verified) = proof.verify(samples::LOG_RECORD, &samples::log_key()) {
        assert!(
            verified.index == proof.index() && verified.index < verified.checkpoint.size(),
            "the index is within the tree"
        );
    }
    assert!(proof.verify(b"another record", &samples::log_key()).is_err(), "no other record is proven");
    true
}

/// Only the log can sign its checkpoints: only the sample's tree is accepted.
pub fn checkpoint(bytes: &[u8]) -> bool {
    let Ok(checkpoint) = SignedCheckpoint::verify(bytes, &samples::log_key()) else { return false };
    let [sample] = samples::checkpoints().try_into().expect("one sample");
    let sample = SignedCheckpoint::verify(&sample, &samples::log_key()).expect("the sample is valid");
    assert!(checkpoint.is_same_tree(&sample), "only the sample's tree was signed");
    true
}

/// A tile has one path.
pub fn tile(bytes: &[u8]) -> bool {
    let Some(tile) = std::str::from_utf8(bytes).ok().and_then(|path| path.parse::<TileId>().ok()) else {
        return false;
    };
    assert!(tile.to_string().as_bytes() == bytes, "one text form");
    assert!((1..=256).contains(&tile.width()), "the width is 1 to 256");
    true
}

/// The entries of a bundle re-encode to the same bundle.
pub fn bundle(bytes: &[u8]) -> bool {
    let Ok(entries) = tlog::bundle::entries(bytes).collect::<Result<Vec<_>, _>>() else { return false };
    let mut written = Vec::new();
    for entry in &entries {
        tlog::bundle::push(&mut written, entry).expect("a decoded entry can be encoded");
    }
    assert!(
        written == bytes && tlog::bundle::decode_exactly(bytes, entries.len()).is_ok(),
        "the bundle re-encodes to itself"
    );
    true
}

/// Public keys of logs and witnesses, and log origins.
pub fn vkey(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let log = text.parse::<LogKey>().map(|key| key.to_string());
    let witness = text.parse::<WitnessKey>().map(|key| key.to_string());
    let origin = text.parse::<Origin>().map(|origin| origin.to_string());
    for written in [&log, &witness].into_iter().flatten() {
        assert!(written == text.trim_end(), "one text form");
    }
    assert!(log.is_err() || witness.is_err(), "a key is either a log key or a witness key");
    log.is_ok() || witness.is_ok() || origin.is_ok()
}
