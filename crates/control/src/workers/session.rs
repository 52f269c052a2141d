//! What becomes of what a worker says in its session.
//!
//! What never lives here: the rules of leases and statements (`apply`). Invariants: a bounded number of one
//! session's messages is being committed at one time, and those of one lease in their order, so that no worker
//! holds another back; until the worker has reported, nothing of its leases is taken in; an answer says
//! "refused" only of what was decided.

use std::sync::Arc;

use palyra_platform as platform;
use palyra_state::dispatch::Failure;
use palyra_state::leases::{self, Held, HeldState, Outcome};
use palyra_state::{Code, Digest, Id, Reject, Reply, fleet, limits};

use super::care::Why;
use super::messages::{
    Answer, AttestAnswer, CleanedUp, Finished, FromWorker, HeldLease, LeaseName, Statement, ToWorker,
};
use crate::caller::Caller;
use crate::control::Control;
use crate::error::{Error, Refusal};
use crate::outbox::{End, Waiting};
use crate::registry::{Entry, Transport};
use crate::selector::parse_id;
use crate::sessions::Session;
use crate::workers::WorkerRefusal;

impl Session {
    /// Takes in what a worker says.
    pub(crate) async fn hear_worker(&self, caller: Caller, message: FromWorker) -> Result<(), Error> {
        if self.entry.transport == Transport::Poll {
            return Err(WorkerRefusal::Polls.into());
        }
        match message {
            FromWorker::Says {
                request_id,
                statement,
            } => self.commit(caller, request_id, statement).await,
            FromWorker::Renew { sequence, leases } => {
                self.control.wish_longer(&self.entry, sequence, leases);
                Ok(())
            }
            FromWorker::Get {
                request_id,
                lease,
                digest,
                offset,
            } => {
                self.control
                    .ask_chunk(&self.entry, request_id, lease, digest, offset);
                Ok(())
            }
            FromWorker::Output {
                lease,
                first,
                lines,
                progress,
            } => self
                .control
                .take_run_output(&self.entry, &lease, first, lines, progress),
        }
    }

    /// Commits in the background, in its turn; the answer comes through [`crate::Outgoing`].
    async fn commit(&self, caller: Caller, request_id: String, statement: Statement) -> Result<(), Error> {
        let closed = || Refusal::SessionEnded {
            code: End::Disconnected.as_str(),
        };
        let permit = Arc::clone(&self.results)
            .acquire_owned()
            .await
            .map_err(|_| closed())?;
        let line = lease_of(&statement).and_then(|lease| Id::parse(&lease.id));
        let mut turn = self.entry.worker.queue(line.unwrap_or(self.entry.device_id));
        let (control, entry) = (self.control.clone(), Arc::clone(&self.entry));
        // A replica that stops waits for it.
        let counted = Arc::clone(self.control.committing()).try_acquire_owned().ok();
        platform::spawn(async move {
            turn.comes().await;
            let told = control.worker_says(&caller, &entry, &request_id, statement).await;
            match told {
                Ok(None) => {}
                Ok(Some(message)) => control.tell_worker(&entry, message),
                Err(error) => {
                    control.tell_worker(&entry, ToWorker::Answer(refused(&request_id, &error)));
                }
            }
            drop((turn, permit, counted));
        })
        .detach();
        Ok(())
    }
}

fn lease_of(statement: &Statement) -> Option<&LeaseName> {
    match statement {
        Statement::Report { .. } | Statement::AskChallenge | Statement::Attest { .. } => None,
        Statement::Accept(lease)
        | Statement::Finish(lease, _)
        | Statement::Cleaned(lease, _)
        | Statement::Violation { lease, .. }
        | Statement::Put { lease, .. } => Some(lease),
    }
}

/// The answer to what was refused, or not decided.
fn refused(request_id: &str, error: &Error) -> Answer {
    Answer {
        request_id: request_id.to_owned(),
        accepted: false,
        code: error.code(),
        message: error.to_string(),
        retry: is_undecided(error),
    }
}

/// Whether the same may be said again and come to something else: the session or its certificate changed, or
/// nobody knows.
pub(super) fn is_undecided(error: &Error) -> bool {
    let rebinding = matches!(
        error,
        Error::Rejected(reject) if matches!(
            reject.kind(),
            Code::EpochStale | Code::SessionStale | Code::CertificateSuperseded
        )
    );
    let early = matches!(error, Error::Refused(Refusal::Worker(WorkerRefusal::NotReported)));
    error.is_retryable() || rebinding || early
}

fn accepted(request_id: &str) -> Option<ToWorker> {
    Some(ToWorker::Answer(Answer {
        request_id: request_id.to_owned(),
        accepted: true,
        code: String::new(),
        message: String::new(),
        retry: false,
    }))
}

