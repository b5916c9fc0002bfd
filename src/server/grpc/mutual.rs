//! Accepts mutual-TLS connections for tonic, because tonic cannot replace its TLS configuration while it serves.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::server::connections::{Tls, next};

/// Maximum number of concurrent handshakes; further connections wait in the listen backlog. Each handshake costs memory, and
/// its client may stay silent.
const MAX_HANDSHAKES: usize = 1024;
/// Time limit of a handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Yields connections whose handshake is complete, until the stream is dropped. Slow handshakes do not delay others.
pub(super) fn connections(listener: TcpListener, tls: Tls) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (sender, stream) = mpsc::channel(1);
    tokio::spawn(async move {
        let permits = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        loop {
            let (permit, stream, peer) = tokio::select! {
                () = sender.closed() => return,
                next = next(&listener, &permits) => next,
            };
            let (tls, sender) = (tls.clone(), sender.clone());
            tokio::spawn(async move {
                if let Some(stream) = tls.accept(stream, peer, HANDSHAKE_LIMIT).await {
                    // Sending fails only after the listener is closed; the connection is then dropped.
                    let _ = sender.send(Ok(stream)).await;
                }
                drop(permit);
            });
        }
    });
    ReceiverStream::new(stream)
}
