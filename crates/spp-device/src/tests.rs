//! Devices that are installed, confirmed, wiped, recovered and attacked.

use ciborium::Value;
use coset::{CoseSign1Builder, HeaderBuilder, TaggedCborSerializable as _, iana};
use proptest::prelude::*;
use spp_format::keys::{KeyType, PublicKey, SignatureAlgorithm, ecdsa_fixed_from_der, generate_p256, sha256};
use spp_format::package::samples::{chip, pair, session, symmetric_key};
use spp_format::package::{
    BackupError, BackupFormat, BackupPackage, BackupRules, CertificateChain, ConfirmationKey, TransportCurve, seal,
    verify_confirmation,
};
use spp_format::tlog::testing::LocalSigner;
use spp_format::tlog::{HashSource, LogProof, TileId, Tree, leaf_hash, prove_inclusion};
use tempfile::TempDir;

use super::*;

const IDENTITY: &str = "serial:SN-0001";
const X25519: Option<TransportCurve> = Some(TransportCurve::X25519);

/// A manufacturer key and a simulated fab.
struct Factory {
    manufacturer: DevicePrivateKey,
    fab: SimulatedFab,
    _directory: TempDir,
}

impl Factory {
    fn new() -> Self {
        let directory = spp_test_support::files::temp_dir();
        let manufacturer = generate_p256().unwrap();
        let fab = SimulatedFab::create(directory.path(), manufacturer.public().clone(), None).unwrap();
        Self { manufacturer, fab, _directory: directory }
    }

    fn device(&self, byte: u8) -> Device {
        self.fab.device(&chip(byte), X25519).unwrap()
    }

    /// A package with a delivered key pair of this type.
    fn package(&self, byte: u8, kind: KeyType) -> DataPackage {
        let pair = pair(kind);
        let device = certificate(&self.manufacturer, &chip(byte), IDENTITY, pair.public());
        self.package_with(byte, CertificateChain::X509 { device, issuers: vec![] }, Some(pair))
    }

    /// A package with symmetric keys only.
    fn symmetric_package(&self, byte: u8) -> DataPackage {
        self.package_with(byte, CertificateChain::Cwt(cwt(&self.manufacturer, &chip(byte), IDENTITY)), None)
    }

    fn package_with(&self, byte: u8, certificate: CertificateChain, pair: Option<DevicePrivateKey>) -> DataPackage {
        DataPackage {
            chip: chip(byte),
            identity: IDENTITY.parse().unwrap(),
            profile: "tracker".parse().unwrap(),
            session: session(byte),
            certificate,
            key_pair: pair,
            symmetric_keys: vec![symmetric_key("channel", 0xa1)],
            master_key_version: 1,
        }
    }
}

fn install(device: &mut Device, package: &DataPackage) -> Result<InstalledPackage, DeviceError> {
    device.install(&package.session, &Delivery::Clear(&package.encode().unwrap()))
}

fn rejection(device: &mut Device, package: &DataPackage) -> String {
    let message = install(device, package).unwrap_err().to_string();
    assert!(matches!(device.backup(), Err(DeviceError::Empty)), "nothing is stored after: {message}");
    message
}

#[test]
fn device_with_every_key_type_installs_confirms_and_recovers() {
    let factory = Factory::new();
    for kind in [KeyType::P256, KeyType::P384, KeyType::Ed25519, KeyType::Rsa2048] {
        let mut device = factory.device(kind as u8);
        let package = factory.package(kind as u8, kind);
        let bytes = package.encode().unwrap();
        let installed = install(&mut device, &package).unwrap();
        assert_eq!((installed.session, installed.identity.to_string()), (package.session, IDENTITY.to_owned()));

        let backup = device.backup().unwrap();
        let rules = BackupRules { format: BackupFormat::Cose, max_bytes: 8192 };
        BackupPackage::accept(&backup, &rules, &package.chip, &bytes, &package.secrets()).unwrap();
        let claims = ConfirmationClaims::new(package.session, package.chip.clone(), &bytes, &backup);
        let key = ConfirmationKey::Pair(installed.public_key.as_ref().unwrap());
        verify_confirmation(&device.confirmation().unwrap(), &claims, &key).unwrap();

        device.wipe().unwrap();
        assert!(matches!(device.installed(), Err(DeviceError::Empty)));
        let record = PublicRecord { certificate: &installed.certificate, is_cwt: false, backup: &backup };
        assert_eq!(device.recover(&record).unwrap(), installed);
        assert_eq!(device.package().unwrap().encode().unwrap().expose(), bytes.expose());
        assert_eq!(device.backup().unwrap(), backup);
    }
}

