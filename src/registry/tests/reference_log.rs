//! A log of devices with real certificates, its mirror, and copies for tampering tests.

use std::sync::LazyLock;

use spp_format::certificate::{
    AuthorityCertificate, CertificateRequest, CertificateSerial, IssuedCertificate, IssuerCertificate, Profile,
    SubjectName, authority_certificate, prepare,
};
use spp_format::keys::{DevicePrivateKey, SignatureAlgorithm, generate_p256, sha256};
use tempfile::TempDir;

use super::*;

pub(super) const P256: SignatureAlgorithm = SignatureAlgorithm::EcdsaP256Sha256;
pub(super) const NOW: u64 = 1_767_225_600;
/// Two full bundles and a partial third one.
pub(super) const ENTRIES: u64 = 600;
pub(super) const PROFILE: &str = r#"
identities = ["serial"]
hardware_type = "1.3.6.1.4.1.32473.1.7"
issuer = "manufacturer"
key_pair.source = "generate"
key_pair.kind = "p256"
"#;

/// The manufacturer, which issues the devices' certificates.
pub(super) struct Manufacturer {
    key: DevicePrivateKey,
    pub(super) issuer: IssuerCertificate,
    profile: Profile,
}

impl Manufacturer {
    pub(super) fn new() -> Self {
        let key = generate_p256().unwrap();
        let unsigned = authority_certificate(&AuthorityCertificate {
            subject: &SubjectName::with_common_name("Manufacturer").unwrap(),
            public_key: key.public(),
            algorithm: P256,
            serial: CertificateSerial::from_random([7; 20]),
            not_before: NOW,
            not_after: None,
        })
        .unwrap();
        let signature = key.sign(P256, unsigned.to_be_signed()).unwrap();
        let pem = unsigned.assemble(&signature).unwrap().to_pem().unwrap();
        let issuer = IssuerCertificate::from_pem(&pem, P256).unwrap();
        Self { key, issuer, profile: Profile::from_toml("phone".parse().unwrap(), "phone.toml", PROFILE).unwrap() }
    }

    /// The record of device `n` with a certificate of its own.
    pub(super) fn record(&self, n: u64) -> DeviceRecord {
        let (blank, device) = (record(n), generate_p256().unwrap());
        let serial = CertificateSerial::from_random(sha256(&n.to_be_bytes())[..20].try_into().unwrap());
        let request = CertificateRequest {
            profile: &self.profile,
            issuer: &self.issuer,
            chip: &blank.chip,
            identity: &blank.identity,
            public_key: Some(device.public()),
            serial,
            not_before: NOW,
        };
        let to_sign = prepare(&request).unwrap().lint().unwrap().into_to_sign();
        let signature = self.key.sign(P256, to_sign.to_be_signed()).unwrap();
        let issued = IssuedCertificate::assemble(&to_sign, &self.issuer, &signature).unwrap();
        DeviceRecord {
            certificate: issued.as_bytes().to_vec(),
            serial: serial.as_bytes().to_vec(),
            public_key: Some(device.public().spki_der().to_vec()),
            ..blank
        }
    }
}

/// A log of devices with real certificates, and a mirror of it. Created once; tests modify copies.
pub(super) struct ReferenceLog {
    pub(super) manufacturer: Manufacturer,
    pub(super) log: Log,
    pub(super) entries: Vec<Vec<u8>>,
    pub(super) mirror: PathBuf,
}

pub(super) static REFERENCE: LazyLock<ReferenceLog> = LazyLock::new(|| {
    let (manufacturer, log) = (Manufacturer::new(), Log::new());
    let records: Vec<_> = (0..ENTRIES).map(|n| manufacturer.record(n)).collect();
    // Single-threaded, so that the entries are in the order of their numbers.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let public = log.open().await;
        // In batches of different sizes, as in production.
        for records in [&records[..90], &records[90..91], &records[91..300], &records[300..590], &records[590..]] {
            let slots: Vec<_> = records.iter().map(|_| public.reserve_slot()).collect();
            let mut tasks = JoinSet::new();
            for record in records {
                let (public, record) = (public.clone(), record.clone());
                tasks.spawn(async move { public.publish(&record).await.unwrap() });
            }
            tasks.join_all().await;
            drop(slots);
        }
    });
    drop(runtime);
    let (mirror, key) = (log.dir.path().join("mirror"), log.signer.key());
    spp_log::registry::export(&mut StoreDirectory::new(&log.dir(), key), key, &mirror, &mut |_, _| ()).unwrap();
    let bundles = ["000", "001", "002.p/88"].map(|name| fs::read(mirror.join("tile/entries").join(name)).unwrap());
    let entries: Vec<_> = bundles.iter().flat_map(|bundle| entries_of(bundle)).collect();
    assert!(entries.iter().zip(&records).all(|(entry, record)| *entry == record.to_bytes().unwrap()));
    ReferenceLog { manufacturer, log, entries, mirror }
});

