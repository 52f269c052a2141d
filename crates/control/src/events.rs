//! The feed for nodes and operators: what happened, from a cursor on, as far as the reader may see it.
//!
//! What never lives here: streams (the server's), and who may see what (`palyra_state::journal::audience`).
//! Invariants: the rows that a reader gets rise strictly and are the same from every replica; a reader is told the
//! cursor up to which everything was looked at, also when nothing was for it; nothing is read ahead of the reader, and
//! no view of the state outlives one step; each step is admitted anew, and a replica that may have missed something
//! tells its readers to go elsewhere instead of being quiet.

mod refused;

use std::time::Duration;

use palyra_pki::PeerIdentity;
use palyra_platform as platform;
use palyra_state::access::Role;
use palyra_state::journal::{self, Cursor, Row, Rows, audience};
use palyra_state::{Id, meta};
use prost::Message as _;

pub use refused::FeedRefusal;

use crate::caller::Caller;
use crate::control::{Control, ReadInfo};
use crate::error::{Error, Refusal};
use crate::limits::{EVENT_BYTES, TAIL_ROWS};
use crate::readers::{Filter, Seated};
use crate::selector;

/// Rows that may be looked through without a word to the reader.
const QUIET_ROWS: usize = 4_096;
/// Pause between heartbeats when none is asked for, and the bounds of what may be.
const HEARTBEAT: Duration = Duration::from_secs(10);
const HEARTBEAT_MIN: Duration = Duration::from_secs(1);
const HEARTBEAT_MAX: Duration = Duration::from_secs(60);

/// What to read.
#[derive(Debug, Clone, Default)]
pub struct EventsRequest {
    /// After this cursor; none: from now on, or from the first row held.
    pub after: Option<Cursor>,
    /// Without `after`, from the first row held.
    pub from_first: bool,
    /// The cluster that `after` is of; empty: not compared.
    pub cluster_id: String,
    /// Only actions that begin so.
    pub action_prefix: String,
    /// Only rows of this subject; empty: of any.
    pub subject: String,
    /// Only rows about this device; empty: about any. Must be empty for a node.
    pub device: String,
    /// Pause between heartbeats in milliseconds; 0: ten seconds.
    pub heartbeat_ms: u64,
    /// The connection that carries the stream; 0 when it is not known.
    pub connection: u64,
}

/// What a reader gets.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Rows, at least one, and the cursor after which to go on.
    Rows {
        /// In order.
        rows: Vec<Row>,
        /// Everything up to here was looked at.
        cursor: Cursor,
    },
    /// Everything that had happened when the stream began was told.
    CaughtUp {
        /// Up to here.
        cursor: Cursor,
        /// How fresh it is.
        read: ReadInfo,
    },
    /// Nothing for the reader happened up to here.
    Heartbeat {
        /// Here.
        cursor: Cursor,
    },
    /// Rows after the reader's cursor were trimmed.
    Gap {
        /// The first row held, with which the stream goes on.
        first: Cursor,
        /// Index at which to list things anew.
        rescan: u64,
    },
}

/// Who reads.
#[derive(Debug)]
enum Who {
    Node { peer: PeerIdentity, device_id: Id },
    Operator { peer: PeerIdentity, role: Role },
}

/// A reader of the feed.
#[derive(Debug)]
pub struct Events {
    control: Control,
    who: Who,
    filter: Filter,
    seated: Seated,
    at: Cursor,
    heartbeat: Duration,
    /// There may be rows behind `at`.
    behind: bool,
    caught_up: bool,
    /// Rows that were looked through since the reader was told something.
    quiet: usize,
    over: bool,
}

impl Control {
    /// Opens the feed for a node: what is about it, and what every node must know.
    ///
    /// # Errors
    /// What admission refuses, [`FeedRefusal`], and [`Error::Busy`].
    pub async fn node_events(
        &self,
        peer: &PeerIdentity,
        device_id: &str,
        request: EventsRequest,
    ) -> Result<Events, Error> {
        let Caller::Node { device_id, .. } = self.admit_node_as(peer, device_id)? else {
            return Err(Error::Internal(
                "a node's admission answered another caller".to_owned(),
            ));
        };
        if !request.device.is_empty() {
            let next = "leave it empty: a node sees its own rows";
            return Err(Error::invalid("device", "a node names a device", next));
        }
        let who = Who::Node {
            peer: peer.clone(),
            device_id,
        };
        self.open_events(who, request).await
    }

