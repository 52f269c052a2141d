//! A connection whose end is seen the moment that the kernel tells it.
//!
//! What never lives here: what is said on it. The connection is the agent's in everything else: mutual TLS, HTTP/2,
//! the same signs of life. Nothing of HTTP/2 decides when it counts as closed: the end of the stream of bytes does.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use palyra_client::{ConnectOptions, Connection};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;

/// For TCP, TLS and HTTP/2 together.
const CONNECT: Duration = Duration::from_secs(10);

/// When a connection ended; nothing while it lives.
pub(crate) type Closed = watch::Receiver<Option<Instant>>;

/// The bytes of a connection, and what to tell when they end.
struct Watched<S> {
    inner: S,
    tell: watch::Sender<Option<Instant>>,
}

impl<S> Watched<S> {
    fn ended(&self) {
        self.tell.send_if_modified(|at| {
            let first = at.is_none();
            at.get_or_insert_with(Instant::now);
            first
        });
    }
}

impl<S> Drop for Watched<S> {
    fn drop(&mut self) {
        self.ended();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        if let Poll::Ready(done) = &read
            && (done.is_err() || buf.filled().len() == before)
        {
            self.ended();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, buf);
        if matches!(written, Poll::Ready(Err(_))) {
            self.ended();
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Connects to `address` (`host:port`, the host an IP address). The error is the cause, for people.
pub(crate) async fn dial(address: &str, tls: &Arc<ClientConfig>) -> Result<(Connection, Closed), String> {
    let connecting = timeout(CONNECT, open(address, tls));
    connecting
        .await
        .map_err(|_| format!("no connection within {} s", CONNECT.as_secs()))?
}

async fn open(address: &str, tls: &Arc<ClientConfig>) -> Result<(Connection, Closed), String> {
    let text = |error: io::Error| error.to_string();
    let tcp = TcpStream::connect(address).await.map_err(text)?;
    tcp.set_nodelay(true).map_err(text)?;
    let host = tcp.peer_addr().map_err(text)?.ip();
    let connector = TlsConnector::from(Arc::clone(tls));
    let stream = connector
        .connect(ServerName::from(host), tcp)
        .await
        .map_err(text)?;
    let (tell, closed) = watch::channel(None);
    let watched = Watched { inner: stream, tell };
    let options = ConnectOptions::default();
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| error.to_string())?
        .http2_keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .keep_alive_while_idle(true);
    let slot = Arc::new(Mutex::new(Some(TokioIo::new(watched))));
    let once = tower::service_fn(move |_| {
        let taken = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = || io::Error::new(io::ErrorKind::NotConnected, "the connection ended");
        std::future::ready(taken.ok_or_else(ended))
    });
    let channel = endpoint
        .connect_with_connector(once)
        .await
        .map_err(|error| error.to_string())?;
    Ok((Connection::Grpc(channel), closed))
}

/// Waits until a connection has ended. Answers when that was.
pub(crate) async fn end_of(closed: &Closed) -> Instant {
    let mut closed = closed.clone();
    loop {
        if let Some(at) = *closed.borrow_and_update() {
            return at;
        }
        if closed.changed().await.is_err() {
            return closed.borrow().unwrap_or_else(Instant::now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn the_end_of_the_bytes_is_the_end() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let (tell, closed) = watch::channel(None);
        let mut watched = Watched { inner: ours, tell };
        theirs.write_all(b"x").await.unwrap();
        let mut byte = [0u8; 1];
        watched.read_exact(&mut byte).await.unwrap();
        assert_eq!(*closed.borrow(), None);
        drop(theirs);
        assert_eq!(watched.read(&mut byte).await.unwrap(), 0);
        let at = (*closed.borrow()).unwrap();
        drop(watched);
        assert_eq!(end_of(&closed).await, at, "the first sign counts");
    }
}
