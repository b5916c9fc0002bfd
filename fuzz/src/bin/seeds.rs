//! Writes the samples as libFuzzer's seeds: `corpus/TARGET/sample-N`.

use std::fs;
use std::path::Path;

fn main() -> std::io::Result<()> {
    for target in spp_fuzz::TARGETS {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
        fs::create_dir_all(&directory)?;
        for (n, sample) in (target.samples)().into_iter().enumerate() {
            fs::write(directory.join(format!("sample-{n}")), sample)?;
        }
    }
    Ok(())
}
