//! Searches logs, command lines, environments, memory and stores for secrets.

use std::path::Path;
use std::process::Stdio;

use spp_device::Device;
use spp_format::keys::PrivateParts;
use spp_format::package::TransportCurve;
use spp_proto::{AssembleRequest, CompleteRequest, SessionState};
use tonic::Code;

use spp_testkit::devices::{
    Line, Refusal, TestFab, assemble, chip, complete, install, phone, provision, sealed, sensor, state_of,
};
use spp_testkit::process::{Process, Signal, child_command, program, send};
use spp_testkit::site::Site;
use spp_testkit::wait::eventually;

/// A secret in every encoding in which it could leak.
struct Secret {
    what: String,
    forms: Vec<Vec<u8>>,
}

impl Secret {
    /// Searches for three pieces of the secret in each encoding: a part of a key is a leak too.
    fn new(what: impl Into<String>, secret: &[u8]) -> Self {
        const PIECE: usize = 12;
        assert!(secret.len() >= PIECE);
        let starts = [0, (secret.len() - PIECE) / 2, secret.len() - PIECE];
        let forms = starts.iter().flat_map(|start| forms(&secret[*start..start + PIECE])).collect();
        Self { what: what.into(), forms }
    }

    fn is_in(&self, bytes: &[u8]) -> bool {
        self.forms.iter().any(|form| memchr::memmem::find(bytes, form).is_some())
    }
}

fn forms(piece: &[u8]) -> Vec<Vec<u8>> {
    let list = |separator: &str| piece.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator);
    let escaped = |byte: &u8| std::ascii::escape_default(*byte).collect::<Vec<_>>();
    let mut forms = vec![
        piece.to_vec(),
        piece.iter().rev().copied().collect(),
        hex::encode(piece).into_bytes(),
        hex::encode_upper(piece).into_bytes(),
        piece.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":").into_bytes(),
        // Debug of a Vec, JSON, and the Debug format of the HTTP/2 library's buffers.
        list(", ").into_bytes(),
        list(",").into_bytes(),
        piece.iter().flat_map(escaped).collect(),
    ];
    for skipped in 0..3 {
        let inner = &piece[skipped..];
        let pem = der::pem::encode_string("X", der::pem::LineEnding::LF, &inner[..inner.len() / 3 * 3]).unwrap();
        let text: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        forms.push(text.replace('+', "-").replace('/', "_").into_bytes());
        forms.push(text.into_bytes());
    }
    forms
}

/// The private scalar and the symmetric keys installed on a device.
fn keys_of(device: &Device, name: &str) -> Vec<Secret> {
    let package = device.package().unwrap();
    let mut wanted = Vec::new();
    if let Some(PrivateParts::Ec(scalar)) = package.key_pair.as_ref().map(|pair| pair.parts()) {
        wanted.push(Secret::new(format!("the private key of {name}"), scalar.expose()));
    }
    for key in &package.symmetric_keys {
        wanted.push(Secret::new(format!("the key {} of {name}", key.purpose()), key.key().expose()));
    }
    wanted
}

fn pins(site: &Site) -> Vec<Secret> {
    ["user", "so"].map(|role| Secret::new(format!("the {role} PIN"), &site.read(&format!("hsm/{role}.pin")))).into()
}

fn assert_absent(place: &str, bytes: &[u8], wanted: &[Secret]) {
    for secret in wanted {
        assert!(!secret.is_in(bytes), "{} is in {place}", secret.what);
    }
}

fn assert_absent_from_files(directory: &Path, wanted: &[Secret]) {
    let mut files = 0;
    let mut directories = vec![directory.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                files += 1;
                assert_absent(&path.display().to_string(), &std::fs::read(&path).unwrap(), wanted);
            }
        }
    }
    assert!(files > 0, "nothing was searched");
}

/// Reads a file of a process in `/proc`. Empty if the system denies access, because others then cannot read it either.
fn process_file(pid: u32, file: &str) -> Vec<u8> {
    match std::fs::read(format!("/proc/{pid}/{file}")) {
        Ok(bytes) => bytes,
        Err(e) => {
            assert_eq!(e.kind(), std::io::ErrorKind::PermissionDenied, "{file} of {pid}");
            Vec::new()
        }
    }
}

