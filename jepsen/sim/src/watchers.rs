//! Watchers of the journal, in the words of `palyra_jepsen_check::watch`: at one replica while that is there, or
//! moving; some with a filter, some slow, some new, and all of them leave a good stream now and then, to go on
//! after the last cursor that they were given, or before it on purpose.
//!
//! Half of them read the replica's own feed, which every follower inside the product lives on, the others the feed of
//! the control plane, as operators do. At the end, when everything is whole, each reads on until it has seen all.
//! Never here: judging.

use std::rc::Rc;
use std::time::Duration;

use palyra_control::{Event, Events, EventsRequest};
use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::Pending;
use palyra_platform as platform;
use palyra_replica::{Feed, FeedItem};
use palyra_state::journal::Row;
use palyra_state::{Cursor, Id};
use serde_json::{Value, json};

use crate::breaks::Break;
use crate::chance;
use crate::cluster::{Cluster, Phase};
use crate::fleet;
use crate::tape::{place, told};
use crate::world::Life;

/// How long a watcher waits for a row before it looks whether it goes elsewhere.
const PATIENCE: Duration = Duration::from_millis(200);
/// How often a stream that works is left.
const LEAVES_PERCENT: u64 = 3;
/// Streams that are opened at the end by one watcher, at most: everything is whole.
const LAST_TRIES: usize = 40;
const HEARTBEAT_MS: u64 = 1_000;

/// Where a watcher begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    First,
    Now,
    Cursor(Cursor),
}

/// A watcher, over all of its streams.
pub(crate) struct Watcher {
    cluster: Rc<Cluster>,
    name: String,
    roams: bool,
    slow: bool,
    /// It reads the replica's own feed, which has no filter.
    inside: bool,
    action: &'static str,
    subject: String,
    at: u64,
    after: After,
    /// Where it was some time ago, to go back to.
    earlier: Option<Cursor>,
    opened: u64,
}

/// Where rows come from.
enum Source {
    Inside(Box<Feed>),
    Control(Box<Events>),
}

/// A stream that is open.
struct Stream {
    number: u64,
    life: Life,
    /// Gone while its next message is awaited.
    source: Option<Source>,
    pending: Option<Pending>,
}

/// What a stream said.
enum Said {
    Rows(Vec<Row>, Cursor),
    CaughtUp(Cursor),
    Heartbeat(Cursor),
    Gap(Cursor, u64),
    /// Nothing yet.
    Nothing,
    /// It is over.
    End,
}

impl Watcher {
    /// The `number`th watcher; `keys` are registers, of which some watchers want to know one.
    pub(crate) fn new(cluster: &Rc<Cluster>, number: usize, roams: bool, keys: &[Id]) -> Watcher {
        let inside = number.is_multiple_of(2);
        let (mut action, mut subject) = ("", String::new());
        match number % 6 {
            1 => subject = keys.first().map(ToString::to_string).unwrap_or_default(),
            3 => action = "node.",
            _ => {}
        }
        let begins_now = !inside && chance::percent(40);
        Watcher {
            cluster: cluster.clone(),
            name: format!("w{number}"),
            roams,
            slow: number % 6 == 4,
            inside,
            action,
            subject,
            at: cluster.any_member(),
            after: if begins_now { After::Now } else { After::First },
            earlier: None,
            opened: 0,
        }
    }

    /// Watches until the run is over.
    pub(crate) async fn watch(mut self) -> Watcher {
        while self.cluster.phase.get() != Phase::Over {
            if self.roams || !self.cluster.members().contains(&self.at) {
                self.at = self.cluster.any_member();
            }
            let Some(mut stream) = self.open().await else {
                platform::sleep(PATIENCE).await;
                continue;
            };
            let leaves_at = platform::now() + Duration::from_millis(chance::between(300, 3_000));
            while self.cluster.phase.get() != Phase::Over && platform::now() < leaves_at {
                if matches!(self.next(&mut stream, PATIENCE).await, Said::End) {
                    break;
                }
                if self.slow {
                    platform::sleep(Duration::from_millis(chance::between(100, 1_200))).await;
                }
                if chance::percent(LEAVES_PERCENT) {
                    // Some go back, and must be told the same again.
                    if let Some(earlier) = self.earlier.filter(|_| chance::percent(40)) {
                        self.after = After::Cursor(earlier);
                    }
                    break;
                }
            }
            self.close(stream);
        }
        self
    }

    /// Everything is whole: reads on until there is no more.
    pub(crate) async fn see_all(mut self) {
        for _ in 0..LAST_TRIES {
            self.at = self.cluster.any_member();
            let Some(mut stream) = self.open().await else {
                platform::sleep(PATIENCE).await;
                continue;
            };
            loop {
                match self.next(&mut stream, Duration::from_millis(1)).await {
                    Said::CaughtUp(_) => return self.close(stream),
                    // The replica's own feed says no more when it has said all.
                    Said::Nothing if self.inside => return self.close(stream),
                    Said::End => break,
                    _ => {}
                }
            }
            self.close(stream);
        }
    }

    async fn open(&mut self) -> Option<Stream> {
        let after = match self.after {
            After::First => json!("first"),
            After::Now => json!("now"),
            After::Cursor(cursor) => place(cursor),
        };
        let value = json!({
            "watcher": self.name,
            "after": after,
            "filter": {"action": self.action, "subject": self.subject},
            "slow": self.slow,
        });
        let call = self.cluster.invoke("watch", value.clone(), Some(self.at), None);
        let Some((life, source)) = self.source().await else {
            self.cluster.complete(&call, Kind::Fail, told(value));
            return None;
        };
        let number = self.cluster.streams.get() + 1;
        self.cluster.streams.set(number);
        let mut value = value;
        value["stream"] = number.into();
        self.cluster.complete(&call, Kind::Ok, told(value));
        self.opened += 1;
        if self.opened > 1 {
            self.cluster.world.reach("feed-moved");
        }
        Some(Stream {
            number,
            life,
            source: Some(source),
            pending: None,
        })
    }

