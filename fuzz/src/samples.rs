//! Valid inputs for the parsers: the test vectors, and certificates signed with their key.

use std::sync::LazyLock;

use serde_json::Value;
use spp_format::certificate::{
    AccessCertificate, AccessName, AuthorityCertificate, Caller, CertificateRequest, CertificateSerial,
    IssuedCertificate, IssuerCertificate, Profile, SignedDocument, SubjectName, UnsignedDocument, access_certificate,
    authority_certificate, authority_request, prepare,
};
use spp_format::keys::{DevicePrivateKey, PublicKey, SignatureAlgorithm};
use spp_format::package::{ConfirmationClaims, DataPackage, TransportCurve, TransportPrivateKey};
use spp_format::record::{AuditCheckpoint, DeviceRecord};
use spp_format::secret::{Secret, SecretBytes};
use spp_format::tlog::LogKey;

const P256: &str = include_str!("../../tests/vectors/p256.json");
const ED25519: &str = include_str!("../../tests/vectors/ed25519.json");
const RSA: &str = include_str!("../../tests/vectors/rsa-2048.json");
const SYMMETRIC: &str = include_str!("../../tests/vectors/symmetric.json");
const PHONE: &str = include_str!("../../deploy/demo/profiles/phone.toml");
const SENSOR: &str = include_str!("../../deploy/demo/profiles/sensor.toml");
const GATEWAY: &str = include_str!("../../deploy/demo/profiles/gateway.toml");

/// 2026-01-01T00:00:00Z.
const NOW: u64 = 1_767_225_600;
const ALGORITHM: SignatureAlgorithm = SignatureAlgorithm::EcdsaP256Sha256;

/// The device of a test vector and its keys.
pub struct Context {
    pub package: DataPackage,
    pub bytes: SecretBytes,
    pub chip_key: Secret<[u8; 32]>,
    pub transport: TransportPrivateKey,
    pub claims: ConfirmationClaims,
}

/// A device with a key pair.
pub static CONTEXT: LazyLock<Context> = LazyLock::new(|| Context::from_vector(P256));
/// A device that confirms with a symmetric key.
pub static MAC_CONTEXT: LazyLock<Context> = LazyLock::new(|| Context::from_vector(SYMMETRIC));

static ISSUER: LazyLock<IssuerCertificate> = LazyLock::new(|| {
    let pem = authority().to_pem().expect("a valid certificate");
    IssuerCertificate::from_pem(&pem, ALGORITHM).expect("a CA may issue")
});

impl Context {
    fn from_vector(vector: &str) -> Self {
        let (bytes, backup) = (output(vector, "package"), output(vector, "backup"));
        let package = DataPackage::decode(&bytes).expect("a valid package");
        let bytes = SecretBytes::new(bytes);
        let claims = ConfirmationClaims::new(package.session, package.chip.clone(), &bytes, &backup);
        let curve = match input(vector, "transport_curve").as_str() {
            "p256" => TransportCurve::P256,
            _ => TransportCurve::X25519,
        };
        let transport = SecretBytes::new(from_hex(&input(vector, "transport_private_key")));
        Self {
            package,
            bytes,
            chip_key: Secret::new(from_hex(&input(vector, "chip_key")).try_into().expect("32 bytes")),
            transport: TransportPrivateKey::from_bytes(curve, &transport).expect("a valid key"),
            claims,
        }
    }

    /// The device's key pair also serves as the manufacturer's. It is fixed, so that findings are reproducible.
    fn pair(&self) -> &DevicePrivateKey {
        self.package.key_pair.as_ref().expect("the vector has a pair")
    }
}

/// The key that signs the sample certificates.
pub fn manufacturer() -> &'static PublicKey {
    CONTEXT.pair().public()
}

pub fn data_packages() -> Vec<Vec<u8>> {
    [P256, ED25519, RSA, SYMMETRIC].map(|vector| output(vector, "package")).to_vec()
}

pub fn sealed_packages() -> Vec<Vec<u8>> {
    vec![output(P256, "sealed")]
}

pub fn backups() -> Vec<Vec<u8>> {
    vec![output(P256, "backup")]
}

pub fn confirmations() -> Vec<Vec<u8>> {
    vec![output(P256, "confirmation"), output(SYMMETRIC, "confirmation")]
}

pub fn csrs() -> Vec<Vec<u8>> {
    let request = authority_request(&subject(), manufacturer(), ALGORITHM).expect("a valid request");
    vec![signed(request).as_der().to_vec()]
}

pub fn callers() -> Vec<Vec<u8>> {
    let station = AccessName::Client(Caller::Station("line-1/a".parse().expect("a valid name")));
    let officer = AccessName::Client(Caller::Officer("o-1".parse().expect("a valid name")));
    let certificate = |name: &AccessName| {
        let template = AccessCertificate {
            name,
            public_key: manufacturer(),
            issuer: &ISSUER,
            serial: serial(),
            not_before: NOW,
            not_after: NOW + 86_400,
        };
        signed(access_certificate(&template).expect("a valid template")).as_der().to_vec()
    };
    vec![certificate(&station), certificate(&officer)]
}

pub fn x509() -> Vec<Vec<u8>> {
    vec![device_certificate(PHONE, Some(manufacturer()))]
}