    /// Opens the feed for an operator.
    ///
    /// # Errors
    /// What admission refuses, [`FeedRefusal`], and [`Error::Busy`].
    pub async fn operator_events(
        &self,
        peer: &PeerIdentity,
        request: EventsRequest,
    ) -> Result<Events, Error> {
        let role = self.reader_role(peer)?;
        let peer = peer.clone();
        self.open_events(Who::Operator { peer, role }, request).await
    }

    fn reader_role(&self, peer: &PeerIdentity) -> Result<Role, Error> {
        match self.admit_operator(peer, Role::Viewer)? {
            Caller::Operator { role, .. } => Ok(role),
            _ => Err(Error::Internal(
                "an operator's admission answered another caller".to_owned(),
            )),
        }
    }

    async fn open_events(&self, who: Who, request: EventsRequest) -> Result<Events, Error> {
        let own = self.cluster_id().to_string();
        if !request.cluster_id.is_empty() && request.cluster_id != own {
            let found = request.cluster_id.chars().take(64).collect();
            return Err(FeedRefusal::Elsewhere { found, expected: own }.into());
        }
        let view = self.replica().view();
        let device = match request.device.as_str() {
            "" => None,
            named => Some(selector::device(&view, named)?),
        };
        drop(view);
        let filter = Filter {
            action_prefix: request.action_prefix,
            subject: request.subject,
            device,
        };
        let (identity, node) = match &who {
            Who::Node { device_id, .. } => (device_id.to_string(), Some(*device_id)),
            Who::Operator { peer, .. } => (peer.id.id().to_owned(), None),
        };
        if let Some(after) = request.after {
            self.reached(after).await?;
        }
        // From here on a row is either in the view below or noted in the seat.
        let seated = self
            .readers()
            .enter(identity, node, filter.clone(), request.connection)?;
        let view = self.replica().view();
        let at = match request.after {
            // Planted: a reader goes on one entry too late.
            Some(after) if palyra_fault::planted("resume-off-by-one") => Cursor {
                index: after.index + 1,
                ..after
            },
            Some(after) => after,
            None if request.from_first => journal::before_first(&view),
            None => end_of(&view),
        };
        let heartbeat = match request.heartbeat_ms {
            0 => HEARTBEAT,
            asked => Duration::from_millis(asked).clamp(HEARTBEAT_MIN, HEARTBEAT_MAX),
        };
        Ok(Events {
            control: self.clone(),
            who,
            filter,
            seated,
            at,
            heartbeat,
            behind: true,
            caught_up: false,
            quiet: 0,
            over: false,
        })
    }

    /// Sees to it that this replica has applied what a reader has seen at another.
    async fn reached(&self, after: Cursor) -> Result<(), Error> {
        let applied = || meta(&self.replica().view()).index;
        if after.index <= applied() {
            return Ok(());
        }
        // What another replica has told is committed: after the leader's word it is here, or it never was.
        let confirmed = self.barrier().await.is_ok();
        let applied = applied();
        if after.index <= applied {
            return Ok(());
        }
        let cursor = format!("{}.{}", after.index, after.ordinal);
        Err(if confirmed {
            FeedRefusal::Beyond { cursor, applied }.into()
        } else {
            FeedRefusal::NotYet { cursor, applied }.into()
        })
    }
}

/// The cursor behind everything that a view holds.
fn end_of(view: &dyn palyra_state::Read) -> Cursor {
    meta(view).journal_last.max(journal::before_first(view))
}

