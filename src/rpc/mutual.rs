//! Connections with mutual TLS for tonic, whose own TLS cannot be exchanged while it serves.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::connections::{Tls, next};

/// Handshakes at once; more wait with the system until one ends. Each costs some memory and a caller who may say nothing.
const HANDSHAKES: usize = 1024;
/// How long a handshake may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Connections whose handshake is done, until the stream is dropped. A slow handshake holds up no other one.
pub(super) fn connections(listener: TcpListener, tls: Tls) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (sender, stream) = mpsc::channel(1);
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let (place, stream, peer) = tokio::select! {
                () = sender.closed() => return,
                next = next(&listener, &places) => next,
            };
            let (tls, sender) = (tls.clone(), sender.clone());
            tokio::spawn(async move {
                if let Some(stream) = tls.accept(stream, peer, LIMIT).await {
                    // Dropped if nobody takes it any more: the listener is closed.
                    let _ = sender.send(Ok(stream)).await;
                }
                drop(place);
            });
        }
    });
    ReceiverStream::new(stream)
}
