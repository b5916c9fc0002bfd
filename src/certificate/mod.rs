//! X.509 and CWT device certificates: profile, prepared, linted, issued. Pure: no I/O, no clock, no HSM.
