//! Invalid input is refused with the correct code and field, and changes no state.

use std::path::Path;

use coset::{CoseEncrypt0Builder, HeaderBuilder, TaggedCborSerializable as _, iana};
use spp_format::keys::{DevicePrivateKey, PrivateParts, generate_p256, sha256};
use spp_format::names::SessionId;
use spp_format::package::{ConfirmationClaims, ConfirmationSigner, TransportCurve, confirm};
use spp_format::secret::SecretBytes;
use spp_proto::get_session_request::Session as Selector;
use spp_proto::{
    AbortRequest, AssembleRequest, CompleteRequest, GetRecordRequest, GetSessionRequest, SessionState, TransportKey,
};
use tonic::{Code, Status};

use spp_testkit::devices::{
    Line, Refusal, TestFab, assemble, chip, complete, csr, gateway, imei, install, package, phone, sealed, sensor,
    state_of,
};
use spp_testkit::process::{child_command, output};
use spp_testkit::site::Site;

/// Edits of the phone profile: the chip has its own backup format.
const OPAQUE: [(&str, &str); 1] = [("format = \"cose\"", "format = \"opaque\"")];
/// Edits of the phone profile: no key confirmation required.
const WAIVED: [(&str, &str); 1] = [("required = true", "required = false")];

/// Starts a site with the profiles `opaque` and `waived` besides those of the demo.
fn site() -> Site {
    let mut site = Site::new();
    for (name, edits) in [("opaque", OPAQUE), ("waived", WAIVED)] {
        let file = format!("profiles/{name}.toml");
        std::fs::copy(site.path("profiles/phone.toml"), site.path(&file)).unwrap();
        edits.iter().for_each(|(from, to)| site.edit(&file, from, to));
    }
    site.edit("sppd.toml", "\"router\"]", "\"router\", \"opaque\", \"waived\"]");
    site.start();
    site
}

/// Returns the counts that must not change: sessions by state, and records.
async fn counts(site: &Site) -> [u64; 6] {
    let status = site.status().await;
    let s = status.sessions.unwrap();
    [s.reserved, s.issued, s.published, s.erased, s.aborted, status.records]
}

fn fields(code: Code, reason: &str, fields: &[&str]) -> Refusal {
    Refusal { code, reason: reason.to_owned(), fields: fields.iter().map(ToString::to_string).collect() }
}

fn invalid(names: &[&str]) -> Refusal {
    fields(Code::InvalidArgument, "INVALID", names)
}

fn not_accepted(name: &str) -> Refusal {
    fields(Code::FailedPrecondition, "NOT_ACCEPTED", &[name])
}