impl Control {
    /// Puts a message into a session's box; a box that is full ends it.
    pub(super) fn tell_worker(&self, entry: &Arc<Entry>, message: ToWorker) {
        if !entry.outbox.put(Waiting::Worker(Box::new(message))) {
            self.end_session(entry, End::SlowReader);
        }
    }

    async fn worker_says(
        &self,
        caller: &Caller,
        entry: &Arc<Entry>,
        request_id: &str,
        statement: Statement,
    ) -> Result<Option<ToWorker>, Error> {
        let id = self.request_id(request_id)?;
        let reported = entry.worker.lock().reconciled;
        match statement {
            Statement::Report { held } => return self.reconcile_worker(caller, entry, id, held).await,
            Statement::AskChallenge => {
                self.challenge(entry, id, Why::First).await?;
                return Ok(None);
            }
            Statement::Attest {
                statement,
                public_key,
                signature,
            } => {
                let attest = fleet::Attest {
                    worker_id: entry.device_id,
                    epoch: entry.epoch(),
                    statement,
                    public_key,
                    signature,
                };
                return self.attest(caller, entry, (id, request_id), attest).await;
            }
            _ if !reported => return Err(WorkerRefusal::NotReported.into()),
            Statement::Accept(lease) => {
                let (lease_id, fence) = (parse_id("lease_id", &lease.id)?, lease.fence);
                let epoch = entry.epoch();
                let accept = leases::Accept {
                    lease_id,
                    fence,
                    epoch,
                };
                self.propose(id, caller.actor(), accept).await?;
            }
            Statement::Finish(lease, finished) => {
                self.propose(id, caller.actor(), finish(&lease, *finished)?)
                    .await?;
            }
            Statement::Cleaned(lease, cleaned) => {
                self.propose(id, caller.actor(), clean(&lease, cleaned)?).await?;
            }
            Statement::Violation { lease, kind, message } => {
                let violate = violation(entry.device_id, &lease, kind, message)?;
                self.propose(id, caller.actor(), violate).await?;
            }
            Statement::Put {
                lease,
                digest,
                size,
                offset,
                chunk,
            } => {
                let put = self.output_piece(&lease, &digest, (size, offset), chunk)?;
                let written = self.propose(id, caller.actor(), put).await?;
                if let Reply::ArtifactReceived(received) = written.reply
                    && let Some(refusal) = received.refusal
                {
                    return Err(refusal.into());
                }
            }
        }
        Ok(accepted(request_id))
    }

    /// Compares what a worker has with the ledger, tells it, and from then on gives it what is its own.
    async fn reconcile_worker(
        &self,
        caller: &Caller,
        entry: &Arc<Entry>,
        request_id: Id,
        held: Vec<HeldLease>,
    ) -> Result<Option<ToWorker>, Error> {
        if held.len() > limits::LEASES_HELD {
            let (cause, next) = (
                format!("{} leases", held.len()),
                format!("name at most {}", limits::LEASES_HELD),
            );
            return Err(Error::invalid("held", cause, next));
        }
        let held: Result<Vec<Held>, Error> = held.into_iter().map(held_lease).collect();
        let reconcile = leases::Reconcile {
            worker_id: entry.device_id,
            epoch: entry.epoch(),
            held: held?,
        };
        let written = self.propose(request_id, caller.actor(), reconcile).await?;
        let Reply::Reconciled(found) = written.reply else {
            return Err(self.odd_reply("leases.reconcile"));
        };
        self.applied(written.receipt).await?;
        {
            // Offers wait for the lock, and so come after this.
            let mut seat = entry.worker.lock();
            seat.told.extend(found.end.iter().map(|end| end.lease_id));
            seat.reconciled = true;
            let told = ToWorker::Reconciled {
                request_id: request_id.to_string(),
                keep: found.keep,
                end: found.end,
            };
            if !entry.outbox.put(Waiting::Worker(Box::new(told))) {
                drop(seat);
                self.end_session(entry, End::SlowReader);
                return Ok(None);
            }
        }
        self.deliver_work(entry);
        self.look_after(entry);
        Ok(None)
    }

