//! Compiles `proto/` with protox, so that no `protoc` needs to be installed.

use std::path::PathBuf;

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../../proto");
    let files =
        ["access", "line", "officer", "production", "recovery"].map(|service| format!("spp/v1/{service}.proto"));
    let descriptors = protox::compile(files, ["../../proto"])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("spp_descriptor.bin"), descriptors.encode_to_vec())?;
    // A plain data package has private keys: src/lib.rs writes their Debug.
    let secret = ["spp.v1.AssembleResponse", "spp.v1.AssembleResponse.delivery"];
    tonic_prost_build::configure().build_transport(false).skip_debug(secret).compile_fds(descriptors)?;
    Ok(())
}
