//! `sppctl reload`: the running daemon reads its configuration again.

use serde_json::json;

use super::pool_cli::DaemonArgs;
use super::status::{StatusError, connect, refused, with_deadline};
use crate::proto;

/// Has it read and tells what is another now.
pub async fn reload(daemon: DaemonArgs) -> Result<(), StatusError> {
    let mut client = connect(&daemon.server, &daemon.tls).await?;
    let answer = client.reload(with_deadline(proto::ReloadRequest {})).await;
    let answer = answer.map_err(|status| refused(&daemon.server, &status))?.into_inner();
    let hash = hex::encode(&answer.configuration_sha256);
    if daemon.json {
        println!("{:#}", json!({ "changes": answer.changes, "configuration_sha256": hash }));
        return Ok(());
    }
    for change in &answer.changes {
        println!("{change}");
    }
    let what = if answer.changes.is_empty() { "nothing is another" } else { "in force" };
    println!("{what}; SHA-256 of the file: {hash}");
    Ok(())
}
