//! The run's one clock, and the history as it happens.
//!
//! Everything runs under one kernel, so one monotonic clock orders every event of a run, and real-time order needs no
//! synchronisation of clocks. Invariants: an invocation is written before the request leaves, a completion after the
//! answer has come; a process that ended in `info` is never used again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use palyra_jepsen_check::history::{Answer, Pending};
use palyra_jepsen_check::{History, Kind, Recorder};
use serde_json::Value;

/// Nanoseconds since the run began.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Begins now.
    #[must_use]
    pub fn begin() -> Clock {
        Clock(Instant::now())
    }

    /// Now.
    #[must_use]
    pub fn nanos(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Now, as a duration.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    /// The moment that lies so long after the beginning.
    #[must_use]
    pub fn at(&self, after: Duration) -> tokio::time::Instant {
        (self.0 + after).into()
    }
}

/// The history, shared by all who write it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Record {
    clock: Clock,
    recorder: Arc<Mutex<Recorder>>,
}

impl Record {
    /// An empty one.
    #[must_use]
    pub fn new(clock: Clock) -> Record {
        Record {
            clock,
            recorder: Arc::default(),
        }
    }

    /// The clock that its times are of.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock
    }

    fn lock(&self) -> MutexGuard<'_, Recorder> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client that writes down what it asks, one operation at a time.
    #[must_use]
    pub fn process(&self) -> Process {
        Process {
            id: self.lock().process(),
            record: self.clone(),
        }
    }

    /// The nemesis did something, or something happened that no client asked for.
    pub fn fault(&self, f: &str, value: Value) {
        let mut recorder = self.lock();
        // Under the lock, so that times rise with the places.
        let now = self.clock.nanos();
        recorder.fault(now, f, value);
    }

    /// What was written down so far.
    #[must_use]
    pub fn history(&self) -> History {
        self.lock().history().clone()
    }

    /// How many events were written down.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().history().events.len()
    }

    /// Whether nothing was written down.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Looks at what was written after the first `from` events.
    pub fn since<T>(&self, from: usize, look: impl FnOnce(&[palyra_jepsen_check::Event]) -> T) -> T {
        let recorder = self.lock();
        look(recorder.history().events.get(from..).unwrap_or_default())
    }
}

/// A client in the history.
#[derive(Debug)]
pub struct Process {
    id: u64,
    record: Record,
}

/// An operation that is under way. Dropped without an end it counts as unknown, and its process must not go on.
#[derive(Debug)]
#[must_use = "an operation that is not ended counts as unknown"]
pub struct Call(Pending);

/// How an operation ended.
#[derive(Clone, Debug)]
pub struct End {
    kind: Kind,
    answer: Answer,
}

impl End {
    /// It took effect. Of a read: this is what it saw.
    #[must_use]
    pub fn ok(value: Value) -> End {
        End::with(Kind::Ok, value, None)
    }

    /// It had no effect and never will.
    #[must_use]
    pub fn fail(value: Value, why: impl Into<String>) -> End {
        End::with(Kind::Fail, value, Some(why.into()))
    }

    /// Nobody knows.
    #[must_use]
    pub fn info(value: Value, why: impl Into<String>) -> End {
        End::with(Kind::Info, value, Some(why.into()))
    }

    /// What a call that failed comes to.
    #[must_use]
    pub fn missed(kind: Kind, value: Value, why: impl Into<String>) -> End {
        End::with(kind, value, Some(why.into()))
    }

    fn with(kind: Kind, value: Value, error: Option<String>) -> End {
        let answer = Answer {
            value,
            error,
            ..Answer::default()
        };
        End { kind, answer }
    }

    /// The same, at a log index; 0 is none.
    #[must_use]
    pub fn at(mut self, rev: u64) -> End {
        self.answer.rev = (rev != 0).then_some(rev);
        self
    }

    /// Which of the three it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl Process {
    /// A call goes out now, to a replica, with a request id when it is a change.
    pub fn invoke(&mut self, f: &str, value: Value, node: Option<&str>, request: Option<&str>) -> Call {
        let mut recorder = self.record.lock();
        let now = self.record.clock.nanos();
        let (node, request) = (node.map(str::to_owned), request.map(str::to_owned));
        Call(recorder.invoke(now, self.id, f, value, node, request))
    }

    /// It has ended. After an unknown end this becomes another process.
    pub fn end(&mut self, call: Call, end: End) -> Kind {
        let mut recorder = self.record.lock();
        let now = self.record.clock.nanos();
        recorder.complete(now, &call.0, end.kind, end.answer);
        if end.kind == Kind::Info {
            self.id = recorder.process();
        }
        end.kind
    }

    /// Another client in the same history.
    #[must_use]
    pub fn another(&self) -> Process {
        self.record.process()
    }

    /// Its number at present.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_process_is_never_used_again_after_an_unknown_end() {
        let record = Record::new(Clock::begin());
        let mut process = record.process();
        let first = process.id();
        let call = process.invoke("write", json!({"key": "a"}), Some("r1"), Some("id"));
        assert_eq!(process.end(call, End::ok(json!({})).at(7)), Kind::Ok);
        assert_eq!(process.id(), first);
        let call = process.invoke("write", json!({"key": "a"}), Some("r1"), None);
        assert_eq!(process.end(call, End::info(json!({}), "lost")), Kind::Info);
        assert_ne!(process.id(), first);
        let history = record.history();
        assert_eq!(history.ops().len(), 2);
        assert_eq!(history.ops()[0].rev(), Some(7));
        assert!(history.events.windows(2).all(|pair| pair[0].time <= pair[1].time));
    }
}
