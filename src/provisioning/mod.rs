//! The story of one device.
