//! A station that provisions one device: the two calls, with the device's part in between.
//!
//! With `make dev` running in another terminal, it provisions a simulated phone:
//!
//! ```sh
//! cd target/demo
//! cargo run -p spp-line --example provision_device -- https://localhost:7443 tls/line-1-a keys/manufacturer-ca.pem \
//!     phone imei:490154200000013 /tmp/my-devices
//! ```

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use spp_device::{Delivery, SimulatedFab};
use spp_format::certificate::IssuerCertificate;
use spp_format::keys::sha256;
use spp_format::names::{ChipId, SessionId};
use spp_format::secret::SecretBytes;
use spp_line::proto::assemble_response::Delivery as Package;
use spp_line::proto::{AssembleRequest, CompleteRequest};
use spp_line::{RetryPolicy, StationClient};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [server, credentials, manufacturer, profile, identity, devices] = &arguments[..] else {
        eprintln!(
            "usage: provision_device https://HOST:PORT CREDENTIALS_DIRECTORY MANUFACTURER_CA.pem PROFILE IDENTITY DEVICES_DIRECTORY"
        );
        return ExitCode::from(2);
    };
    match provision(server, credentials, manufacturer, profile, identity, devices).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("provision_device: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn provision(
    server: &str,
    credentials: &str,
    manufacturer: &str,
    profile: &str,
    identity: &str,
    devices: &str,
) -> Result<(), Box<dyn Error>> {
    // The device of this example is simulated; a real station talks to one over its test pads. Its ROM has the
    // manufacturer's key.
    let fab = if Path::new(devices).join("fab.cbor").exists() {
        SimulatedFab::open(devices)?
    } else {
        let ca = IssuerCertificate::from_pem_with_default_algorithm(&std::fs::read_to_string(manufacturer)?)?;
        SimulatedFab::create(devices, ca.public_key().clone(), None)?
    };
    let chip = ChipId::from_bytes(&sha256(identity.as_bytes()))?;
    let mut device = fab.device(&chip, None)?;

    // 1. Assemble: the daemon issues the certificate and makes the keys. A repeated order returns the same ones.
    let station = StationClient::connect(server, Path::new(credentials), RetryPolicy::default()).await?;
    let order = AssembleRequest {
        chip_id: chip.as_bytes().to_vec(),
        identity: identity.to_owned(),
        profile: profile.to_owned(),
        ..AssembleRequest::default()
    };
    let assembled = station.assemble(order).await?;

    // 2. The device verifies the package, stores it encrypted with its chip key, and proves that it holds its keys.
    let session = SessionId::from_bytes(&assembled.session_id)?;
    match assembled.delivery.ok_or("the answer has no package")? {
        Package::DataPackage(bytes) => device.install(&session, &Delivery::Clear(&SecretBytes::new(bytes)))?,
        Package::SealedPackage(sealed) => device.install(&session, &Delivery::Sealed(&sealed))?,
    };

    // 3. Complete: the daemon publishes the backup and erases the device's key pair.
    let completion = CompleteRequest {
        session_id: assembled.session_id,
        backup_package: device.backup()?,
        key_confirmation: device.confirmation()?,
    };
    let receipt = station.complete(completion).await?.receipt.ok_or("the answer has no receipt")?;
    println!("chip {chip} is {identity}: record {} of the public database", receipt.record_index);
    Ok(())
}
