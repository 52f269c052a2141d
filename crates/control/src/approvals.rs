//! Approvals and grants: asked for, decided, waited for, taken back.
//!
//! What never lives here: what a decision covers, and when a grant starts a run (`apply` decides both, at the
//! entry's place in the log). Invariants: the approval of a pairing is decided by the pairing's own commands,
//! because its certificate is issued in that entry; a wait is answered from the state and never from memory;
//! what the clock has ended is shown as ended, also before that is written down.

use std::time::Duration;

use palyra_state::approvals::{
    self as records, Approval, ApprovalState, CreateGrant, Decide, Grant, GrantState, Policy, RevokeGrant,
    Risk, Scope, SetPolicy, Subject, Withdraw,
};
use palyra_state::{Code, Id, Read, Reject, Reply};

use crate::caller::Caller;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo, bounded_wait};
use crate::dispatch::{Page, next_page, page_size, page_start};
use crate::error::Error;
use crate::limits::DISPATCH_WAIT_MAX;
use crate::selector;

/// An approval as it stands now.
#[derive(Debug, Clone, PartialEq)]
pub struct ApprovalView {
    /// The record.
    pub record: Approval,
    /// Where it stands by this replica's clock.
    pub status: ApprovalState,
}

/// A grant as it stands now.
#[derive(Debug, Clone, PartialEq)]
pub struct GrantView {
    /// The record.
    pub record: Grant,
    /// Where it stands by this replica's clock, and by what its approval is worth now.
    pub status: GrantState,
}

/// What an operator asks permission for.
#[derive(Debug, Clone, Default)]
pub struct AskGrant {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// The grant's id, a ULID; empty for a fresh one.
    pub grant_id: String,
    /// The run's id, a ULID; empty for a fresh one.
    pub run_id: String,
    /// The tool.
    pub tool: String,
    /// A session of the operator; may be empty.
    pub session: String,
    /// How long the run may be started; 0: an hour.
    pub ttl_ms: u64,
    /// For the person who decides.
    pub summary: String,
    /// `low`, `medium`, `high` or `critical`; empty for `medium`.
    pub risk: String,
}

/// What an operator decides.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// The approval, by id or a prefix that names one.
    pub id: String,
    /// `allow` or `deny`.
    pub decision: String,
    /// `once`, `session` or `timeboxed`; empty for `once`.
    pub scope: String,
    /// How long it is good, when it covers more; 0: an hour.
    pub ttl_ms: u64,
    /// Why; may be empty.
    pub reason: String,
    /// Of a pairing: what was read off the machine's screen; empty: not compared.
    pub sas: String,
}

