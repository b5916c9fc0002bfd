//! Files people write: the file's shape and the validated value are two types, and every fault is reported at once.

mod faults;

pub use faults::{Fault, Faults};
