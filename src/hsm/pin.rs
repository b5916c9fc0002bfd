//! Where the user PIN comes from. It is read by the worker (or by an officer's tool), never by the process that faces the
//! network, and never from an argument, the environment or the configuration file.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

use crate::config::{PrivateFileError, open_private};
use crate::secret::SecretBytes;

/// Where a PIN is read from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PinSource {
    /// A file that only its owner, who runs this process or is root, may read.
    File(PathBuf),
    /// A credential of systemd (`LoadCredential=`), already unreadable for others; the path below `$CREDENTIALS_DIRECTORY`.
    Credential(PathBuf),
    /// A person types it at the terminal of this process.
    Prompt,
    /// It comes from the process that keeps what a person typed ([`super::keeper`]), through the worker's standard output.
    Handed,
    /// A person enters it at the HSM itself (CKF_PROTECTED_AUTHENTICATION_PATH); no process ever sees it.
    Protected,
}

/// Why a PIN file was refused. Never says what is in it.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// It cannot be read, or others may read it.
    #[error("PIN file {0}")]
    File(#[from] PrivateFileError),
    /// Empty, or more than a PIN.
    #[error("{path} must hold one line of 1 to {max} bytes of UTF-8", max = PinSource::MAX_LEN)]
    NotAPin {
        /// Which.
        path: String,
    },
    /// There is no terminal, or nobody typed.
    #[error("the PIN could not be asked for: {0}; give a PIN file where there is no terminal")]
    NotTyped(#[source] std::io::Error),
}

/// The terminal of this process, which shows nothing of what is typed until this is dropped.
///
/// `rpassword` prompts first and only then turns the echo off; what a program or a quick person types in between is shown.
struct SilentTerminal {
    terminal: File,
    before: Termios,
}

impl SilentTerminal {
    fn new() -> std::io::Result<Self> {
        let terminal = File::options().read(true).write(true).open("/dev/tty")?;
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
            tracing::warn!(error = %e, "the terminal does not show what is typed; `stty sane` mends it");
        }
    }
}

fn open_credential(path: &Path) -> Result<File, PrivateFileError> {
    File::open(path).map_err(|cause| PrivateFileError::Unreadable { path: path.display().to_string(), cause })
}

impl PinSource {
    /// Most bytes of a PIN.
    pub const MAX_LEN: usize = 256;

    /// Checks that the file is there and closed to others, without reading it.
    pub fn check(&self) -> Result<(), PinError> {
        match self {
            Self::File(path) => open_private(path).map(drop)?,
            Self::Credential(path) => open_credential(path).map(drop)?,
            Self::Prompt | Self::Handed | Self::Protected => {}
        }
        Ok(())
    }

    /// Reads the PIN; there is none for a program where a person enters it at the HSM.
    pub fn read(&self) -> Result<Option<SecretBytes>, PinError> {
        match self {
            Self::File(path) => Self::read_line(open_private(path)?, &format!("PIN file {}", path.display())).map(Some),
            Self::Credential(path) => {
                Self::read_line(open_credential(path)?, &format!("PIN credential {}", path.display())).map(Some)
            }
            Self::Handed => {
                let handed = std::io::stdout().as_fd().try_clone_to_owned().map_err(PinError::NotTyped)?;
                Self::read_line(File::from(handed), "the PIN that was typed").map(Some)
            }
            Self::Prompt => {
                let _silent = SilentTerminal::new().map_err(PinError::NotTyped)?;
                let typed = rpassword::prompt_password("user PIN of the token: ").map_err(PinError::NotTyped)?;
                let typed = SecretBytes::new(typed.into_bytes());
                if typed.expose().is_empty() || typed.expose().len() > Self::MAX_LEN {
                    return Err(PinError::NotAPin { path: "what was typed".to_owned() });
                }
                Ok(Some(typed))
            }
            Self::Protected => Ok(None),
        }
    }

    /// One line ending at the end is not part of it.
    fn read_line(file: File, path: &str) -> Result<SecretBytes, PinError> {
        let path = path.to_owned();
        // Room for the longest PIN, so that the buffer never moves and leaves a copy behind.
        let mut pin = SecretBytes::new(Vec::with_capacity(Self::MAX_LEN + 2));
        file.take(Self::MAX_LEN as u64 + 2)
            .read_to_end(pin.expose_mut())
            .map_err(|cause| PrivateFileError::Unreadable { path: path.clone(), cause })?;
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

    use super::*;

    fn pin_file(content: &str, mode: u32) -> (tempfile::TempDir, PinSource) {
        let dir = spp_testkit::files::temp_dir();
        let path = dir.path().join("pin");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, PinSource::File(path))
    }

    #[test]
    fn a_pin_is_one_line_without_its_ending() {
        let (_dir, source) = pin_file("1234\n", 0o600);
        assert_eq!(source.read().unwrap().unwrap().expose(), b"1234");
    }

    #[test]
    fn a_pin_file_that_others_may_read_is_refused_before_it_is_read() {
        for mode in [0o644, 0o640, 0o604] {
            let (_dir, source) = pin_file("1234", mode);
            assert!(matches!(source.check(), Err(PinError::File(PrivateFileError::Open { .. }))), "{mode:o}");
        }
    }

    #[test]
    fn what_is_no_pin_is_refused_without_showing_it() {
        for content in ["", "\n", "first\nsecond", &"x".repeat(257)] {
            let (_dir, source) = pin_file(content, 0o400);
            let error = source.read().err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains("one line") && !error.contains("second"), "{error}");
        }
    }
}
