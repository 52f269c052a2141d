//! What the programs of runs write: in the memory of the replica that holds the worker's session.
//!
//! What never lives here: the log, and the lines of dispatches (`outputs`, whose memory this uses). Invariants:
//! a line is taken in under the present fence of a live lease, and from nobody else; memory and rate are bounded
//! for each run.

use std::sync::Arc;
use std::time::Duration;

use palyra_platform as platform;
use palyra_state::Id;
use palyra_state::leases::{self, Run};

use super::delivery::own_lease;
use super::messages::LeaseName;
use super::runs::{RunView, run_view};
use crate::control::{Control, bounded_wait};
use crate::error::Error;
use crate::limits::LOGS_WAIT_MAX;
use crate::outputs::{AskOutput, Line, Output, Piece, Position, Progress, RELAY_PAUSE, RELAY_WAIT};
use crate::peers::{Answer, Call};
use crate::registry::Entry;
use crate::selector;

/// What an operator sees of a running run.
#[derive(Debug, Clone, PartialEq)]
pub struct RunLogs {
    /// The run, as this replica has it.
    pub run: RunView,
    /// Lines after the position that was asked for, in order.
    pub lines: Vec<Line>,
    /// The newest word of the program about itself.
    pub progress: Option<Progress>,
    /// The replica that has them; 0 when none does.
    pub replica_id: u64,
}

impl Control {
    /// Takes what a worker sent of a run that it has leased; of any other it is nobody's business.
    pub(super) fn take_run_output(
        &self,
        entry: &Arc<Entry>,
        lease: &LeaseName,
        first: u64,
        lines: Vec<String>,
        progress: Option<(Option<u32>, String)>,
    ) -> Result<(), Error> {
        selector::parse_id("lease_id", &lease.id)?;
        let Ok(found) = own_lease(&self.replica().view(), entry, lease) else {
            return Ok(());
        };
        let output = Output {
            dispatch_id: String::new(),
            epoch: entry.epoch(),
            attempt: found.attempt,
            first,
            lines,
            progress,
        };
        if self.workers().outputs.take(found.run_id, output) {
            self.waiters().wake(found.run_id);
        }
        Ok(())
    }

    /// What the program of a run wrote after `after`, wherever its worker is connected; waits for something new,
    /// or for another state of the run, `wait_ms` at most (30,000).
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such run; [`Error::Busy`].
    pub async fn run_logs(&self, id: &str, after: Position, wait_ms: u64) -> Result<RunLogs, Error> {
        let id = self.find_run(id).await?;
        let wait = bounded_wait(wait_ms, Duration::ZERO, LOGS_WAIT_MAX);
        let until = platform::now() + wait;
        let first = self.run_of(id)?;
        let mut held_by = self.holder(&first);
        loop {
            let left = until.saturating_duration_since(platform::now());
            let now = self.run_of(id)?;
            // Of what has ended, the last that held it may have something still.
            held_by = self.holder(&now).or(held_by);
            let changed = now.state != first.state || now.fence != first.fence;
            let over = changed || now.state().is_terminal();
            let wait = if over {
                Duration::ZERO
            } else {
                left.min(RELAY_WAIT)
            };
            let piece = match held_by {
                Some(replica) if replica == self.replica_id() => {
                    self.run_output_here(id, after, wait).await?
                }
                Some(replica) => self.run_output_there(replica, id, after, wait).await,
                None => {
                    self.run_moves(id, &now, wait).await?;
                    Piece::default()
                }
            };
            if !piece.lines.is_empty() || over || left.is_zero() {
                return Ok(RunLogs {
                    run: run_view(&self.replica().view(), id)?,
                    lines: piece.lines,
                    progress: piece.progress,
                    replica_id: held_by.unwrap_or_default(),
                });
            }
        }
    }

    fn run_of(&self, id: Id) -> Result<Run, Error> {
        run_view(&self.replica().view(), id).map(|seen| seen.record)
    }

    /// The replica that holds the session of the worker that has, or had, a run.
    fn holder(&self, run: &Run) -> Option<u64> {
        let lease = leases::lease(&self.replica().view(), run.lease_id?)?;
        (lease.replica_id != 0).then_some(lease.replica_id)
    }

    async fn run_moves(&self, id: Id, seen: &Run, wait: Duration) -> Result<(), Error> {
        let look = || {
            let now = leases::run(&self.replica().view(), id);
            let moved = now.is_none_or(|now| now.state != seen.state || now.fence != seen.fence);
            ((), moved)
        };
        self.waiters().until(id, wait, look).await
    }

    /// What this replica has; waits for something new, or for the end.
    pub(crate) async fn run_output_here(
        &self,
        id: Id,
        after: Position,
        wait: Duration,
    ) -> Result<Piece, Error> {
        let word = |piece: &Piece| {
            let progress = piece.progress.as_ref();
            progress.map(|progress| (progress.percent, progress.message.clone()))
        };
        let stand = || leases::run(&self.replica().view(), id).map(|run| (run.state, run.fence));
        let (before, stood) = (word(&self.workers().outputs.after(id, after)), stand());
        let look = || {
            let piece = self.workers().outputs.after(id, after);
            let news = !piece.lines.is_empty() || word(&piece) != before || stand() != stood;
            (piece, news)
        };
        self.waiters().until(id, wait, look).await
    }

    async fn run_output_there(&self, replica: u64, id: Id, after: Position, wait: Duration) -> Piece {
        let ask = AskOutput {
            dispatch_id: id,
            attempt: after.0,
            line: after.1,
            wait_ms: crate::caller::millis(wait),
        };
        let answered = self.call_peer(replica, Call::RunOutput(ask), wait + self.timings().call_timeout);
        match answered.await {
            Ok(Answer::Output(piece)) => piece,
            other => {
                // What it had is lost unless it comes back; the worker will find another.
                tracing::debug!(run = %id, replica, ?other, "the output of a run was not fetched");
                platform::sleep(RELAY_PAUSE.min(wait)).await;
                Piece::default()
            }
        }
    }
}
