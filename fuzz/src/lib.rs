//! What is done to bytes from outside, one function for each parser. None may panic, and what is accepted must hold.
//!
//! The same functions run under libFuzzer (`fuzz_targets/`) and, with damaged samples, in `cargo test --test integration parsers`. Each
//! says whether it accepted the bytes, so that a test can tell that its samples are good ones.

pub mod samples;

use spp::certificate::{IssuerCertificate, Profile, caller_of, verify_csr, verify_device_certificate};
use spp::keys::{KeyKind, PublicKey, SignatureAlgorithm};
use spp::names::{ChipId, DeviceIdentity, KeyName, OfficerName, ProfileName, SessionId, StationName};
use spp::package::{
    BackupFormat, BackupPackage, BackupRules, ConfirmationKey, DataPackage, MAX_BACKUP_LEN, TransportCurve,
    TransportPublicKey, open, open_backup, verify_confirmation,
};
use spp::store::{AuditCheckpoint, DeviceRecord, LogEntry};
use spp::tlog::{self, LogKey, LogProof, Origin, SignedCheckpoint, TileId, WitnessKey};

use samples::{CONTEXT, MAC_CONTEXT};

/// A parser that is fuzzed.
pub struct Target {
    /// Its name, as of its file in `fuzz_targets/`.
    pub name: &'static str,
    /// Reads bytes; whether it accepted them.
    pub reads: fn(&[u8]) -> bool,
    /// Bytes that it accepts.
    pub samples: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "data_package", reads: data_package, samples: samples::data_packages },
    Target { name: "sealed_package", reads: sealed_package, samples: samples::sealed_packages },
    Target { name: "backup", reads: backup, samples: samples::backups },
    Target { name: "confirmation", reads: confirmation, samples: samples::confirmations },
    Target { name: "csr", reads: csr, samples: samples::csrs },
    Target { name: "caller", reads: caller, samples: samples::callers },
    Target { name: "x509", reads: x509, samples: samples::x509 },
    Target { name: "cwt", reads: cwt, samples: samples::cwts },
    Target { name: "record", reads: record, samples: samples::records },
    Target { name: "audit_checkpoint", reads: audit_checkpoint, samples: samples::audit_checkpoints },
    Target { name: "names", reads: names, samples: samples::names },
    Target { name: "profile", reads: profile, samples: samples::profiles },
    Target { name: "issuer", reads: issuer, samples: samples::issuers },
    Target { name: "keys", reads: keys, samples: samples::keys },
    Target { name: "log_proof", reads: log_proof, samples: samples::log_proofs },
    Target { name: "checkpoint", reads: checkpoint, samples: samples::checkpoints },
    Target { name: "tile", reads: tile, samples: samples::tiles },
    Target { name: "bundle", reads: bundle, samples: samples::bundles },
    Target { name: "vkey", reads: vkey, samples: samples::vkeys },
];

/// There is one encoding of a package: what was read is written the same.
pub fn data_package(bytes: &[u8]) -> bool {
    let Ok(package) = DataPackage::decode(bytes) else { return false };
    let written = package.encode().expect("what was read fits");
    assert!(written.expose() == bytes, "the encoding must be deterministic");
    true
}

/// What opens was sealed to this chip for this session, and is the package.
pub fn sealed_package(bytes: &[u8]) -> bool {
    let Ok(opened) = open(bytes, &CONTEXT.transport, &CONTEXT.package.session, &CONTEXT.package.chip) else {
        return false;
    };
    assert!(opened.expose() == CONTEXT.bytes.expose(), "only the package was ever sealed");
    true
}

/// An accepted backup is published as it came, and has no secret in it.
pub fn backup(bytes: &[u8]) -> bool {
    let package = &CONTEXT.package;
    let certificate = package.certificate.device_certificate();
    if let Ok(opened) = open_backup(bytes, &CONTEXT.chip_key, &package.chip, certificate) {
        assert!(opened.expose() == CONTEXT.bytes.expose(), "only the package was ever encrypted");
    }
    let accept = |format| {
        let rules = BackupRules { format, max_bytes: MAX_BACKUP_LEN };
        BackupPackage::accept(bytes, &rules, &package.chip, &CONTEXT.bytes, &package.secrets())
    };
    let opaque = accept(BackupFormat::Opaque);
    let Ok(accepted) = accept(BackupFormat::Cose) else { return false };
    assert!(opaque.is_ok(), "the opaque rules ask for less");
    assert!(accepted.as_bytes() == bytes && bytes.len() <= MAX_BACKUP_LEN);
    true
}

/// What is verified confirms exactly what was delivered.
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

/// The key of an accepted request can be stored and read back.
pub fn csr(bytes: &[u8]) -> bool {
    let Ok(key) = verify_csr(bytes) else { return false };
    assert!(PublicKey::from_spki_der(key.spki_der()).as_ref() == Ok(&key));
    true
}

/// Whose client certificate it is.
pub fn caller(bytes: &[u8]) -> bool {
    caller_of(bytes).is_ok()
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
    assert!(certificate.is_for(&package.identity), "the manufacturer signed no other identity");
    true
}

