//! Man pages and shell completions, made from what a program says of itself.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Command, Subcommand};
use clap_complete::Shell;

/// What can be made of it.
#[derive(Subcommand)]
pub enum CliDocs {
    /// Print the completions for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
    /// Write the man pages, one for each command.
    Man {
        /// Where to; it is made if it is not there.
        dir: PathBuf,
    },
}

impl CliDocs {
    /// Makes it.
    pub fn run(self, program: Command) -> Result<(), String> {
        match self {
            Self::Completions { shell } => completions(shell, program),
            Self::Man { dir } => man(&dir, program),
        }
        .map_err(|e| e.to_string())
    }
}

/// Prints the completions.
pub fn completions(shell: Shell, mut program: Command) -> io::Result<()> {
    let name = program.get_name().to_owned();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut program, name, &mut text);
    io::Write::write_all(&mut io::stdout().lock(), &text)
}

/// Writes the man pages of the program and of all its commands.
pub fn man(dir: &Path, program: Command) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    clap_mangen::generate_to(program, dir)
}
