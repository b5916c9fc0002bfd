//! The only room with cryptoki.
