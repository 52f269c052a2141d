//! A stream that can be shut from outside: the requests of an append stream end when their answers are let go of.
//!
//! openraft draws the requests of all append streams to one peer from one place. It takes a stream for ended when it
//! lets go of its answers, but the transport may still hold the requests and ask for the next one: that one takes
//! entries away from the stream after it, nobody waits for its answer, and the leader waits for ever for a peer that
//! was never asked (`jepsen scenario palyra-requests-after-the-end`). So requests end with the answers, at once.
//!
//! Invariant: once a [`Valve`] is gone, nothing more comes out of its stream, whoever holds it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use futures::Stream;
use futures::stream::BoxStream;

struct Inside<T> {
    /// Nothing once it is shut.
    stream: Option<BoxStream<'static, T>>,
    /// Who waits for the next item.
    waits: Option<Waker>,
}

/// Shuts its stream when it is dropped.
pub(crate) struct Valve<T>(Arc<Mutex<Inside<T>>>);

/// The stream behind a valve.
pub(crate) struct Behind<T>(Arc<Mutex<Inside<T>>>);

/// Puts a valve before a stream.
pub(crate) fn valve<T>(stream: BoxStream<'static, T>) -> (Valve<T>, Behind<T>) {
    let inside = Arc::new(Mutex::new(Inside {
        stream: Some(stream),
        waits: None,
    }));
    (Valve(Arc::clone(&inside)), Behind(inside))
}

impl<T> Drop for Valve<T> {
    fn drop(&mut self) {
        let (stream, waits) = {
            let mut inside = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            (inside.stream.take(), inside.waits.take())
        };
        // Outside of the lock: what the stream holds is not ours to know.
        drop(stream);
        if let Some(waker) = waits {
            waker.wake();
        }
    }
}

impl<T> Stream for Behind<T> {
    type Item = T;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut inside = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = inside.stream.as_mut() else {
            return Poll::Ready(None);
        };
        let polled = stream.as_mut().poll_next(cx);
        inside.waits = polled.is_pending().then(|| cx.waker().clone());
        polled
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use futures::stream;

    use super::*;

    #[tokio::test]
    async fn what_is_behind_an_open_valve_comes_out() {
        let (open, behind) = valve(stream::iter(1..=3).boxed());
        assert_eq!(behind.collect::<Vec<_>>().await, vec![1, 2, 3]);
        drop(open);
    }

    #[tokio::test]
    async fn nothing_comes_out_of_a_shut_one() {
        let (open, mut behind) = valve(stream::iter(1..=3).boxed());
        assert_eq!(behind.next().await, Some(1));
        drop(open);
        assert_eq!(behind.next().await, None);
        assert_eq!(behind.next().await, None);
    }

    #[tokio::test]
    async fn who_waits_is_told_and_what_the_stream_held_is_let_go() {
        let held = Arc::new(());
        let inner = Arc::clone(&held);
        let endless = stream::pending::<u8>().inspect(move |_| drop(Arc::clone(&inner)));
        let (open, mut behind) = valve(endless.boxed());
        let shut = async {
            tokio::task::yield_now().await;
            drop(open);
        };
        let ((), next) = futures::join!(shut, behind.next());
        assert_eq!(next, None);
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
