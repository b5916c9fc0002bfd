//! HTTP/1.1 within limits: so many connections, one request on each, none of them for long; and the drain.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// Connections at once; more wait with the system until one ends.
const PLACES: u32 = 16;
/// No connection takes longer, whatever its other end does.
const LIMIT: Duration = Duration::from_secs(10);
/// How long the head of a request may take.
const HEAD_LIMIT: Duration = Duration::from_secs(3);
/// Most octets of a request's head.
const HEAD_SIZE: usize = 16 * 1024;
/// How long it waits after the system gave no connection, as when the process has no file descriptor left.
const PAUSE: Duration = Duration::from_secs(1);

/// Serves until `stop` is true, then lets the requests in flight be answered.
pub(super) async fn serve(listener: TcpListener, router: Router, stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(PLACES as usize));
    loop {
        let (place, stream) = tokio::select! {
            () = wait_for(stop.clone()) => break,
            next = next(&listener, &places) => next,
        };
        let (router, stop) = (router.clone(), stop.clone());
        tokio::spawn(async move {
            answer(stream, router, stop).await;
            drop(place);
        });
    }
    drop(listener);
    // All places are free once every connection has ended, which none can put off beyond its limit.
    let _ = places.acquire_many(PLACES).await;
}

async fn next(listener: &TcpListener, places: &Arc<Semaphore>) -> (Option<OwnedSemaphorePermit>, TcpStream) {
    // It is never closed, so there always is a place in the end.
    let place = Arc::clone(places).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (place, stream),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn answer(stream: TcpStream, router: Router, stop: watch::Receiver<bool>) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_SIZE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let whole = async {
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = wait_for(stop) => {}
        }
        connection.as_mut().graceful_shutdown();
        connection.await
    };
    match tokio::time::timeout(LIMIT, whole).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection ended early"),
        Err(_) => tracing::debug!(after = ?LIMIT, "a connection took too long"),
    }
}

async fn wait_for(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop as well.
    let _ = stop.wait_for(|stop| *stop).await;
}
