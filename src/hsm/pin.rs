//! Reads the user PIN. Only the worker or an officer's tool reads the PIN, never the process that faces the network, and never
//! from an argument, the environment or the configuration file.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use serde::{Deserialize, Serialize};
use spp_format::file_format::{PrivateFileError, open_private};
use spp_format::secret::SecretBytes;
use zeroize::Zeroize as _;

/// The source of a PIN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PinSource {
    /// A file readable by its owner only, who is the user of this process or root.
    File(PathBuf),
    /// A systemd credential (`LoadCredential=`), which systemd protects from other users; the path below
    /// `$CREDENTIALS_DIRECTORY`.
    Credential(PathBuf),
    /// A person types it at the terminal of this process.
    Prompt,
    /// The PIN agent ([`super::pin_agent`]) sends it through the worker's standard output.
    FromAgent,
    /// A person enters it at the HSM (CKF_PROTECTED_AUTHENTICATION_PATH); no process sees it.
    Protected,
}

/// Why a PIN cannot be read. Never contains the PIN.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The file cannot be read, or other users can read it.
    #[error("PIN file {0}")]
    File(#[from] PrivateFileError),
    /// Reading failed after the file was opened.
    #[error("cannot read {path}: {cause}")]
    NotRead {
        /// The source of the PIN.
        path: String,
        /// The system error.
        cause: std::io::Error,
    },
    /// The content is not one line of 1 to 256 bytes of UTF-8.
    #[error("{path}: expected one line of 1 to {max} bytes of UTF-8", max = PinSource::MAX_LEN)]
    NotAPin {
        /// The source.
        path: String,
    },
    /// There is no terminal, or no PIN was typed.
    #[error("cannot prompt for the PIN: {0}; without a terminal use a PIN file")]
    NotTyped(#[source] std::io::Error),
}

/// The terminal of this process, with the echo off until this value is dropped.
///
/// `rpassword` turns the echo off only after the prompt, so input that arrives in between would be shown.
struct SilentTerminal {
    terminal: File,
    before: Termios,
}

impl SilentTerminal {
    fn new() -> std::io::Result<Self> {
        Self::with_echo_off(File::options().read(true).write(true).open("/dev/tty")?)
    }

    fn with_echo_off(terminal: File) -> std::io::Result<Self> {
        let before = tcgetattr(&terminal)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&terminal, OptionalActions::Flush, &silent)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for SilentTerminal {
    fn drop(&mut self) {
        if let Err(e) = tcsetattr(&self.terminal, OptionalActions::Now, &self.before) {
            tracing::warn!(error = %e, "cannot restore the terminal echo; run `stty sane`");
        }
    }
}

fn open_credential(path: &Path) -> Result<File, PrivateFileError> {
    File::open(path).map_err(|cause| PrivateFileError::Unreadable { path: path.display().to_string(), cause })
}

impl PinSource {
    /// Maximum length of a PIN in bytes.
    pub const MAX_LEN: usize = 256;

    /// Checks that the file exists and that other users cannot read it, without reading it.
    pub fn check(&self) -> Result<(), PinError> {
        match self {
            Self::File(path) => open_private(path).map(drop)?,
            Self::Credential(path) => open_credential(path).map(drop)?,
            Self::Prompt | Self::FromAgent | Self::Protected => {}
        }
        Ok(())
    }

    /// Reads the PIN; `None` if a person enters it at the HSM.
    pub fn read(&self) -> Result<Option<SecretBytes>, PinError> {
        match self {
            Self::File(path) => Self::read_line(open_private(path)?, &format!("PIN file {}", path.display())).map(Some),
            Self::Credential(path) => {
                Self::read_line(open_credential(path)?, &format!("PIN credential {}", path.display())).map(Some)
            }
            Self::FromAgent => {
                let pipe = std::io::stdout().as_fd().try_clone_to_owned().map_err(PinError::NotTyped)?;
                Self::read_line(File::from(pipe), "typed PIN").map(Some)
            }
            Self::Prompt => {
                let _silent = SilentTerminal::new().map_err(PinError::NotTyped)?;
                let typed = rpassword::prompt_password("user PIN of the token: ").map_err(PinError::NotTyped)?;
                let typed = SecretBytes::new(typed.into_bytes());
                if typed.expose().is_empty() || typed.expose().len() > Self::MAX_LEN {
                    return Err(PinError::NotAPin { path: "typed PIN".to_owned() });
                }
                Ok(Some(typed))
            }
            Self::Protected => Ok(None),
        }
    }

    /// Reads the PIN without its line ending.
    fn read_line(file: File, path: &str) -> Result<SecretBytes, PinError> {
        let path = path.to_owned();
        // Capacity for the longest PIN: a reallocation would leave a copy behind.
        let mut pin = SecretBytes::new(Vec::with_capacity(Self::MAX_LEN + 2));
        file.take(Self::MAX_LEN as u64 + 2)
            .read_to_end(pin.expose_mut())
            .map_err(|cause| PinError::NotRead { path: path.clone(), cause })?;
        let bytes = pin.expose_mut();
        while bytes.last().is_some_and(|b| *b == b'\n' || *b == b'\r') {
            bytes.pop();
        }
        if bytes.is_empty()
            || bytes.len() > Self::MAX_LEN
            || std::str::from_utf8(bytes).is_err()
            || bytes.contains(&b'\n')
        {
            bytes.zeroize();
            return Err(PinError::NotAPin { path });
        }
        Ok(pin)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use rustix::pty::OpenptFlags;

    use super::*;

    fn pin_file(content: &str, mode: u32) -> (tempfile::TempDir, PinSource) {
        let dir = spp_testkit::files::temp_dir();
        let path = dir.path().join("pin");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, PinSource::File(path))
    }

    #[test]
    fn pin_excludes_line_ending() {
        let (_dir, source) = pin_file("1234\n", 0o600);
        assert_eq!(source.read().unwrap().unwrap().expose(), b"1234");
    }

    #[test]
    fn pin_file_readable_by_others_is_refused() {
        for mode in [0o644, 0o640, 0o604] {
            let (_dir, source) = pin_file("1234", mode);
            assert!(matches!(source.check(), Err(PinError::File(PrivateFileError::Open { .. }))), "{mode:o}");
        }
    }

    #[test]
    fn terminal_echo_is_off_until_dropped() {
        let controller = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&controller).unwrap();
        rustix::pty::unlockpt(&controller).unwrap();
        let name = rustix::pty::ptsname(&controller, Vec::new()).unwrap();
        let terminal = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let echoes = || tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ECHO);
        assert!(echoes());
        let silent = SilentTerminal::with_echo_off(terminal.try_clone().unwrap()).unwrap();
        assert!(!echoes());
        drop(silent);
        assert!(echoes());
    }

    #[test]
    fn malformed_pin_is_refused_without_showing_it() {
        for content in ["", "\n", "first\nsecond", &"x".repeat(257)] {
            let (_dir, source) = pin_file(content, 0o400);
            let error = source.read().err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains("one line") && !error.contains("second"), "{error}");
        }
    }
}
