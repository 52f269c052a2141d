//! A TLS stream that remembers why it broke.
//!
//! In TLS 1.3 a server's refusal of our certificate comes after the handshake, and whoever happens to read at
//! that moment gets it: often the task behind the channel, and never the call that then fails. Here the
//! reason is kept for it.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The TLS failure that ended a stream, if one did.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastWord(Arc<Mutex<Option<rustls::Error>>>);

impl LastWord {
    /// What to say of a stream that is over.
    pub(crate) fn error(&self) -> io::Error {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Some(tls) => io::Error::new(io::ErrorKind::InvalidData, tls),
            None => io::Error::new(io::ErrorKind::NotConnected, "the connection ended"),
        }
    }

    fn note(&self, error: &io::Error) {
        if let Some(tls) = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(tls.clone());
        }
    }
}

/// The stream.
pub(crate) struct Watched<S> {
    inner: S,
    last_word: LastWord,
}

impl<S> Watched<S> {
    /// Watches over `inner`; what ends it is in `last_word` then.
    pub(crate) fn new(inner: S, last_word: LastWord) -> Self {
        Self { inner, last_word }
    }

    fn noted<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &polled {
            self.last_word.note(error);
        }
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.noted(polled)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.noted(polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.noted(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