#[test]
fn device_without_key_pair_confirms_with_symmetric_key() {
    let factory = Factory::new();
    let mut device = factory.device(1);
    let package = factory.symmetric_package(1);
    let installed = install(&mut device, &package).unwrap();
    assert_eq!((installed.is_cwt, installed.public_key), (true, None));
    let (bytes, backup) = (package.encode().unwrap(), device.backup().unwrap());
    let claims = ConfirmationClaims::new(package.session, package.chip.clone(), &bytes, &backup);
    let key = ConfirmationKey::Symmetric(package.symmetric_keys[0].key());
    verify_confirmation(&device.confirmation().unwrap(), &claims, &key).unwrap();
}

#[test]
fn device_with_own_key_pair_confirms_and_recovers() {
    let factory = Factory::new();
    let mut device = factory.device(1);
    let own = device.own_key_pair().unwrap();
    let leaf = certificate(&factory.manufacturer, &chip(1), IDENTITY, own.public());
    let package = factory.package_with(1, CertificateChain::X509 { device: leaf, issuers: vec![] }, None);
    install(&mut device, &package).unwrap();
    let backup = device.backup().unwrap();
    let claims = ConfirmationClaims::new(package.session, chip(1), &package.encode().unwrap(), &backup);
    verify_confirmation(&device.confirmation().unwrap(), &claims, &ConfirmationKey::Pair(own.public())).unwrap();
    // Another chip derives another key pair; a certificate for it is rejected.
    let other = factory.device(2).own_key_pair().unwrap();
    let leaf = certificate(&factory.manufacturer, &chip(1), IDENTITY, other.public());
    let foreign = factory.package_with(1, CertificateChain::X509 { device: leaf, issuers: vec![] }, None);
    assert!(matches!(install(&mut device, &foreign), Err(DeviceError::KeyMismatch("chip"))));
    assert_eq!(device.backup().unwrap(), backup, "a rejected package leaves the installed one unchanged");
}

#[test]
fn sealed_package_installs_only_on_its_chip() {
    let factory = Factory::new();
    for curve in [TransportCurve::P256, TransportCurve::X25519] {
        let device = |byte| factory.fab.device(&chip(byte), Some(curve)).unwrap();
        let package = factory.package(1, KeyType::P256);
        let transport_key = device(1).transport_public_key().unwrap().unwrap();
        let sealed = seal(&package.encode().unwrap(), &transport_key, &package.session, &package.chip).unwrap();
        let install =
            |chip_byte, session_byte| device(chip_byte).install(&session(session_byte), &Delivery::Sealed(&sealed));
        assert!(install(2, 1).is_err());
        assert!(install(1, 2).is_err());
        assert!(install(1, 1).is_ok());
        let mut unsealed = factory.fab.device(&chip(1), None).unwrap();
        let result = unsealed.install(&session(1), &Delivery::Sealed(&sealed));
        assert!(matches!(result, Err(DeviceError::NoTransportKey)));
    }
}

