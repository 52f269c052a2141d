//! Runs for workers: each asked for, permitted, started, and followed to its end.
//!
//! What never lives here: what became of their leases. Invariant: one whose start is not known keeps its request id
//! and is asked
//! for again until it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use palyra_client::{Client, Error, new_ulid};
use palyra_proto::approval::v1::{CreateGrantRequest, DecideRequest};
use palyra_proto::run::v1::StartRequest;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::proof::TOOL;
use super::worker::below;

/// What a decision of the bench's operator covers.
const SESSION: &str = "palyra-bench";
/// Starts that are under way at one time.
const UNDER_WAY: usize = 12;
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(300);

/// The runs of a bench.
pub(crate) struct Load {
    /// Runs that were started.
    pub(crate) started: Arc<AtomicU64>,
    stop: CancellationToken,
    tasks: JoinSet<Result<()>>,
}

/// How runs are made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// Longest time that one holds its slot, in milliseconds; the shortest is a fifth of it.
    pub(crate) hold_ms: u64,
    /// Of its leases.
    pub(crate) ttl_ms: u64,
    /// Of the run.
    pub(crate) timeout_ms: u64,
}

/// Permits the first run of the session for all that follow.
pub(crate) async fn permit(client: &Client) -> Result<()> {
    let request = grant(&new_ulid());
    let grant = client
        .create_grant(request)
        .await
        .context("the first grant")?
        .grant;
    let grant = grant.unwrap_or_default();
    if grant.state != "pending" {
        return Ok(());
    }
    let decide = DecideRequest {
        request_id: new_ulid(),
        id: grant.approval_id,
        decision: "allow".to_owned(),
        scope: "session".to_owned(),
        ttl_ms: 3_600_000,
        reason: "palyra-bench lease".to_owned(),
        ..DecideRequest::default()
    };
    client
        .decide_approval(decide)
        .await
        .context("the approval of the session")?;
    Ok(())
}

fn grant(run_id: &str) -> CreateGrantRequest {
    CreateGrantRequest {
        request_id: new_ulid(),
        grant_id: new_ulid(),
        run_id: run_id.to_owned(),
        tool: TOOL.to_owned(),
        session: SESSION.to_owned(),
        ttl_ms: 0,
        summary: String::new(),
        risk: "low".to_owned(),
    }
}

/// Asks until the answer is known.
async fn insist<T, F: Future<Output = Result<T, Error>>>(mut ask: impl FnMut() -> F) -> Result<T> {
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() < until && (error.retryable || error.exit_code() == 13) => {
                sleep(AGAIN).await;
            }
            // No replica: it is being killed.
            Err(error) if Instant::now() < until && matches!(error.exit_code(), 4 | 9 | 10) => {
                sleep(AGAIN).await;
            }
            Err(error) => bail!("{error}"),
        }
    }
}

/// Starts one run.
pub(crate) async fn start(client: &Client, kind: Kind) -> Result<String> {
    let run_id = new_ulid();
    let ask = grant(&run_id);
    insist(|| client.create_grant(ask.clone()))
        .await
        .context("a grant")?;
    let hold_ms = kind.hold_ms / 5 + below(kind.hold_ms * 4 / 5 + 1);
    let request = StartRequest {
        request_id: new_ulid(),
        run_id: run_id.clone(),
        tool: TOOL.to_owned(),
        params: format!("{{\"hold_ms\":{hold_ms}}}").into(),
        effect: "idempotent".to_owned(),
        max_attempts: 16,
        ttl_ms: kind.ttl_ms,
        timeout_ms: kind.timeout_ms,
        ..StartRequest::default()
    };
    insist(|| client.start_run(request.clone()))
        .await
        .context("a run")?;
    Ok(run_id)
}

impl Load {
    /// Starts `count` runs as fast as they are taken, so that leases compete.
    pub(crate) fn begin(client: &Client, count: u64, kind: Kind) -> Load {
        let started = Arc::new(AtomicU64::new(0));
        let next = Arc::new(AtomicU64::new(0));
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        for _ in 0..UNDER_WAY {
            let (client, stop) = (client.clone(), stop.clone());
            let (started, next) = (Arc::clone(&started), Arc::clone(&next));
            tasks.spawn(async move {
                while next.fetch_add(1, Ordering::Relaxed) < count && !stop.is_cancelled() {
                    start(&client, kind).await?;
                    started.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
        }
        Load { started, stop, tasks }
    }

    /// Starts no more, and waits for what is under way.
    pub(crate) async fn end(mut self) -> Result<u64> {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.context("a starter of runs has panicked")??;
        }
        Ok(self.started.load(Ordering::Relaxed))
    }
}
