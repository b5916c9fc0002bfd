//! Bad input is refused with the right code and the right field, and changes nothing.

use std::path::Path;

use coset::{CoseEncrypt0Builder, HeaderBuilder, TaggedCborSerializable as _, iana};
use spp::keys::{DevicePrivateKey, PrivateParts, generate_p256, sha256};
use spp::names::SessionId;
use spp::package::{ConfirmationClaims, ConfirmationSigner, TransportCurve, confirm};
use spp::proto::get_session_request::Session as Which;
use spp::proto::{
    AbortRequest, AssembleRequest, CompleteRequest, GetRecordRequest, GetSessionRequest, SessionState, TransportKey,
};
use spp::secret::SecretBytes;
use tonic::{Code, Status};

use spp_testkit::floor::{
    Floor, Line, Refusal, assemble, chip, complete, csr, gateway, imei, install, package, phone, sealed, sensor,
    state_of,
};
use spp_testkit::process::{output, tethered};
use spp_testkit::site::Site;

/// A phone whose chip has a backup format of its own.
const OPAQUE: [(&str, &str); 1] = [("format = \"cose\"", "format = \"opaque\"")];
/// A phone that need not prove that it has its keys.
const WAIVED: [(&str, &str); 1] = [("required = true", "required = false")];

/// A site with the profiles `opaque` and `waived` besides those of the demo.
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

