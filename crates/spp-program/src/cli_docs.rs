//! Generates man pages and shell completions from the clap definitions.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Command, Subcommand};
use clap_complete::Shell;

/// The documentation subcommands.
#[derive(Subcommand)]
pub enum CliDocs {
    /// Print shell completions.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Write one man page per command.
    Man {
        /// The output directory; created if it does not exist.
        dir: PathBuf,
    },
}

impl CliDocs {
    /// Generates the requested output.
    pub fn run(self, program: Command) -> Result<(), String> {
        match self {
            Self::Completions { shell } => completions(shell, program),
            Self::Man { dir } => man(&dir, program),
        }
        .map_err(|e| e.to_string())
    }
}

/// Prints shell completions.
pub fn completions(shell: Shell, mut program: Command) -> io::Result<()> {
    let name = program.get_name().to_owned();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut program, name, &mut text);
    io::Write::write_all(&mut io::stdout().lock(), &text)
}

/// Writes the man pages of the program and of all its subcommands.
pub fn man(dir: &Path, program: Command) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    clap_mangen::generate_to(program, dir)
}