#[test]
fn package_of_other_chip_session_or_identity_rejected() {
    let factory = Factory::new();
    let mut device = factory.device(1);
    assert!(rejection(&mut device, &factory.package(2, KeyType::P256)).contains("for chip 0202"));
    let bytes = factory.package(1, KeyType::P256).encode().unwrap();
    let message = device.install(&session(9), &Delivery::Clear(&bytes)).unwrap_err().to_string();
    assert!(message.contains("for session 0101"), "{message}");
    let mut other_identity = factory.package(1, KeyType::P256);
    other_identity.identity = "serial:SN-0002".parse().unwrap();
    assert!(rejection(&mut device, &other_identity).contains("for identity SN-0002"));
}

#[test]
fn package_with_wrong_certificate_or_key_rejected() {
    let (factory, other) = (Factory::new(), Factory::new());
    let mut device = factory.device(1);
    assert!(rejection(&mut device, &other.package(1, KeyType::P256)).contains("the signature does not verify"));
    assert!(rejection(&mut device, &other.symmetric_package(1)).contains("the signature does not verify"));

    let other_chip = DataPackage { chip: chip(1), session: session(1), ..factory.package(2, KeyType::P256) };
    assert!(rejection(&mut device, &other_chip).contains("issued for another chip"));
    let other_chip = DataPackage { chip: chip(1), session: session(1), ..factory.symmetric_package(2) };
    assert!(rejection(&mut device, &other_chip).contains("issued for another chip"));
    let other_key = DataPackage { key_pair: Some(pair(KeyType::P256)), ..factory.package(1, KeyType::P256) };
    assert!(rejection(&mut device, &other_key).contains("private key of the data package does not match"));
}

#[test]
fn reinstalled_package_keeps_its_backup() {
    let factory = Factory::new();
    let mut device = factory.device(1);
    let package = factory.package(1, KeyType::Ed25519);
    install(&mut device, &package).unwrap();
    let backup = device.backup().unwrap();
    install(&mut device, &package).unwrap();
    assert_eq!(device.backup().unwrap(), backup);
    // The same device after a power cycle.
    let fab = SimulatedFab::open(factory._directory.path()).unwrap();
    assert_eq!(fab.device(&chip(1), X25519).unwrap().backup().unwrap(), backup);
    // A package of another session replaces the stored one.
    install(&mut device, &DataPackage { session: session(7), ..factory.package(1, KeyType::Ed25519) }).unwrap();
    assert_ne!(device.backup().unwrap(), backup);
}

#[test]
fn recover_with_wrong_or_altered_record_fails() {
    let factory = Factory::new();
    let (mut one, mut other) = (factory.device(1), factory.device(2));
    let installed = install(&mut one, &factory.package(1, KeyType::P256)).unwrap();
    let backup = one.backup().unwrap();
    let record = PublicRecord { certificate: &installed.certificate, is_cwt: false, backup: &backup };
    assert!(other.recover(&record).unwrap_err().to_string().contains("kid"));
    let leaf = certificate(&factory.manufacturer, &chip(1), IDENTITY, generate_p256().unwrap().public());
    let swapped = PublicRecord { certificate: &leaf, ..record };
    assert!(matches!(one.recover(&swapped), Err(DeviceError::Backup(BackupError::DoesNotOpen))));
    let as_cwt = PublicRecord { is_cwt: true, ..record };
    assert!(matches!(one.recover(&as_cwt), Err(DeviceError::Certificate(_))));
    assert!(one.installed().is_ok(), "rejected records leave the flash unchanged");
}

#[test]
fn damaged_flash_detected_and_recovered() {
    let factory = Factory::new();
    let mut device = factory.device(1);
    let package = factory.package(1, KeyType::P256);
    let installed = install(&mut device, &package).unwrap();
    let backup = device.backup().unwrap();
    let flash = device.flash.read().unwrap().unwrap();
    for index in (0..flash.len()).step_by(13) {
        let mut altered = flash.clone();
        altered[index] ^= 0x10;
        device.flash.write(&altered).unwrap();
        assert!(device.installed().is_err(), "{index}");
    }
    let record = PublicRecord { certificate: &installed.certificate, is_cwt: false, backup: &backup };
    assert_eq!(device.recover(&record).unwrap(), installed);
}

