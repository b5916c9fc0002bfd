#![no_main]

libfuzzer_sys::fuzz_target!(|octets: &[u8]| {
    spp_fuzz::audit_checkpoint(octets);
});
