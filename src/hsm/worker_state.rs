//! Publishes the state of each HSM's worker to the handle.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::connection::Connection;

/// The state of a worker, as callers see it.
#[derive(Clone)]
pub(super) enum State {
    /// Being started, the first time or again.
    Unavailable { reason: String, retry_after: Duration },
    /// Serving.
    Ready(Arc<Connection>),
    /// Only an officer helps.
    Stopped { reason: String },
}

/// The publishers of the given number of HSMs, whose workers are starting, and the states that they publish.
pub(super) fn state_publishers(members: usize) -> (Vec<StatePublisher>, watch::Receiver<Vec<State>>) {
    let starting = || State::Unavailable { reason: "worker starting".to_owned(), retry_after: Duration::from_secs(1) };
    let (sender, states) = watch::channel((0..members).map(|_| starting()).collect());
    let publishers = (0..members).map(|member| StatePublisher { states: sender.clone(), member }).collect();
    (publishers, states)
}

/// Publishes the state of one HSM to the handle.
pub(super) struct StatePublisher {
    states: watch::Sender<Vec<State>>,
    member: usize,
}

impl StatePublisher {
    pub(super) fn publish(&self, state: State) {
        self.states.send_modify(|states| {
            if let Some(current) = states.get_mut(self.member) {
                *current = state;
            }
        });
    }

    /// Resolves when the last handle is dropped.
    pub(super) async fn closed(&self) {
        self.states.closed().await;
    }
}