impl Control {
    /// Asks for a grant. The caller has been admitted as operator.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad id or risk, and what the state machine refuses.
    pub async fn create_grant(
        &self,
        caller: &Caller,
        ask: AskGrant,
    ) -> Result<(GrantView, WriteInfo), Error> {
        let request_id = self.request_id(&ask.request_id)?;
        let grant_id = self.id_or_fresh("grant_id", &ask.grant_id)?;
        let run_id = self.id_or_fresh("run_id", &ask.run_id)?;
        let risk = match ask.risk.as_str() {
            "" => Risk::Medium,
            text => Risk::parse(text)
                .ok_or_else(|| bad_word("risk", text, "use low, medium, high or critical"))?,
        };
        let command = CreateGrant {
            grant_id,
            run_id,
            tool: ask.tool,
            session: ask.session,
            ttl_ms: ask.ttl_ms,
            summary: ask.summary,
            risk: risk as i32,
            approval_id: self.fresh_id(),
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::GrantCreated(created) = written.reply else {
            return Err(self.odd_reply("approvals.create_grant"));
        };
        self.applied(written.receipt).await?;
        let view = self.replica().view();
        let duplicate = written.info.duplicate || created.grant_id != grant_id;
        let info = WriteInfo {
            duplicate,
            ..written.info
        };
        Ok((grant_view(&view, created.grant_id, self.now_ms(&view))?, info))
    }

    fn id_or_fresh(&self, field: &'static str, text: &str) -> Result<Id, Error> {
        if text.is_empty() {
            Ok(self.fresh_id())
        } else {
            selector::parse_id(field, text)
        }
    }

    /// Decides an approval; that of a pairing by what pairing does: an allowed one is let in with a
    /// certificate of this replica. The caller has been admitted as operator.
    ///
    /// # Errors [`Error::Invalid`] for a bad word, and what the state machine refuses: decided before,
    /// expired, four eyes.
    pub async fn decide_approval(
        &self,
        caller: &Caller,
        verdict: Verdict,
    ) -> Result<(ApprovalView, WriteInfo), Error> {
        let allow = match verdict.decision.as_str() {
            "allow" => true,
            "deny" => false,
            text => return Err(bad_word("decision", text, "use allow or deny")),
        };
        let scope = match verdict.scope.as_str() {
            "" => Scope::Once,
            text => {
                Scope::parse(text).ok_or_else(|| bad_word("scope", text, "use once, session or timeboxed"))?
            }
        };
        self.barrier().await?;
        let found = {
            let view = self.replica().view();
            let id = selector::approval(&view, &verdict.id)?;
            records::approval(&view, id).ok_or_else(|| Reject::new(Code::NoSuchApproval, [&id]))?
        };
        if found.subject() == Subject::Pairing {
            return self
                .decide_pairing(caller, &verdict, found.id, allow, scope)
                .await;
        }
        if !verdict.sas.is_empty() {
            let next = "check digits belong to pairing requests; leave them out";
            return Err(Error::invalid("sas", "the approval is of a grant", next));
        }
        if !allow && scope != Scope::Once {
            let next = "leave the scope out: what is denied is what was asked";
            return Err(Error::invalid("scope", "a denial covers nothing else", next));
        }
        let command = Decide {
            approval_id: found.id,
            allow,
            scope: scope as i32,
            ttl_ms: verdict.ttl_ms,
            reason: verdict.reason,
        };
        let request_id = self.request_id(&verdict.request_id)?;
        self.write_approval(caller, request_id, found.id, command).await
    }

    async fn decide_pairing(
        &self,
        caller: &Caller,
        verdict: &Verdict,
        id: Id,
        allow: bool,
        scope: Scope,
    ) -> Result<(ApprovalView, WriteInfo), Error> {
        if scope != Scope::Once {
            let next = "leave the scope out: each machine is decided for itself";
            return Err(Error::invalid(
                "scope",
                "the approval is of a pairing request",
                next,
            ));
        }
        let (request_id, name) = (&verdict.request_id, id.to_string());
        let (_, info) = if allow {
            self.approve(caller, request_id, &name, &verdict.sas, &verdict.reason)
                .await?
        } else {
            self.reject(caller, request_id, &name, &verdict.reason).await?
        };
        let view = self.replica().view();
        Ok((approval_view(&view, id, self.now_ms(&view))?, info))
    }

    /// Proposes what is done to an approval, and answers what it is then.
    async fn write_approval(
        &self,
        caller: &Caller,
        request_id: Id,
        id: Id,
        command: impl Into<palyra_state::Command>,
    ) -> Result<(ApprovalView, WriteInfo), Error> {
        let written = self.propose(request_id, caller.actor(), command).await?;
        self.applied(written.receipt).await?;
        let view = self.replica().view();
        Ok((approval_view(&view, id, self.now_ms(&view))?, written.info))
    }

    /// Takes back an approval of a grant that waits, or a decision that stands, with what rests on it and was
    /// not used.
    ///
    /// # Errors
    /// What the state machine refuses: there is none, it is of a pairing, or nothing rests on it.
    pub async fn withdraw_approval(
        &self,
        caller: &Caller,
        request_id: &str,
        id: &str,
        reason: &str,
    ) -> Result<(ApprovalView, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        self.barrier().await?;
        let approval_id = selector::approval(&self.replica().view(), id)?;
        let command = Withdraw {
            approval_id,
            reason: reason.to_owned(),
        };
        self.write_approval(caller, request_id, approval_id, command)
            .await
    }

    /// Takes a grant back, and with `cancel_run` the run that it started, too.
    ///
    /// # Errors
    /// What the state machine refuses: there is none, or it was denied or has expired.
    pub async fn revoke_grant(
        &self,
        caller: &Caller,
        request_id: &str,
        id: &str,
        reason: &str,
        cancel_run: bool,
    ) -> Result<(GrantView, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        self.barrier().await?;
        let grant_id = selector::grant(&self.replica().view(), id)?;
        let command = RevokeGrant {
            grant_id,
            reason: reason.to_owned(),
            cancel_run,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        self.applied(written.receipt).await?;
        let view = self.replica().view();
        Ok((grant_view(&view, grant_id, self.now_ms(&view))?, written.info))
    }

    /// Approvals by id, oldest first; without a state those that wait, with `all` all of them; without a
    /// subject of all.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad state, subject or page, and what a read can say.
    pub async fn list_approvals(
        &self,
        read: ReadOptions,
        state: &str,
        subject: &str,
        after: &str,
        limit: u32,
    ) -> Result<Page<ApprovalView>, Error> {
        let wanted = match state {
            "" => Some(ApprovalState::Pending),
            "all" => None,
            text => Some(ApprovalState::parse(text).ok_or_else(|| bad_state(text, &approval_states()))?),
        };
        let subject = match subject {
            "" => None,
            text => {
                Some(Subject::parse(text).ok_or_else(|| bad_word("subject", text, "use pairing or grant"))?)
            }
        };
        let (view, info) = self.read(read).await?;
        let now = self.now_ms(&view);
        let limit = page_size(limit);
        let mut after = page_start(after)?;
        let mut items = Vec::new();
        while items.len() <= limit {
            let page = match wanted {
                // Those that the clock has ended are written as pending until somebody writes that down.
                None | Some(ApprovalState::Expired) => records::approvals(&view, after, limit),
                Some(state) => records::approvals_by_state(&view, state, after, limit),
            };
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            let seen = page.into_iter().map(|record| seen_approval(record, now));
            items.extend(seen.filter(|seen| {
                wanted.is_none_or(|wanted| seen.status == wanted)
                    && subject.is_none_or(|subject| seen.record.subject() == subject)
            }));
        }
        let next = next_page(&mut items, limit, |seen| seen.record.id.to_string());
        Ok(Page {
            items,
            next,
            read: info,
        })
    }

    /// One approval, by id or a prefix that names one.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is none, and what a read can say.
    pub async fn get_approval(&self, read: ReadOptions, id: &str) -> Result<(ApprovalView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let id = selector::approval(&view, id)?;
        Ok((approval_view(&view, id, self.now_ms(&view))?, info))
    }

    /// Waits until an approval is decided or over, or `wait_ms` (at most 300,000) are over; answers it as it
    /// is then.
    ///
    /// # Errors [`Error::Rejected`] when there is none; [`Error::Busy`]; [`Error::Stale`] as soon as this
    /// replica is cut off, for it would not hear of the decision.
    pub async fn wait_approval(&self, id: &str, wait_ms: u64) -> Result<(ApprovalView, ReadInfo), Error> {
        self.barrier().await?;
        let id = selector::approval(&self.replica().view(), id)?;
        let waits = |view: &dyn Read| {
            let found = records::approval(view, id);
            let now = self.now_ms(view);
            found.is_some_and(|found| records::approval_status(&found, now) == ApprovalState::Pending)
        };
        let wait = bounded_wait(wait_ms, Duration::ZERO, DISPATCH_WAIT_MAX);
        let seen = self.waiters().until(id, wait, || {
            let view = self.replica().view();
            let over = !waits(&view);
            (view, over || self.check_fresh().is_err())
        });
        let view = seen.await?;
        if waits(&view) {
            self.check_fresh()?;
        }
        let info = self.read_info(view.index());
        Ok((approval_view(&view, id, self.now_ms(&view))?, info))
    }

    /// Grants by id, oldest first; without a state all of them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad state or page, and what a read can say.
    pub async fn list_grants(
        &self,
        read: ReadOptions,
        state: &str,
        after: &str,
        limit: u32,
    ) -> Result<Page<GrantView>, Error> {
        let wanted = match state {
            "" | "all" => None,
            text => Some(GrantState::parse(text).ok_or_else(|| bad_state(text, &grant_states()))?),
        };
        let (view, info) = self.read(read).await?;
        let now = self.now_ms(&view);
        let limit = page_size(limit);
        let mut after = page_start(after)?;
        let mut items = Vec::new();
        while items.len() <= limit {
            let page = match wanted {
                // Those that ended by time, or by who decided being removed, are written as live until then.
                None | Some(GrantState::Expired | GrantState::Revoked) => {
                    records::grants(&view, after, limit)
                }
                Some(state) => records::grants_by_state(&view, state, after, limit),
            };
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            let seen = page.into_iter().map(|record| seen_grant(&view, record, now));
            items.extend(seen.filter(|seen| wanted.is_none_or(|wanted| seen.status == wanted)));
        }
        let next = next_page(&mut items, limit, |seen| seen.record.id.to_string());
        Ok(Page {
            items,
            next,
            read: info,
        })
    }

    /// One grant, by id or a prefix that names one.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is none, and what a read can say.
    pub async fn get_grant(&self, read: ReadOptions, id: &str) -> Result<(GrantView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let id = selector::grant(&view, id)?;
        Ok((grant_view(&view, id, self.now_ms(&view))?, info))
    }

    /// What approvals are held to.
    ///
    /// # Errors
    /// What a read can say.
    pub async fn approval_policy(&self, read: ReadOptions) -> Result<(Policy, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        Ok((records::policy(&view), info))
    }

    /// Sets what approvals are held to. The caller is an admin.
    ///
    /// # Errors
    /// What the state machine refuses: a time that is out of range.
    pub async fn set_approval_policy(
        &self,
        caller: &Caller,
        request_id: &str,
        policy: Policy,
    ) -> Result<(Policy, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        let written = self
            .propose(request_id, caller.actor(), SetPolicy { policy })
            .await?;
        self.applied(written.receipt).await?;
        Ok((records::policy(&self.replica().view()), written.info))
    }
}

fn seen_approval(record: Approval, now: u64) -> ApprovalView {
    ApprovalView {
        status: records::approval_status(&record, now),
        record,
    }
}

fn seen_grant(view: &dyn Read, record: Grant, now: u64) -> GrantView {
    GrantView {
        status: records::grant_status(view, &record, now),
        record,
    }
}

fn approval_view(view: &dyn Read, id: Id, now: u64) -> Result<ApprovalView, Error> {
    let found = records::approval(view, id).ok_or_else(|| Reject::new(Code::NoSuchApproval, [&id]))?;
    Ok(seen_approval(found, now))
}

fn grant_view(view: &dyn Read, id: Id, now: u64) -> Result<GrantView, Error> {
    let found = records::grant(view, id).ok_or_else(|| Reject::new(Code::NoSuchGrant, [&id]))?;
    Ok(seen_grant(view, found, now))
}

fn approval_states() -> Vec<&'static str> {
    ApprovalState::ALL.iter().map(|state| state.as_str()).collect()
}

fn grant_states() -> Vec<&'static str> {
    GrantState::ALL.iter().map(|state| state.as_str()).collect()
}

fn bad_state(text: &str, states: &[&str]) -> Error {
    bad_word("state", text, format!("use one of {}, all", states.join(", ")))
}

fn bad_word(field: &'static str, text: &str, next: impl Into<String>) -> Error {
    let shown: String = text.chars().take(32).collect();
    Error::invalid(field, format!("{shown:?} is none"), next)
}
