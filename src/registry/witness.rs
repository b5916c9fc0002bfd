//! Witnesses: others that cosign a checkpoint only if it continues the ones they have seen (C2SP tlog-witness). With their cosignatures
//! on it, nobody can be shown another log.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};

use tokio::task::JoinSet;

use super::fetch::Fetcher;
use super::log::Shared;
use super::read::Tiles;
use super::snapshot::Snapshot;
use crate::store::WitnessStatus;
use crate::tlog::{LogKey, SignedCheckpoint, WitnessKey, prove_consistency};

/// How often a new checkpoint is looked for.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often witnesses that did not cosign are asked again about the same checkpoint.
const AGAIN: Duration = Duration::from_secs(15);
/// How long a witness may take to answer a request.
const LIMIT: Duration = Duration::from_secs(5);
/// How long a checkpoint waits for cosignatures before it is published; those that come later are added to it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most bytes of an answer.
const MAX_ANSWER: u64 = 16 * 1024;

/// A witness that is asked.
#[derive(Debug, Clone)]
pub struct Witness {
    /// Its submission prefix, `https://witness.example/w1`.
    pub url: String,
    /// Whose cosignatures are believed.
    pub key: WitnessKey,
    /// The CA of its certificate; that of the system if there is none.
    pub authority: Option<std::path::PathBuf>,
}

/// The newest checkpoint that the witnesses were asked about, with the cosignatures that they gave.
#[derive(Clone, Default)]
pub(super) struct Cosigned(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    newest: Option<SignedCheckpoint>,
    witnesses: Vec<WitnessStatus>,
}

impl Cosigned {
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

/// One witness, and what is known of it.
struct Asked {
    witness: Witness,
    fetcher: Result<Fetcher, String>,
    /// The size of the tree that it has cosigned last.
    size: u64,
}

/// Asks the witnesses about each new checkpoint, all at once, until the log is gone. A checkpoint is published with the
/// cosignatures that came in time; a witness that is away holds nothing up.
pub(super) async fn ask(shared: Weak<Shared>, witnesses: Vec<Witness>, key: LogKey, cosigned: Cosigned) {
    let ask = |witness: Witness| {
        let fetcher = Fetcher::of_witnesses(witness.authority.as_deref(), LIMIT);
        Asked { witness, fetcher, size: 0 }
    };
    let mut asked: Vec<_> = witnesses.into_iter().map(ask).collect();
    let mut since_asked = AGAIN;
    loop {
        tokio::time::sleep(INTERVAL).await;
        since_asked += INTERVAL;
        let Some(shared) = shared.upgrade() else { return };
        let head = shared.head();
        let Some(checkpoint) = head.checkpoint.clone().filter(|checkpoint| checkpoint.size() > 0) else { continue };
        let newest = cosigned.newest().filter(|newest| newest.is_same_tree(&checkpoint));
        let lacking =
            |asked: &Asked| newest.as_ref().is_none_or(|newest| newest.cosigners(&[&asked.witness.key]).is_empty());
        let wait = newest.is_some() && since_asked < AGAIN;
        if wait || !asked.iter().any(lacking) {
            continue;
        }
        since_asked = Duration::ZERO;
        let mut calls = JoinSet::new();
        for mut asked in asked.drain(..) {
            let (shared, head, checkpoint) = (Arc::clone(&shared), Arc::clone(&head), checkpoint.clone());
            let skip = newest.as_ref().is_some_and(|newest| !newest.cosigners(&[&asked.witness.key]).is_empty());
            calls.spawn_blocking(move || {
                let answer = if skip { Ok(Vec::new()) } else { asked.cosign(&shared, &head, &checkpoint) };
                (asked, answer)
            });
        }
        drop((shared, head));
        let mut published = newest.unwrap_or(checkpoint);
        let until = tokio::time::Instant::now() + PATIENCE;
        let mut status = Vec::new();
        loop {
            // Whoever is fast is not held up by whoever is slow.
            let in_time = tokio::time::timeout_at(until, calls.join_next()).await;
            let next = match in_time {
                Ok(next) => next,
                Err(_) => {
                    cosigned.publish(&published);
                    calls.join_next().await
                }
            };
            let Some(ended) = next else { break };
            let Ok((one, answer)) = ended else { continue };
            let mut trouble = answer.as_ref().err().cloned();
            if let Ok(lines) = &answer {
                published = published.cosigned(lines, &[&one.witness.key]);
            }
            if trouble.is_none() && published.cosigners(&[&one.witness.key]).is_empty() {
                trouble = Some("its cosignature does not verify".to_owned());
            }
            let name = one.witness.key.name().to_owned();
            if let Some(why) = &trouble {
                tracing::warn!(witness = %name, why, "a checkpoint has no cosignature of a witness; it is asked again");
            }
            status.push(WitnessStatus { name, size: one.size, trouble });
            asked.push(one);
        }
        match SignedCheckpoint::verify(published.note(), &key) {
            Ok(_) => cosigned.publish(&published),
            Err(e) => {
                tracing::error!(error = %e, "the checkpoint does not verify with its cosignatures; it is not published")
            }
        }
        status.sort_by(|a, b| a.name.cmp(&b.name));
        cosigned.state().witnesses = status;
    }
}

impl Asked {
    /// The witness's cosignature lines.
    fn cosign(&mut self, shared: &Shared, head: &Snapshot, checkpoint: &SignedCheckpoint) -> Result<Vec<u8>, String> {
        let first = self.add_checkpoint(shared, head, checkpoint)?;
        // It knows another tree than we thought: after a restart of this log we do not know what it has seen.
        let answer = match first {
            Reply::Knows(size) if size <= checkpoint.size() => {
                self.size = size;
                self.add_checkpoint(shared, head, checkpoint)?
            }
            other => other,
        };
        match answer {
            Reply::Cosigned(lines) => {
                self.size = checkpoint.size();
                Ok(lines)
            }
            Reply::Knows(size) => Err(format!("it knows a tree of {size} entries: is another log using this name?")),
        }
    }

    fn add_checkpoint(&self, shared: &Shared, head: &Snapshot, checkpoint: &SignedCheckpoint) -> Result<Reply, String> {
        let proof = match self.size {
            size if size == checkpoint.size() => Vec::new(),
            size => prove_consistency(&head.tree, size, &Tiles(shared, head)).map_err(|e| e.to_string())?,
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
                size.map(Reply::Knows).ok_or_else(|| "it answers 409 without a size".to_owned())
            }
            403 => Err("it does not accept the log's signature (403): does it know this log's key?".to_owned()),
            404 => Err("it does not know this log (404): its operator must add it".to_owned()),
            422 => Err("it found the checkpoint inconsistent with what it has seen (422)".to_owned()),
            status => Err(format!("it answers {status}")),
        }
    }
}

enum Reply {
    Cosigned(Vec<u8>),
    Knows(u64),
}