pub fn cwts() -> Vec<Vec<u8>> {
    // The demo's sensor profile does not allow an IMEI, but the sample device has one.
    let any_identity = SENSOR.replace(r#"["eui48", "serial"]"#, r#"["imei"]"#);
    vec![device_certificate(&any_identity, None)]
}

pub fn records() -> Vec<Vec<u8>> {
    let package = &CONTEXT.package;
    let record = DeviceRecord {
        chip: package.chip.clone(),
        identity: package.identity.clone(),
        profile: package.profile.clone(),
        certificate: package.certificate.device_certificate().to_vec(),
        certificate_is_cwt: false,
        serial: serial().as_bytes().to_vec(),
        public_key: Some(manufacturer().spki_der().to_vec()),
        backup: output(P256, "backup"),
        master_key_version: 1,
        session: package.session,
        published: NOW,
    };
    let without_pair = DeviceRecord { certificate_is_cwt: true, public_key: None, ..record.clone() };
    [record, without_pair].map(|record| record.to_bytes().expect("within the size limit")).to_vec()
}

pub fn audit_checkpoints() -> Vec<Vec<u8>> {
    let checkpoint = AuditCheckpoint {
        node: "line-3".to_owned(),
        entries: 4096,
        note: b"spp.example/audit\n4096\n\n\xe2\x80\x94 spp.example/audit AAAA\n".to_vec(),
        recorded: NOW,
    };
    let first = AuditCheckpoint { entries: 1, note: vec![b'n'], recorded: 0, ..checkpoint.clone() };
    [checkpoint, first].map(|checkpoint| checkpoint.to_bytes().expect("within the size limit")).to_vec()
}

pub fn names() -> Vec<Vec<u8>> {
    let texts = [
        "imei:490154203237518",
        "meid:a0000000002329",
        "eui48:0123456789ab",
        "eui64:0123456789abcdef",
        "serial:SN-0001",
        "line-3/a",
        "master-1",
        "000102030405060708090a0b0c0d0e0f",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

pub fn profiles() -> Vec<Vec<u8>> {
    [PHONE, SENSOR, GATEWAY].map(|text| text.as_bytes().to_vec()).to_vec()
}

pub fn issuers() -> Vec<Vec<u8>> {
    vec![authority().to_pem().expect("a valid certificate").into_bytes()]
}

pub fn keys() -> Vec<Vec<u8>> {
    let spki = |vector| from_hex(&input(vector, "public_key"));
    let transport = CONTEXT.transport.public().expect("a public key").as_bytes().to_vec();
    vec![spki(P256), spki(ED25519), spki(RSA), transport]
}

fn device_certificate(profile: &str, public_key: Option<&PublicKey>) -> Vec<u8> {
    let name = "sample".parse().expect("a valid name");
    let profile = Profile::from_toml(name, "sample.toml", profile).expect("a valid demo profile");
    let request = CertificateRequest {
        profile: &profile,
        issuer: &ISSUER,
        chip: &CONTEXT.package.chip,
        identity: &CONTEXT.package.identity,
        public_key,
        serial: serial(),
        not_before: NOW,
    };
    let to_sign = prepare(&request).expect("a valid request").lint().expect("no lint findings").into_to_sign();
    let signature = CONTEXT.pair().sign(ALGORITHM, to_sign.to_be_signed()).expect("the key signs");
    IssuedCertificate::assemble(&to_sign, &ISSUER, &signature).expect("the signature verifies").into_bytes()
}

fn authority() -> SignedDocument {
    let template = AuthorityCertificate {
        subject: &subject(),
        public_key: manufacturer(),
        algorithm: ALGORITHM,
        serial: serial(),
        not_before: NOW,
        not_after: None,
    };
    signed(authority_certificate(&template).expect("a valid template"))
}

fn signed(document: UnsignedDocument) -> SignedDocument {
    let signature = CONTEXT.pair().sign(ALGORITHM, document.to_be_signed()).expect("the key signs");
    document.assemble(&signature).expect("the signature verifies")
}

fn subject() -> SubjectName {
    SubjectName::with_common_name("Sample").expect("a valid name")
}

fn serial() -> CertificateSerial {
    CertificateSerial::from_random([7; CertificateSerial::LEN])
}

fn input(vector: &str, field: &str) -> String {
    text(vector, "inputs", field)
}

fn output(vector: &str, field: &str) -> Vec<u8> {
    from_hex(&text(vector, "outputs", field))
}

fn text(vector: &str, part: &str, field: &str) -> String {
    let vector: Value = serde_json::from_str(vector).expect("valid JSON");
    vector[part][field].as_str().expect("the vector has the field").to_owned()
}

fn from_hex(text: &str) -> Vec<u8> {
    hex::decode(text).expect("valid hex")
}

/// A record of a log that was created once, with its proof and the log's key.
pub const LOG_RECORD: &[u8] = include_bytes!("log/record.cbor");
const LOG_PROOF: &[u8] = include_bytes!("log/record.tlog-proof");
const LOG_KEY: &str = include_str!("log/log.vkey");

pub fn log_key() -> LogKey {
    LOG_KEY.parse().expect("a valid key")
}

pub fn log_proofs() -> Vec<Vec<u8>> {
    let text = std::str::from_utf8(LOG_PROOF).expect("UTF-8");
    vec![LOG_PROOF.to_vec(), text.replacen("index", "extra AAAA\nindex", 1).into_bytes()]
}

pub fn checkpoints() -> Vec<Vec<u8>> {
    let text = std::str::from_utf8(LOG_PROOF).expect("UTF-8");
    vec![text.split_once("\n\n").expect("the checkpoint follows").1.as_bytes().to_vec()]
}

pub fn tiles() -> Vec<Vec<u8>> {
    ["tile/0/000", "tile/1/x001/x234/067.p/8", "tile/entries/x001/000.p/255"]
        .map(|path| path.as_bytes().to_vec())
        .to_vec()
}

pub fn bundles() -> Vec<Vec<u8>> {
    vec![[&[0, 3][..], b"one", &[0, 0], &[0, 2], b"do"].concat()]
}

pub fn vkeys() -> Vec<Vec<u8>> {
    vec![LOG_KEY.as_bytes().to_vec(), b"log.example/devices".to_vec()]
}
