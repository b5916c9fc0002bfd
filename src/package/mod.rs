//! Data package, sealed delivery, backup acceptance, key confirmation: CBOR and COSE. Pure: no I/O, no clock, no HSM.
