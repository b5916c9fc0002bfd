//! Reports health per service (`grpc.health.v1`).
//!
//! Line is serving while the HSM is ready, the stores are open and the disk has free space. Recovery is serving while records
//! can be looked up, Production while the state store is open. Officer and the daemon as a whole are always serving.

use std::sync::Arc;
use std::time::Duration;

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::provisioning::Provisioner;

/// How often disk and stores are polled. HSM changes are reported at once.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
const LINE: &str = "spp.v1.Line";
const RECOVERY: &str = "spp.v1.Recovery";
const OFFICER: &str = "spp.v1.Officer";
const PRODUCTION: &str = "spp.v1.Production";

/// A dependency that a service needs and that is unavailable.
pub(crate) struct MissingDependency {
    /// `hsm`, `state-store`, `disk` or `public-database`.
    pub(crate) dependency: &'static str,
    pub(crate) reason: String,
}

/// Lists the missing dependencies of each service. Officer depends on the daemon alone.
pub(crate) fn missing_dependencies(provisioner: &Provisioner) -> [(&'static str, Vec<MissingDependency>); 4] {
    let missing = |dependency, reason: Option<String>| reason.map(|reason| MissingDependency { dependency, reason });
    let hsm = provisioner.hsm().status();
    let log = provisioner.registry().status();
    let (store, disk) = match provisioner.journal().disk_space() {
        Ok((free, floor)) if free < floor => (None, Some(format!("{free} bytes free, {floor} required"))),
        Ok(_) => (None, None),
        Err(error) => (Some(error.to_string()), None),
    };
    let line = [
        missing("hsm", (!hsm.ready).then_some(hsm.error)),
        missing("state-store", store.clone()),
        missing("disk", disk),
        missing("public-database", log.publish_error),
    ];
    let recovery = missing("public-database", log.read_error);
    let production = missing("state-store", store);
    [
        (LINE, line.into_iter().flatten().collect()),
        (RECOVERY, recovery.into_iter().collect()),
        (OFFICER, Vec::new()),
        (PRODUCTION, production.into_iter().collect()),
    ]
}

/// Returns why the Line service takes no new devices, or `None` if it does.
pub(crate) fn line_unavailable_reason(provisioner: &Provisioner) -> Option<String> {
    let [(_, line), ..] = missing_dependencies(provisioner);
    line.into_iter().next().map(|missing| format!("{}: {}", missing.dependency, missing.reason))
}

/// Keeps the health service up to date.
pub(in crate::server) struct HealthReports {
    pub(super) reporter: HealthReporter,
    pub(super) provisioner: Arc<Provisioner>,
}

impl HealthReports {
    /// Runs until the task is aborted.
    pub(in crate::server) async fn run(self) {
        let Self { reporter, provisioner } = self;
        let mut hsm = provisioner.hsm().clone();
        for service in ["", OFFICER] {
            reporter.set_service_status(service, ServingStatus::Serving).await;
        }
        let mut line = StatusReporter::new(LINE);
        let mut recovery = StatusReporter::new(RECOVERY);
        let mut production = StatusReporter::new(PRODUCTION);
        loop {
            line.update(&reporter, line_unavailable_reason(&provisioner)).await;
            recovery.update(&reporter, provisioner.registry().status().read_error).await;
            production.update(&reporter, provisioner.journal().disk_space().err().map(|e| e.to_string())).await;
            let _ = tokio::time::timeout(POLL_INTERVAL, hsm.changed()).await;
        }
    }
}

/// Reports one service's status when it changes.
struct StatusReporter {
    service: &'static str,
    last_reported: Option<Option<String>>,
}

impl StatusReporter {
    const fn new(service: &'static str) -> Self {
        Self { service, last_reported: None }
    }

    /// Reports `error` unless it was the last status reported.
    async fn update(&mut self, reporter: &HealthReporter, error: Option<String>) {
        if self.last_reported.as_ref() == Some(&error) {
            return;
        }
        let status = if error.is_none() { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status(self.service, status).await;
        match &error {
            None => tracing::info!(service = self.service, "service available"),
            Some(reason) => tracing::warn!(service = self.service, %reason, "service unavailable"),
        }
        self.last_reported = Some(error);
    }
}
