//! Health per service (`grpc.health.v1`): Line serves while the HSM does, the stores are open and there is room on the disk;
//! Recovery serves while records can be looked up; Officer, and the daemon as a whole, as long as it runs.

use std::sync::Arc;
use std::time::Duration;

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::provisioning::Provisioner;

/// How often the disk is looked at; the HSM's changes are told at once.
const LOOK: Duration = Duration::from_secs(2);
const LINE: &str = "spp.v1.Line";

/// Why no new device is taken now, if so.
pub(crate) fn line_trouble(provisioner: &Provisioner) -> Option<String> {
    let hsm = provisioner.hsm().status();
    if !hsm.ready {
        return Some(format!("the HSM is not ready: {}", hsm.trouble));
    }
    match provisioner.journal().room() {
        Ok((free, floor)) if free < floor => Some(format!("{free} octets are free on the disk, {floor} are needed")),
        Ok(_) => provisioner.registry().status().publishing_trouble,
        Err(error) => Some(error.to_string()),
    }
}

/// Keeps the health service told until the task is ended.
pub(super) async fn report(reporter: HealthReporter, provisioner: Arc<Provisioner>) {
    let mut hsm = provisioner.hsm().clone();
    for service in ["", "spp.v1.Officer"] {
        reporter.set_service_status(service, ServingStatus::Serving).await;
    }
    let mut line = Told::new(LINE);
    let mut recovery = Told::new("spp.v1.Recovery");
    loop {
        line.tell(&reporter, line_trouble(&provisioner)).await;
        recovery.tell(&reporter, provisioner.registry().status().reading_trouble).await;
        let _ = tokio::time::timeout(LOOK, hsm.changed()).await;
    }
}

/// A service and what was said of it last.
struct Told {
    service: &'static str,
    last: Option<Option<String>>,
}

impl Told {
    const fn new(service: &'static str) -> Self {
        Self { service, last: None }
    }

    /// Says it if it is news.
    async fn tell(&mut self, reporter: &HealthReporter, trouble: Option<String>) {
        if self.last.as_ref() == Some(&trouble) {
            return;
        }
        let status = if trouble.is_none() { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status(self.service, status).await;
        match &trouble {
            None => tracing::info!(service = self.service, "served"),
            Some(why) => tracing::warn!(service = self.service, %why, "not served"),
        }
        self.last = Some(trouble);
    }
}
