//! How the HSMs are, for officers and metrics.

use std::sync::atomic::Ordering;

use super::handle::Hsm;
use super::members::HsmId;
use super::statistics::CallStatistic;
use super::supervisor::State;
use super::wire::Priority;

/// The HSMs at this moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HsmStatus {
    /// Whether calls are served: one HSM is enough.
    pub ready: bool,
    /// Why not.
    pub trouble: String,
    /// Calls that wait or are with a worker.
    pub calls_in_flight: u64,
    /// Calls that may wait at once.
    pub queue: u64,
    /// Each HSM, in the order of the configuration.
    pub members: Vec<MemberStatus>,
}

/// One HSM at this moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemberStatus {
    /// What the configuration calls it.
    pub name: String,
    /// Whether it serves calls.
    pub ready: bool,
    /// Why not.
    pub trouble: String,
    /// The module's description of itself.
    pub module: String,
    /// The token's label.
    pub token_label: String,
    /// The token's serial number.
    pub token_serial: String,
    /// How often its worker was started.
    pub worker_starts: u64,
    /// Calls of the line that are with its worker.
    pub calls_in_flight: u64,
    /// Calls that nobody waits for and are with its worker.
    pub background_calls_in_flight: u64,
    /// Calls answered.
    pub calls_answered: u64,
    /// What was asked of its workers, and what came of it.
    pub calls: Vec<CallStatistic>,
}

impl Hsm {
    /// How they are.
    pub fn status(&self) -> HsmStatus {
        let states = self.states.borrow();
        let members: Vec<_> = self.members.each().zip(&*states).map(|(member, state)| self.of(member, state)).collect();
        let troubles = members.iter().zip(self.members.each());
        let troubles: Vec<_> = troubles.map(|(one, member)| self.members.told(member, &one.trouble)).collect();
        let ready = members.iter().any(|member| member.ready);
        let waiting = self.members.places.saturating_sub(self.members.queue.available_permits()) as u64;
        HsmStatus {
            ready,
            trouble: if ready { String::new() } else { troubles.join("; ") },
            calls_in_flight: waiting.max(members.iter().map(|member| member.calls_in_flight).sum()),
            queue: self.members.places as u64,
            members,
        }
    }

    fn of(&self, member: HsmId, state: &State) -> MemberStatus {
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
            State::Unavailable { why, .. } | State::Stopped { why } => status.trouble.clone_from(why),
        }
        status
    }
}
