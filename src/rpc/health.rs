//! Health per service (`grpc.health.v1`): Line serves while the HSM does, the stores are open and there is room on the disk;
//! Recovery serves while records can be looked up; Production while the state store is open; Officer, and the daemon as a whole, as
//! long as it runs.

use std::sync::Arc;
use std::time::Duration;

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::provisioning::Provisioner;

/// How often the disk is looked at; the HSM's changes are told at once.
const LOOK: Duration = Duration::from_secs(2);
const LINE: &str = "spp.v1.Line";
const RECOVERY: &str = "spp.v1.Recovery";
const OFFICER: &str = "spp.v1.Officer";
const PRODUCTION: &str = "spp.v1.Production";

/// What a service needs and does not have.
pub(crate) struct Missing {
    /// `hsm`, `state-store`, `disk` or `public-database`.
    pub(crate) dependency: &'static str,
    pub(crate) why: String,
}

/// What each service needs and does not have at this moment. The officers' needs nothing but the daemon.
pub(crate) fn missing(provisioner: &Provisioner) -> [(&'static str, Vec<Missing>); 4] {
    let missing = |dependency, why: Option<String>| why.map(|why| Missing { dependency, why });
    let hsm = provisioner.hsm().status();
    let log = provisioner.registry().status();
    let (store, disk) = match provisioner.journal().room() {
        Ok((free, floor)) if free < floor => (None, Some(format!("{free} bytes are free, {floor} are needed"))),
        Ok(_) => (None, None),
        Err(error) => (Some(error.to_string()), None),
    };
    let line = [
        missing("hsm", (!hsm.ready).then_some(hsm.trouble)),
        missing("state-store", store.clone()),
        missing("disk", disk),
        missing("public-database", log.publishing_trouble),
    ];
    let recovery = missing("public-database", log.reading_trouble);
    let production = missing("state-store", store);
    [
        (LINE, line.into_iter().flatten().collect()),
        (RECOVERY, recovery.into_iter().collect()),
        (OFFICER, Vec::new()),
        (PRODUCTION, production.into_iter().collect()),
    ]
}

/// Why no new device is taken now, if so.
pub(crate) fn line_trouble(provisioner: &Provisioner) -> Option<String> {
    let [(_, line), ..] = missing(provisioner);
    line.into_iter().next().map(|missing| format!("{}: {}", missing.dependency, missing.why))
}

/// Keeps the health service told until the task is ended.
pub(super) async fn report(reporter: HealthReporter, provisioner: Arc<Provisioner>) {
    let mut hsm = provisioner.hsm().clone();
    for service in ["", OFFICER] {
        reporter.set_service_status(service, ServingStatus::Serving).await;
    }
    let mut line = Told::new(LINE);
    let mut recovery = Told::new(RECOVERY);
    let mut production = Told::new(PRODUCTION);
    loop {
        line.tell(&reporter, line_trouble(&provisioner)).await;
        recovery.tell(&reporter, provisioner.registry().status().reading_trouble).await;
        production.tell(&reporter, provisioner.journal().room().err().map(|error| error.to_string())).await;
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
