//! Simulated devices, their orders, and a station's handling of the answers.

use spp_device::{Delivery, Device, PublicRecord, SimulatedFab};
use spp_format::certificate::IssuerCertificate;
use spp_format::keys::{DevicePrivateKey, PublicKey, SignatureAlgorithm, sha256};
use spp_format::names::{ChipId, Imei, SessionId};
use spp_format::package::TransportCurve;
use spp_format::secret::SecretBytes;
use spp_format::tlog::{LogKey, LogProof};
use spp_proto::assemble_response::Delivery as ProtoDelivery;
use spp_proto::get_session_request::Session as SessionSelector;
use spp_proto::line_client::LineClient;
use spp_proto::{
    AssembleRequest, AssembleResponse, CertificateFormat, CompleteRequest, GetRecordResponse, GetSessionRequest,
    GetSessionResponse, Receipt, SessionState, TransportKey, TransportKeyType,
};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::site::Site;

pub type Line = LineClient<Channel>;

/// Creates the simulated devices of a site.
pub struct TestFab(SimulatedFab);

impl TestFab {
    /// Creates a fab whose chips have the site's manufacturer key in their ROM.
    pub fn new(site: &Site) -> Self {
        Self(SimulatedFab::create(site.path("devices"), manufacturer(site), None).unwrap())
    }

    /// Device number `n`, without a transport key.
    pub fn device(&self, n: u64) -> Device {
        self.0.device(&chip(n), None).unwrap()
    }

    /// Device number `n`, to which packages can be sealed.
    pub fn sealing_device(&self, n: u64, curve: TransportCurve) -> Device {
        self.0.device(&chip(n), Some(curve)).unwrap()
    }
}

pub fn manufacturer(site: &Site) -> PublicKey {
    let pem = String::from_utf8(site.read("keys/manufacturer-ca.pem")).unwrap();
    IssuerCertificate::from_pem(&pem, SignatureAlgorithm::EcdsaP256Sha256).unwrap().public_key().clone()
}

pub fn chip(n: u64) -> ChipId {
    ChipId::from_bytes(&[&[0xc4; 8][..], &n.to_be_bytes()].concat()).unwrap()
}

/// An IMEI in the range of line-1/a.
pub fn imei(n: u64) -> String {
    let digits = format!("4901542{n:07}");
    format!("imei:{digits}{}", Imei::check_digit(&digits).unwrap())
}

/// The order for device `n` as a phone: a pair generated in the HSM, and a symmetric key.
pub fn phone(n: u64) -> AssembleRequest {
    let chip_id = chip(n).as_bytes().to_vec();
    AssembleRequest { chip_id, identity: imei(n), profile: "phone".to_owned(), ..Default::default() }
}

/// The order for device `n` as a sensor: symmetric keys only, sealed.
pub fn sensor(n: u64, device: &Device) -> AssembleRequest {
    sealed(AssembleRequest { identity: format!("eui48:{n:012x}"), profile: "sensor".to_owned(), ..phone(n) }, device)
}

/// The order for device `n` as a gateway, which generates its own pair.
pub fn gateway(n: u64, device: &Device) -> AssembleRequest {
    let csr = csr(&device.own_key_pair().unwrap());
    AssembleRequest { identity: format!("serial:GW-{n}"), profile: "gateway".to_owned(), csr, ..phone(n) }
}

