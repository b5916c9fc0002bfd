//! HTTP within limits: so many connections, none of them for long; and the drain.

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

use crate::connections::{Tls, next, stopped};

/// How long TLS and the head of a request may take.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// Most bytes of a request's head.
const HEAD_SIZE: usize = 16 * 1024;
/// Requests at once on one connection of HTTP/2.
const STREAMS: u32 = 100;
/// How often a silent HTTP/2 connection is asked whether it is still there.
const ALIVE: Duration = Duration::from_secs(30);

/// What a listener grants.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Connections at once; more wait with the system until one ends.
    pub(super) places: u32,
    /// Connections of one address at once; more are closed.
    pub(super) of_one_address: u32,
    /// After so long a connection is asked to end: whoever stays makes room for others.
    pub(super) age: Duration,
    /// How long what was begun by then may take.
    pub(super) grace: Duration,
    /// Whether a connection of HTTP/1.1 takes more than one request.
    pub(super) keep_alive: bool,
}

/// Who is at the other end of the connection.
#[derive(Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

/// Serves until `stop` is true, then lets the requests in flight be answered.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    router: Router,
    limits: Limits,
    stop: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(limits.places as usize));
    let addresses = Arc::new(Addresses::default());
    loop {
        let (place, stream, peer) = tokio::select! {
            () = stopped(stop.clone()) => break,
            next = next(&listener, &places) => next,
        };
        let Some(of_address) = addresses.enter(holder(peer.ip()), limits.of_one_address) else {
            tracing::debug!(%peer, "an address has too many connections");
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
            // In this order: whoever is let in by the free place must not be counted beside the one that left it.
            drop(of_address);
            drop(place);
        });
    }
    drop(listener);
    // All places are free once every connection has ended, which none can put off beyond its limit.
    let _ = places.acquire_many(limits.places).await;
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
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEAD_SIZE as u32)
        .keep_alive_interval(ALIVE);
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Peer(peer));
        router.clone().oneshot(request)
    });
    // The library waits for the first byte as long as it takes: which version of HTTP it is to be is not known before.
    let mut stream = BufReader::new(stream);
    let first = tokio::select! {
        first = tokio::time::timeout(HEAD_LIMIT, stream.fill_buf()) => first,
        () = stopped(stop.clone()) => return,
    };
    if !first.is_ok_and(|first| first.is_ok_and(|bytes| !bytes.is_empty())) {
        return tracing::debug!(%peer, "nothing was asked");
    }
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return tell(ended, peer),
        () = stopped(stop) => {}
        () = tokio::time::sleep(limits.age) => {}
    }
    connection.as_mut().graceful_shutdown();
    match tokio::time::timeout(limits.grace, connection).await {
        Ok(ended) => tell(ended, peer),
        Err(_) => tracing::debug!(%peer, "a connection took too long"),
    }
}

/// The connections of each address.
#[derive(Default)]
struct Addresses(Mutex<HashMap<IpAddr, u32>>);

impl Addresses {
    /// One more connection, as long as the value lives; none if there are so many.
    fn enter(self: &Arc<Self>, address: IpAddr, most: u32) -> Option<impl Drop + Send + use<>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(address).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(OfAddress(Arc::clone(self), address))
    }
}

struct OfAddress(Arc<Addresses>, IpAddr);

impl Drop for OfAddress {
    fn drop(&mut self) {
        let mut all = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Slot::Occupied(mut count) = all.entry(self.1) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// Whoever has an IPv6 address has all of its /64.
pub(super) fn holder(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

fn tell(ended: Result<(), Box<dyn std::error::Error + Send + Sync>>, peer: SocketAddr) {
    if let Err(error) = ended {
        tracing::debug!(%error, %peer, "a connection ended early");
    }
}