fn openssl_csr(directory: &Path, key: &[&str]) -> Vec<u8> {
    let request = ["req", "-new", "-batch", "-nodes", "-subj", "/CN=x", "-keyout", "k", "-outform", "DER"];
    let mut openssl = child_command("openssl");
    openssl.args(request).args(key).current_dir(directory);
    let output = output(openssl);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn transport(kind: i32, bytes: &[u8]) -> Option<TransportKey> {
    Some(TransportKey { r#type: kind, public_key: bytes.to_vec() })
}

#[tokio::test]
async fn invalid_order_names_its_fields_and_changes_nothing() {
    let site = site();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let device = fab.sealing_device(1, TransportCurve::P256);
    let order = phone(1);
    let with_csr = gateway(1, &device);
    let point = device.transport_public_key().unwrap().unwrap().as_bytes().to_vec();
    let identity = |text: &str| AssembleRequest { identity: text.to_owned(), ..order.clone() };
    let profile = |text: &str| AssembleRequest { profile: text.to_owned(), ..order.clone() };
    let chip_of = |length| AssembleRequest { chip_id: vec![1; length], ..order.clone() };
    let csr_of = |csr: Vec<u8>| AssembleRequest { csr, ..with_csr.clone() };
    let to_key = |transport_key| AssembleRequest { transport_key, ..order.clone() };
    let mut forged = with_csr.csr.clone();
    *forged.last_mut().unwrap() ^= 1;
    let weak = openssl_csr(&site.path(""), &["-newkey", "rsa:1024"]);
    let other_kind = openssl_csr(&site.path(""), &["-newkey", "ed25519"]);

    let table = [
        ("an empty message", AssembleRequest::default(), invalid(&["chip_id", "identity", "profile"])),
        ("a chip ID that is too short", chip_of(7), invalid(&["chip_id"])),
        ("a chip ID that is too long", chip_of(65), invalid(&["chip_id"])),
        ("no chip ID", chip_of(0), invalid(&["chip_id"])),
        ("an IMEI of 14 digits", identity("imei:49015420000001"), invalid(&["identity"])),
        ("an IMEI of 16 digits", identity("imei:4901542000000100"), invalid(&["identity"])),
        ("an IMEI with a letter", identity("imei:49015420000001a"), invalid(&["identity"])),
        ("an IMEI with a wrong check digit", identity("imei:490154203237519"), invalid(&["identity"])),
        ("an identity of an unknown kind", identity("uuid:1"), invalid(&["identity"])),
        ("an identity without a kind", identity("490154203237518"), invalid(&["identity"])),
        ("an oversized identity", identity(&format!("serial:{}", "x".repeat(5000))), invalid(&["identity"])),
        ("an unknown profile", profile("toaster"), invalid(&["profile"])),
        ("no profile", profile(""), invalid(&["profile"])),
        ("a profile that is a path", profile("../phone"), invalid(&["profile"])),
        ("an identity of another kind", identity("serial:1"), invalid(&["identity"])),
        ("a missing CSR", csr_of(Vec::new()), invalid(&["csr"])),
        (
            "a CSR that the profile does not use",
            AssembleRequest { csr: with_csr.csr.clone(), ..order.clone() },
            invalid(&["csr"]),
        ),
        ("a CSR with a bad signature", csr_of(forged), invalid(&["csr"])),
        ("a CSR for RSA with 1024 bits", csr_of(weak), invalid(&["csr"])),
        ("a CSR for a key type that the profile does not accept", csr_of(other_kind), invalid(&["csr"])),
        ("a malformed CSR", csr_of(b"garbage".to_vec()), invalid(&["csr"])),
        ("a truncated CSR", csr_of(with_csr.csr[..100].to_vec()), invalid(&["csr"])),
        ("an oversized CSR", csr_of(vec![0x30; 4097]), invalid(&["csr"])),
        ("no type of transport key", to_key(transport(0, &point)), invalid(&["transport_key"])),
        ("an unknown type of transport key", to_key(transport(7, &point)), invalid(&["transport_key"])),
        ("a point off the curve", to_key(transport(1, &[4; 65])), invalid(&["transport_key"])),
        ("a point of another curve", to_key(transport(2, &point)), invalid(&["transport_key"])),
        ("a point of small order", to_key(transport(2, &[0; 32])), invalid(&["transport_key"])),
        ("an empty point", to_key(transport(1, &[])), invalid(&["transport_key"])),
        (
            "no transport key where sealing is required",
            AssembleRequest { transport_key: None, ..sensor(1, &device) },
            invalid(&["transport_key"]),
        ),
        (
            "an order that does not match its profile in any field",
            AssembleRequest { profile: "sensor".to_owned(), csr: with_csr.csr.clone(), ..order.clone() },
            invalid(&["identity", "csr", "transport_key"]),
        ),
        (
            "all fields invalid",
            AssembleRequest {
                chip_id: vec![1],
                identity: "imei:1".to_owned(),
                profile: "NO".to_owned(),
                csr: vec![0],
                transport_key: transport(9, &[]),
                ..AssembleRequest::default()
            },
            invalid(&["chip_id", "identity", "profile", "csr", "transport_key"]),
        ),
    ];
    let before = counts(&site).await;
    for (what, order, expected) in table {
        assert_eq!(Refusal::of(&assemble(&mut line, &order).await.unwrap_err()), expected, "{what}");
    }
    assert_eq!(counts(&site).await, before);
    assemble(&mut line, &sealed(order, &device)).await.expect("a valid order is still accepted");
}

#[tokio::test]
async fn order_outside_station_identities_is_not_permitted() {
    let site = site();
    let mut line = site.station().await;
    let foreign = AssembleRequest { identity: "imei:350000000000006".to_owned(), ..phone(1) };
    let refused = assemble(&mut line, &foreign).await.unwrap_err();
    assert_eq!(Refusal::of(&refused), fields(Code::PermissionDenied, "NOT_PERMITTED", &[]));
    assert!(refused.message().contains("imei:350000000000006"), "{refused:?}");
    assert_eq!(counts(&site).await, [0; 6]);
}

/// A device with an installed package and without a receipt.
struct InstalledDevice {
    valid: CompleteRequest,
    package: Vec<u8>,
    scalar: Vec<u8>,
    symmetric: Vec<u8>,
    key: DevicePrivateKey,
}

async fn installed_device(line: &mut Line, fab: &TestFab, n: u64, profile: &str) -> InstalledDevice {
    let order = AssembleRequest { profile: profile.to_owned(), ..phone(n) };
    let answer = assemble(line, &order).await.unwrap();
    let mut device = fab.device(n);
    let valid = install(&mut device, &answer);
    let bytes = package(&device);
    let installed = device.package().unwrap();
    let key = installed.key_pair.unwrap();
    let PrivateParts::Ec(scalar) = key.parts() else { panic!("a phone has a P-256 pair") };
    let (scalar, symmetric) = (scalar.expose().clone(), installed.symmetric_keys[0].key().expose().clone());
    InstalledDevice { valid, package: bytes, scalar, symmetric, key }
}

impl InstalledDevice {
    /// Returns a well-formed COSE_Encrypt0 of the correct length with `content` in place of the ciphertext.
    fn envelope(&self, n: u64, content: &[u8]) -> Vec<u8> {
        let mut ciphertext = content.to_vec();
        ciphertext.resize(self.package.len() + 16, 0xee);
        let protected = HeaderBuilder::new().algorithm(iana::Algorithm::A256GCM).key_id(chip(n).as_bytes().to_vec());
        CoseEncrypt0Builder::new()
            .protected(protected.build())
            .unprotected(HeaderBuilder::new().iv(vec![7; 12]).build())
            .ciphertext(ciphertext)
            .build()
            .to_tagged_vec()
            .unwrap()
    }

    fn confirm(&self, claims: &ConfirmationClaims, key: &DevicePrivateKey) -> Vec<u8> {
        confirm(claims, &ConfirmationSigner::Pair(key)).unwrap()
    }

    fn claims(&self, n: u64) -> ConfirmationClaims {
        let session = SessionId::from_bytes(&self.valid.session_id).unwrap();
        let package = SecretBytes::copy_of(&self.package);
        ConfirmationClaims::new(session, chip(n), &package, &self.valid.backup_package)
    }

    /// Returns the request with this backup and a valid confirmation of it.
    fn with_backup(&self, n: u64, backup: Vec<u8>) -> CompleteRequest {
        let claims = ConfirmationClaims { backup_hash: sha256(&backup), ..self.claims(n) };
        let key_confirmation = self.confirm(&claims, &self.key);
        CompleteRequest { backup_package: backup, key_confirmation, ..self.valid.clone() }
    }

    fn with_confirmation(&self, key_confirmation: Vec<u8>) -> CompleteRequest {
        CompleteRequest { key_confirmation, ..self.valid.clone() }
    }
}

fn base64(bytes: &[u8]) -> Vec<u8> {
    let pem = der::pem::encode_string("X", der::pem::LineEnding::LF, bytes).unwrap();
    pem.lines().filter(|line| !line.starts_with('-')).collect::<String>().into_bytes()
}

/// Asserts that an invalid request is refused twice and changes nothing, and that the valid one then succeeds.
async fn assert_refused_then_completed(
    site: &Site,
    line: &mut Line,
    what: &str,
    (n, device): (u64, &InstalledDevice),
    (invalid, expected): (CompleteRequest, Refusal),
) {
    let before = counts(site).await;
    for _ in 0..2 {
        assert_eq!(Refusal::of(&complete(line, &invalid).await.unwrap_err()), expected, "{what}");
    }
    assert_eq!(counts(site).await, before, "{what}");
    assert_eq!(state_of(line, &chip(n)).await, SessionState::Issued, "{what}");
    let record = GetRecordRequest { chip_id: chip(n).as_bytes().to_vec() };
    assert_eq!(site.recovery().await.get_record(record).await.unwrap_err().code(), Code::NotFound, "{what}");
    complete(line, &device.valid).await.unwrap_or_else(|e| panic!("the valid request fails after {what}: {e}"));
}

#[tokio::test]
async fn invalid_backup_changes_nothing_and_valid_one_succeeds() {
    type Make = fn(u64, &InstalledDevice, &InstalledDevice) -> Vec<u8>;
    let site = site();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let other = installed_device(&mut line, &fab, 9999, "phone").await;
    let table: [(&str, &str, Make, Code); 16] = [
        ("an empty backup", "phone", |_, _, _| Vec::new(), Code::InvalidArgument),
        ("an oversized backup", "opaque", |_, _, _| vec![1; 33 * 1024], Code::InvalidArgument),
        ("a backup of the wrong chip", "phone", |_, _, o| o.valid.backup_package.clone(), Code::FailedPrecondition),
        ("a backup that names another chip", "phone", |_, d, _| d.envelope(1, &[]), Code::FailedPrecondition),
        ("a truncated backup", "phone", |_, d, _| d.valid.backup_package[..60].to_vec(), Code::FailedPrecondition),
        (
            "a backup with trailing bytes",
            "phone",
            |_, d, _| [&d.valid.backup_package[..], &[0]].concat(),
            Code::FailedPrecondition,
        ),
        ("an untagged backup", "phone", |_, d, _| d.valid.backup_package[1..].to_vec(), Code::FailedPrecondition),
        ("malformed CBOR", "phone", |_, _, _| vec![0xff; 64], Code::FailedPrecondition),
        ("deep nesting", "phone", |_, _, _| vec![0x81; 8192], Code::FailedPrecondition),
        ("CBOR of another kind", "phone", |_, _, _| vec![0xd0, 0x80], Code::FailedPrecondition),
        ("the package in clear", "phone", |n, d, _| d.envelope(n, &d.package), Code::FailedPrecondition),
        ("the private key in clear", "phone", |n, d, _| d.envelope(n, &d.scalar), Code::FailedPrecondition),
        ("the private key in hex", "phone", |n, d, _| d.envelope(n, &hex(&d.scalar)), Code::FailedPrecondition),
        ("the symmetric key in clear", "opaque", |_, d, _| embedded(&d.symmetric), Code::FailedPrecondition),
        ("the symmetric key in hex", "opaque", |_, d, _| embedded(&hex(&d.symmetric)), Code::FailedPrecondition),
        ("the private key in base64", "opaque", |_, d, _| embedded(&base64(&d.scalar)), Code::FailedPrecondition),
    ];
    for ((what, profile, make, code), n) in table.into_iter().zip(1000..) {
        let device = installed_device(&mut line, &fab, n, profile).await;
        let request = device.with_backup(n, make(n, &device, &other));
        let reason = if code == Code::InvalidArgument { "INVALID" } else { "NOT_ACCEPTED" };
        let expected = fields(code, reason, &["backup_package"]);
        assert_refused_then_completed(&site, &mut line, what, (n, &device), (request, expected)).await;
    }
}

fn hex(bytes: &[u8]) -> Vec<u8> {
    hex::encode_upper(bytes).into_bytes()
}

/// Embeds bytes in others.
fn embedded(bytes: &[u8]) -> Vec<u8> {
    [&[0x55; 333][..], bytes, &[0xaa; 111]].concat()
}

#[tokio::test]
async fn invalid_confirmation_changes_nothing_and_valid_one_succeeds() {
    type Make = fn(u64, &InstalledDevice, &InstalledDevice) -> Vec<u8>;
    let site = site();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let other = installed_device(&mut line, &fab, 9999, "phone").await;
    let table: [(&str, Make); 10] = [
        ("no confirmation", |_, _, _| Vec::new()),
        ("a truncated confirmation", |_, d, _| d.valid.key_confirmation[..80].to_vec()),
        ("an untagged confirmation", |_, d, _| d.valid.key_confirmation[1..].to_vec()),
        ("garbage", |_, _, _| vec![0xff; 100]),
        ("an altered signature", |_, d, _| altered(&d.valid.key_confirmation)),
        ("a confirmation by another key", |n, d, _| d.confirm(&d.claims(n), &generate_p256().unwrap())),
        ("a confirmation of another session", |_, _, o| o.valid.key_confirmation.clone()),
        ("a confirmation that claims another session", |n, d, o| {
            d.confirm(&ConfirmationClaims { session: o.claims(1).session, ..d.claims(n) }, &d.key)
        }),
        ("a confirmation of another package", |n, d, _| {
            d.confirm(&ConfirmationClaims { package_hash: [0; 32], ..d.claims(n) }, &d.key)
        }),
        ("a confirmation of another backup", |n, d, _| {
            d.confirm(&ConfirmationClaims { backup_hash: [0; 32], ..d.claims(n) }, &d.key)
        }),
    ];
    for ((what, make), n) in table.into_iter().zip(1000..) {
        let device = installed_device(&mut line, &fab, n, "phone").await;
        let refused = (device.with_confirmation(make(n, &device, &other)), not_accepted("key_confirmation"));
        assert_refused_then_completed(&site, &mut line, what, (n, &device), refused).await;
    }
    let device = installed_device(&mut line, &fab, 1, "phone").await;
    let refused = (device.with_confirmation(vec![0xd2; 4097]), invalid(&["key_confirmation"]));
    assert_refused_then_completed(&site, &mut line, "an oversized confirmation", (1, &device), refused).await;
}

fn altered(bytes: &[u8]) -> Vec<u8> {
    let mut altered = bytes.to_vec();
    *altered.last_mut().unwrap() ^= 1;
    altered
}

#[tokio::test]
async fn waived_confirmation_is_still_verified_if_present() {
    let site = site();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let device = installed_device(&mut line, &fab, 1, "waived").await;
    let request = device.with_confirmation(altered(&device.valid.key_confirmation));
    let refused = Refusal::of(&complete(&mut line, &request).await.unwrap_err());
    assert_eq!(refused, not_accepted("key_confirmation"));
    complete(&mut line, &device.with_confirmation(Vec::new())).await.expect("the profile waives it");
}

#[tokio::test]
async fn opaque_backup_is_published_unchanged() {
    let site = site();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let device = installed_device(&mut line, &fab, 1, "opaque").await;
    let own_format = device.with_backup(1, vec![0x42; 500]);
    complete(&mut line, &own_format).await.unwrap();
    let record = GetRecordRequest { chip_id: chip(1).as_bytes().to_vec() };
    let record = site.recovery().await.get_record(record).await.unwrap().into_inner().record.unwrap();
    assert_eq!(record.backup_package, vec![0x42; 500]);
}

#[tokio::test]
async fn unknown_session_is_refused_by_every_call() {
    let site = site();
    let mut line = site.station().await;
    let unknown = fields(Code::NotFound, "NO_SESSION", &[]);
    for (session_id, expected) in [
        (vec![1; 16], &unknown),
        (vec![1; 15], &invalid(&["session_id"])),
        (vec![1; 17], &invalid(&["session_id"])),
        (Vec::new(), &invalid(&["session_id"])),
    ] {
        let request =
            CompleteRequest { session_id: session_id.clone(), backup_package: vec![1], key_confirmation: vec![1] };
        let by_id = GetSessionRequest { session: Some(Selector::SessionId(session_id.clone())) };
        let abort = AbortRequest { session_id, reason: String::new() };
        for status in [
            complete(&mut line, &request).await.unwrap_err(),
            line.abort(abort).await.unwrap_err(),
            line.get_session(by_id).await.unwrap_err(),
        ] {
            assert_eq!(&Refusal::of(&status), expected, "{status:?}");
        }
    }
    let by_chip = |bytes: &[u8]| GetSessionRequest { session: Some(Selector::ChipId(bytes.to_vec())) };
    let mut refusal = async |request| Refusal::of(&line.get_session(request).await.unwrap_err());
    assert_eq!(refusal(by_chip(&[1; 8])).await, unknown);
    assert_eq!(refusal(by_chip(&[1; 7])).await, invalid(&["chip_id"]));
    assert_eq!(refusal(GetSessionRequest { session: None }).await, invalid(&["session"]));
}

#[tokio::test]
async fn complete_abort_and_get_record_fields_are_checked() {
    let site = site();
    let mut line = site.station().await;
    let empty = complete(&mut line, &CompleteRequest::default()).await.unwrap_err();
    assert_eq!(Refusal::of(&empty), invalid(&["session_id", "backup_package"]));
    let oversized =
        CompleteRequest { session_id: vec![1], backup_package: vec![0; 33 << 10], key_confirmation: vec![0; 5000] };
    let oversized = complete(&mut line, &oversized).await.unwrap_err();
    assert_eq!(Refusal::of(&oversized), invalid(&["session_id", "backup_package", "key_confirmation"]));
    let answer = assemble(&mut line, &phone(1)).await.unwrap();
    let abort = AbortRequest { session_id: answer.session_id, reason: "x".repeat(201) };
    assert_eq!(Refusal::of(&line.abort(abort).await.unwrap_err()), invalid(&["reason"]));
    assert_eq!(state_of(&mut line, &chip(1)).await, SessionState::Issued);

    let mut recovery = site.recovery().await;
    let mut record = async |chip_id| recovery.get_record(GetRecordRequest { chip_id }).await.unwrap_err();
    assert_eq!(Refusal::of(&record(vec![1; 7]).await), invalid(&["chip_id"]));
    assert_eq!(Refusal::of(&record(vec![1; 8]).await), fields(Code::NotFound, "NO_RECORD", &[]));
}

#[tokio::test]
async fn oversized_message_is_refused_before_parsing() {
    let site = site();
    let mut line = site.station().await;
    let order = AssembleRequest { identity: imei(1), csr: vec![0; 100 << 10], ..phone(1) };
    let refused: Status = assemble(&mut line, &order).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    assemble(
        &mut line,
        &AssembleRequest {
            csr: csr(&generate_p256().unwrap()),
            identity: "serial:1".into(),
            profile: "gateway".into(),
            ..phone(1)
        },
    )
    .await
    .expect("the connection still works");
}
