//! The status of the HSMs, for officers and metrics.

use std::sync::atomic::Ordering;

use super::handle::Hsm;
use super::members::HsmId;
use super::statistics::CallStatistic;
use super::wire::Priority;
use super::worker_state::State;

/// The current status of all HSMs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HsmStatus {
    /// Whether at least one HSM serves calls.
    pub ready: bool,
    /// Why no HSM serves calls; empty if one does.
    pub error: String,
    /// Calls queued or sent to a worker.
    pub calls_in_flight: u64,
    /// Maximum number of queued calls.
    pub queue: u64,
    /// Each HSM, in the order of the configuration.
    pub members: Vec<MemberStatus>,
}

/// The current status of one HSM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemberStatus {
    /// The name in the configuration.
    pub name: String,
    /// Whether it serves calls.
    pub ready: bool,
    /// Why it does not serve calls; empty if it does.
    pub error: String,
    /// The module's description of itself.
    pub module: String,
    /// The token's label.
    pub token_label: String,
    /// The token's serial number.
    pub token_serial: String,
    /// Number of worker starts.
    pub worker_starts: u64,
    /// Line calls sent to the worker and not yet answered.
    pub calls_in_flight: u64,
    /// Background calls sent to the worker and not yet answered.
    pub background_calls_in_flight: u64,
    /// Line calls answered.
    pub calls_answered: u64,
    /// Statistics per operation and outcome.
    pub calls: Vec<CallStatistic>,
}

impl Hsm {
    /// The current status.
    pub fn status(&self) -> HsmStatus {
        let states = self.states.borrow();
        let members: Vec<_> =
            self.members.ids().zip(&*states).map(|(member, state)| self.member_status(member, state)).collect();
        let errors = members.iter().zip(self.members.ids());
        let errors: Vec<_> =
            errors.map(|(status, member)| self.members.with_member_name(member, &status.error)).collect();
        let ready = members.iter().any(|member| member.ready);
        let waiting = self.members.queue_capacity.saturating_sub(self.members.queue.available_permits()) as u64;
        HsmStatus {
            ready,
            error: if ready { String::new() } else { errors.join("; ") },
            calls_in_flight: waiting.max(members.iter().map(|member| member.calls_in_flight).sum()),
            queue: self.members.queue_capacity as u64,
            members,
        }
    }

    fn member_status(&self, member: HsmId, state: &State) -> MemberStatus {
        let mut status = MemberStatus::default();
        if let Some(member) = self.members.get(member) {
            status.name.clone_from(&member.config.name);
            status.worker_starts = member.counters.starts.load(Ordering::Relaxed);
            status.calls_answered = member.counters.answered.load(Ordering::Relaxed);
            status.calls = member.counters.calls.all();
        }
        match state {
            State::Ready(connection) => {
                status.ready = true;
                status.module.clone_from(&connection.module);
                status.token_label.clone_from(&connection.token.label);
                status.token_serial.clone_from(&connection.token.serial);
                status.calls_in_flight = connection.pending.count(Priority::Line) as u64;
                status.background_calls_in_flight = connection.pending.count(Priority::Background) as u64;
            }
            State::Unavailable { reason, .. } | State::Stopped { reason } => status.error.clone_from(reason),
        }
        status
    }
}
