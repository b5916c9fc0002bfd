//! What a station does.
