//! The embedded engines, on sled 0.34.
