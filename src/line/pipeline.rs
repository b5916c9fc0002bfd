//! Many devices at a time: P tasks over a few connections, and one book-keeper that writes down what they tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::LineError;
use super::device_flow::{DeviceFlow, Failure, Station};
use super::orders::Order;
use super::run_log::{Ended, RunLog};
use crate::proto::line_client::LineClient;

/// A run: who, over what, for whom.
pub(super) struct Run {
    pub(super) station: Station,
    pub(super) channels: Vec<Channel>,
    pub(super) orders: Vec<Order>,
    /// Devices that are worked on at the same time.
    pub(super) parallel: usize,
    pub(super) book: RunLog,
}

/// Works through the orders. Ends early, with what was begun finished, when nobody answers any more or Ctrl-C is pressed.
pub(super) async fn run(run: Run) -> Result<Ended, LineError> {
    let Run { station, channels, orders, parallel, mut book } = run;
    let begun = Instant::now();
    // 1. What the journal knows needs no work.
    let mut todo = Vec::new();
    for (index, order) in orders.iter().enumerate() {
        match book.remembered(order) {
            Some(way) => book.enter(order, way)?,
            None => todo.push(index),
        }
    }
    // 2. The rest goes through the tasks to the book-keeper.
    let line = Arc::new(Line { station, orders, todo, next: AtomicUsize::new(0), stop: AtomicBool::new(false) });
    let (tell, told) = mpsc::channel(1024);
    let keeper = {
        let line = Arc::clone(&line);
        tokio::task::spawn_blocking(move || keep(book, &line, told))
    };
    let watch = tokio::spawn(stop_on_interrupt(Arc::clone(&line)));
    let mut tasks = JoinSet::new();
    for channel in channels.iter().cycle().take(parallel.min(line.todo.len())) {
        tasks.spawn(work(Arc::clone(&line), LineClient::new(channel.clone()), tell.clone()));
    }
    drop(tell);
    tasks.join_all().await;
    watch.abort();
    // 3. The book is closed when the last task has told its last device.
    let book = keeper.await.map_err(|e| LineError::Usage(format!("the book-keeping stopped: {e}")))??;
    book.close(line.orders.len(), begun.elapsed())
}

/// What the tasks share.
struct Line {
    station: Station,
    orders: Vec<Order>,
    /// Indices of the orders that need work.
    todo: Vec<usize>,
    next: AtomicUsize,
    stop: AtomicBool,
}

impl Line {
    /// The next order, each once.
    fn next(&self) -> Option<&Order> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let next = self.todo.get(self.next.fetch_add(1, Ordering::Relaxed))?;
        self.orders.get(*next)
    }
}

type Told = (Order, DeviceFlow);

async fn work(line: Arc<Line>, client: LineClient<Channel>, tell: mpsc::Sender<Told>) {
    while let Some(order) = line.next() {
        // Closed if the book-keeper failed: then nothing more is begun.
        let Ok(slot) = tell.reserve().await else { return };
        let way = line.station.provision(&client, order).await;
        if way.outcome.as_ref().is_err_and(Failure::is_away) {
            // Each of the other devices would wait as long and fare the same.
            line.stop.store(true, Ordering::Relaxed);
        }
        slot.send((order.clone(), way));
    }
}

fn keep(mut book: RunLog, line: &Line, mut told: mpsc::Receiver<Told>) -> Result<RunLog, LineError> {
    book.show_progress(line.orders.len());
    while let Some((order, way)) = told.blocking_recv() {
        book.enter(&order, way)?;
        if told.is_empty() {
            book.flush()?;
        }
    }
    Ok(book)
}

async fn stop_on_interrupt(line: Arc<Line>) {
    if tokio::signal::ctrl_c().await.is_ok() {
        line.stop.store(true, Ordering::Relaxed);
        eprintln!("finishing the devices that were begun; Ctrl-C again ends at once; the same command resumes");
    }
    if tokio::signal::ctrl_c().await.is_ok() {
        std::process::exit(130);
    }
}
