//! A session without a stream, for networks that break long streams: attach, poll, report.
//!
//! What never lives here: a decision when to fall back (see `agent`).
//!
//! Invariants: the same table of dispatches as with a stream, so that changing the transport loses nothing;
//! one poll and a bounded number of reports are under way at a time.

use std::time::Duration;

use palyra_client::{Connection, new_ulid};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Heard;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::agent::Agent;
use crate::session::{CALL, End, LAST_WORD, Renewal, take, unless_stopped};
use crate::worker::desk;

/// How long a poll may wait at the server, in milliseconds.
const WAIT_MS: u32 = 5_000;
/// A server that answers at once must not be asked in a tight loop.
const AT_LEAST: Duration = Duration::from_millis(200);

type Polled = std::result::Result<wire::PollResponse, End>;

/// Runs a session by polling until it ends, or until `until`, when it is time to try the stream again.
pub(crate) async fn run(agent: &mut Agent, connection: Connection, until: Instant) -> End {
    let answer = match attach(agent, &connection).await {
        Ok(answer) => answer,
        Err(end) => return end,
    };
    let epoch = answer.epoch;
    let mut reports = JoinSet::new();
    let mut send = agent.jobs.attached(epoch);
    let mut renewal = Renewal::default();
    let mut heard = Ok(answer);
    loop {
        match heard.and_then(|answer| absorb(agent, answer)) {
            Ok(bodies) => send.extend(bodies),
            Err(end) => return end,
        }
        report(agent, &connection, &mut reports, std::mem::take(&mut send));
        let request = wire::PollRequest {
            device_id: agent.device_id.clone(),
            epoch,
            attach: None,
            wait_ms: WAIT_MS,
            leave: false,
            trust_generation: agent.link.trust_generation(),
        };
        let polled = poll(connection.clone(), request);
        tokio::pin!(polled);
        let begun = Instant::now();
        heard = loop {
            agent.publish();
            if agent.may_stop() {
                leave(agent.device_id.clone(), connection.clone(), epoch).await;
                return End::Stopped;
            }
            renewal.begin(agent, &connection);
            let due = agent.jobs.next_overdue().unwrap_or(until);
            tokio::select! {
                polled = &mut polled => break polled,
                Some(event) = agent.events.recv() => {
                    let body = agent.jobs.event(event);
                    report(agent, &connection, &mut reports, body);
                }
                Some(Ok(Some(answer))) = reports.join_next() => agent.jobs.answered(&answer),
                () = sleep_until(due.min(until)) => {
                    if Instant::now() >= until {
                        return End::Again;
                    }
                    let bodies = agent.jobs.overdue(Instant::now());
                    report(agent, &connection, &mut reports, bodies);
                }
                outcome = renewal.ended() => {
                    if agent.link.renewed(outcome) {
                        return End::Again;
                    }
                }
                // Leases need a stream; what runs goes on until its deadline.
                _ = desk::next(&mut agent.desk) => {}
                () = agent.shutdown.changes() => {}
            }
        };
        sleep(AT_LEAST.saturating_sub(begun.elapsed())).await;
    }
}

/// Says that this node goes. Without an answer the replica finds out by itself, a little later.
async fn leave(device_id: String, connection: Connection, epoch: u64) {
    let request = wire::PollRequest {
        device_id,
        epoch,
        attach: None,
        wait_ms: 0,
        trust_generation: 0,
        leave: true,
    };
    drop(timeout(LAST_WORD, connection.poll(request)).await);
}

async fn attach(agent: &mut Agent, connection: &Connection) -> Polled {
    let attach = wire::Attach {
        request_id: new_ulid(),
        held: agent.jobs.held(),
        trust_generation: agent.link.trust_generation(),
        held_attempts: agent.jobs.held_attempts(),
        fallback: agent.fallback.clone(),
    };
    let request = wire::PollRequest {
        device_id: agent.device_id.clone(),
        epoch: 0,
        attach: Some(attach),
        wait_ms: 0,
        leave: false,
        trust_generation: agent.link.trust_generation(),
    };
    let answer = unless_stopped(&mut agent.shutdown, poll(connection.clone(), request)).await??;
    let told = answer.messages.iter().find_map(|message| match &message.body {
        Some(Heard::Attached(told)) => Some(told.clone()),
        _ => None,
    });
    let attached = told.unwrap_or_else(|| wire::Attached {
        epoch: answer.epoch,
        ..wire::Attached::default()
    });
    agent.attached(&attached, "poll");
    Ok(answer)
}

async fn poll(connection: Connection, request: wire::PollRequest) -> Polled {
    let patience = CALL + Duration::from_millis(u64::from(request.wait_ms));
    match timeout(patience, connection.poll(request)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(failure)) => Err(End::of_failure(failure)),
        Err(_) => Err(End::lost("no answer to a poll in time")),
    }
}

fn absorb(agent: &mut Agent, answer: wire::PollResponse) -> std::result::Result<Vec<Body>, End> {
    agent.heard();
    let mut send = Vec::new();
    for message in answer.messages {
        send.extend(take(agent, message)?);
    }
    Ok(send)
}

/// Reports results, each in a call of its own. The other messages have no place in this transport: the poll
/// itself is the heartbeat, and a delivery is known by the answer.
fn report(
    agent: &Agent,
    connection: &Connection,
    reports: &mut JoinSet<Option<wire::ResultAnswer>>,
    bodies: impl IntoIterator<Item = Body>,
) {
    for body in bodies {
        let Body::Result(result) = body else { continue };
        let connection = connection.clone();
        let request = wire::ReportRequest {
            device_id: agent.device_id.clone(),
            result: Some(result),
        };
        reports.spawn(async move {
            let answered = timeout(CALL, connection.report(request)).await;
            // Without an answer the result is overdue after a while and goes out again.
            answered.ok()?.ok()?.answer
        });
    }
}
