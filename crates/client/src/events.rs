//! What happens in the cluster, as a feed that survives the replicas it is read from.
//!
//! What never lives here: printing, and what a row means. Invariants: every row comes once and in order, over all
//! replicas and reconnects, or the feed ends with an error; rows that were trimmed while nobody read are told as a gap,
//! with the index at which a list makes the reader whole again; what is held is one message.
//!
//! ```no_run
//! # async fn example(client: palyra_client::Client) -> Result<(), palyra_client::Error> {
//! use palyra_client::Event;
//! use palyra_proto::journal::v1::StreamEventsRequest;
//!
//! // From now on; a saved `Bookmark` goes on where it stopped: `bookmark.request()`.
//! let request = StreamEventsRequest { action_prefix: "dispatch.".into(), ..Default::default() };
//! let mut events = client.events(request, None);
//! loop {
//!     match events.next().await? {
//!         Event::Rows(rows) => {
//!             for row in rows {
//!                 println!("{} {}", row.action, row.subject);
//!             }
//!             // Saved now, not before: what follows it has not been printed yet.
//!             println!("resume after {}", events.bookmark().expect("there is one after rows"));
//!         }
//!         Event::Gap { rescan, .. } => {
//!             // List what is followed at `client.at_least(rescan)`, and go on after that list's index:
//!             events.go_on_after(rescan);
//!         }
//!         Event::CaughtUp { .. } | Event::Moved { .. } | Event::Lost { .. } => {}
//!     }
//! }
//! # }
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use palyra_proto::common::v1::ReadInfo;
use palyra_proto::journal::v1::stream_events_response::Body;
use palyra_proto::journal::v1::{Cursor, Row, StreamEventsRequest, StreamEventsResponse};
use tokio::time::timeout;

use crate::client::Client;
use crate::error::{Class, E_OUT_OF_ORDER, Error, Failure, classify};
use crate::road::{Open, Road, Tried};
use crate::services::journal;

/// Pause between the heartbeats that are asked for.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// A replica that misses so many heartbeats has gone.
const SILENT_HEARTBEATS: u32 = 3;

/// What happened on the feed.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Rows, oldest first; never empty.
    Rows(Vec<Row>),
    /// Everything that had happened when the feed began was told.
    CaughtUp {
        /// The log index up to which.
        index: u64,
    },
    /// Rows before `first` were trimmed; some were missed.
    Gap {
        /// The first row that is held, with which the feed goes on.
        first: Cursor,
        /// List anew at an index of at least this, and go on after that list with [`Events::go_on_after`].
        rescan: u64,
    },
    /// No replica lets the feed go on now; it keeps trying. Told once for each outage.
    Lost {
        /// Why.
        cause: String,
    },
    /// The feed goes on at another connection.
    Moved {
        /// `host:port` that it is read from now.
        endpoint: String,
        /// Why the former one ended.
        cause: String,
    },
}

/// A place in the feed of one cluster, to be kept: `<cluster id>/<index>.<ordinal>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bookmark {
    /// The cluster.
    pub cluster_id: String,
    /// The last row that was told, or a place behind it up to which nothing was for the reader.
    pub cursor: Cursor,
}

impl Bookmark {
    /// A request that goes on here.
    #[must_use]
    pub fn request(&self) -> StreamEventsRequest {
        StreamEventsRequest {
            after: Some(self.cursor),
            cluster_id: self.cluster_id.clone(),
            ..StreamEventsRequest::default()
        }
    }
}

impl fmt::Display for Bookmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cursor { index, ordinal } = self.cursor;
        write!(f, "{}/{index}.{ordinal}", self.cluster_id)
    }
}

impl FromStr for Bookmark {
    type Err = Error;

