//! What security officers do.