pub(super) fn entries_of(bundle: &[u8]) -> Vec<Vec<u8>> {
    let (mut entries, mut rest) = (Vec::new(), bundle);
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let (entry, after) = after.split_at(usize::from(u16::from_be_bytes(*length)));
        entries.push(entry.to_vec());
        rest = after;
    }
    entries
}

pub(super) fn bundle_of(entries: &[Vec<u8>]) -> Vec<u8> {
    entries.iter().flat_map(|entry| [&(entry.len() as u16).to_be_bytes(), entry.as_slice()].concat()).collect()
}

/// A log that a test may tamper with.
pub(super) struct TamperedLog(pub(super) TempDir);

impl TamperedLog {
    /// A copy of the unmodified mirror.
    pub(super) fn mirror() -> Self {
        let dir = spp_testkit::files::temp_dir();
        copy_directory(&REFERENCE.mirror.join("tile"), &dir.path().join("tile"));
        fs::copy(REFERENCE.mirror.join("checkpoint"), dir.path().join("checkpoint")).unwrap();
        Self(dir)
    }

    /// A log with these entries and this checkpoint.
    pub(super) fn new(entries: &[Vec<u8>], checkpoint: &[u8]) -> Self {
        let tampered = Self(spp_testkit::files::temp_dir());
        tampered.write_tiles(entries);
        fs::write(tampered.path("checkpoint"), checkpoint).unwrap();
        tampered
    }

    /// A log with these entries and a checkpoint signed by the log's key.
    pub(super) fn signed(entries: &[Vec<u8>]) -> Self {
        Self::new(entries, checkpoint_of(entries, &REFERENCE.log.signer).note())
    }

    /// Writes the tiles of these entries.
    pub(super) fn write_tiles(&self, entries: &[Vec<u8>]) {
        for (name, bytes) in tiles_of(entries) {
            fs::create_dir_all(self.path(&name).parent().unwrap()).unwrap();
            fs::write(self.path(&name), bytes).unwrap();
        }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn change(self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut bytes = fs::read(self.path(name)).unwrap();
        change(&mut bytes);
        fs::write(self.path(name), bytes).unwrap();
        self
    }

    pub(super) fn change_entries(self, name: &str, change: impl FnOnce(&mut Vec<Vec<u8>>)) -> Self {
        self.change(name, |bytes| {
            let mut entries = entries_of(bytes);
            change(&mut entries);
            *bytes = bundle_of(&entries);
        })
    }

    pub(super) fn without(self, name: &str) -> Self {
        fs::remove_file(self.path(name)).unwrap();
        self
    }

    pub(super) fn findings(&self) -> Findings {
        verify_source(&mut Mirror::new(self.0.path()), None)
    }

    pub(super) fn findings_after(&self, seen: &[u8]) -> Findings {
        verify_source(&mut Mirror::new(self.0.path()), Some(seen))
    }
}

/// The findings of a verification, which a test removes one by one.
#[derive(Debug)]
pub(super) struct Findings(pub(super) Vec<Finding>);

impl Findings {
    /// Asserts that a finding at this location contains `message`, and removes it.
    pub(super) fn expect_finding(mut self, at: &str, message: &str) -> Self {
        let fits = |finding: &Finding| finding.at == at && finding.problem.contains(message);
        let place = self.0.iter().position(fits).unwrap_or_else(|| panic!("{at}: {message}: not among {:#?}", self.0));
        self.0.remove(place);
        self
    }

    pub(super) fn assert_no_more(self) {
        assert_eq!(self.0, []);
    }
}

pub(super) fn verify_source(source: &mut dyn LogSource, seen: Option<&[u8]>) -> Findings {
    let issuers = [REFERENCE.manufacturer.issuer.clone()];
    let options = VerifyOptions { key: REFERENCE.log.signer.key(), issuers: &issuers, seen };
    let verification = verify(source, &options, &mut |_, _| ());
    assert_eq!(verification.is_good(), verification.findings.is_empty());
    Findings(verification.findings)
}

pub(super) fn flip(bytes: &mut [u8], at: usize) {
    bytes[at] ^= 1 << (at % 8);
}

/// The checkpoint of the first `size` entries.
pub(super) fn earlier_checkpoint(size: usize) -> Vec<u8> {
    checkpoint_of(&REFERENCE.entries[..size], &REFERENCE.log.signer).note().to_vec()
}

/// The entries, with the record of one device changed.
pub(super) fn with_changed_record(at: usize, change: impl FnOnce(&mut DeviceRecord)) -> Vec<Vec<u8>> {
    let mut entries = REFERENCE.entries.clone();
    let mut record = DeviceRecord::from_bytes(&entries[at]).unwrap();
    change(&mut record);
    entries[at] = record.to_bytes().unwrap();
    entries
}
