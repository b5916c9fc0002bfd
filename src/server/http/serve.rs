//! Serves HTTP connections within limits on their number and age, and drains them.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, BufReader};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tower::ServiceExt as _;

use crate::server::connections::{Tls, next, stopped};

/// Time limit of the TLS handshake and of a request's headers.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// Maximum size of a request's headers in bytes.
const HEAD_SIZE: usize = 16 * 1024;
/// Maximum number of concurrent requests on one HTTP/2 connection.
const MAX_STREAMS: u32 = 100;
/// Ping interval of idle HTTP/2 connections.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// Limits of a listener.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Maximum number of connections; further ones wait in the listen backlog.
    pub(super) connections: u32,
    /// Maximum number of connections per address; further ones are closed.
    pub(super) connections_per_address: u32,
    /// Age at which a connection is shut down gracefully, so that long-lived clients do not block others.
    pub(super) max_age: Duration,
    /// Time limit of the graceful shutdown.
    pub(super) grace: Duration,
    /// Whether an HTTP/1.1 connection accepts more than one request.
    pub(super) keep_alive: bool,
}

/// The address of the client.
#[derive(Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

/// Serves until `stop` is true, then answers the requests in flight.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    router: Router,
    limits: Limits,
    stop: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(limits.connections as usize));
    let counts = Arc::new(ConnectionCounts::default());
    loop {
        let (permit, stream, peer) = tokio::select! {
            () = stopped(stop.clone()) => break,
            next = next(&listener, &permits) => next,
        };
        let Some(counted) = counts.add(rate_key(peer.ip()), limits.connections_per_address) else {
            tracing::debug!(%peer, "too many connections from this address");
            continue;
        };
        let (router, stop, tls) = (router.clone(), stop.clone(), tls.clone());
        tokio::spawn(async move {
            match tls {
                None => answer(stream, peer, router, limits, stop).await,
                Some(tls) => {
                    if let Some(stream) = tls.accept(stream, peer, HEAD_LIMIT).await {
                        answer(stream, peer, router, limits, stop).await;
                    }
                }
            }
            // In this order, so that the next connection of this address, which the permit admits, does not see the old count.
            drop(counted);
            drop(permit);
        });
    }
    drop(listener);
    // All permits are free once every connection has ended; the limits bound how long that takes.
    let _ = permits.acquire_many(limits.connections).await;
}

async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    router: Router,
    limits: Limits,
    stop: watch::Receiver<bool>,
) {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .keep_alive(limits.keep_alive)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_SIZE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(HEAD_SIZE as u32)
        .keep_alive_interval(PING_INTERVAL);
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Peer(peer));
        router.clone().oneshot(request)
    });
    // hyper waits for the first byte without a limit, because it has to detect the HTTP version.
    let mut stream = BufReader::new(stream);
    let first = tokio::select! {
        first = tokio::time::timeout(HEAD_LIMIT, stream.fill_buf()) => first,
        () = stopped(stop.clone()) => return,
    };
    if !first.is_ok_and(|first| first.is_ok_and(|bytes| !bytes.is_empty())) {
        return tracing::debug!(%peer, "connection closed or timed out before a request");
    }
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return log_end(ended, peer),
        () = stopped(stop) => {}
        () = tokio::time::sleep(limits.max_age) => {}
    }
    connection.as_mut().graceful_shutdown();
    match tokio::time::timeout(limits.grace, connection).await {
        Ok(ended) => log_end(ended, peer),
        Err(_) => tracing::debug!(%peer, "graceful shutdown of a connection timed out"),
    }
}

/// The number of connections of each address.
#[derive(Default)]
struct ConnectionCounts(Mutex<HashMap<IpAddr, u32>>);

impl ConnectionCounts {
    /// Counts a connection for as long as the returned value lives; `None` if the address already has `limit` connections.
    fn add(self: &Arc<Self>, address: IpAddr, limit: u32) -> Option<impl Drop + Send + use<>> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(CountedConnection(Arc::clone(self), address))
    }
}

struct CountedConnection(Arc<ConnectionCounts>, IpAddr);

impl Drop for CountedConnection {
    fn drop(&mut self) {
        let mut counts = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Slot::Occupied(mut count) = counts.entry(self.1) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// Returns the key under which an address is limited: one client usually controls the whole /64 of an IPv6 address.
pub(super) fn rate_key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

fn log_end(ended: Result<(), Box<dyn std::error::Error + Send + Sync>>, peer: SocketAddr) {
    if let Err(error) = ended {
        tracing::debug!(%error, %peer, "connection ended with an error");
    }
}