/// There is one encoding of a record: what was read is written the same.
pub fn record(bytes: &[u8]) -> bool {
    let Ok(record) = DeviceRecord::from_bytes(bytes) else { return false };
    assert!(record.to_bytes().as_deref() == Ok(bytes), "the encoding must be deterministic");
    assert!(matches!(LogEntry::from_bytes(bytes), Ok(LogEntry::Device(_))), "it is no other entry");
    true
}

/// There is one encoding of an audit checkpoint, and it is no record.
pub fn audit_checkpoint(bytes: &[u8]) -> bool {
    let Ok(checkpoint) = AuditCheckpoint::from_bytes(bytes) else { return false };
    assert!(checkpoint.to_bytes().as_deref() == Ok(bytes), "the encoding must be deterministic");
    assert!(matches!(LogEntry::from_bytes(bytes), Ok(LogEntry::Audit(_))), "it is no other entry");
    true
}

/// Every name has one text form.
pub fn names(bytes: &[u8]) -> bool {
    fn stable<T: std::str::FromStr + ToString + PartialEq>(text: &str) -> bool {
        let Ok(name) = text.parse::<T>() else { return false };
        assert!(name.to_string().parse::<T>().is_ok_and(|again| again == name), "a name's own text must be its name");
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
    let name: ProfileName = "fuzz".parse().expect("it is a name");
    match Profile::from_toml(name, "fuzz.toml", text) {
        Ok(_) => true,
        Err(faults) => {
            assert!(!faults.to_string().is_empty(), "a refusal says why");
            false
        }
    }
}

/// A chain of issuers, as an offline root sends it.
pub fn issuer(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    IssuerCertificate::from_pem(text, SignatureAlgorithm::EcdsaP256Sha256).is_ok()
}

/// Public keys, of devices and for sealing.
pub fn keys(bytes: &[u8]) -> bool {
    let curves = [TransportCurve::P256, TransportCurve::X25519];
    let transport = curves.into_iter().any(|curve| TransportPublicKey::new(curve, bytes).is_ok());
    let point = [KeyKind::P256, KeyKind::P384].into_iter().any(|kind| PublicKey::from_ec_point(kind, bytes).is_ok());
    let spki = PublicKey::from_spki_der(bytes);
    if let Ok(key) = &spki {
        assert!(PublicKey::from_spki_der(key.spki_der()).as_ref() == Ok(key));
    }
    transport || point || spki.is_ok()
}

/// A proof is written as it was read, but for extra data; and it proves the one record of the samples or nothing.
pub fn log_proof(bytes: &[u8]) -> bool {
    let Ok(proof) = LogProof::from_bytes(bytes) else { return false };
    let written = proof.to_bytes();
    assert!(LogProof::from_bytes(&written).as_ref() == Ok(&proof), "what was written is read back");
    if let Ok(proven) = proof.verify(samples::LOG_RECORD, &samples::log_key()) {
        assert!(proven.index == proof.index() && proven.index < proven.checkpoint.size(), "it is in the tree");
    }
    assert!(proof.verify(b"another record", &samples::log_key()).is_err(), "nothing else is proven");
    true
}

/// Nobody but the log signs its checkpoints: only the tree of the samples is accepted.
pub fn checkpoint(bytes: &[u8]) -> bool {
    let Ok(checkpoint) = SignedCheckpoint::verify(bytes, &samples::log_key()) else { return false };
    let [sample] = samples::checkpoints().try_into().expect("there is one");
    let sample = SignedCheckpoint::verify(&sample, &samples::log_key()).expect("it is right");
    assert!(checkpoint.is_same_tree(&sample), "only that tree was ever signed");
    true
}

/// A tile has one path.
pub fn tile(bytes: &[u8]) -> bool {
    let Some(tile) = std::str::from_utf8(bytes).ok().and_then(|path| path.parse::<TileId>().ok()) else {
        return false;
    };
    assert!(tile.to_string().as_bytes() == bytes, "there is one form");
    assert!((1..=256).contains(&tile.width()), "it has hashes or entries");
    true
}

/// The entries of a bundle, put together again, are the bundle.
pub fn bundle(bytes: &[u8]) -> bool {
    let Ok(entries) = tlog::bundle::entries(bytes).collect::<Result<Vec<_>, _>>() else { return false };
    let mut written = Vec::new();
    for entry in &entries {
        tlog::bundle::push(&mut written, entry).expect("it was an entry");
    }
    assert!(written == bytes && tlog::bundle::exactly(bytes, entries.len()).is_ok(), "nothing is lost");
    true
}

/// Public keys of logs and witnesses, and the names of logs.
pub fn vkey(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let log = text.parse::<LogKey>().map(|key| key.to_string());
    let witness = text.parse::<WitnessKey>().map(|key| key.to_string());
    let origin = text.parse::<Origin>().map(|origin| origin.to_string());
    for written in [&log, &witness].into_iter().flatten() {
        assert!(written == text.trim_end(), "there is one form");
    }
    assert!(log.is_err() || witness.is_err(), "a key signs one kind of thing");
    log.is_ok() || witness.is_ok() || origin.is_ok()
}
