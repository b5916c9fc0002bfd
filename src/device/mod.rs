//! The personal device: what a chip does with what the processing point gives it.
