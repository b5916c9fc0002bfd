//! Collects cosignatures of witnesses (C2SP tlog-witness). A witness cosigns a checkpoint only if it is consistent with those
//! that it has seen, so a log with cosigned checkpoints cannot present different views.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};

use spp_format::tlog::{LogKey, SignedCheckpoint, WitnessKey, prove_consistency};
use spp_log::registry::fetch::Fetcher;
use tokio::task::JoinSet;

use super::read::Tiles;
use super::shared::Shared;
use super::snapshot::Snapshot;
use crate::store::WitnessStatus;

/// Interval of checks for a new checkpoint.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Interval of retries for witnesses that have not cosigned the current checkpoint.
const RETRY_INTERVAL: Duration = Duration::from_secs(15);
/// Timeout of a request to a witness.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a checkpoint waits for cosignatures before it is published. Later cosignatures are added to it.
const PUBLISH_DELAY: Duration = Duration::from_secs(1);
/// Maximum size of a response in bytes.
const MAX_ANSWER: u64 = 16 * 1024;

/// A configured witness.
#[derive(Debug, Clone)]
pub struct Witness {
    /// Its submission prefix, for example `https://witness.example/w1`.
    pub url: String,
    /// The key that verifies its cosignatures.
    pub key: WitnessKey,
    /// The CA of its TLS certificate; the system's CAs if `None`.
    pub authority: Option<std::path::PathBuf>,
}

/// The newest checkpoint that was sent to the witnesses, with their cosignatures, and the witnesses' status.
#[derive(Clone, Default)]
pub(super) struct CosigningState(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    newest: Option<SignedCheckpoint>,
    witnesses: Vec<WitnessStatus>,
}

impl CosigningState {
    pub(super) fn newest(&self) -> Option<SignedCheckpoint> {
        self.state().newest.clone()
    }

    fn publish(&self, checkpoint: &SignedCheckpoint) {
        self.state().newest = Some(checkpoint.clone());
    }

