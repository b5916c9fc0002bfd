//! A test site: a token with keys, stores, certificates and a daemon, all real, in one directory.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use spp::hsm::{HsmConfig, KeyManifest, ModuleProfile, PinSource, SupervisorPacing};
use spp_proto as proto;
use spp_proto::line_client::LineClient;
use spp_proto::officer_client::OfficerClient;
use spp_proto::recovery_client::RecoveryClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::files::{copy_directory, temp_dir, write_private};
use crate::ports::free_port;
use crate::process::{
    Process, Signal, child_command, children_of, faulty_module, output, output_with_input, program, send,
};
use crate::template::copy_template;
use crate::wait::{eventually, eventually_blocking};

/// The demo's configuration, from which every site is created.
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/demo");
/// The profiles of PKCS#11 modules, copied into every site.
const HSM_CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../hsm-config");

/// A directory with everything a daemon needs. Dropping it stops the daemon and removes the directory.
pub struct Site {
    directory: tempfile::TempDir,
    pub line: u16,
    pub officer: u16,
    pub public: u16,
    daemon: Option<Process>,
}

impl Site {
    /// Creates a site: token, ceremony, stores, and certificates of the daemon, the station line-1/a and the officer o-1.
    ///
    /// All sites of a test run are copies of one template: they have the same keys, identities and history, but their own ports.
    /// Without SoftHSM this fails with the installation command.
    pub fn new() -> Self {
        let site = Self::empty();
        let (sppctl, demo, hsm_config) = (program("sppctl"), Path::new(DEMO), Path::new(HSM_CONFIG));
        copy_template("site", &[&sppctl, demo, hsm_config], site.directory.path(), make);
        site.set_paths_and_ports();
        site
    }

    /// Creates a site with its own keys.
    pub fn with_own_keys() -> Self {
        let site = Self::empty();
        make(site.directory.path());
        site.set_paths_and_ports();
        site
    }

    fn empty() -> Self {
        let [line, officer, public] = std::array::from_fn(|_| free_port());
        Self { directory: temp_dir(), line, officer, public, daemon: None }
    }