#[test]
fn fab_file_created_once_and_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let factory = Factory::new();
    let directory = factory._directory.path();
    let manufacturer = factory.manufacturer.public().clone();
    let again = SimulatedFab::create(directory, manufacturer, None).map(|_| ()).unwrap_err().to_string();
    assert!(again.contains("already exists"), "{again}");
    let file = directory.join("fab.cbor");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(SimulatedFab::open(directory).map(|_| ()).unwrap_err().to_string().contains("chmod 600"));
    assert!(
        SimulatedFab::open(directory.join("missing")).map(|_| ()).unwrap_err().to_string().contains("create it first")
    );
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&file, [0xa0]).unwrap();
    assert!(SimulatedFab::open(directory).map(|_| ()).unwrap_err().to_string().contains("damaged"));
}

proptest! {
    #![proptest_config(spp_test_support::random::cases(32, 1600))]

    #[test]
    fn device_rejects_arbitrary_bytes_without_panic(bytes: Vec<u8>, as_record: Vec<u8>) {
        let factory = Factory::new();
        let mut device = factory.device(1);
        prop_assert!(device.install(&session(1), &Delivery::Clear(&SecretBytes::copy_of(&bytes))).is_err());
        prop_assert!(device.install(&session(1), &Delivery::Sealed(&bytes)).is_err());
        let record = PublicRecord { certificate: &bytes, is_cwt: false, backup: &as_record };
        prop_assert!(device.recover(&record).is_err());
        for is_cwt in [true, false] {
            let manufacturer = factory.manufacturer.public();
            prop_assert!(certificate::verify_certificate(&bytes, is_cwt, manufacturer, &chip(1)).is_err());
        }
        device.flash.write(&bytes).unwrap();
        prop_assert!(device.installed().is_err());
    }
}

/// A minimal device certificate: subject serialNumber = identity, hardwareModuleName = chip.
fn certificate(manufacturer: &DevicePrivateKey, chip: &ChipId, identity: &str, public: &PublicKey) -> Vec<u8> {
    let oid = |hex_text: &str| hex::decode(hex_text).unwrap();
    let algorithm = tlv(0x30, &[&oid("06082a8648ce3d040302")]);
    let name = |text: &str| {
        let attribute = tlv(0x30, &[&oid("0603550405"), &tlv(0x13, &[text.as_bytes()])]);
        tlv(0x30, &[&tlv(0x31, &[&attribute])])
    };
    let validity = tlv(0x30, &[&tlv(0x17, &[b"200101000000Z"]), &tlv(0x18, &[b"99991231235959Z"])]);
    let module = tlv(0x30, &[&oid("06092b0601040182375801"), &tlv(0x04, &[chip.as_bytes()])]);
    let other_name = tlv(0xa0, &[&oid("06082b06010505070804"), &tlv(0xa0, &[&module])]);
    let san = tlv(0x30, &[&oid("0603551d11"), &tlv(0x04, &[&tlv(0x30, &[&other_name])])]);
    let extensions = tlv(0xa3, &[&tlv(0x30, &[&san])]);
    let parts: [&[u8]; 8] = [
        &oid("a003020102"),
        &oid("020101"),
        &algorithm,
        &name("issuer"),
        &validity,
        &name(identity.split_once(':').unwrap().1),
        public.spki_der(),
        &extensions,
    ];
    let tbs = tlv(0x30, &parts);
    let signature = manufacturer.sign(SignatureAlgorithm::EcdsaP256Sha256, &tbs).unwrap();
    tlv(0x30, &[&tbs, &algorithm, &tlv(0x03, &[&[0], &signature])])
}

fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let length = match content.len() {
        short @ 0..=0x7f => vec![u8::try_from(short).unwrap()],
        long => [&[0x82][..], &u16::try_from(long).unwrap().to_be_bytes()].concat(),
    };
    // Lengths from 128 to 255 take one byte in DER.
    let length = if length.len() == 3 && length[1] == 0 { vec![0x81, length[2]] } else { length };
    [&[tag], length.as_slice(), &content].concat()
}