    pub(super) fn status(&self) -> Vec<WitnessStatus> {
        self.state().witnesses.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The client of one witness.
struct WitnessClient {
    witness: Witness,
    fetcher: Result<Fetcher, String>,
    /// The size of the last tree that the witness has cosigned.
    size: u64,
}

/// Requests cosignatures for each new checkpoint from all witnesses concurrently, until the log is closed. Publishes a checkpoint
/// with the cosignatures that arrive within [`PUBLISH_DELAY`]; an unavailable witness causes no other delay.
pub(super) async fn run(shared: Weak<Shared>, witnesses: Vec<Witness>, key: LogKey, cosigning: CosigningState) {
    let connect = |witness: Witness| {
        let fetcher = Fetcher::for_witnesses(witness.authority.as_deref(), REQUEST_TIMEOUT);
        WitnessClient { witness, fetcher, size: 0 }
    };
    let mut clients: Vec<_> = witnesses.into_iter().map(connect).collect();
    let mut since_request = RETRY_INTERVAL;
    loop {
        tokio::time::sleep(CHECK_INTERVAL).await;
        since_request += CHECK_INTERVAL;
        let Some(shared) = shared.upgrade() else { return };
        let snapshot = shared.snapshot();
        let Some(checkpoint) = snapshot.checkpoint.clone().filter(|checkpoint| checkpoint.size() > 0) else { continue };
        let newest = cosigning.newest().filter(|newest| newest.is_same_tree(&checkpoint));
        let not_cosigned = |client: &WitnessClient| {
            newest.as_ref().is_none_or(|newest| newest.cosigners(&[&client.witness.key]).is_empty())
        };
        let wait = newest.is_some() && since_request < RETRY_INTERVAL;
        if wait || !clients.iter().any(not_cosigned) {
            continue;
        }
        since_request = Duration::ZERO;
        let mut calls = JoinSet::new();
        for mut client in clients.drain(..) {
            let (shared, snapshot, checkpoint) = (Arc::clone(&shared), Arc::clone(&snapshot), checkpoint.clone());
            let skip = newest.as_ref().is_some_and(|newest| !newest.cosigners(&[&client.witness.key]).is_empty());
            calls.spawn_blocking(move || {
                let result = if skip { Ok(Vec::new()) } else { client.cosign(&shared, &snapshot, &checkpoint) };
                (client, result)
            });
        }
        drop((shared, snapshot));
        let mut published = newest.unwrap_or(checkpoint);
        let deadline = tokio::time::Instant::now() + PUBLISH_DELAY;
        let mut status = Vec::new();
        loop {
            // A slow witness does not delay the cosignatures of the fast ones.
            let in_time = tokio::time::timeout_at(deadline, calls.join_next()).await;
            let next = match in_time {
                Ok(next) => next,
                Err(_) => {
                    cosigning.publish(&published);
                    calls.join_next().await
                }
            };
            let Some(ended) = next else { break };
            let Ok((client, result)) = ended else { continue };
            let mut error = result.as_ref().err().cloned();
            if let Ok(lines) = &result {
                published = published.cosigned(lines, &[&client.witness.key]);
            }
            if error.is_none() && published.cosigners(&[&client.witness.key]).is_empty() {
                error = Some("cosignature does not verify".to_owned());
            }
            let name = client.witness.key.name().to_owned();
            if let Some(why) = &error {
                tracing::warn!(witness = %name, why, "checkpoint not cosigned by a witness; retrying");
            }
            status.push(WitnessStatus { name, size: client.size, error });
            clients.push(client);
        }
        match SignedCheckpoint::verify(published.note(), &key) {
            Ok(_) => cosigning.publish(&published),
            Err(e) => {
                tracing::error!(error = %e, "cosigned checkpoint does not verify; not published")
            }
        }
        status.sort_by(|a, b| a.name.cmp(&b.name));
        cosigning.state().witnesses = status;
    }
}

impl WitnessClient {
    /// Requests a cosignature and returns the witness's signature lines.
    fn cosign(
        &mut self,
        shared: &Shared,
        snapshot: &Snapshot,
        checkpoint: &SignedCheckpoint,
    ) -> Result<Vec<u8>, String> {
        let first = self.add_checkpoint(shared, snapshot, checkpoint)?;
        // After a restart of the log the last size that the witness has seen is unknown. The witness answers with that size.
        let answer = match first {
            Reply::KnownSize(size) if size <= checkpoint.size() => {
                self.size = size;
                self.add_checkpoint(shared, snapshot, checkpoint)?
            }
            other => other,
        };
        match answer {
            Reply::Cosigned(lines) => {
                self.size = checkpoint.size();
                Ok(lines)
            }
            Reply::KnownSize(size) => {
                Err(format!("witness has cosigned a tree of {size} entries; check that no other log uses this name"))
            }
        }
    }

    fn add_checkpoint(
        &self,
        shared: &Shared,
        snapshot: &Snapshot,
        checkpoint: &SignedCheckpoint,
    ) -> Result<Reply, String> {
        let proof = match self.size {
            size if size == checkpoint.size() => Vec::new(),
            size => prove_consistency(&snapshot.tree, size, &Tiles(shared, snapshot)).map_err(|e| e.to_string())?,
        };
        let mut body = format!("old {}\n", self.size);
        for hash in proof {
            body.push_str(&BASE64_STANDARD.encode(hash));
            body.push('\n');
        }
        body.push('\n');
        let body = [body.as_bytes(), checkpoint.note()].concat();
        let url = format!("{}/add-checkpoint", self.witness.url.trim_end_matches('/'));
        let fetcher = self.fetcher.as_ref().map_err(Clone::clone)?;
        let answer = fetcher.post(&url, &body, MAX_ANSWER)?;
        match answer.status {
            200 => Ok(Reply::Cosigned(answer.body)),
            409 => {
                let size = std::str::from_utf8(&answer.body).ok().and_then(|text| text.trim_end().parse().ok());
                size.map(Reply::KnownSize).ok_or_else(|| "status 409 without a tree size".to_owned())
            }
            403 => Err("witness rejects the log's signature (403); check the log key in its configuration".to_owned()),
            404 => Err("log unknown to the witness (404); its operator must add the log".to_owned()),
            422 => Err("witness found the checkpoint inconsistent with an earlier one (422)".to_owned()),
            status => Err(format!("status {status}")),
        }
    }
}

enum Reply {
    Cosigned(Vec<u8>),
    KnownSize(u64),
}
