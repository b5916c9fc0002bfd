//! A site for tests: a token of its own, a ceremony, stores, certificates and a daemon, all real, all in one directory.
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use spp::hsm::{HsmConfig, KeyRegister, ModuleProfile, PinSource};
use spp::proto;
use spp::proto::line_client::LineClient;
use spp::proto::officer_client::OfficerClient;
use spp::proto::recovery_client::RecoveryClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

pub const SPPD: &str = env!("CARGO_BIN_EXE_sppd");
pub const SPPCTL: &str = env!("CARGO_BIN_EXE_sppctl");
pub const SPP_LINE: &str = env!("CARGO_BIN_EXE_spp-line");
/// The profiles of the demo, copied into every site.
pub const PROFILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/demo/profiles");
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/demo");
const HSM_CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/hsm-config");

/// A directory with everything a daemon needs. Dropping it ends the daemon and removes the directory.
pub struct Site {
    directory: tempfile::TempDir,
    pub line: u16,
    pub officer: u16,
    pub public: u16,
    daemon: Option<Child>,
}

impl Site {
    /// Token, ceremony, stores, certificates of the daemon, of the station line-1/a and of the officer o-1. A missing SoftHSM
    /// fails here, with the command that installs it.
    pub fn new() -> Self {
        let [line, officer, public] = free_ports();
        let site = Self { directory: tempfile::tempdir().unwrap(), line, officer, public, daemon: None };
        site.write_files();
        site.sppctl("token init --module hsm-config/softhsm2.toml --directory hsm --label spp-demo --so-pin-file hsm/so.pin --pin-file hsm/user.pin");
        site.sppctl("ceremony run ceremony.toml --hsm hsm.toml --out keys");
        site.sppctl("init --config sppd.toml");
        site.sppctl("server enroll --config sppd.toml --dns localhost --ip 127.0.0.1 --out tls/server");
        site.sppctl("station enroll line-1/a --config sppd.toml --out tls/line-1-a");
        site.sppctl("officer enroll o-1 --config sppd.toml --out tls/officer");
        site
    }

    /// A site whose daemon serves.
    pub fn running() -> Self {
        let mut site = Self::new();
        site.start();
        site
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    fn write_files(&self) {
        for file in ["hsm.toml", "ceremony.toml", "sppd.toml"] {
            let text = std::fs::read_to_string(Path::new(DEMO).join(file)).unwrap();
            let text = text
                .replace("127.0.0.1:7443", &format!("127.0.0.1:{}", self.line))
                .replace("127.0.0.1:7444", &format!("127.0.0.1:{}", self.officer))
                .replace("127.0.0.1:7445", &format!("127.0.0.1:{}", self.public))
                .replace("low = 10\nhigh = 20", "low = 1\nhigh = 2")
                .replace("\"256 MiB\"", "\"1 MiB\"\nreserve = \"1 MiB\"");
            std::fs::write(self.path(file), text).unwrap();
        }
        copy_directory(Path::new(PROFILES), &self.path("profiles"));
        copy_directory(Path::new(HSM_CONFIG), &self.path("hsm-config"));
        std::fs::create_dir_all(self.path("hsm/tokens")).unwrap();
        let tokens = self.path("hsm/tokens");
        let conf =
            format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display());
        std::fs::write(self.path("hsm/softhsm2.conf"), conf).unwrap();
        write_private(&self.path("hsm/user.pin"), "482910375566");
        write_private(&self.path("hsm/so.pin"), "118822993344");
    }