impl Events {
    /// The next event. After an error there is none; `None` when this replica stops. Safe to cancel.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        if self.over {
            return None;
        }
        self.seated.seat.asks();
        let next = self.step().await;
        match &next {
            Some(Ok(_)) => self.seated.seat.handed(),
            _ => self.over = true,
        }
        next
    }

    /// Everything up to here was looked at.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        self.at
    }

    async fn step(&mut self) -> Option<Result<Event, Error>> {
        loop {
            if self.seated.seat.has_stalled() {
                return Some(Err(FeedRefusal::Stalled.into()));
            }
            if self.control.is_stopping() {
                return None;
            }
            // Anew each time: whoever was shut out meanwhile, or has another role now, reads accordingly.
            if let Err(error) = self.admit() {
                return Some(Err(error));
            }
            if self.behind {
                if let Some(event) = self.look() {
                    return Some(Ok(event));
                }
                // A long way through rows of others must not keep this thread.
                tokio::task::yield_now().await;
                continue;
            }
            if let Some(event) = self.wait().await {
                return Some(Ok(event));
            }
        }
    }

    fn admit(&mut self) -> Result<(), Error> {
        match &mut self.who {
            Who::Node { peer, .. } => self.control.admit_node(peer).map(drop),
            Who::Operator { peer, role } => {
                *role = self.control.reader_role(peer)?;
                Ok(())
            }
        }
    }

    /// One step through the journal.
    fn look(&mut self) -> Option<Event> {
        let view = self.control.replica().view();
        let rows = match journal::rows_after(&view, self.at, TAIL_ROWS) {
            Rows::Gap { first } => {
                self.at = journal::before_first(&view);
                self.caught_up = false;
                let rescan = meta(&view).index;
                return Some(Event::Gap { first, rescan });
            }
            Rows::Rows(rows) => rows,
        };
        if rows.is_empty() {
            self.behind = false;
            self.at = self.at.max(end_of(&view));
            if std::mem::replace(&mut self.caught_up, true) {
                return None;
            }
            let read = self.control.read_info(meta(&view).index);
            let cursor = self.at;
            return Some(Event::CaughtUp { cursor, read });
        }
        drop(view);
        let seen = self.shown(rows);
        let cursor = self.at;
        if !seen.is_empty() {
            self.quiet = 0;
            return Some(Event::Rows { rows: seen, cursor });
        }
        if self.quiet < QUIET_ROWS {
            return None;
        }
        self.quiet = 0;
        Some(Event::Heartbeat { cursor })
    }

    /// What the reader sees of these rows; as many as one message holds.
    fn shown(&mut self, rows: Vec<Row>) -> Vec<Row> {
        let mut seen = Vec::new();
        let mut bytes = 0;
        for row in rows {
            if let Some(shown) = self.see(&row) {
                let size = shown.encoded_len();
                if bytes + size > EVENT_BYTES && !seen.is_empty() {
                    break;
                }
                bytes += size;
                seen.push(shown);
            }
            self.at = row.cursor();
            self.quiet += 1;
        }
        seen
    }

    fn see(&self, row: &Row) -> Option<Row> {
        if !self.filter.wants(row) {
            return None;
        }
        match &self.who {
            Who::Node { device_id, .. } => audience::for_node(row, *device_id),
            Who::Operator {
                role: Role::Viewer, ..
            } => Some(audience::for_viewer(row)),
            Who::Operator { .. } => Some(row.clone()),
        }
    }

    /// Waits until something was noted, or it is time for a heartbeat.
    async fn wait(&mut self) -> Option<Event> {
        let (waiting, looked_at) = self.control.readers().take(&self.seated.seat);
        if let Some(before) = waiting {
            // What lies between was looked at by the follower of the feed, and is not for this reader.
            self.at = self.at.max(before);
            self.behind = true;
            return None;
        }
        self.at = self.at.max(looked_at);
        let mut stopping = self.control.stopping();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stop| *stop) => None,
            () = self.seated.seat.woken() => None,
            () = platform::sleep(self.heartbeat) => {
                let (waiting, looked_at) = self.control.readers().take(&self.seated.seat);
                if let Some(before) = waiting {
                    self.at = self.at.max(before);
                    self.behind = true;
                    return None;
                }
                self.at = self.at.max(looked_at);
                Some(Event::Heartbeat { cursor: self.at })
            }
        }
    }
}

impl From<FeedRefusal> for Error {
    fn from(refusal: FeedRefusal) -> Error {
        Error::Refused(Refusal::Feed(refusal))
    }
}