    /// Creates a site and starts its daemon.
    pub fn running() -> Self {
        let mut site = Self::new();
        site.start();
        site
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    /// Writes the settings that depend on the directory and the ports.
    fn set_paths_and_ports(&self) {
        write_softhsm_conf(self.directory.path());
        for (port, from) in [(self.line, 7443), (self.officer, 7444), (self.public, 7445)] {
            self.edit("sppd.toml", &format!("127.0.0.1:{from}"), &format!("127.0.0.1:{port}"));
        }
    }

    /// Runs sppctl with these words in the site's directory; it must succeed.
    pub fn sppctl(&self, words: &str) -> String {
        let output = self.try_sppctl(words);
        assert!(output.status.success(), "sppctl {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs sppctl with these words in the site's directory.
    pub fn try_sppctl(&self, words: &str) -> Output {
        self.run("sppctl", words)
    }

    /// Runs spp-line with these words in the site's directory.
    pub fn spp_line(&self, words: &str) -> Output {
        self.run("spp-line", words)
    }

    /// Runs one of our programs with these words in the site's directory, to its end.
    pub fn run(&self, name: &str, words: &str) -> Output {
        output(self.command(name, words))
    }

    /// Runs one of our programs with `text` on its standard input.
    pub fn run_with_input(&self, name: &str, words: &str, text: &str) -> Output {
        output_with_input(self.command(name, words), text)
    }

    /// A command for one of our programs in the site's directory, to be started by [`Process::spawn`].
    pub fn command(&self, name: &str, words: &str) -> Command {
        let mut command = child_command(program(name));
        command.args(words.split_whitespace()).current_dir(self.directory.path());
        command
    }

    /// Runs openssl with these words in the site's directory; it must succeed.
    pub fn openssl(&self, words: &str) -> String {
        let mut command = child_command("openssl");
        command.args(words.split_whitespace()).current_dir(self.directory.path());
        let output = output(command);
        assert!(output.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts the daemon and waits until the line is served.
    pub fn start(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// Starts the daemon without waiting. Its log is appended to `sppd.log`.
    pub fn spawn(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("sppd.log")).unwrap();
        let mut daemon = self.command("sppd", "--config sppd.toml");
        daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.daemon = Some(Process::spawn(daemon));
    }

    /// Waits until the line is served.
    pub fn wait_ready(&self) {
        let words = format!("status --server https://127.0.0.1:{} --tls tls/officer --wait 30s", self.officer);
        let output = self.try_sppctl(&words);
        assert!(output.status.success(), "not ready: {}\n{}", String::from_utf8_lossy(&output.stderr), self.log());
    }

    /// Waits until a daemon that may not be ready answers officers.
    pub async fn until_listening(&self) {
        eventually("sppd listens", async || {
            self.connect(self.officer, self.tls("tls/officer")).await.map_err(|e| (e, self.log()))
        })
        .await;
    }

    /// Waits until the daemon has logged these words.
    pub fn until_logged(&self, words: &str) {
        eventually_blocking(&format!("the log has {words:?}"), || {
            let log = self.log();
            if log.contains(words) { Ok(()) } else { Err(log) }
        });
    }

    /// Sends SIGKILL to the daemon and waits for it to end.
    pub fn kill(&mut self) {
        self.daemon.take().expect("the daemon runs").kill();
    }

    /// Sends SIGTERM and returns the exit status of the drained daemon.
    pub fn stop(&mut self) -> ExitStatus {
        let daemon = self.daemon.as_mut().expect("the daemon runs");
        daemon.signal(Signal::TERM);
        let status = eventually_blocking("sppd has stopped", || daemon.try_wait());
        self.daemon = None;
        status
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// The process ID of the daemon.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("the daemon runs").id()
    }

    /// The HSM worker's process.
    pub fn worker_pid(&self) -> Option<u32> {
        children_of(self.pid()).into_iter().next()
    }

    /// Replaces text in a file of the site; the file must contain `from`.
    pub fn edit(&self, relative: &str, from: &str, to: &str) {
        replace(&self.path(relative), from, to);
    }

    /// Configures the module of `tests/faulty-hsm`, which wraps SoftHSM.
    pub fn use_faulty_module(&self) {
        let real = ModuleProfile::load(&self.path("hsm-config/softhsm2.toml"), &self.path("hsm")).unwrap().library;
        let faulty = faulty_module();
        self.edit("hsm-config/softhsm2.toml", "library = [\n", &format!("library = [\n\"{}\",\n", faulty.display()));
        let environment = format!(
            "[environment]\nFAULTY_HSM_MODULE = \"{}\"\nFAULTY_HSM_CONTROL = \"{{directory}}/faults\"\n",
            real.display()
        );
        self.edit("hsm-config/softhsm2.toml", "[environment]\n", &environment);
    }

    /// Sets the rules of the faulty module atomically, so that the module never reads a partial file.
    pub fn fail(&self, rules: &str) {
        let control = self.path("hsm/faults");
        std::fs::write(control.with_extension("new"), rules).unwrap();
        std::fs::rename(control.with_extension("new"), &control).unwrap();
    }

    /// The HSM configuration of the site's daemon.
    pub fn hsm_config(&self) -> HsmConfig {
        HsmConfig {
            name: "main".to_owned(),
            module: ModuleProfile::load(&self.path("hsm-config/softhsm2.toml"), &self.path("hsm")).unwrap(),
            pin: PinSource::File(self.path("hsm/user.pin")),
            pin_agent: None,
            pin_refused: self.path("pin-refused.json"),
            keys: KeyManifest::load(&self.path("keys/keys.toml")).unwrap(),
            call_timeout: Duration::from_secs(10),
            queue: 256,
            worker_program: program("sppd"),
            pacing: quick_pacing(),
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
        drop(self.daemon.take());
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(60)..];
            eprintln!("end of the daemon's log:\n{}", last.join("\n"));
        }
    }
}

/// Supervisor pacing with a tenth of the intervals in production.
pub fn quick_pacing() -> SupervisorPacing {
    SupervisorPacing {
        first_backoff: Duration::from_millis(10),
        longest_backoff: Duration::from_millis(200),
        steady_after: Duration::from_millis(500),
        poll_interval: Duration::from_millis(25),
        officer_poll_interval: Duration::from_millis(100),
    }
}

/// Creates a site in an empty directory, with the ports of the demo.
fn make(directory: &Path) {
    for file in ["hsm.toml", "ceremony.toml", "sppd.toml"] {
        let text = std::fs::read_to_string(Path::new(DEMO).join(file)).unwrap();
        let text = text
            .replace("low = 10\nhigh = 20", "low = 1\nhigh = 2")
            .replace("\"256 MiB\"", "\"1 MiB\"\nreserve = \"1 MiB\"");
        std::fs::write(directory.join(file), text).unwrap();
    }
    copy_directory(&Path::new(DEMO).join("profiles"), &directory.join("profiles"));
    copy_directory(Path::new(HSM_CONFIG), &directory.join("hsm-config"));
    // On a busy machine, threads of the lowest priority would hardly run.
    replace(&directory.join("hsm-config/softhsm2.toml"), "# background_nice = 19", "background_nice = 0");
    // An RSA pair takes one second of CPU time, and every daemon would generate two.
    replace(&directory.join("profiles/router.toml"), "rsa-2048", "ed25519");
    replace(&directory.join("sppd.toml"), "rsa-2048", "ed25519");
    std::fs::create_dir_all(directory.join("hsm/tokens")).unwrap();
    write_softhsm_conf(directory);
    write_private(&directory.join("hsm/user.pin"), "482910375566");
    write_private(&directory.join("hsm/so.pin"), "118822993344");
    for words in [
        "token init --module hsm-config/softhsm2.toml --directory hsm --label spp-demo --so-pin-file hsm/so.pin --pin-file hsm/user.pin",
        "ceremony run ceremony.toml --hsm hsm.toml --out keys",
        "init --config sppd.toml",
        "server enroll --config sppd.toml --dns localhost --ip 127.0.0.1 --out tls/server",
        "station enroll line-1/a --config sppd.toml --out tls/line-1-a",
        "officer enroll o-1 --config sppd.toml --out tls/officer",
    ] {
        let mut command = child_command(program("sppctl"));
        command.args(words.split_whitespace()).current_dir(directory);
        let output = output(command);
        assert!(output.status.success(), "sppctl {words}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

fn replace(file: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{} has no {from:?}", file.display());
    std::fs::write(file, text.replacen(from, to, 1)).unwrap();
}

/// Writes the only file that contains an absolute path.
fn write_softhsm_conf(directory: &Path) {
    let tokens = directory.join("hsm/tokens");
    let conf = format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display());
    std::fs::write(directory.join("hsm/softhsm2.conf"), conf).unwrap();
}
