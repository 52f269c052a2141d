//! The grant that a run is started with: asked for, waited for, and what is said when it is not given.

use palyra_client::{Class, Client, MAX_WAIT_MS, new_ulid};
use palyra_proto::approval::v1::{CreateGrantRequest, GetGrantRequest, GrantInfo};
use tokio::time::Instant;

use super::start::Start;
use crate::failure::{Failure, Result};
use crate::output::note;
use crate::output::time::millis;

/// The grant with this id.
pub(super) async fn get(client: &Client, id: &str) -> Result<GrantInfo> {
    let request = GetGrantRequest {
        id: id.to_owned(),
        read: None,
    };
    Ok(client.get_grant(request).await?.grant.unwrap_or_default())
}

/// Asks for a grant of a new run.
pub(super) async fn create(client: &Client, ask: &Start, run_id: &str) -> Result<GrantInfo> {
    let (tool, session, summary, risk) = ask.asks();
    let request = CreateGrantRequest {
        request_id: new_ulid(),
        grant_id: new_ulid(),
        run_id: run_id.to_owned(),
        tool: tool.to_owned(),
        session: session.to_owned(),
        ttl_ms: 0,
        summary: summary.to_owned(),
        risk: risk.to_owned(),
    };
    Ok(client.create_grant(request).await?.grant.unwrap_or_default())
}

/// Waits until it is decided; answers the run that may be started.
///
/// Errors: it was denied, has expired, or was used; nobody decided in time.
pub(super) async fn wait_active(client: &Client, mut grant: GrantInfo, until: Instant) -> Result<String> {
    if grant.state == "pending" {
        note(&format!(
            "waits for approval {}; who may decide: palyra approval decide {} --allow",
            grant.approval_id, grant.approval_id
        ));
    }
    while grant.state == "pending" {
        let left = millis(until.saturating_duration_since(Instant::now()));
        if left == 0 {
            break;
        }
        let wait_ms = u32::try_from(left.min(MAX_WAIT_MS.into())).unwrap_or(MAX_WAIT_MS);
        let decided = client.wait_approval(&grant.approval_id, wait_ms).await?;
        let index = decided.read.map_or(0, |read| read.index);
        grant = get(&client.clone().at_least(index), &grant.id).await?;
    }
    verdict(grant)
}

fn verdict(grant: GrantInfo) -> Result<String> {
    let (id, run) = (&grant.id, &grant.run_id);
    let (class, message, next) = match grant.state.as_str() {
        // A used one: the same start again is answered, and another one is refused by the cluster.
        "active" | "used" => return Ok(grant.run_id),
        "pending" => (
            Class::Precondition,
            format!("nobody decided approval {} in time", grant.approval_id),
            format!("once it is decided: palyra run start --grant {id} with the rest as before"),
        ),
        state => {
            let by = match grant.ended_by.as_str() {
                "" => String::new(),
                by => format!(" by {by}"),
            };
            let reason = match grant.reason.as_str() {
                "" => String::new(),
                reason => format!(": {reason}"),
            };
            (
                Class::Denied,
                format!("grant {id} of run {run} is {state}{by}{reason}"),
                format!("palyra approval show {}", grant.approval_id),
            )
        }
    };
    Err(Failure::local(class, message, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_given_grant_starts_a_run() {
        let grant = |state: &str| GrantInfo {
            id: "G".to_owned(),
            run_id: "R".to_owned(),
            state: state.to_owned(),
            ended_by: "operator:anna".to_owned(),
            reason: "not today".to_owned(),
            ..GrantInfo::default()
        };
        assert_eq!(verdict(grant("active")).unwrap(), "R");
        let denied = verdict(grant("denied")).unwrap_err();
        assert_eq!(
            denied.words(),
            "grant G of run R is denied by operator:anna: not today"
        );
        assert_eq!(denied.exit_code(), 3);
        assert_eq!(verdict(grant("pending")).unwrap_err().exit_code(), 7);
    }
}
