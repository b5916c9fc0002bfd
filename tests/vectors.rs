//! Test vectors for firmware authors in `tests/vectors/`: the messages of one device in bytes.
//!
//! Deterministic outputs are recomputed and compared; the others (ephemeral keys, ECDSA and PSS signatures) are decrypted or
//! verified. `SPP_WRITE_VECTORS=1 cargo test --test integration vectors` regenerates the outputs from the inputs in the files.

use std::path::Path;

use serde::{Deserialize, Serialize};
use spp_format::keys::{DevicePrivateKey, KeyType, PublicKey};
use spp_format::package::{
    BackupFormat, BackupIv, BackupPackage, BackupRules, CertificateChain, ConfirmationClaims, ConfirmationKey,
    ConfirmationSigner, DataPackage, MAX_BACKUP_LEN, SymmetricKey, TransportCurve, TransportPrivateKey, confirm,
    make_backup, open, open_backup, seal, verify_confirmation,
};
use spp_format::secret::{Secret, SecretBytes};

/// One file. All byte strings are in hex.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vector {
    about: String,
    inputs: Inputs,
    outputs: Outputs,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Inputs {
    chip: String,
    identity: String,
    profile: String,
    session: String,
    master_key_version: u32,
    /// The device certificate first, in DER.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    certificates: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cwt: Option<String>,
    /// SubjectPublicKeyInfo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    public_key: Option<String>,
    /// PKCS#8, or the Ed25519 seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    private_key: Option<String>,
    symmetric_keys: Vec<SymmetricInput>,
    chip_key: String,
    backup_iv: String,
    transport_curve: String,
    transport_private_key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SymmetricInput {
    purpose: String,
    key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Outputs {
    /// Deterministic.
    package: String,
    /// Deterministic for the given IV.
    backup: String,
    /// Deterministic for Ed25519 and HMAC.
    confirmation: String,
    /// Uses an ephemeral key: decrypts to the package.
    sealed: String,
}

#[test]
fn p256() {
    check("p256");
}

#[test]
fn ed25519() {
    check("ed25519");
}

#[test]
fn rsa_2048() {
    check("rsa-2048");
}

#[test]
fn symmetric_keys_only() {
    check("symmetric");
}

fn check(name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(format!("{name}.json"));
    let mut vector: Vector = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let computed = Computed::from_inputs(&vector.inputs);
    if std::env::var_os("SPP_WRITE_VECTORS").is_some() {
        vector.outputs = computed.outputs(&vector.inputs);
        std::fs::write(&path, serde_json::to_string_pretty(&vector).unwrap() + "\n").unwrap();
    }
    computed.compare(&vector.outputs);
}

/// Values computed from the inputs.
struct Computed {
    package: DataPackage,
    bytes: SecretBytes,
    chip_key: Secret<[u8; 32]>,
    transport: TransportPrivateKey,
    backup: Vec<u8>,
    claims: ConfirmationClaims,
}

impl Computed {
    fn from_inputs(inputs: &Inputs) -> Self {
        let package = package(inputs);
        let bytes = package.encode().unwrap();
        let chip_key = Secret::new(from_hex(&inputs.chip_key).try_into().unwrap());
        let iv = BackupIv::fixed_for_test_vectors_only(from_hex(&inputs.backup_iv).try_into().unwrap());
        let certificate = package.certificate.device_certificate();
        let backup = make_backup(&bytes, &chip_key, &package.chip, certificate, iv).unwrap();
        let claims = ConfirmationClaims::new(package.session, package.chip.clone(), &bytes, &backup);
        let curve = if inputs.transport_curve == "p256" { TransportCurve::P256 } else { TransportCurve::X25519 };
        let transport = SecretBytes::new(from_hex(&inputs.transport_private_key));
        let transport = TransportPrivateKey::from_bytes(curve, &transport).unwrap();
        Self { package, bytes, chip_key, transport, backup, claims }
    }

    fn outputs(&self, inputs: &Inputs) -> Outputs {
        let package = package(inputs);
        let transport_key = self.transport.public().unwrap();
        Outputs {
            package: hex::encode(self.bytes.expose()),
            backup: hex::encode(&self.backup),
            confirmation: hex::encode(self.confirmation()),
            sealed: hex::encode(seal(&self.bytes, &transport_key, &package.session, &package.chip).unwrap()),
        }
    }

    fn confirmation(&self) -> Vec<u8> {
        let signer = match &self.package.key_pair {
            Some(pair) => ConfirmationSigner::Pair(pair),
            None => ConfirmationSigner::Symmetric(self.package.symmetric_keys[0].key()),
        };
        confirm(&self.claims, &signer).unwrap()
    }

    fn compare(&self, outputs: &Outputs) {
        let (chip, session) = (&self.package.chip, &self.package.session);
        assert_eq!(hex::encode(self.bytes.expose()), outputs.package);
        let decoded = DataPackage::decode(&from_hex(&outputs.package)).unwrap();
        assert_eq!(decoded.encode().unwrap().expose(), self.bytes.expose());

        assert_eq!(hex::encode(&self.backup), outputs.backup);
        let backup = from_hex(&outputs.backup);
        let certificate = self.package.certificate.device_certificate();
        let opened = open_backup(&backup, &self.chip_key, chip, certificate).unwrap();
        assert_eq!(opened.expose(), self.bytes.expose());
        let rules = BackupRules { format: BackupFormat::Cose, max_bytes: MAX_BACKUP_LEN };
        BackupPackage::accept(&backup, &rules, chip, &self.bytes, &self.package.secrets()).unwrap();

        let confirmation = from_hex(&outputs.confirmation);
        let kind = self.package.key_pair.as_ref().map(|pair| pair.public().kind());
        if matches!(kind, None | Some(KeyType::Ed25519)) {
            assert_eq!(self.confirmation(), confirmation);
        }
        let key = match &self.package.key_pair {
            Some(pair) => ConfirmationKey::Pair(pair.public()),
            None => ConfirmationKey::Symmetric(self.package.symmetric_keys[0].key()),
        };
        verify_confirmation(&confirmation, &self.claims, &key).unwrap();

        let opened = open(&from_hex(&outputs.sealed), &self.transport, session, chip).unwrap();
        assert_eq!(opened.expose(), self.bytes.expose());
    }
}

fn package(inputs: &Inputs) -> DataPackage {
    let mut certificates = inputs.certificates.iter().map(|certificate| from_hex(certificate));
    let certificate = match &inputs.cwt {
        Some(cwt) => CertificateChain::Cwt(from_hex(cwt)),
        None => CertificateChain::X509 { device: certificates.next().unwrap(), issuers: certificates.collect() },
    };
    let key_pair = inputs.private_key.as_ref().zip(inputs.public_key.as_ref()).map(|(private, public)| {
        let public = PublicKey::from_spki_der(&from_hex(public)).unwrap();
        DevicePrivateKey::from_unwrapped(public, &SecretBytes::new(from_hex(private))).unwrap()
    });
    let symmetric = |input: &SymmetricInput| SymmetricKey::new(&input.purpose, SecretBytes::new(from_hex(&input.key)));
    DataPackage {
        chip: inputs.chip.parse().unwrap(),
        identity: inputs.identity.parse().unwrap(),
        profile: inputs.profile.parse().unwrap(),
        session: inputs.session.parse().unwrap(),
        certificate,
        key_pair,
        symmetric_keys: inputs.symmetric_keys.iter().map(symmetric).collect::<Result<_, _>>().unwrap(),
        master_key_version: inputs.master_key_version,
    }
}

fn from_hex(text: &str) -> Vec<u8> {
    hex::decode(text).unwrap()
}