/// Adds the device's transport key to the order.
pub fn sealed(order: AssembleRequest, device: &Device) -> AssembleRequest {
    let key = device.transport_public_key().unwrap().unwrap();
    let kind = match key.curve() {
        TransportCurve::P256 => TransportKeyType::P256,
        TransportCurve::X25519 => TransportKeyType::X25519,
    };
    let transport_key = TransportKey { r#type: kind.into(), public_key: key.as_bytes().to_vec() };
    AssembleRequest { transport_key: Some(transport_key), ..order }
}

/// A PKCS#10 request for a P-256 pair, without a subject.
pub fn csr(pair: &DevicePrivateKey) -> Vec<u8> {
    use der::asn1::{BitString, ObjectIdentifier};
    use der::{Decode as _, Encode as _};
    use x509_cert::request::{CertReq, CertReqInfo, Version};
    const ECDSA_WITH_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
    let info = CertReqInfo {
        version: Version::V1,
        subject: Default::default(),
        public_key: spki::SubjectPublicKeyInfoOwned::from_der(pair.public().spki_der()).unwrap(),
        attributes: Default::default(),
    };
    let signature = pair.sign(SignatureAlgorithm::EcdsaP256Sha256, &info.to_der().unwrap()).unwrap();
    let algorithm = spki::AlgorithmIdentifierOwned { oid: ECDSA_WITH_SHA256, parameters: None };
    CertReq { info, algorithm, signature: BitString::from_bytes(&signature).unwrap() }.to_der().unwrap()
}

/// Installs the answer on the device and returns the Complete request.
pub fn install(device: &mut Device, answer: &AssembleResponse) -> CompleteRequest {
    let session = SessionId::from_bytes(&answer.session_id).unwrap();
    match answer.delivery.as_ref().unwrap() {
        ProtoDelivery::DataPackage(bytes) => {
            device.install(&session, &Delivery::Clear(&SecretBytes::copy_of(bytes))).unwrap();
        }
        ProtoDelivery::SealedPackage(bytes) => {
            device.install(&session, &Delivery::Sealed(bytes)).unwrap();
        }
    }
    CompleteRequest {
        session_id: answer.session_id.clone(),
        backup_package: device.backup().unwrap(),
        key_confirmation: device.confirmation().unwrap(),
    }
}

/// The bytes of the data package that the device has installed.
pub fn package(device: &Device) -> Vec<u8> {
    device.package().unwrap().encode().unwrap().expose().clone()
}

/// Assembles, installs, completes.
pub async fn provision(line: &mut Line, device: &mut Device, order: &AssembleRequest) -> (CompleteRequest, Receipt) {
    let answer = assemble(line, order).await.unwrap();
    let request = install(device, &answer);
    let receipt = complete(line, &request).await.unwrap();
    (request, receipt)
}

pub async fn assemble(line: &mut Line, order: &AssembleRequest) -> Result<AssembleResponse, Status> {
    line.assemble(order.clone()).await.map(tonic::Response::into_inner)
}

pub async fn complete(line: &mut Line, request: &CompleteRequest) -> Result<Receipt, Status> {
    line.complete(request.clone()).await.map(|answer| answer.into_inner().receipt.unwrap())
}

/// The receipt without its proof, as some answers contain it.
pub fn without_proof(receipt: &Receipt) -> Option<Receipt> {
    Some(Receipt { tlog_proof: Vec::new(), ..receipt.clone() })
}

/// Asserts that the receipt proves the inclusion of these bytes in the site's log.
pub fn assert_inclusion(site: &Site, receipt: &Receipt, record: &[u8]) {
    let key: LogKey = String::from_utf8(site.read("keys/log-1.vkey")).unwrap().parse().unwrap();
    let proven = LogProof::from_bytes(&receipt.tlog_proof).unwrap().verify(record, &key).unwrap();
    assert_eq!((proven.index, &receipt.record_hash), (receipt.record_index, &sha256(record).to_vec()));
}

pub async fn session_of(line: &mut Line, chip: &ChipId) -> Result<GetSessionResponse, Status> {
    let session = Some(SessionSelector::ChipId(chip.as_bytes().to_vec()));
    line.get_session(GetSessionRequest { session }).await.map(tonic::Response::into_inner)
}

pub async fn state_of(line: &mut Line, chip: &ChipId) -> SessionState {
    session_of(line, chip).await.unwrap().state()
}

/// Recovers a device with its public record.
pub fn recover(device: &mut Device, answer: &GetRecordResponse) {
    let record = answer.record.as_ref().unwrap();
    let is_cwt = record.certificate_format() == CertificateFormat::Cwt;
    let (certificate, backup) = (&record.certificate, &record.backup_package);
    device.recover(&PublicRecord { certificate, is_cwt, backup }).unwrap();
}

/// A refusal by the daemon (not by the transport), with its reason.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    pub reason: String,
    /// The fields of `google.rpc.BadRequest`, in order.
    pub fields: Vec<String>,
}

impl Refusal {
    /// Parses a status. Asserts that every refusal has a domain and reason, and every violation a description.
    pub fn of(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
        assert_eq!(info.domain, "spp", "{status:?}");
        assert!(!info.reason.is_empty() && !status.message().is_empty(), "{status:?}");
        let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
        assert!(violations.iter().all(|v| !v.description.is_empty()), "{status:?}");
        let fields = violations.into_iter().map(|v| v.field).collect();
        Self { code: status.code(), reason: info.reason.clone(), fields }
    }

    pub fn is(&self, code: Code, reason: &str) -> bool {
        self.code == code && self.reason == reason
    }
}

/// Whether the call may be repeated: the refusal has a retry delay, or the connection failed.
pub fn is_retryable(status: &Status) -> bool {
    let details = status.get_error_details();
    details.error_info().is_none() || details.retry_info().is_some()
}
