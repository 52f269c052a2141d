//! `watch`: readers follow the journal as it grows, while registers are written.
//!
//! A watcher has a name and one filter, and lives through many streams: some stay with one replica, others go
//! elsewhere whenever theirs ends, some are slow, and all of them leave a good stream now and then, to go on after
//! the last cursor that they were given, or before it on purpose. At the end, when everything is whole, each goes
//! on once more until it is told that it has seen all. Conditions: `palyra_jepsen_check::watch`, and those of the
//! journal and of registers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use palyra_jepsen_check::Facts;
use palyra_proto::journal::v1::journal_service_client::JournalServiceClient;
use palyra_proto::journal::v1::stream_events_response::Body;
use palyra_proto::journal::v1::{Cursor, Row, StreamEventsRequest, StreamEventsResponse};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tonic::Streaming;

use super::journal::place;
use super::operator::{Asked, Operator, merge};
use super::registry::Registry;
use super::{Kind, Workload};
use crate::record::End;
use crate::run::Run;

pub(super) const KIND: Kind = Kind {
    name: "watch",
    does: "readers that follow the journal at every replica, move, resume, and lag, while registers are written",
    usual: &[
        "kill",
        "reset",
        "partition:leader",
        "isolate-until-snapshot",
        "snapshot",
        "purge",
        "slow-link",
        "reorder",
        "jitter",
        "corrupt",
    ],
    make: || {
        Box::new(Watch {
            registers: Registry::by_id("w"),
            streams: Arc::default(),
            watchers: Mutex::default(),
        })
    },
};

const HEARTBEAT_MS: u32 = 1_000;
/// A replica that misses so many heartbeats has gone.
const SILENT: Duration = Duration::from_millis(3_500);
/// Between two tries to open a stream.
const AGAIN: Duration = Duration::from_millis(200);
/// One client of so many writes.
const WRITERS: u64 = 3;
/// How often a stream that works is left.
const LEAVES_PERCENT: u64 = 3;
/// At the end, for each watcher, to see everything.
const LAST: Duration = Duration::from_secs(12);

struct Watch {
    registers: Registry,
    /// The last stream's number.
    streams: Arc<AtomicU64>,
    /// Those whose clients have ended.
    watchers: Mutex<Vec<Watcher>>,
}

/// Where a watcher begins.
#[derive(Clone, Copy, Debug, PartialEq)]
enum After {
    First,
    Now,
    Cursor(Cursor),
}

struct Watcher {
    name: String,
    operator: Operator,
    /// The replica that it stays with.
    home: Option<u64>,
    slow: bool,
    action: String,
    subject: String,
    after: After,
    /// Where it was some time ago, to go back to.
    earlier: Option<Cursor>,
    streams: Arc<AtomicU64>,
    stream: Option<(u64, Streaming<StreamEventsResponse>)>,
}

#[async_trait]
impl Workload for Watch {
    fn name(&self) -> &'static str {
        "watch"
    }

    fn floors(&self) -> &'static [&'static str] {
        &["write", "next"]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        self.registers.prepare(run).await
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        if number % WRITERS == WRITERS - 1 {
            return self.registers.client(run, number).await;
        }
        let mut watcher = self.watcher(run, number)?;
        while run.is_loading() {
            watcher.step(run).await;
        }
        watcher.stream = None;
        self.watchers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(watcher);
        Ok(())
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        let watchers = std::mem::take(&mut *self.watchers.lock().unwrap_or_else(PoisonError::into_inner));
        let ends = watchers.into_iter().map(|mut watcher| async move {
            // What it does not see in this time the checker misses.
            drop(timeout(LAST, watcher.see_all()).await);
        });
        futures::future::join_all(ends).await;
        self.registers.finish(run).await?;
        Operator::new(run, "watch, last reads")?.rows().await
    }

    fn tell(&self, facts: &mut Facts) {
        facts.registers = Some(Registry::rows());
    }
}

impl Watch {
    fn watcher(&self, run: &Arc<Run>, number: u64) -> Result<Watcher> {
        let mut operator = Operator::new(run, &format!("watch {number}"))?;
        let devices = self.registers.devices()?;
        let (mut action, mut subject) = (String::new(), String::new());
        match number % 6 {
            1 => operator.chance.one(&devices).clone_into(&mut subject),
            4 => "node.".clone_into(&mut action),
            _ => {}
        }
        let stays = operator.chance.percent(50);
        Ok(Watcher {
            name: format!("w{number}"),
            home: stays.then(|| number % run.settings.replicas.max(1) + 1),
            slow: number % 6 == 3,
            action,
            subject,
            after: if operator.chance.percent(60) {
                After::First
            } else {
                After::Now
            },
            earlier: None,
            operator,
            streams: Arc::clone(&self.streams),
            stream: None,
        })
    }
}