    async fn attest(
        &self,
        caller: &Caller,
        entry: &Arc<Entry>,
        (id, request_id): (Id, &str),
        attest: fleet::Attest,
    ) -> Result<Option<ToWorker>, Error> {
        // What is asked from now on is another statement.
        entry.worker.lock().shown = None;
        let written = match self.propose(id, caller.actor(), attest).await {
            Ok(written) => written,
            // What cannot be a statement at all; what was not decided is an answer like any other.
            Err(Error::Rejected(reject)) if !is_undecided(&reject.clone().into()) => {
                return Ok(Some(ToWorker::Attested(not_admitted(request_id, &reject))));
            }
            Err(error) => return Err(error),
        };
        let Reply::Attestation(outcome) = written.reply else {
            return Err(self.odd_reply("fleet.attest"));
        };
        let evidence = outcome.evidence().as_str();
        if let Some(reject) = outcome.refusal {
            return Ok(Some(ToWorker::Attested(not_admitted(request_id, &reject))));
        }
        entry.worker.lock().statement = Some((outcome.now, outcome.expires_at));
        Ok(Some(ToWorker::Attested(AttestAnswer {
            request_id: request_id.to_owned(),
            admitted: true,
            code: String::new(),
            message: String::new(),
            next: String::new(),
            evidence,
            expires_in_ms: outcome.expires_at.saturating_sub(outcome.now),
        })))
    }

    /// A piece of an output, of the run that the lease is of.
    fn output_piece(
        &self,
        lease: &LeaseName,
        digest: &[u8],
        (size, offset): (u64, u64),
        chunk: bytes::Bytes,
    ) -> Result<leases::PutArtifact, Error> {
        let lease_id = parse_id("lease_id", &lease.id)?;
        let found = leases::lease(&self.replica().view(), lease_id)
            .ok_or_else(|| Reject::new(Code::NoSuchLease, [&lease_id]))?;
        Ok(leases::PutArtifact {
            run_id: found.run_id,
            digest: digest_of(digest)?,
            size,
            offset,
            chunk,
            lease_id: Some(lease_id),
            fence: lease.fence,
        })
    }
}

/// A SHA-256 from a field.
pub(crate) fn digest_of(bytes: &[u8]) -> Result<Digest, Error> {
    Digest::from_slice(bytes).ok_or_else(|| {
        Error::invalid(
            "digest",
            format!("it has {} bytes", bytes.len()),
            "send a SHA-256: 32 bytes",
        )
    })
}

fn not_admitted(request_id: &str, reject: &Reject) -> AttestAnswer {
    AttestAnswer {
        request_id: request_id.to_owned(),
        admitted: false,
        code: reject.code(),
        message: reject.message(),
        next: reject.next(),
        evidence: "",
        expires_in_ms: 0,
    }
}

fn held_lease(held: HeldLease) -> Result<Held, Error> {
    let state = match held.state.as_str() {
        "running" => HeldState::Running,
        "finished" => HeldState::Finished,
        "cleaned" => HeldState::Cleaned,
        "unclean" => HeldState::Unclean,
        other => {
            let shown: String = other.chars().take(32).collect();
            return Err(Error::invalid(
                "held.state",
                format!("{shown:?} is no state"),
                "send running, finished, cleaned or unclean",
            ));
        }
    };
    Ok(Held {
        lease_id: parse_id("held.lease_id", &held.lease.id)?,
        fence: held.lease.fence,
        state: state as i32,
        message: held.message,
    })
}

fn finish(lease: &LeaseName, finished: Finished) -> Result<leases::Finish, Error> {
    let outcome = Outcome::parse(&finished.outcome).ok_or_else(|| {
        let shown: String = finished.outcome.chars().take(32).collect();
        Error::invalid(
            "outcome",
            format!("{shown:?} is no outcome"),
            "send succeeded, failed, refused or cancelled",
        )
    })?;
    if outcome == Outcome::Succeeded || !finished.result.is_empty() {
        crate::json::check("result", &finished.result)?;
    }
    let error = (outcome != Outcome::Succeeded).then_some(Failure {
        code: finished.error_code,
        message: finished.error_message,
    });
    Ok(leases::Finish {
        lease_id: parse_id("lease_id", &lease.id)?,
        fence: lease.fence,
        outcome: outcome as i32,
        exit_code: finished.exit_code,
        result: finished.result,
        outputs: finished.outputs,
        error,
        log_tail: finished.log_tail,
        usage: finished.usage,
        sandbox: finished.sandbox,
    })
}

fn violation(
    worker_id: Id,
    lease: &LeaseName,
    kind: String,
    message: String,
) -> Result<fleet::Violate, Error> {
    Ok(fleet::Violate {
        worker_id,
        lease_id: parse_id("lease_id", &lease.id)?,
        fence: lease.fence,
        kind,
        message,
    })
}

fn clean(lease: &LeaseName, cleaned: CleanedUp) -> Result<leases::Cleaned, Error> {
    Ok(leases::Cleaned {
        lease_id: parse_id("lease_id", &lease.id)?,
        fence: lease.fence,
        ok: cleaned.ok,
        message: cleaned.message,
        removed_files: cleaned.removed_files,
        removed_bytes: cleaned.removed_bytes,
    })
}