    fn from_str(text: &str) -> Result<Bookmark, Error> {
        let parts = || {
            let (cluster_id, cursor) = text.split_once('/')?;
            let (index, ordinal) = cursor.split_once('.')?;
            let cursor = Cursor {
                index: index.parse().ok()?,
                ordinal: ordinal.parse().ok()?,
            };
            crate::ids::is_ulid(cluster_id).then(|| Bookmark {
                cluster_id: cluster_id.to_owned(),
                cursor,
            })
        };
        parts().ok_or_else(|| {
            Error::local(
                Class::Invalid,
                format!("{text:?} is no place in a feed"),
                "write CLUSTER/INDEX.ORDINAL, as it was printed",
            )
        })
    }
}

/// The feed.
#[derive(Debug)]
pub struct Events {
    road: Road,
    request: StreamEventsRequest,
    stream: Option<Box<Open<StreamEventsResponse>>>,
    ready: VecDeque<Event>,
    /// The last row that was told, on whichever replica.
    told: Option<Cursor>,
    heartbeat: Duration,
    read: Option<ReadInfo>,
}

impl Client {
    /// What happens, from where `request` says. It goes on until `patience` passes without any replica being
    /// reachable; without `patience`, for ever.
    #[must_use]
    pub fn events(&self, request: StreamEventsRequest, patience: Option<Duration>) -> Events {
        let mut request = request;
        if request.heartbeat_ms == 0 {
            request.heartbeat_ms = u32::try_from(HEARTBEAT.as_millis()).unwrap_or(u32::MAX);
        }
        Events {
            heartbeat: Duration::from_millis(request.heartbeat_ms.into()),
            road: Road::new(self.clone(), patience),
            request,
            stream: None,
            ready: VecDeque::new(),
            told: None,
            read: None,
        }
    }
}

fn place(cursor: &Cursor) -> (u64, u32) {
    (cursor.index, cursor.ordinal)
}

