//! The only room with tonic.
