//! Dispatches at a fixed rate, each measured from the moment at which the schedule wanted it.
//!
//! What never lives here: which nodes and capabilities. Invariants: the schedule does not wait for answers; a
//! dispatch whose fate is not known keeps its request id and is asked for again until it is.

use std::time::Duration;

use palyra_client::Client;
use palyra_proto::dispatch::v1::{DispatchInfo, InvokeRequest};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

/// How often a dispatch is asked for again whose fate is not known.
const UNKNOWN_TRIES: u32 = 10;
const AGAIN: Duration = Duration::from_millis(500);

/// One dispatch to be made.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// The device.
    pub(crate) device_id: String,
    /// What it is to do.
    pub(crate) capability: String,
    /// JSON.
    pub(crate) payload: String,
    /// Counted from acceptance.
    pub(crate) deadline: Duration,
}

impl Job {
    /// As a request that waits for the end, or for `wait`, whatever is first.
    #[allow(clippy::needless_update, reason = "the message grows")]
    pub(crate) fn request(&self, request_id: &str, wait: Duration) -> InvokeRequest {
        InvokeRequest {
            request_id: request_id.to_owned(),
            device_id: self.device_id.clone(),
            capability: self.capability.clone(),
            payload: self.payload.clone().into(),
            timeout_ms: u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX),
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(palyra_client::MAX_WAIT_MS),
            ..Default::default()
        }
    }
}

/// What became of a job.
#[derive(Debug)]
pub(crate) struct Done {
    /// The job's number in the schedule.
    pub(crate) number: usize,
    /// The job.
    pub(crate) job: Job,
    /// Under which it was sent, each time.
    pub(crate) request_id: String,
    /// From its place in the schedule to the answer.
    pub(crate) took: Duration,
    /// The dispatch, or why there is none.
    pub(crate) outcome: Result<DispatchInfo, palyra_client::Error>,
}

impl Done {
    /// The state of the dispatch, or a dash without one.
    pub(crate) fn state(&self) -> &str {
        self.outcome.as_ref().map_or("-", |info| info.state.as_str())
    }

    /// Whether the dispatch ended, in whatever way.
    pub(crate) fn has_ended(&self) -> bool {
        ENDS.contains(&self.state())
    }
}

/// The states in which a dispatch stays.
const ENDS: [&str; 6] = [
    "succeeded",
    "failed",
    "timed_out",
    "rejected",
    "cancelled",
    "session_lost",
];

/// Makes the jobs `per_second` times a second, and waits for all.
pub(crate) async fn run(client: &Client, jobs: Vec<Job>, per_second: f64, wait: Duration) -> Vec<Done> {
    let mut jobs = jobs.into_iter();
    until(client, &CancellationToken::new(), per_second, wait, |_| {
        jobs.next()
    })
    .await
}

/// Makes the jobs that `next` names by their numbers, `per_second` times a second, until it names no more or `stop`
/// is cancelled; then waits for all.
pub(crate) async fn until(
    client: &Client,
    stop: &CancellationToken,
    per_second: f64,
    wait: Duration,
    mut next: impl FnMut(usize) -> Option<Job>,
) -> Vec<Done> {
    let began = Instant::now();
    let mut under_way = JoinSet::new();
    for number in 0.. {
        let due = began + due_after(number, per_second);
        if stop.run_until_cancelled(sleep_until(due)).await.is_none() {
            break;
        }
        let Some(job) = next(number) else { break };
        under_way.spawn(one(client.clone(), number, job, due, wait));
    }
    let mut done = under_way.join_all().await;
    done.sort_by_key(|done| done.number);
    done
}

/// When a job is due, counted from the first.
fn due_after(number: usize, per_second: f64) -> Duration {
    #[expect(
        clippy::cast_precision_loss,
        reason = "a run has fewer jobs than an f64 has digits"
    )]
    Duration::from_secs_f64(number as f64 / per_second)
}

async fn one(client: Client, number: usize, job: Job, due: Instant, wait: Duration) -> Done {
    let request_id = palyra_client::new_ulid();
    let mut done = ask(&client, number, job, request_id, wait).await;
    // Under the same request id it is answered and not submitted again; the schedule's moment still counts.
    for _ in 0..UNKNOWN_TRIES {
        let settled = match &done.outcome {
            Ok(_) => done.has_ended(),
            Err(error) => !error.retryable && !error.unknown,
        };
        if settled {
            break;
        }
        sleep(AGAIN).await;
        done = ask(&client, number, done.job, done.request_id, wait).await;
    }
    done.took = due.elapsed();
    done
}

async fn ask(client: &Client, number: usize, job: Job, request_id: String, wait: Duration) -> Done {
    let answer = client.invoke(job.request(&request_id, wait)).await;
    Done {
        number,
        job,
        request_id,
        took: Duration::ZERO,
        outcome: answer.map(|answer| answer.dispatch.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_is_fixed() {
        assert_eq!(due_after(0, 20.0), Duration::ZERO);
        assert_eq!(due_after(30, 20.0), Duration::from_millis(1_500));
    }

    #[test]
    fn a_request_waits_and_has_its_deadline() {
        let job = Job {
            device_id: "d".to_owned(),
            capability: "echo".to_owned(),
            payload: "{}".to_owned(),
            deadline: Duration::from_secs(9),
        };
        let request = job.request("r", Duration::from_secs(3));
        assert_eq!((request.timeout_ms, request.wait_ms), (9_000, 3_000));
        assert_eq!(request.request_id, "r");
    }
}