    /// Runs sppctl with these words in the site's directory; it must succeed.
    pub fn sppctl(&self, words: &str) -> String {
        let output = self.try_sppctl(words);
        assert!(output.status.success(), "sppctl {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn try_sppctl(&self, words: &str) -> Output {
        Command::new(SPPCTL).args(words.split_whitespace()).current_dir(self.directory.path()).output().unwrap()
    }

    pub fn spp_line(&self, words: &str) -> Output {
        Command::new(SPP_LINE).args(words.split_whitespace()).current_dir(self.directory.path()).output().unwrap()
    }

    /// Starts the daemon and waits until the line is served.
    pub fn start(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// Starts the daemon and does not wait. Its log goes on in `sppd.log`.
    pub fn spawn(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("sppd.log")).unwrap();
        let daemon = Command::new(SPPD)
            .args(["--config", "sppd.toml"])
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.daemon = Some(daemon.unwrap());
    }

    pub fn wait_ready(&self) {
        let words = format!("status --server https://127.0.0.1:{} --tls tls/officer --wait 30s", self.officer);
        let output = self.try_sppctl(&words);
        assert!(output.status.success(), "not ready: {}\n{}", String::from_utf8_lossy(&output.stderr), self.log());
    }

    /// kill -9, and the end of the process.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// SIGTERM; the exit status of the drained daemon.
    pub fn stop(&mut self) -> std::process::ExitStatus {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        self.signal(daemon.id(), "TERM");
        let until = Instant::now() + Duration::from_secs(40);
        loop {
            if let Some(status) = daemon.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "sppd did not stop: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn signal(&self, pid: u32, signal: &str) {
        let sent = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status().unwrap();
        assert!(sent.success(), "no process {pid} for SIG{signal}");
    }

    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("the daemon runs").id()
    }

    /// The HSM worker's process: the child of whichever thread of the daemon started it.
    pub fn worker_pid(&self) -> Option<u32> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).ok()?;
        let children = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("children")).ok();
        threads.flatten().filter_map(children).find_map(|text| text.split_whitespace().next()?.parse().ok())
    }

    /// Another text in a file of the site; what is replaced must be there.
    pub fn edit(&self, relative: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path(relative)).unwrap();
        assert!(text.contains(from), "{relative} has no {from:?}");
        std::fs::write(self.path(relative), text.replacen(from, to, 1)).unwrap();
    }

    /// From now on the module is the one of `tests/faulty-hsm`, over SoftHSM.
    pub fn use_faulty_module(&self) {
        let real = ModuleProfile::load(&self.path("hsm-config/softhsm2.toml"), &self.path("hsm")).unwrap().library;
        let faulty = Path::new(SPPD).parent().unwrap().join("deps/libfaulty_hsm.so");
        assert!(faulty.exists(), "{} is built with the tests", faulty.display());
        self.edit("hsm-config/softhsm2.toml", "library = [\n", &format!("library = [\n\"{}\",\n", faulty.display()));
        let environment = format!(
            "[environment]\nFAULTY_HSM_MODULE = \"{}\"\nFAULTY_HSM_CONTROL = \"{{directory}}/faults\"\n",
            real.display()
        );
        self.edit("hsm-config/softhsm2.toml", "[environment]\n", &environment);
    }

    /// The rules of the faulty module from now on; in one step, so that no half of them is read.
    pub fn fail(&self, rules: &str) {
        let control = self.path("hsm/faults");
        std::fs::write(control.with_extension("new"), rules).unwrap();
        std::fs::rename(control.with_extension("new"), &control).unwrap();
    }

    /// What the daemon would start the HSM with.
    pub fn hsm_config(&self) -> HsmConfig {
        HsmConfig {
            name: "main".to_owned(),
            module: ModuleProfile::load(&self.path("hsm-config/softhsm2.toml"), &self.path("hsm")).unwrap(),
            pin: PinSource::File(self.path("hsm/user.pin")),
            pin_keeper: None,
            pin_refused: self.path("pin-refused.json"),
            keys: KeyRegister::load(&self.path("keys/keys.toml")).unwrap(),
            call_timeout: Duration::from_secs(10),
            queue: 256,
            worker_program: SPPD.into(),
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("sppd.log")).unwrap_or_default()
    }

    pub fn read(&self, relative: &str) -> Vec<u8> {
        std::fs::read(self.path(relative)).unwrap()
    }

    /// A TLS client configuration with the certificate in that directory.
    pub fn tls(&self, directory: &str) -> ClientTlsConfig {
        let file = |name: &str| self.read(&format!("{directory}/{name}"));
        self.public_tls().identity(Identity::from_pem(file("certificate.pem"), file("key.pem")))
    }

    /// A TLS client configuration without a client certificate.
    pub fn public_tls(&self) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.read("keys/access-ca.pem")))
            .domain_name("localhost")
    }

    pub async fn connect(&self, port: u16, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{port}")).unwrap();
        endpoint.tls_config(tls)?.timeout(Duration::from_secs(30)).connect().await
    }

    pub async fn station(&self) -> LineClient<Channel> {
        LineClient::new(self.connect(self.line, self.tls("tls/line-1-a")).await.unwrap())
    }

    pub async fn officer(&self) -> OfficerClient<Channel> {
        OfficerClient::new(self.connect(self.officer, self.tls("tls/officer")).await.unwrap())
    }

    pub async fn status(&self) -> proto::GetStatusResponse {
        self.officer().await.get_status(proto::GetStatusRequest {}).await.unwrap().into_inner()
    }

    pub async fn recovery(&self) -> RecoveryClient<Channel> {
        RecoveryClient::new(self.connect(self.public, self.public_tls()).await.unwrap())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(60)..];
            eprintln!("the end of the daemon's log:\n{}", last.join("\n"));
        }
    }
}

pub fn write_private(path: &Path, content: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn copy_directory(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn free_ports() -> [u16; 3] {
    std::array::from_fn(|_| free_port())
}

/// A port for a daemon that is killed and started again: below those that the system gives to clients (from 32768 on),
/// so that no connection of another test takes it meanwhile.
pub fn free_port() -> u16 {
    const FIRST: u32 = 15_000;
    const COUNT: u32 = 17_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id().wrapping_mul(97);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(step < COUNT, "no port is free");
        let port = u16::try_from(FIRST + begin.wrapping_add(step) % COUNT).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