fn cwt(manufacturer: &DevicePrivateKey, chip: &ChipId, identity: &str) -> Vec<u8> {
    let claims = Value::Map(vec![
        (Value::from(1), Value::Text("issuer".to_owned())),
        (Value::from(2), Value::Text(identity.to_owned())),
        (Value::from(6), Value::from(1_600_000_000)),
        (Value::from(7), Value::Bytes(vec![7; 16])),
        (Value::from(-70_001), Value::Bytes(chip.as_bytes().to_vec())),
        (Value::from(-70_002), Value::Tag(111, Box::new(Value::Bytes(vec![0x2b, 6, 1, 4, 1])))),
    ]);
    let mut payload = Vec::new();
    ciborium::into_writer(&claims, &mut payload).unwrap();
    CoseSign1Builder::new()
        .protected(HeaderBuilder::new().algorithm(iana::Algorithm::ES256).build())
        .payload(payload)
        .create_signature(&[], |message| {
            let der = manufacturer.sign(SignatureAlgorithm::EcdsaP256Sha256, message).unwrap();
            ecdsa_fixed_from_der(&der, KeyType::P256).unwrap()
        })
        .build()
        .to_tagged_vec()
        .unwrap()
}

#[test]
fn receipt_verifies_only_for_own_record() {
    let directory = spp_test_support::files::temp_dir();
    let (manufacturer, log) = (generate_p256().unwrap(), LocalSigner::new("log.example/test"));
    let fab = SimulatedFab::create(directory.path(), manufacturer.public().clone(), Some(log.key().clone())).unwrap();
    drop(fab);
    // The log's key is part of the ROM file.
    let fab = SimulatedFab::open(directory.path()).unwrap();
    let factory = Factory { manufacturer, fab, _directory: directory };
    let mut device = factory.device(1);
    let package = factory.package(1, KeyType::P256);
    device.install(&session(1), &Delivery::Clear(&package.encode().unwrap())).unwrap();

    let record = device.expected_record(77).unwrap().to_bytes().unwrap();
    let entries = [b"another entry".to_vec(), record.clone(), b"one more".to_vec()];
    let mut tree = Tree::default();
    entries.iter().for_each(|entry| drop(tree.push(leaf_hash(entry))));
    let checkpoint = log.checkpoint(&tree);
    let no_tiles = NoTiles;
    let proof = |index| LogProof::new(index, prove_inclusion(&tree, index, &no_tiles).unwrap(), &checkpoint).to_bytes();
    let receipt = device.verify_receipt(77, &proof(1)).unwrap().unwrap();
    assert_eq!(receipt.record_hash, sha256(&record));
    let verified = receipt.proof;
    assert_eq!((verified.index, verified.checkpoint.size()), (1, 3));

    let expect_rejected = |published, proof: &[u8]| {
        let error = device.verify_receipt(published, proof).unwrap_err();
        assert!(matches!(error, DeviceError::Receipt(_)), "{error}");
    };
    expect_rejected(78, &proof(1));
    expect_rejected(77, &proof(0));
    expect_rejected(77, b"");
    let other = LocalSigner::new("log.example/test").checkpoint(&tree);
    expect_rejected(77, &LogProof::new(1, prove_inclusion(&tree, 1, &no_tiles).unwrap(), &other).to_bytes());
    // A new backup of the same package changes the record.
    device.wipe().unwrap();
    device.install(&session(1), &Delivery::Clear(&package.encode().unwrap())).unwrap();
    let error = device.verify_receipt(77, &proof(1)).unwrap_err();
    assert!(matches!(error, DeviceError::Receipt(_)), "{error}");
}

/// Three entries fill no tile: all hashes are on the tree's right edge.
struct NoTiles;

impl HashSource for NoTiles {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        Err(format!("{tile} not found"))
    }
}
