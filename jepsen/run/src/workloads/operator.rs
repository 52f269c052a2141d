//! What the harness asks as an operator: each try an operation of the history, at one replica; and the last reads
//! that workloads of the fleet have in common.
//!
//! Never here: what it means (the checkers). Invariant: a request that is sent again has the same request id, and
//! is an operation of its own.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use palyra_client::Step;
use palyra_jepsen_check::Kind;
use palyra_proto::journal::v1::TailRequest;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::chance::Chance;
use crate::door::{Door, Identity, Miss};
use crate::record::{End, Process};
use crate::run::Run;

/// A replica that is well answers within this, elections included.
pub(super) const CALL: Duration = Duration::from_millis(3_000);
/// Between two tries of one request.
const AGAIN: Duration = Duration::from_millis(250);
/// Rows in one operation of the history, so that its lines stay short.
const PAGE: usize = 400;

/// An operator: one client of the history, at one replica at a time.
pub(super) struct Operator {
    /// The run.
    pub(super) run: Arc<Run>,
    /// Its own chance.
    pub(super) chance: Chance,
    /// The replica that it asks.
    pub(super) at: u64,
    /// Its operations that are no call of their own go through this.
    pub(super) process: Process,
    identity: Identity,
    doors: BTreeMap<u64, Door>,
}

/// What is asked.
#[derive(Clone, Debug)]
pub(super) struct Asked<'a> {
    /// The operation.
    pub(super) f: &'a str,
    /// Its value in the history.
    pub(super) value: Value,
    /// Of a change.
    pub(super) request: Option<&'a str>,
    /// How long an answer may take.
    pub(super) within: Duration,
}

impl<'a> Asked<'a> {
    /// A change.
    pub(super) fn change(f: &'a str, value: Value, request: &'a str) -> Asked<'a> {
        Asked {
            f,
            value,
            request: Some(request),
            within: CALL,
        }
    }

    /// A read.
    pub(super) fn read(f: &'a str, value: Value) -> Asked<'a> {
        Asked {
            f,
            value,
            request: None,
            within: CALL,
        }
    }
}

impl Operator {
    /// The first operator of the cluster, under a name that decides its chance.
    pub(super) fn new(run: &Arc<Run>, name: &str) -> Result<Operator> {
        let mut chance = run.chance(name);
        Ok(Operator {
            run: Arc::clone(run),
            at: run.pick(&mut chance, None),
            chance,
            process: run.record.process(),
            identity: Identity::of(&run.cluster.operator()?)?,
            doors: BTreeMap::new(),
        })
    }

    /// Goes to another replica, or stays, as `broke` and chance have it.
    pub(super) fn roam(&mut self, broke: bool) {
        let stay = (!broke).then_some(self.at);
        self.at = self.run.pick(&mut self.chance, stay);
    }

    /// Waits as long as the rate wants.
    pub(super) async fn pace(&mut self) {
        let run = Arc::clone(&self.run);
        run.pace(&mut self.chance).await;
    }

    /// Asks once, here. `tell` says what the history is told of the answer, and its log index.
    pub(super) async fn ask<T, F, Fut>(
        &mut self,
        asked: Asked<'_>,
        send: F,
        tell: impl FnOnce(&T) -> (Value, u64),
    ) -> Result<T, Miss>
    where
        F: FnOnce(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let (cluster, identity) = (&self.run.cluster, &self.identity);
        let door = self
            .doors
            .entry(self.at)
            .or_insert_with(|| cluster.door(self.at, identity))
            .clone();
        let node = format!("r{}", self.at);
        let call = self
            .process
            .invoke(asked.f, asked.value.clone(), Some(&node), asked.request);
        let answer = door.call(asked.within, send).await;
        let end = match &answer {
            Ok(done) => {
                let (more, index) = tell(done);
                End::ok(merge(asked.value, &more)).at(index)
            }
            Err(miss) => End::missed(miss.kind(asked.request.is_some()), asked.value, miss.to_string()),
        };
        self.process.end(call, end);
        answer
    }

