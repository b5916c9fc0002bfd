//! Reads the files that people write: all faults of a file are reported at once, each with its place.

mod faults;
mod private_file;
mod toml_file;

pub use faults::{Fault, Faults};
pub use private_file::{PrivateFileError, open_private};
pub use toml_file::read_toml;
