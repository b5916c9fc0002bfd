//! Load generator: concurrent callers until a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How long each piece of work took that so many callers did meanwhile, shortest first. Each piece has a number of its own.
pub(crate) async fn measure<F, O>(callers: u64, lasting: Duration, work: F) -> Result<Vec<Duration>, Failure>
where
    F: Fn(u64) -> O + Clone + Send + 'static,
    O: Future<Output = Result<(), Failure>> + Send,
{
    let (next, end) = (Arc::new(AtomicU64::new(0)), Instant::now() + lasting);
    let tasks = (0..callers).map(|_| {
        let (work, next) = (work.clone(), next.clone());
        tokio::spawn(async move {
            let mut times = Vec::new();
            while Instant::now() < end {
                let begun = Instant::now();
                work(next.fetch_add(1, Relaxed)).await?;
                times.push(begun.elapsed());
            }
            Ok::<_, Failure>(times)
        })
    });
    let mut all = Vec::new();
    for task in tasks.collect::<Vec<_>>() {
        all.extend(task.await??);
    }
    all.sort_unstable();
    Ok(all)
}

/// The time within which so many of a hundred were done.
pub(crate) fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted.get(sorted.len() * percent / 100).copied().unwrap_or_default()
}