impl Watcher {
    async fn step(&mut self, run: &Arc<Run>) {
        if self.stream.is_none() {
            if !self.open(self.slow).await {
                tokio::select! {
                    () = sleep(AGAIN) => {},
                    () = run.load_ended() => {},
                }
            }
            return;
        }
        self.next().await;
        if self.slow {
            let pause = Duration::from_millis(self.operator.chance.between(100, 1_200));
            tokio::select! {
                () = sleep(pause) => {},
                () = run.load_ended() => {},
            }
        }
        if self.operator.chance.percent(LEAVES_PERCENT) {
            self.stream = None;
            // Some go back, and must be told the same again.
            if let Some(earlier) = self.earlier.filter(|_| self.operator.chance.percent(40)) {
                self.after = After::Cursor(earlier);
            }
        }
    }

    /// Opens a stream, at home or elsewhere. Answers whether there is one.
    async fn open(&mut self, slow: bool) -> bool {
        self.operator.roam(true);
        if let Some(home) = self
            .home
            .filter(|home| self.operator.run.cluster.replicas().contains(home))
        {
            self.operator.at = home;
        }
        let request = StreamEventsRequest {
            after: match self.after {
                After::Cursor(cursor) => Some(cursor),
                After::First | After::Now => None,
            },
            from_first: self.after == After::First,
            action_prefix: self.action.clone(),
            subject: self.subject.clone(),
            heartbeat_ms: HEARTBEAT_MS,
            ..Default::default()
        };
        let after = match &self.after {
            After::First => json!("first"),
            After::Now => json!("now"),
            After::Cursor(cursor) => place(cursor),
        };
        let filter = json!({"action": self.action, "subject": self.subject});
        let value = json!({"watcher": self.name, "after": after, "filter": filter, "slow": slow});
        let number = self.streams.fetch_add(1, Ordering::Relaxed) + 1;
        let opened = self.operator.ask(
            Asked::read("watch", value),
            |channel| async move { JournalServiceClient::new(channel).stream_events(request).await },
            |_| (json!({"stream": number}), 0),
        );
        self.stream = opened.await.ok().map(|stream| (number, stream));
        self.stream.is_some()
    }

    /// The next message, or the end of the stream. Answers whether everything that had happened was told.
    async fn next(&mut self) -> bool {
        let Some((number, mut stream)) = self.stream.take() else {
            return false;
        };
        let asked = json!({"watcher": self.name, "stream": number});
        let node = format!("r{}", self.operator.at);
        let call = self
            .operator
            .process
            .invoke("next", asked.clone(), Some(&node), None);
        let body = match timeout(SILENT, stream.message()).await {
            Ok(Ok(Some(StreamEventsResponse { body: Some(body) }))) => Ok(body),
            Ok(Ok(Some(_))) => Err("a message without contents".to_owned()),
            Ok(Ok(None)) => Err("the replica ended the stream".to_owned()),
            Ok(Err(status)) => Err(status.to_string()),
            Err(_) => Err("the replica went silent".to_owned()),
        };
        match body {
            Ok(body) => {
                self.went(&body);
                let end = End::ok(merge(asked, &item(&body)));
                self.operator.process.end(call, end);
                self.stream = Some((number, stream));
                matches!(body, Body::CaughtUp(_))
            }
            Err(why) => {
                self.operator.process.end(call, End::fail(asked, why));
                false
            }
        }
    }

    /// Remembers where it is.
    fn went(&mut self, body: &Body) {
        let cursor = match body {
            Body::Rows(rows) => rows.cursor,
            Body::CaughtUp(caught_up) => caught_up.cursor,
            Body::Heartbeat(heartbeat) => heartbeat.cursor,
            // What follows it tells where it is.
            Body::Gap(_) => None,
        };
        let Some(cursor) = cursor else { return };
        if let After::Cursor(before) = self.after
            && self.operator.chance.percent(20)
        {
            self.earlier = Some(before);
        }
        self.after = After::Cursor(cursor);
    }

    /// Everything is whole: reads on until it is told that there is no more.
    async fn see_all(&mut self) {
        // The others are judged by when they see it; this one is not slow any more, but was.
        loop {
            if self.stream.is_none() && !self.open(self.slow).await {
                sleep(AGAIN).await;
            } else if self.next().await {
                return;
            }
        }
    }
}

/// A message as the history has it.
fn item(body: &Body) -> Value {
    let at = |cursor: &Option<Cursor>| place(&cursor.unwrap_or_default());
    match body {
        Body::Rows(rows) => {
            let told: Vec<Value> = rows.rows.iter().map(short).collect();
            json!({"rows": told, "cursor": at(&rows.cursor)})
        }
        Body::CaughtUp(caught_up) => json!({"caught_up": at(&caught_up.cursor)}),
        Body::Heartbeat(heartbeat) => json!({"heartbeat": at(&heartbeat.cursor)}),
        Body::Gap(gap) => json!({"gap": at(&gap.first), "rescan": gap.rescan}),
    }
}

/// What the checker compares: the hash stands for the rest.
fn short(row: &Row) -> Value {
    let cursor = row.cursor.unwrap_or_default();
    json!({
        "index": cursor.index,
        "ordinal": cursor.ordinal,
        "action": row.action,
        "subject": row.subject,
        "hash": hex::encode(&row.hash),
    })
}
