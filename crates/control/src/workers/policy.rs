//! What workers are held to, for operators: look, and change with the difference shown.

use palyra_state::fleet::{self as records, Policy};
use palyra_state::{Code, Reject, Reply};

use crate::caller::Caller;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo};
use crate::error::Error;

/// A field that differs.
pub use palyra_state::fleet::Change as PolicyChange;

/// A policy that an operator wants.
#[derive(Debug, Clone, Default)]
pub struct SetPolicy {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// The policy.
    pub policy: Policy,
    /// The version that it replaces.
    pub expected_version: u64,
    /// Why.
    pub reason: String,
    /// Only look what it would change.
    pub dry_run: bool,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicySet {
    /// The policy as it is, or would be.
    pub policy: Policy,
    /// What differs from the one before.
    pub changes: Vec<PolicyChange>,
    /// Admitted workers that it does not allow.
    pub affected: u64,
    /// The entry; nothing of a dry run.
    pub write: Option<WriteInfo>,
}

impl Control {
    /// What workers are held to; version 0 when nothing was set.
    ///
    /// # Errors
    /// What a read can say.
    pub async fn fleet_policy(&self, read: ReadOptions) -> Result<(Policy, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        Ok((records::policy(&view).unwrap_or_default(), info))
    }

    /// Sets what workers are held to, or says what that would change. The caller has been admitted as admin.
    ///
    /// # Errors
    /// What the state machine refuses: another version is in force, the policy is no policy.
    pub async fn set_fleet_policy(&self, caller: &Caller, set: SetPolicy) -> Result<PolicySet, Error> {
        let request_id = self.request_id(&set.request_id)?;
        let wanted = records::normal(&set.policy)?;
        // Looked at before the change: afterwards the one before is gone.
        self.barrier().await?;
        let (changes, affected, before) = {
            let view = self.replica().view();
            let before = records::policy(&view);
            let version = before.as_ref().map_or(0, |policy| policy.version);
            let changes = records::diff(before.as_ref(), &wanted);
            (
                changes,
                records::unmet(&view, self.now_ms(&view), &wanted),
                version,
            )
        };
        if set.dry_run {
            if before != set.expected_version {
                return Err(Reject::new(Code::PolicyConflict, [&set.expected_version, &before]).into());
            }
            let policy = Policy {
                version: before + 1,
                ..wanted
            };
            return Ok(PolicySet {
                policy,
                changes,
                affected,
                write: None,
            });
        }
        let command = records::SetPolicy {
            policy: wanted.clone(),
            expected_version: set.expected_version,
            reason: set.reason,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::PolicySet(done) = written.reply else {
            return Err(self.odd_reply("fleet.set_policy"));
        };
        self.applied(written.receipt).await?;
        let stored = records::policy(&self.replica().view()).filter(|policy| policy.version == done.version);
        Ok(PolicySet {
            policy: stored.unwrap_or(Policy {
                version: done.version,
                ..wanted
            }),
            changes,
            affected,
            write: Some(written.info),
        })
    }
}