/// All readable memory of a process. Requires root, because the process is not dumpable.
fn memory_of(pid: u32) -> Vec<u8> {
    use std::os::unix::fs::FileExt as _;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut all = Vec::new();
    for line in
        maps.lines().filter(|line| line.split_whitespace().nth(1).is_some_and(|rights| rights.starts_with("rw")))
    {
        let (from, to) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        let address = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let mut bytes = vec![0; (address(to) - address(from)) as usize];
        // The mapping may no longer exist.
        if memory.read_exact_at(&mut bytes, address(from)).is_ok() {
            all.extend(bytes);
        }
    }
    all
}

/// The worker reads the PIN and wipes it; the process that faces the network never holds it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemon_memory_never_contains_pin() {
    let site = Site::running();
    process_devices(&TestFab::new(&site), &mut site.station().await).await;
    let (daemon, worker) = (memory_of(site.pid()), memory_of(site.worker_pid().unwrap()));
    // The search finds a string that the daemon's memory is known to contain.
    let known = Secret::new("the configuration", b"manufacturer-ca.pem");
    assert!(known.is_in(&daemon) && daemon.len() > 1 << 20 && worker.len() > 1 << 20);
    assert_absent("the memory of sppd", &daemon, &pins(&site));
    assert_absent("the memory of the worker, after the login", &worker, &pins(&site));
}

/// A typed PIN is prompted for once and reaches every worker. The memory of sppd and all command lines never contain it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn typed_pin_serves_every_worker_outside_daemon() {
    use std::io::Write as _;
    let site = Site::new();
    site.edit("sppd.toml", "pin_file = \"hsm/user.pin\"", "pin = \"prompt\"");
    let command = format!("exec {} --config sppd.toml 2>>sppd.log", program("sppd").display());
    let mut terminal = child_command("script");
    terminal.args(["-q", "-e", "-f", "-c", &command, "typescript"]).current_dir(site.path(""));
    terminal.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut terminal = Process::spawn(terminal);
    let mut keyboard = terminal.child().stdin.take().unwrap();
    let screen = || std::fs::read_to_string(site.path("typescript")).unwrap_or_default();
    let prompted = || if screen().contains("user PIN of the token") { Ok(()) } else { Err(site.log()) };
    eventually("sppd prompts for the PIN", async || prompted()).await;
    keyboard.write_all(&[&site.read("hsm/user.pin")[..], b"\n"].concat()).unwrap();
    tokio::task::block_in_place(|| site.wait_ready());
    let pins = pins(&site);
    assert_absent("the terminal's screen", screen().as_bytes(), &pins);
    let processes = processes_named(&["spp-hsm-worker", "spp-pin-agent", "sppd"], &site);
    let pid_of = |name: &str| {
        processes.iter().find(|(process, _)| process == name).unwrap_or_else(|| panic!("{name}: {processes:?}")).1
    };
    for (name, pid) in &processes {
        for file in ["cmdline", "environ"] {
            assert_absent(&format!("{file} of {name}"), &process_file(*pid, file), &pins);
        }
    }
    let agent = memory_of(pid_of("spp-pin-agent"));
    assert!(pins.iter().any(|pin| pin.is_in(&agent)), "the search does not find the PIN in the agent");
    let worker = pid_of("spp-hsm-worker");
    send(worker, Signal::KILL);
    eventually("another worker runs", async || {
        processes_named(&["spp-hsm-worker"], &site).iter().any(|(_, pid)| *pid != worker)
    })
    .await;
    tokio::task::block_in_place(|| site.wait_ready());
    assemble(&mut site.station().await, &phone(1)).await.expect("the new worker gets the PIN");
    assert_absent("the memory of sppd", &memory_of(pid_of("sppd")), &pins);
    send(pid_of("sppd"), Signal::TERM);
    assert!(terminal.wait().success());
}

/// Processes of this site with these names.
fn processes_named(names: &[&str], site: &Site) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    let directory = std::fs::canonicalize(site.path("")).unwrap();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim().to_owned();
        let is_of_site = std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == directory);
        if is_of_site && names.contains(&name.as_str()) {
            found.push((name, pid));
        }
    }
    found
}

#[test]
fn secret_search_finds_every_encoding() {
    let secret: Vec<u8> = (0..32_u8).map(|n| n.wrapping_mul(37).wrapping_add(11)).collect();
    let wanted = Secret::new("a secret", &secret);
    let pem = der::pem::encode_string("X", der::pem::LineEnding::LF, &[b"ab", &secret[..]].concat()).unwrap();
    for leak in [
        secret.clone(),
        hex::encode(&secret).into_bytes(),
        format!("{secret:?}").into_bytes(),
        serde_json::to_vec(&secret).unwrap(),
        secret.escape_ascii().to_string().into_bytes(),
        pem.replace('\n', "").into_bytes(),
    ] {
        assert!(wanted.is_in(&[b"before", &leak[..], b"after"].concat()), "{}", String::from_utf8_lossy(&leak));
    }
    assert!(!wanted.is_in(&[7; 4096]));
}

