//! `journal`: readers fetch the hash-chained journal from every replica all the time, and keep each head that they
//! see, while registers are written.
//!
//! A read is answered by the replica that was asked, now and then from what it has alone, so that replicas which
//! are cut off are read too. Readers go on where they were, go back on purpose, begin anew at the first row, and
//! take all that with them to other replicas. Conditions: `palyra_jepsen_check::journal`, and those of registers.

use std::sync::Arc;

use anyhow::Result;
use async_trait::async_trait;
use palyra_jepsen_check::Facts;
use palyra_proto::common::v1::{Consistency, ReadOptions};
use palyra_proto::journal::v1::journal_service_client::JournalServiceClient;
use palyra_proto::journal::v1::{Cursor, Row, TailRequest, VerifyRequest, VerifyResponse};
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::operator::{Asked, Operator, row};
use super::registry::Registry;
use super::{Kind, Workload};
use crate::run::Run;

pub(super) const KIND: Kind = Kind {
    name: "journal",
    does: "the hash-chained journal, read at every replica all the time, while registers are written",
    usual: &[
        "power",
        "bitflip",
        "truncate",
        "disk:eio",
        "disk:fsync-eio-once",
        "disk:full",
        "disk:slow-fsync",
        "isolate-until-snapshot",
        "purge",
    ],
    make: || {
        Box::new(Journal {
            registers: Registry::by_id("j"),
        })
    },
};

/// Rows of one answer: more are left for the next.
const PAGE: usize = 150;
/// Places that a reader remembers, to go back to.
const PLACES: usize = 64;
/// One client of so many writes.
const WRITERS: u64 = 3;

struct Journal {
    registers: Registry,
}

#[async_trait]
impl Workload for Journal {
    fn name(&self) -> &'static str {
        "journal"
    }

    fn floors(&self) -> &'static [&'static str] {
        &["write", "tail", "head"]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        self.registers.prepare(run).await
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        if number % WRITERS == WRITERS - 1 {
            return self.registers.client(run, number).await;
        }
        let mut reader = Reader::new(run, &format!("journal {number}"))?;
        while run.is_loading() {
            let broke = reader.step().await;
            reader.operator.roam(broke);
            reader.operator.pace().await;
        }
        Ok(())
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        self.registers.finish(run).await?;
        let mut reader = Reader::new(run, "journal, last reads")?;
        reader.operator.rows().await?;
        for id in run.cluster.replicas() {
            reader.operator.at = id;
            reader.head(Consistency::Linearizable).await;
        }
        Ok(())
    }

    fn tell(&self, facts: &mut Facts) {
        facts.registers = Some(Registry::rows());
    }
}

/// Who reads, and where it was.
struct Reader {
    operator: Operator,
    /// The row that it saw last.
    last: Option<Cursor>,
    /// Rows that it saw before.
    places: Vec<Cursor>,
}

/// One answer of `tail`.
#[derive(Debug, Default)]
struct Page {
    rows: Vec<Row>,
    gap: Option<Cursor>,
    end: bool,
    index: u64,
}

impl Reader {
    fn new(run: &Arc<Run>, name: &str) -> Result<Reader> {
        Ok(Reader {
            operator: Operator::new(run, name)?,
            last: None,
            places: Vec::new(),
        })
    }

    /// One read. Answers whether the replica was of no use.
    async fn step(&mut self) -> bool {
        // What a replica has alone must be the beginning of the same journal.
        let alone = self.operator.chance.percent(40);
        let consistency = if alone {
            Consistency::Local
        } else {
            Consistency::Linearizable
        };
        match self.operator.chance.below(100) {
            0..62 => self.tail(self.last, consistency).await,
            62..76 if !self.places.is_empty() => {
                let place = *self.operator.chance.one(&self.places);
                self.tail(Some(place), consistency).await
            }
            62..80 => self.tail(None, consistency).await,
            _ => self.head(consistency).await,
        }
    }

    async fn tail(&mut self, after: Option<Cursor>, consistency: Consistency) -> bool {
        let asked = Asked::read("tail", json!({"after": after.as_ref().map(place)}));
        let answer = self
            .operator
            .ask(
                asked,
                |channel| fetch(channel, after, options(consistency)),
                |page| (page.told(), page.index),
            )
            .await;
        let Ok(page) = answer else { return true };
        // A gap leaves nothing to go on from: the next one begins with the first row that is held.
        self.last = page.rows.last().and_then(|row| row.cursor).or(after);
        if page.gap.is_some() {
            self.last = None;
        }
        if let Some(last) = self.last {
            if self.places.len() == PLACES {
                let at = self.operator.chance.place(PLACES);
                self.places.swap_remove(at);
            }
            self.places.push(last);
        }
        false
    }

    async fn head(&mut self, consistency: Consistency) -> bool {
        let request = VerifyRequest {
            read: options(consistency),
        };
        let answer = self.operator.ask(
            Asked::read("head", json!({})),
            |channel| async move { JournalServiceClient::new(channel).verify(request).await },
            |head: &VerifyResponse| (told(head), head.read.as_ref().map_or(0, |read| read.index)),
        );
        answer.await.is_err()
    }
}

impl Page {
    /// What the history is told.
    fn told(&self) -> Value {
        match &self.gap {
            Some(first) => json!({"gap": place(first)}),
            None => json!({"rows": self.rows.iter().map(row).collect::<Vec<_>>(), "end": self.end}),
        }
    }
}

fn options(consistency: Consistency) -> Option<ReadOptions> {
    Some(ReadOptions {
        consistency: consistency.into(),
        min_index: 0,
    })
}

/// Rows after a cursor, as many as fit one answer.
async fn fetch(
    channel: Channel,
    after: Option<Cursor>,
    read: Option<ReadOptions>,
) -> Result<Response<Page>, Status> {
    let request = TailRequest {
        after,
        read,
        ..Default::default()
    };
    let mut stream = JournalServiceClient::new(channel)
        .tail(request)
        .await?
        .into_inner();
    let mut page = Page::default();
    while page.rows.len() < PAGE {
        let Some(part) = stream.message().await? else {
            page.end = true;
            break;
        };
        page.index = page.index.max(part.read.map_or(0, |read| read.index));
        if part.gap_first.is_some() {
            // After rows it belongs to the next answer.
            page.gap = part.gap_first.filter(|_| page.rows.is_empty());
            break;
        }
        page.rows.extend(part.rows);
    }
    Ok(Response::new(page))
}

fn told(head: &VerifyResponse) -> Value {
    json!({
        "rows": head.rows,
        "first": place(&head.first.unwrap_or_default()),
        "last": place(&head.last.unwrap_or_default()),
        "head": hex::encode(&head.head),
        "intact": head.intact,
        "problem": head.problem,
    })
}

/// A cursor as histories have it.
pub(super) fn place(cursor: &Cursor) -> Value {
    json!([cursor.index, cursor.ordinal])
}