    /// Asks here and elsewhere, the same each time, until it is known what became of it, or for `within`.
    pub(super) async fn insist<T, Fut>(
        &mut self,
        asked: Asked<'_>,
        within: Duration,
        send: impl Fn(Channel) -> Fut,
        tell: impl Fn(&T) -> (Value, u64),
    ) -> Result<T, Miss>
    where
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let until = Instant::now() + within;
        loop {
            let answer = self.ask(asked.clone(), &send, &tell).await;
            let Err(miss) = &answer else { return answer };
            if !is_open(miss) || Instant::now() >= until || self.run.stop.is_cancelled() {
                return answer;
            }
            self.roam(true);
            sleep(AGAIN).await;
        }
    }

    /// Reads the whole journal of each replica, unless that comes later, into the history, page by page: `rows`, as
    /// the checker of the journal has it.
    pub(super) async fn rows(&mut self) -> Result<()> {
        if self.run.journal_held.load(Ordering::Relaxed) {
            return Ok(());
        }
        for id in self.run.cluster.replicas() {
            self.at = id;
            self.rows_here().await?;
        }
        Ok(())
    }

    async fn rows_here(&mut self) -> Result<()> {
        let client = self.run.cluster.client(&[self.at], Duration::from_secs(20))?;
        let mut feed = client.follow(TailRequest::default(), Some(Duration::from_secs(60)));
        let (mut page, mut after) = (Vec::new(), Value::Null);
        loop {
            match feed.next().await.context("reading the journal at the end")? {
                Step::Rows(rows) => {
                    page.extend(rows.iter().map(row));
                    if page.len() >= PAGE {
                        after = self.page(after, &mut page, false);
                    }
                }
                Step::End => break,
                Step::Gap(first) => bail!("the journal begins at {first:?}: the run was too long for it"),
                Step::Moved { .. } | Step::Lost { .. } => {}
            }
        }
        self.page(after, &mut page, true);
        Ok(())
    }

    /// Tells one page; answers after what the next one comes.
    fn page(&mut self, after: Value, rows: &mut Vec<Value>, end: bool) -> Value {
        let rows = std::mem::take(rows);
        let last = rows
            .last()
            .map_or_else(|| after.clone(), |row| json!([row["index"], row["ordinal"]]));
        let node = format!("r{}", self.at);
        let call = self
            .process
            .invoke("rows", json!({"after": after}), Some(&node), None);
        let value = json!({"after": after, "rows": rows, "end": end});
        self.process.end(call, End::ok(value));
        last
    }
}

/// A row as the checker of the journal has it.
pub(super) fn row(row: &palyra_proto::journal::v1::Row) -> Value {
    let cursor = row.cursor.unwrap_or_default();
    json!({
        "index": cursor.index,
        "ordinal": cursor.ordinal,
        "at_ms": row.at_ms,
        "actor": row.actor,
        "action": row.action,
        "subject": row.subject,
        "request": row.request_id,
        "detail": row.detail,
        "prev": hex::encode(&row.prev_hash),
        "hash": hex::encode(&row.hash),
    })
}

/// Whether nobody knows what became of it, or another try may do better.
pub(super) fn is_open(miss: &Miss) -> bool {
    match miss {
        Miss::Answered(error) => error.retryable || error.unknown || miss.kind(true) == Kind::Info,
        Miss::NotSent(_) | Miss::Lost(_) => true,
        Miss::Refused(_) => false,
    }
}

/// Two objects as one; the second one's fields count.
pub(super) fn merge(mut into: Value, from: &Value) -> Value {
    if let (Some(into), Some(from)) = (into.as_object_mut(), from.as_object()) {
        for (key, value) in from {
            into.insert(key.clone(), value.clone());
        }
    }
    into
}