/// A device of every delivery mode, a refused Complete with a cleartext key, and a repeated Assemble.
async fn process_devices(fab: &TestFab, line: &mut Line) -> Vec<Secret> {
    let mut wanted = Vec::new();
    let mut plain = fab.device(1);
    let answer = assemble(line, &phone(1)).await.unwrap();
    assemble(line, &phone(1)).await.unwrap();
    let request = install(&mut plain, &answer);
    let package = plain.package().unwrap().encode().unwrap();
    let leaky = CompleteRequest { backup_package: package.expose().clone(), ..request.clone() };
    assert_eq!(complete(line, &leaky).await.unwrap_err().code(), Code::FailedPrecondition);
    complete(line, &request).await.unwrap();
    wanted.extend(keys_of(&plain, "a phone"));
    let mut device = fab.sealing_device(2, TransportCurve::P256);
    let order = sealed(phone(2), &device);
    provision(line, &mut device, &order).await;
    wanted.extend(keys_of(&device, "a phone with sealed delivery"));
    let mut device = fab.sealing_device(3, TransportCurve::X25519);
    let order = sensor(3, &device);
    provision(line, &mut device, &order).await;
    wanted.extend(keys_of(&device, "a sensor"));
    wanted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trace_log_and_processes_contain_no_secret() {
    let mut site = Site::new();
    site.edit("sppd.toml", "level = \"info\"", "level = \"trace\"");
    site.start();
    let wanted = process_devices(&TestFab::new(&site), &mut site.station().await).await;
    let wanted: Vec<_> = wanted.into_iter().chain(pins(&site)).collect();
    assert_eq!(wanted.len(), 2 + 2 + 2 + 2);
    for (name, pid) in [("sppd", site.pid()), ("the worker", site.worker_pid().unwrap())] {
        for file in ["cmdline", "environ"] {
            assert_absent(&format!("{file} of {name}"), &process_file(pid, file), &wanted);
        }
        let limits = String::from_utf8(process_file(pid, "limits")).unwrap();
        let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(cores.split_whitespace().nth(4), Some("0"), "{name} may leave a core dump: {cores}");
    }
    let loaded = String::from_utf8(process_file(site.pid(), "maps")).unwrap();
    assert!(!loaded.contains("softhsm"), "the process that faces the network has loaded the module");
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    let log = site.log();
    assert!(log.contains("TRACE") && log.contains("Line.Assemble"), "the log has no trace output");
    assert_absent("the log", log.as_bytes(), &wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_contain_no_cleartext_key() {
    let mut site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    let mut wanted = pins(&site);
    let mut unfinished = Vec::new();
    for n in 1..=8 {
        let mut device = fab.device(n);
        let answer = assemble(&mut line, &phone(n)).await.unwrap();
        unfinished.push(install(&mut device, &answer));
        wanted.extend(keys_of(&device, &format!("phone {n}")));
    }
    let search = || {
        assert_absent_from_files(&site.path("state"), &wanted);
        assert_absent_from_files(&site.path("public"), &wanted);
    };
    search();
    for request in &unfinished {
        complete(&mut line, request).await.unwrap();
    }
    search();
    assert!(tokio::task::block_in_place(|| site.stop()).success());
    assert_absent_from_files(&site.path("state"), &wanted);
    assert_absent_from_files(&site.path("public"), &wanted);
}

#[tokio::test]
async fn completed_session_returns_no_key() {
    let mut site = Site::running();
    let (fab, mut line) = (TestFab::new(&site), site.station().await);
    provision(&mut line, &mut fab.device(1), &phone(1)).await;
    for _ in 0..2 {
        assert_eq!(state_of(&mut line, &chip(1)).await, SessionState::Erased);
        let with_profile = |profile: &str| AssembleRequest { profile: profile.to_owned(), ..phone(1) };
        for order in [phone(1), with_profile("gateway")] {
            let refused = assemble(&mut line, &order).await.unwrap_err();
            assert_ne!(Refusal::of(&refused).code, Code::Ok);
        }
        let refused = Refusal::of(&assemble(&mut line, &phone(1)).await.unwrap_err());
        assert!(refused.is(Code::AlreadyExists, "ALREADY_COMPLETE"), "{refused:?}");
        site.kill();
        site.start();
        line = site.station().await;
    }
}