/// What must not change: sessions by state, and records.
async fn figures(site: &Site) -> [u64; 6] {
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
    let mut openssl = tethered("openssl");
    openssl.args(request).args(key).current_dir(directory);
    let output = output(openssl);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn transport(kind: i32, bytes: &[u8]) -> Option<TransportKey> {
    Some(TransportKey { r#type: kind, public_key: bytes.to_vec() })
}

#[tokio::test]
async fn a_bad_order_is_refused_by_its_field_and_changes_nothing() {
    let site = site();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let device = floor.sealing(1, TransportCurve::P256);
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
        ("an identity of no kind", identity("uuid:1"), invalid(&["identity"])),
        ("an identity without a kind", identity("490154203237518"), invalid(&["identity"])),
        ("an endless identity", identity(&format!("serial:{}", "x".repeat(5000))), invalid(&["identity"])),
        ("an unknown profile", profile("toaster"), invalid(&["profile"])),
        ("no profile", profile(""), invalid(&["profile"])),
        ("a profile that is a path", profile("../phone"), invalid(&["profile"])),
        ("an identity of another kind", identity("serial:1"), invalid(&["identity"])),
        ("a missing CSR", csr_of(Vec::new()), invalid(&["csr"])),
        (
            "a CSR that nobody asked for",
            AssembleRequest { csr: with_csr.csr.clone(), ..order.clone() },
            invalid(&["csr"]),
        ),
        ("a CSR with a bad signature", csr_of(forged), invalid(&["csr"])),
        ("a CSR for RSA with 1024 bits", csr_of(weak), invalid(&["csr"])),
        ("a CSR for a kind that the profile does not take", csr_of(other_kind), invalid(&["csr"])),
        ("a CSR that is none", csr_of(b"garbage".to_vec()), invalid(&["csr"])),
        ("half a CSR", csr_of(with_csr.csr[..100].to_vec()), invalid(&["csr"])),
        ("an oversized CSR", csr_of(vec![0x30; 4097]), invalid(&["csr"])),
        ("no type of transport key", to_key(transport(0, &point)), invalid(&["transport_key"])),
        ("an unknown type of transport key", to_key(transport(7, &point)), invalid(&["transport_key"])),
        ("a point off the curve", to_key(transport(1, &[4; 65])), invalid(&["transport_key"])),
        ("a point of another curve", to_key(transport(2, &point)), invalid(&["transport_key"])),
        ("a point of small order", to_key(transport(2, &[0; 32])), invalid(&["transport_key"])),
        ("no point", to_key(transport(1, &[])), invalid(&["transport_key"])),
        (
            "no transport key where sealing is required",
            AssembleRequest { transport_key: None, ..sensor(1, &device) },
            invalid(&["transport_key"]),
        ),
        (
            "an order that fits its profile in nothing",
            AssembleRequest { profile: "sensor".to_owned(), csr: with_csr.csr.clone(), ..order.clone() },
            invalid(&["identity", "csr", "transport_key"]),
        ),
        (
            "everything at once",
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
    let before = figures(&site).await;
    for (what, order, expected) in table {
        assert_eq!(Refusal::of(&assemble(&mut line, &order).await.unwrap_err()), expected, "{what}");
    }
    assert_eq!(figures(&site).await, before);
    assemble(&mut line, &sealed(order, &device)).await.expect("the right order is still taken");
}

#[tokio::test]
async fn an_order_outside_of_the_stations_ranges_is_not_permitted() {
    let site = site();
    let mut line = site.station().await;
    let foreign = AssembleRequest { identity: "imei:350000000000006".to_owned(), ..phone(1) };
    let refused = assemble(&mut line, &foreign).await.unwrap_err();
    assert_eq!(Refusal::of(&refused), fields(Code::PermissionDenied, "NOT_PERMITTED", &[]));
    assert!(refused.message().contains("imei:350000000000006"), "{refused:?}");
    assert_eq!(figures(&site).await, [0; 6]);
}

/// A device that has its package and not yet its receipt.
struct HalfWay {
    right: CompleteRequest,
    package: Vec<u8>,
    scalar: Vec<u8>,
    symmetric: Vec<u8>,
    own: DevicePrivateKey,
}

async fn half_way(line: &mut Line, floor: &Floor, n: u64, profile: &str) -> HalfWay {
    let order = AssembleRequest { profile: profile.to_owned(), ..phone(n) };
    let answer = assemble(line, &order).await.unwrap();
    let mut device = floor.device(n);
    let right = install(&mut device, &answer);
    let bytes = package(&device);
    let installed = device.package().unwrap();
    let own = installed.key_pair.unwrap();
    let PrivateParts::Ec(scalar) = own.parts() else { panic!("a phone has a P-256 pair") };
    let (scalar, symmetric) = (scalar.expose().clone(), installed.symmetric_keys[0].key().expose().clone());
    HalfWay { right, package: bytes, scalar, symmetric, own }
}

impl HalfWay {
    /// A COSE_Encrypt0 in the right form and of the right length with this in the place of the ciphertext.
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

    fn confirmed(&self, claims: &ConfirmationClaims, key: &DevicePrivateKey) -> Vec<u8> {
        confirm(claims, &ConfirmationSigner::Pair(key)).unwrap()
    }

    fn claims(&self, n: u64) -> ConfirmationClaims {
        let session = SessionId::from_bytes(&self.right.session_id).unwrap();
        let package = SecretBytes::copy_of(&self.package);
        ConfirmationClaims::about(session, chip(n), &package, &self.right.backup_package)
    }

    /// The request with this backup, which the device even confirms.
    fn backed_up(&self, n: u64, backup: Vec<u8>) -> CompleteRequest {
        let claims = ConfirmationClaims { backup_hash: sha256(&backup), ..self.claims(n) };
        let key_confirmation = self.confirmed(&claims, &self.own);
        CompleteRequest { backup_package: backup, key_confirmation, ..self.right.clone() }
    }

    fn confirmed_by(&self, key_confirmation: Vec<u8>) -> CompleteRequest {
        CompleteRequest { key_confirmation, ..self.right.clone() }
    }
}

fn base64(bytes: &[u8]) -> Vec<u8> {
    let pem = der::pem::encode_string("X", der::pem::LineEnding::LF, bytes).unwrap();
    pem.lines().filter(|line| !line.starts_with('-')).collect::<String>().into_bytes()
}

/// Refuses the request, finds nothing changed, and then takes the right one.
async fn refused_and_then_completed(
    site: &Site,
    line: &mut Line,
    what: &str,
    half_way: (u64, &HalfWay),
    (wrong, expected): (CompleteRequest, Refusal),
) {
    let (n, device) = half_way;
    let before = figures(site).await;
    for _ in 0..2 {
        assert_eq!(Refusal::of(&complete(line, &wrong).await.unwrap_err()), expected, "{what}");
    }
    assert_eq!(figures(site).await, before, "{what}");
    assert_eq!(state_of(line, &chip(n)).await, SessionState::Issued, "{what}");
    let record = GetRecordRequest { chip_id: chip(n).as_bytes().to_vec() };
    assert_eq!(site.recovery().await.get_record(record).await.unwrap_err().code(), Code::NotFound, "{what}");
    complete(line, &device.right).await.unwrap_or_else(|e| panic!("after {what} the right one must be taken: {e}"));
}

#[tokio::test]
async fn a_bad_backup_changes_nothing_and_the_right_one_still_succeeds() {
    type Make = fn(u64, &HalfWay, &HalfWay) -> Vec<u8>;
    let site = site();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let other = half_way(&mut line, &floor, 9999, "phone").await;
    let table: [(&str, &str, Make, Code); 16] = [
        ("an empty backup", "phone", |_, _, _| Vec::new(), Code::InvalidArgument),
        ("an oversized backup", "opaque", |_, _, _| vec![1; 33 * 1024], Code::InvalidArgument),
        ("a backup of the wrong chip", "phone", |_, _, o| o.right.backup_package.clone(), Code::FailedPrecondition),
        ("a backup that says another chip", "phone", |_, d, _| d.envelope(1, &[]), Code::FailedPrecondition),
        ("half a backup", "phone", |_, d, _| d.right.backup_package[..60].to_vec(), Code::FailedPrecondition),
        ("a longer backup", "phone", |_, d, _| [&d.right.backup_package[..], &[0]].concat(), Code::FailedPrecondition),
        ("an untagged backup", "phone", |_, d, _| d.right.backup_package[1..].to_vec(), Code::FailedPrecondition),
        ("malformed CBOR", "phone", |_, _, _| vec![0xff; 64], Code::FailedPrecondition),
        ("endless nesting", "phone", |_, _, _| vec![0x81; 8192], Code::FailedPrecondition),
        ("CBOR of another kind", "phone", |_, _, _| vec![0xd0, 0x80], Code::FailedPrecondition),
        ("the package in clear", "phone", |n, d, _| d.envelope(n, &d.package), Code::FailedPrecondition),
        ("the private key in clear", "phone", |n, d, _| d.envelope(n, &d.scalar), Code::FailedPrecondition),
        ("the private key in hex", "phone", |n, d, _| d.envelope(n, &hex(&d.scalar)), Code::FailedPrecondition),
        ("the symmetric key in clear", "opaque", |_, d, _| hidden(&d.symmetric), Code::FailedPrecondition),
        ("the symmetric key in hex", "opaque", |_, d, _| hidden(&hex(&d.symmetric)), Code::FailedPrecondition),
        ("the private key in base64", "opaque", |_, d, _| hidden(&base64(&d.scalar)), Code::FailedPrecondition),
    ];
    for ((what, profile, make, code), n) in table.into_iter().zip(1000..) {
        let device = half_way(&mut line, &floor, n, profile).await;
        let wrong = device.backed_up(n, make(n, &device, &other));
        let reason = if code == Code::InvalidArgument { "INVALID" } else { "NOT_ACCEPTED" };
        let expected = fields(code, reason, &["backup_package"]);
        refused_and_then_completed(&site, &mut line, what, (n, &device), (wrong, expected)).await;
    }
}

fn hex(bytes: &[u8]) -> Vec<u8> {
    hex::encode_upper(bytes).into_bytes()
}

/// Within other bytes.
fn hidden(form: &[u8]) -> Vec<u8> {
    [&[0x55; 333][..], form, &[0xaa; 111]].concat()
}

#[tokio::test]
async fn a_bad_confirmation_changes_nothing_and_the_right_one_still_succeeds() {
    type Make = fn(u64, &HalfWay, &HalfWay) -> Vec<u8>;
    let site = site();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let other = half_way(&mut line, &floor, 9999, "phone").await;
    let table: [(&str, Make); 10] = [
        ("no confirmation", |_, _, _| Vec::new()),
        ("half a confirmation", |_, d, _| d.right.key_confirmation[..80].to_vec()),
        ("an untagged confirmation", |_, d, _| d.right.key_confirmation[1..].to_vec()),
        ("garbage", |_, _, _| vec![0xff; 100]),
        ("an altered signature", |_, d, _| altered(&d.right.key_confirmation)),
        ("a confirmation by another key", |n, d, _| d.confirmed(&d.claims(n), &generate_p256().unwrap())),
        ("a confirmation of another session", |_, _, o| o.right.key_confirmation.clone()),
        ("a confirmation that claims another session", |n, d, o| {
            d.confirmed(&ConfirmationClaims { session: o.claims(1).session, ..d.claims(n) }, &d.own)
        }),
        ("a confirmation of another package", |n, d, _| {
            d.confirmed(&ConfirmationClaims { package_hash: [0; 32], ..d.claims(n) }, &d.own)
        }),
        ("a confirmation of another backup", |n, d, _| {
            d.confirmed(&ConfirmationClaims { backup_hash: [0; 32], ..d.claims(n) }, &d.own)
        }),
    ];
    for ((what, make), n) in table.into_iter().zip(1000..) {
        let device = half_way(&mut line, &floor, n, "phone").await;
        let wrong = (device.confirmed_by(make(n, &device, &other)), not_accepted("key_confirmation"));
        refused_and_then_completed(&site, &mut line, what, (n, &device), wrong).await;
    }
    let device = half_way(&mut line, &floor, 1, "phone").await;
    let wrong = (device.confirmed_by(vec![0xd2; 4097]), invalid(&["key_confirmation"]));
    refused_and_then_completed(&site, &mut line, "an oversized confirmation", (1, &device), wrong).await;
}

fn altered(bytes: &[u8]) -> Vec<u8> {
    let mut altered = bytes.to_vec();
    *altered.last_mut().unwrap() ^= 1;
    altered
}

#[tokio::test]
async fn where_the_confirmation_is_waived_a_wrong_one_is_still_refused() {
    let site = site();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let device = half_way(&mut line, &floor, 1, "waived").await;
    let wrong = device.confirmed_by(altered(&device.right.key_confirmation));
    let refused = Refusal::of(&complete(&mut line, &wrong).await.unwrap_err());
    assert_eq!(refused, not_accepted("key_confirmation"));
    complete(&mut line, &device.confirmed_by(Vec::new())).await.expect("the profile waives it");
}

#[tokio::test]
async fn an_opaque_backup_is_published_as_it_is() {
    let site = site();
    let (floor, mut line) = (Floor::new(&site), site.station().await);
    let device = half_way(&mut line, &floor, 1, "opaque").await;
    let own_format = device.backed_up(1, vec![0x42; 500]);
    complete(&mut line, &own_format).await.unwrap();
    let record = GetRecordRequest { chip_id: chip(1).as_bytes().to_vec() };
    let record = site.recovery().await.get_record(record).await.unwrap().into_inner().record.unwrap();
    assert_eq!(record.backup_package, vec![0x42; 500]);
}

#[tokio::test]
async fn a_session_that_is_none_is_refused_by_every_call() {
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
        let by_id = GetSessionRequest { session: Some(Which::SessionId(session_id.clone())) };
        let abort = AbortRequest { session_id, reason: String::new() };
        for status in [
            complete(&mut line, &request).await.unwrap_err(),
            line.abort(abort).await.unwrap_err(),
            line.get_session(by_id).await.unwrap_err(),
        ] {
            assert_eq!(&Refusal::of(&status), expected, "{status:?}");
        }
    }
    let by_chip = |bytes: &[u8]| GetSessionRequest { session: Some(Which::ChipId(bytes.to_vec())) };
    let mut refusal = async |request| Refusal::of(&line.get_session(request).await.unwrap_err());
    assert_eq!(refusal(by_chip(&[1; 8])).await, unknown);
    assert_eq!(refusal(by_chip(&[1; 7])).await, invalid(&["chip_id"]));
    assert_eq!(refusal(GetSessionRequest { session: None }).await, invalid(&["session"]));
}

#[tokio::test]
async fn the_other_messages_are_checked_too() {
    let site = site();
    let mut line = site.station().await;
    let empty = complete(&mut line, &CompleteRequest::default()).await.unwrap_err();
    assert_eq!(Refusal::of(&empty), invalid(&["session_id", "backup_package"]));
    let many =
        CompleteRequest { session_id: vec![1], backup_package: vec![0; 33 << 10], key_confirmation: vec![0; 5000] };
    let many = complete(&mut line, &many).await.unwrap_err();
    assert_eq!(Refusal::of(&many), invalid(&["session_id", "backup_package", "key_confirmation"]));
    let answer = assemble(&mut line, &phone(1)).await.unwrap();
    let chatty = AbortRequest { session_id: answer.session_id, reason: "x".repeat(201) };
    assert_eq!(Refusal::of(&line.abort(chatty).await.unwrap_err()), invalid(&["reason"]));
    assert_eq!(state_of(&mut line, &chip(1)).await, SessionState::Issued);

    let mut recovery = site.recovery().await;
    let mut record = async |chip_id| recovery.get_record(GetRecordRequest { chip_id }).await.unwrap_err();
    assert_eq!(Refusal::of(&record(vec![1; 7]).await), invalid(&["chip_id"]));
    assert_eq!(Refusal::of(&record(vec![1; 8]).await), fields(Code::NotFound, "NO_RECORD", &[]));
}

#[tokio::test]
async fn a_message_larger_than_any_right_one_is_not_even_read() {
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
