//! `sppctl reload`: makes the daemon reload its configuration.

use serde_json::json;
use spp_proto as proto;

use super::pool_cli::DaemonArgs;
use super::status::{StatusError, call_error, connect, with_deadline};

/// Reloads the configuration and prints the changes.
pub async fn reload(daemon: DaemonArgs) -> Result<(), StatusError> {
    let mut client = connect(&daemon.server, &daemon.tls).await?;
    let answer = client.reload(with_deadline(proto::ReloadRequest {})).await;
    let answer = answer.map_err(|status| call_error(&daemon.server, &status))?.into_inner();
    let hash = hex::encode(&answer.configuration_sha256);
    if daemon.json {
        println!("{:#}", json!({ "changes": answer.changes, "configuration_sha256": hash }));
        return Ok(());
    }
    for change in &answer.changes {
        println!("{change}");
    }
    let summary = if answer.changes.is_empty() { "no changes" } else { "in force" };
    println!("{summary}; SHA-256 of the file: {hash}");
    Ok(())
}
