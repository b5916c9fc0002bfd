//! Provisions many devices in parallel: P tasks over a few connections, and one thread that writes the run log.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::LineError;
use super::client::StationClient;
use super::device_flow::{DeviceResult, Failure, Station};
use super::orders::Order;
use super::run_log::{RunLog, RunResult};

/// The input of a run.
pub(super) struct Run {
    pub(super) station: Station,
    pub(super) clients: Vec<StationClient>,
    pub(super) orders: Vec<Order>,
    /// Number of devices in progress at the same time.
    pub(super) parallel: usize,
    pub(super) run_log: RunLog,
}

/// Processes the orders. Stops early, after finishing the devices in progress, if the daemon is unavailable or on Ctrl-C.
pub(super) async fn run(run: Run) -> Result<RunResult, LineError> {
    let Run { station, clients, orders, parallel, mut run_log } = run;
    let start = Instant::now();
    // 1. Skip the orders that the journal lists as complete.
    let mut todo = Vec::new();
    for (index, order) in orders.iter().enumerate() {
        match run_log.completed_before(order) {
            Some(result) => run_log.record(order, result)?,
            None => todo.push(index),
        }
    }
    // 2. Provision the others in tasks, which send their results to the log thread.
    let state =
        Arc::new(SharedState { station, orders, todo, next: AtomicUsize::new(0), stop: AtomicBool::new(false) });
    let (sender, receiver) = mpsc::channel(1024);
    let log_thread = {
        let state = Arc::clone(&state);
        tokio::task::spawn_blocking(move || record_results(run_log, &state, receiver))
    };
    let watch = tokio::spawn(stop_on_interrupt(Arc::clone(&state)));
    let mut tasks = JoinSet::new();
    for client in clients.iter().cycle().take(parallel.min(state.todo.len())) {
        tasks.spawn(provision_orders(Arc::clone(&state), client.clone(), sender.clone()));
    }
    drop(sender);
    tasks.join_all().await;
    watch.abort();
    // 3. Close the run log after the last result.
    let run_log = log_thread.await.map_err(|e| LineError::Usage(format!("the run log thread failed: {e}")))??;
    run_log.close(state.orders.len(), start.elapsed())
}

/// State shared by the tasks.
struct SharedState {
    station: Station,
    orders: Vec<Order>,
    /// Indices of the orders that need work.
    todo: Vec<usize>,
    next: AtomicUsize,
    stop: AtomicBool,
}

impl SharedState {
    /// Takes the next order; each order is taken once.
    fn next(&self) -> Option<&Order> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let next = self.todo.get(self.next.fetch_add(1, Ordering::Relaxed))?;
        self.orders.get(*next)
    }
}

type FinishedDevice = (Order, DeviceResult);

async fn provision_orders(state: Arc<SharedState>, client: StationClient, sender: mpsc::Sender<FinishedDevice>) {
    while let Some(order) = state.next() {
        // The channel is closed if the log thread failed; no further device is started.
        let Ok(slot) = sender.reserve().await else { return };
        let result = state.station.provision(&client, order).await;
        if result.outcome.as_ref().is_err_and(Failure::is_unavailable) {
            // Every other device would wait as long and fail as well.
            state.stop.store(true, Ordering::Relaxed);
        }
        slot.send((order.clone(), result));
    }
}

fn record_results(
    mut run_log: RunLog,
    state: &SharedState,
    mut receiver: mpsc::Receiver<FinishedDevice>,
) -> Result<RunLog, LineError> {
    run_log.show_progress(state.orders.len());
    while let Some((order, result)) = receiver.blocking_recv() {
        run_log.record(&order, result)?;
        if receiver.is_empty() {
            run_log.flush()?;
        }
    }
    Ok(run_log)
}

async fn stop_on_interrupt(state: Arc<SharedState>) {
    if tokio::signal::ctrl_c().await.is_ok() {
        state.stop.store(true, Ordering::Relaxed);
        eprintln!(
            "finishing the devices in progress; press Ctrl-C again to exit immediately; repeat the command to resume"
        );
    }
    if tokio::signal::ctrl_c().await.is_ok() {
        std::process::exit(130);
    }
}