    async fn source(&self) -> Option<(Life, Source)> {
        let mut after = match self.after {
            After::First | After::Now => None,
            After::Cursor(cursor) => Some(cursor),
        };
        if let Some(after) = &mut after
            && self.cluster.world.broken() == Some(Break::SkipRow)
        {
            after.ordinal += 1;
            after.index += 1;
        }
        if self.inside {
            let (life, replica) = self.cluster.replica(self.at)?;
            let feed = platform::scope_sync(life.tag(), || replica.feed(after.unwrap_or_default()));
            return Some((life, Source::Inside(Box::new(feed))));
        }
        let (life, control) = self.cluster.control(self.at)?;
        let peer = fleet::operator_peer(&self.cluster.papers);
        let request = EventsRequest {
            after,
            from_first: self.after == After::First,
            action_prefix: self.action.to_owned(),
            subject: self.subject.clone(),
            heartbeat_ms: HEARTBEAT_MS,
            ..EventsRequest::default()
        };
        let task = platform::scope_sync(life.tag(), || {
            platform::spawn(async move { control.operator_events(&peer, request).await })
        });
        let events = task.await.ok()?.ok()?;
        Some((life, Source::Control(Box::new(events))))
    }

    /// What comes next, within so long. What is awaited is one operation of the history, however often it is asked for.
    async fn next(&mut self, stream: &mut Stream, patience: Duration) -> Said {
        let Some(source) = stream.source.take() else {
            return Said::End;
        };
        let asked = json!({"watcher": self.name, "stream": stream.number});
        let pending = stream
            .pending
            .take()
            .unwrap_or_else(|| self.cluster.invoke("next", asked.clone(), Some(self.at), None));
        // In a task of the replica: its end is the stream's.
        let task = platform::scope_sync(stream.life.tag(), || platform::spawn(heard(source, patience)));
        let said = match task.await {
            Ok((source, said)) => {
                stream.source = Some(source);
                said
            }
            Err(_) => Said::End,
        };
        match &said {
            Said::Nothing => stream.pending = Some(pending),
            Said::End => {
                stream.source = None;
                self.cluster.complete(&pending, Kind::Fail, told(asked));
            }
            item => {
                self.went(item);
                let value = self.item(stream.number, item);
                self.cluster.complete_unsaid(&pending, Kind::Ok, told(value));
            }
        }
        said
    }

    /// Leaves a stream.
    fn close(&self, stream: Stream) {
        if let Some(pending) = stream.pending {
            let value = json!({"watcher": self.name, "stream": stream.number});
            self.cluster.complete(&pending, Kind::Fail, told(value));
        }
    }

    /// Remembers where it is.
    fn went(&mut self, item: &Said) {
        let cursor = match item {
            Said::Rows(_, cursor) | Said::CaughtUp(cursor) | Said::Heartbeat(cursor) => *cursor,
            Said::Gap(first, _) => {
                return self.cluster.problem(format!(
                    "watch.gapless: r{} says that the journal begins at {first:?}, of which nothing was ever trimmed",
                    self.at
                ));
            }
            Said::Nothing | Said::End => return,
        };
        if let After::Cursor(before) = self.after
            && chance::percent(20)
        {
            self.earlier = Some(before);
        }
        self.after = After::Cursor(cursor);
    }

    /// A message as the history has it.
    fn item(&self, stream: u64, item: &Said) -> Value {
        let mut value = json!({"watcher": self.name, "stream": stream});
        match item {
            Said::Rows(rows, cursor) => {
                let note = format!("{} has {} rows up to {cursor:?}", self.name, rows.len());
                self.cluster.world.note(&note);
                value["rows"] = rows.iter().map(short).collect();
                value["cursor"] = place(*cursor);
            }
            Said::CaughtUp(cursor) => value["caught_up"] = place(*cursor),
            Said::Heartbeat(cursor) => value["heartbeat"] = place(*cursor),
            Said::Gap(first, rescan) => {
                value["gap"] = place(*first);
                value["rescan"] = (*rescan).into();
            }
            Said::Nothing | Said::End => {}
        }
        value
    }
}

/// What the checker compares: the hash stands for the rest.
fn short(row: &Row) -> Value {
    json!({
        "index": row.index,
        "ordinal": row.ordinal,
        "action": row.action,
        "subject": row.subject,
        "hash": row.hash.to_string(),
    })
}

async fn heard(mut source: Source, patience: Duration) -> (Source, Said) {
    let said = match &mut source {
        Source::Inside(feed) => match platform::timeout(patience, feed.next()).await {
            Err(_) => Said::Nothing,
            Ok(None) => Said::End,
            Ok(Some(FeedItem::Rows(rows))) => {
                let cursor = rows.last().map(Row::cursor).unwrap_or_default();
                Said::Rows(rows, cursor)
            }
            Ok(Some(FeedItem::Gap { first })) => Said::Gap(first, 0),
        },
        Source::Control(events) => match platform::timeout(patience, events.next()).await {
            Err(_) => Said::Nothing,
            Ok(None | Some(Err(_))) => Said::End,
            Ok(Some(Ok(event))) => match event {
                Event::Rows { rows, cursor } => Said::Rows(rows, cursor),
                Event::CaughtUp { cursor, .. } => Said::CaughtUp(cursor),
                Event::Heartbeat { cursor } => Said::Heartbeat(cursor),
                Event::Gap { first, rescan } => Said::Gap(first, rescan),
            },
        },
    };
    (source, said)
}