impl Events {
    /// The next event. Safe to drop and call again.
    ///
    /// # Errors
    /// A refusal; [`Class::Unreachable`] or [`Class::Unavailable`] when patience ended; `E1074` when rows come twice
    /// or out of order.
    pub async fn next(&mut self) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            let Some(open) = &mut self.stream else {
                self.open().await?;
                continue;
            };
            let silent = self.heartbeat * SILENT_HEARTBEATS;
            match timeout(silent, open.stream.message()).await {
                Ok(Ok(Some(message))) => self.take(message)?,
                Ok(Ok(None)) => self.lose("the replica ended the stream".to_owned()).await,
                Err(_) => self.lose("the replica went silent".to_owned()).await,
                Ok(Err(status)) => match classify(&status) {
                    Failure::Answered(error) if !error.retryable => return Err(error),
                    Failure::Answered(error) => self.lose(error.message).await,
                    Failure::Lost { cause, .. } => self.lose(cause).await,
                },
            }
        }
    }

    /// Where the feed goes on; nothing before the first [`Event::CaughtUp`] or, when it began at a cursor of a known
    /// cluster, before the first row.
    #[must_use]
    pub fn bookmark(&self) -> Option<Bookmark> {
        let cursor = self.request.after?;
        let cluster_id = self.request.cluster_id.clone();
        (!cluster_id.is_empty()).then_some(Bookmark { cluster_id, cursor })
    }

    /// The cursor after which the feed goes on; nothing while that is not known.
    #[must_use]
    pub fn cursor(&self) -> Option<Cursor> {
        self.request.after
    }

    /// Where and when the last [`Event::CaughtUp`] was true.
    #[must_use]
    pub fn read(&self) -> Option<ReadInfo> {
        self.read
    }

    /// `host:port` that the feed is read from; nothing between two.
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        self.stream.as_ref().map(|open| open.endpoint.as_str())
    }

    /// Goes on behind everything of a log index, of which the caller knows by another way. Never back.
    pub fn go_on_after(&mut self, index: u64) {
        let ordinal = u32::MAX;
        self.advance(Some(Cursor { index, ordinal }));
        self.told = self.told.max_by_place(self.request.after);
        self.ready.retain(|event| !matches!(event, Event::Rows(_)));
        self.stream = None;
    }

    /// Leaves the present replica; the feed goes on at another one if it can.
    pub fn leave(&mut self, cause: &str) {
        if let Some(open) = self.stream.take() {
            self.road.leave(open, cause);
        }
    }

    fn take(&mut self, message: StreamEventsResponse) -> Result<(), Error> {
        match message.body {
            Some(Body::Rows(rows)) => {
                self.in_order(&rows.rows)?;
                self.advance(rows.cursor.or(self.told));
                if !rows.rows.is_empty() {
                    self.road.went_well();
                    self.ready.push_back(Event::Rows(rows.rows));
                }
            }
            Some(Body::CaughtUp(caught_up)) => {
                self.advance(caught_up.cursor);
                self.request.cluster_id = caught_up.cluster_id;
                self.read = caught_up.read;
                let index = caught_up.read.map_or(0, |read| read.index);
                self.ready.push_back(Event::CaughtUp { index });
            }
            Some(Body::Heartbeat(heartbeat)) => {
                self.road.went_well();
                self.advance(heartbeat.cursor);
            }
            Some(Body::Gap(gap)) => {
                let (first, rescan) = (gap.first.unwrap_or_default(), gap.rescan);
                self.ready.push_back(Event::Gap { first, rescan });
            }
            // What this release does not know is none of its business.
            None => {}
        }
        Ok(())
    }

    /// Rows must rise over everything that was told before.
    fn in_order(&mut self, rows: &[Row]) -> Result<(), Error> {
        for row in rows {
            let cursor = row.cursor.unwrap_or_default();
            let before = self.told.max_by_place(self.request.after);
            if let Some(before) = before.filter(|before| place(&cursor) <= place(before)) {
                let message = format!(
                    "the feed told {}.{} after {}.{}: rows must rise",
                    cursor.index, cursor.ordinal, before.index, before.ordinal
                );
                let next =
                    "report it with the logs of the replicas; palyra journal verify checks the record itself";
                return Err(Error::new(Class::Internal, E_OUT_OF_ORDER, message).with_next(next));
            }
            self.told = Some(cursor);
        }
        Ok(())
    }

    /// Never back: a replica's word that nothing happened may be older than the last row.
    fn advance(&mut self, to: Option<Cursor>) {
        self.request.after = self.request.after.max_by_place(to);
        self.request.from_first &= self.request.after.is_none();
    }

    async fn lose(&mut self, cause: String) {
        if let Some(open) = self.stream.take() {
            self.road.lose(open, cause).await;
        }
    }

    async fn open(&mut self) -> Result<(), Error> {
        let request = self.request.clone();
        let tried = self
            .road
            .open(|channel| async move { journal(channel).stream_events(request).await })
            .await?;
        match tried {
            Tried::Open { open, cause } => {
                if let Some(cause) = cause {
                    let endpoint = open.endpoint.clone();
                    self.ready.push_back(Event::Moved { endpoint, cause });
                }
                self.stream = Some(open);
            }
            Tried::Lost { cause } => self.ready.push_back(Event::Lost { cause }),
            Tried::Again => {}
        }
        Ok(())
    }
}

/// The later of two places, where there may be none.
trait Later {
    fn max_by_place(self, other: Self) -> Self;
}

