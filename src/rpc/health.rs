//! Health per service (`grpc.health.v1`): Line serves while the HSM does and there is room on the disk; Recovery and Officer
//! serve as long as the daemon runs.

use std::sync::Arc;
use std::time::Duration;

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::provisioning::Provisioner;

/// How often the disk is looked at; the HSM's changes are told at once.
const LOOK: Duration = Duration::from_secs(2);
const LINE: &str = "spp.v1.Line";

/// Why no new device is taken now, if so.
pub(super) fn line_trouble(provisioner: &Provisioner) -> Option<String> {
    let hsm = provisioner.hsm().status();
    if !hsm.ready {
        return Some(format!("the HSM is not ready: {}", hsm.trouble));
    }
    match provisioner.journal().room() {
        Ok((free, floor)) if free < floor => Some(format!("{free} octets are free on the disk, {floor} are needed")),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    }
}

/// Keeps the health service told until the task is ended.
pub(super) async fn report(reporter: HealthReporter, provisioner: Arc<Provisioner>) {
    let mut hsm = provisioner.hsm().clone();
    for service in ["", "spp.v1.Recovery", "spp.v1.Officer"] {
        reporter.set_service_status(service, ServingStatus::Serving).await;
    }
    let mut before = None;
    loop {
        let trouble = line_trouble(&provisioner);
        if before.as_ref() != Some(&trouble) {
            let status = if trouble.is_none() { ServingStatus::Serving } else { ServingStatus::NotServing };
            reporter.set_service_status(LINE, status).await;
            match &trouble {
                None => tracing::info!("the line is served"),
                Some(why) => tracing::warn!(%why, "the line is not served"),
            }
            before = Some(trouble);
        }
        let _ = tokio::time::timeout(LOOK, hsm.changed()).await;
    }
}