impl Later for Option<Cursor> {
    fn max_by_place(self, other: Option<Cursor>) -> Option<Cursor> {
        match (self, other) {
            (Some(one), Some(two)) => Some(if place(&one) >= place(&two) { one } else { two }),
            (one, two) => one.or(two),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::{ConnectOptions, enrol_recording};
    use crate::pool::{Endpoints, Pool};
    use palyra_pki::tls::SeenServer;
    use palyra_proto::journal::v1::{EventHeartbeat, EventRows, Gap};

    fn events(request: StreamEventsRequest) -> Events {
        let tls = enrol_recording(SeenServer::new()).unwrap();
        let pool = Pool::new(
            &Endpoints::parse("127.0.0.1:1").unwrap(),
            tls,
            ConnectOptions::default(),
        );
        Client::over(pool).events(request, Some(Duration::ZERO))
    }

    fn at(index: u64, ordinal: u32) -> Cursor {
        Cursor { index, ordinal }
    }

    fn rows(cursors: &[Cursor], up_to: Cursor) -> StreamEventsResponse {
        let row = |cursor: &Cursor| Row {
            cursor: Some(*cursor),
            ..Row::default()
        };
        let rows = EventRows {
            rows: cursors.iter().map(row).collect(),
            cursor: Some(up_to),
        };
        StreamEventsResponse {
            body: Some(Body::Rows(rows)),
        }
    }

    fn heartbeat(cursor: Cursor) -> StreamEventsResponse {
        let heartbeat = EventHeartbeat { cursor: Some(cursor) };
        StreamEventsResponse {
            body: Some(Body::Heartbeat(heartbeat)),
        }
    }

    #[test]
    fn heartbeats_move_the_cursor_and_nothing_moves_it_back() {
        let mut events = events(StreamEventsRequest {
            from_first: true,
            ..StreamEventsRequest::default()
        });
        events.take(rows(&[at(3, 0), at(3, 1)], at(5, 0))).unwrap();
        assert_eq!(events.cursor(), Some(at(5, 0)), "as far as was looked");
        assert!(!events.request.from_first, "counts until there is a cursor");
        events.take(heartbeat(at(9, 2))).unwrap();
        events.take(heartbeat(at(7, 0))).unwrap();
        assert_eq!(events.cursor(), Some(at(9, 2)));
    }

    #[test]
    fn a_row_that_comes_twice_or_late_ends_the_feed() {
        for again in [at(3, 1), at(3, 0), at(2, 9)] {
            let mut events = events(StreamEventsRequest::default());
            events.take(rows(&[at(3, 0), at(3, 1)], at(3, 1))).unwrap();
            let error = events.take(rows(&[again], again)).unwrap_err();
            assert_eq!((error.code.as_str(), error.retryable), (E_OUT_OF_ORDER, false));
        }
        let mut events = events(StreamEventsRequest {
            after: Some(at(4, 0)),
            ..StreamEventsRequest::default()
        });
        assert!(
            events.take(rows(&[at(4, 0)], at(4, 0))).is_err(),
            "the first one, too"
        );
    }

    #[tokio::test]
    async fn after_a_gap_the_feed_goes_on_behind_the_list() {
        let mut events = events(StreamEventsRequest {
            after: Some(at(1, 0)),
            ..StreamEventsRequest::default()
        });
        let gap = Gap {
            first: Some(at(8, 0)),
            rescan: 12,
        };
        events
            .take(StreamEventsResponse {
                body: Some(Body::Gap(gap)),
            })
            .unwrap();
        events.take(rows(&[at(8, 0)], at(8, 0))).unwrap();
        assert_eq!(
            events.next().await.unwrap(),
            Event::Gap {
                first: at(8, 0),
                rescan: 12
            }
        );
        events.go_on_after(12);
        assert_eq!(events.cursor(), Some(at(12, u32::MAX)));
        assert!(
            events.ready.is_empty(),
            "what the list has shown is not told again"
        );
        assert!(events.take(rows(&[at(12, 3)], at(12, 3))).is_err());
        assert!(events.take(rows(&[at(13, 0)], at(13, 0))).is_ok());
    }

    #[test]
    fn a_bookmark_is_a_text() {
        let text = "01ARZ3NDEKTSV4RRFFQ69G5FAV/81.2";
        let bookmark: Bookmark = text.parse().unwrap();
        assert_eq!(bookmark.to_string(), text);
        assert_eq!(bookmark.request().after, Some(at(81, 2)));
        for bad in ["81.2", "x/81.2", "01ARZ3NDEKTSV4RRFFQ69G5FAV/81", ""] {
            assert!(bad.parse::<Bookmark>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn patience_ends() {
        let error = events(StreamEventsRequest::default()).next().await.unwrap_err();
        assert_eq!(error.class, Class::Unreachable);
    }
}
