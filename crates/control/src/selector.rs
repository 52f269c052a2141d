//! How people name things: a full ULID, a prefix of one, or a name, as long as it names exactly one.
//!
//! Invariant: a full ULID is never looked up here, so that the state machine decides whether it exists.

use palyra_state::{Id, Read, approvals, dispatch, fleet, identity, leases, limits, pairing};

use crate::error::{Error, Refusal};

/// How many matches an ambiguous selector shows.
const SHOWN: usize = 5;

/// A ULID from a field.
pub(crate) fn parse_id(field: &'static str, text: &str) -> Result<Id, Error> {
    Id::parse(text).filter(|id| !id.is_zero()).ok_or_else(|| {
        let shown: String = text.chars().take(64).collect();
        Error::invalid(
            field,
            format!("{shown:?} is no ULID"),
            "send 26 characters of 0-9 and A-Z without I, L, O, U",
        )
    })
}

/// A ULID in its one canonical spelling, as proofs cover it.
pub(crate) fn parse_exact_id(field: &'static str, text: &str) -> Result<Id, Error> {
    let id = parse_id(field, text)?;
    if id.to_string() == text {
        return Ok(id);
    }
    let next = format!("send it as {id}");
    Err(Error::invalid(
        field,
        format!("{text:?} is no canonical ULID"),
        next,
    ))
}

/// The device that a selector names.
pub(crate) fn device(view: &dyn Read, selector: &str) -> Result<Id, Error> {
    if let Some(id) = Id::parse(selector) {
        return Ok(id);
    }
    if selector.is_empty() {
        return Err(Error::invalid(
            "device_id",
            "it is empty",
            "name a device: palyra device ls",
        ));
    }
    let named = devices_named(view, selector);
    if !named.is_empty() {
        return one("device", selector, named);
    }
    let found = identity::devices_by_prefix(view, selector, SHOWN + 1);
    let mut found: Vec<Id> = found.into_iter().map(|device| device.id).collect();
    // Removed ones only when nothing that is there is meant.
    if found.is_empty() {
        found = removed_named(view, selector);
    }
    if found.is_empty() {
        let bans = identity::bans_by_prefix(view, selector, SHOWN + 1);
        found = bans.into_iter().map(|ban| ban.id).collect();
    }
    one("device", selector, found)
}

/// Removed devices of this name.
fn removed_named(view: &dyn Read, name: &str) -> Vec<Id> {
    let mut found = Vec::new();
    let mut after = None;
    loop {
        let page = identity::bans(view, after, limits::PAGE_MAX);
        let Some(last) = page.last() else { return found };
        after = Some(last.id);
        found.extend(page.iter().filter(|ban| ban.name == name).map(|ban| ban.id));
    }
}

/// Trusted devices of this name; if there are none, revoked ones: a repeated revocation still finds its
/// device.
fn devices_named(view: &dyn Read, name: &str) -> Vec<Id> {
    let (mut trusted, mut revoked) = (Vec::new(), Vec::new());
    let mut after = None;
    loop {
        let page = identity::devices(view, after, limits::PAGE_MAX);
        let Some(last) = page.last() else { break };
        after = Some(last.id);
        for device in page.iter().filter(|device| device.name == name) {
            match device.status() {
                identity::DeviceStatus::Trusted => trusted.push(device.id),
                identity::DeviceStatus::Revoked => revoked.push(device.id),
            }
        }
    }
    if trusted.is_empty() { revoked } else { trusted }
}

/// The pairing request that a selector names: its id, the id or name of its device, or a prefix of an id. Of
/// several requests of a device the one that waits is meant; when none does, the newest, so that a repeated
/// decision finds what it decided.
pub(crate) fn pairing_request(view: &dyn Read, selector: &str) -> Result<Id, Error> {
    if let Some(id) = Id::parse(selector) {
        if pairing::request(view, id).is_some() {
            return Ok(id);
        }
        let found = requests_of(view, |request| request.device_id == id);
        return Ok(found.first().copied().unwrap_or(id));
    }
    if selector.is_empty() {
        return Err(Error::invalid(
            "id",
            "it is empty",
            "name a pairing request: palyra pairing ls",
        ));
    }
    let found = pairing::requests_by_prefix(view, selector, SHOWN + 1);
    if !found.is_empty() {
        return one(
            "pairing request",
            selector,
            found.into_iter().map(|request| request.id).collect(),
        );
    }
    let range = Id::prefix_range(selector);
    let found = requests_of(view, |request| {
        let prefixed = range.is_some_and(|(first, last)| (first..=last).contains(&request.device_id));
        prefixed || request.device_name == selector
    });
    one("pairing request", selector, found)
}

/// Requests of some devices: those that wait; when none does, the newest.
fn requests_of(view: &dyn Read, wanted: impl Fn(&pairing::Request) -> bool) -> Vec<Id> {
    let (mut waiting, mut newest) = (Vec::new(), None);
    let mut after = None;
    loop {
        let page = pairing::requests(view, after, limits::PAGE_MAX);
        let Some(end) = page.last() else { break };
        after = Some(end.id);
        for request in page.iter().filter(|request| wanted(request)) {
            newest = newest.max(Some((request.created_at, request.id)));
            if request.status() == pairing::RequestStatus::PendingApproval {
                waiting.push(request.id);
            }
        }
    }
    if waiting.is_empty() {
        newest.into_iter().map(|(_, id)| id).collect()
    } else {
        waiting
    }
}

/// The code that a selector names: its id, a prefix, or its number with or without the `C`.
pub(crate) fn code(view: &dyn Read, selector: &str) -> Result<Id, Error> {
    if let Some(id) = Id::parse(selector) {
        return Ok(id);
    }
    let digits = selector.strip_prefix(['C', 'c']).unwrap_or(selector);
    if let Some(view) = digits
        .parse()
        .ok()
        .and_then(|number| pairing::code_by_number(view, number))
    {
        return Ok(view.id);
    }
    let range = Id::prefix_range(selector).filter(|_| !selector.is_empty());
    let all = pairing::codes(view);
    let matching = all
        .iter()
        .filter(|code| range.is_some_and(|(first, last)| (first..=last).contains(&code.id)));
    one("pairing code", selector, matching.map(|code| code.id).collect())
}

/// The dispatch that a selector names: its id, or a prefix of one.
pub(crate) fn dispatch_id(view: &dyn Read, selector: &str) -> Result<Id, Error> {
    if let Some(id) = Id::parse(selector) {
        return Ok(id);
    }
    let Some((first, last)) = Id::prefix_range(selector).filter(|_| !selector.is_empty()) else {
        return Err(Error::not_found("dispatch", selector));
    };
    let mut found: Vec<Id> = Vec::new();
    // The page begins after its argument; the first id of the range itself is looked up apart.
    found.extend(dispatch::dispatch(view, first).map(|dispatch| dispatch.id));
    let page = dispatch::list(view, Some(first), SHOWN + 1);
    found.extend(
        page.iter()
            .map(|dispatch| dispatch.id)
            .take_while(|id| *id <= last),
    );
    one("dispatch", selector, found)
}

/// The approval that a selector names: its id, or a prefix of one.
pub(crate) fn approval(view: &dyn Read, selector: &str) -> Result<Id, Error> {
    if let Some(id) = Id::parse(selector) {
        return Ok(id);
    }
    if selector.is_empty() {
        let next = "name an approval: palyra approval ls";
        return Err(Error::invalid("id", "it is empty", next));
    }
    let found = approvals::approvals_by_prefix(view, selector, SHOWN + 1);
    one("approval", selector, found.into_iter().map(|it| it.id).collect())
}

/// The grant that a selector names: its id, or a prefix of one.
pub(crate) fn grant(view: &dyn Read, selector: &str) -> Result<Id, Error> {
    if let Some(id) = Id::parse(selector) {
        return Ok(id);
    }
    if selector.is_empty() {
        return Err(Error::invalid(
            "id",
            "it is empty",
            "name a grant: palyra grant ls",
        ));
    }
    let found = approvals::grants_by_prefix(view, selector, SHOWN + 1);
    one("grant", selector, found.into_iter().map(|it| it.id).collect())
}

/// The worker that a selector names: its id, a prefix of one, or the name of its device.
pub(crate) fn worker(view: &dyn Read, selector: &str) -> Result<Id, Error> {
    if let Some(id) = Id::parse(selector) {
        return Ok(id);
    }
    if selector.is_empty() {
        return Err(Error::invalid(
            "id",
            "it is empty",
            "name a worker: palyra worker ls",
        ));
    }
    let mut named = devices_named(view, selector);
    named.retain(|id| fleet::worker(view, *id).is_some());
    if named.is_empty() {
        let found = fleet::workers_by_prefix(view, selector, SHOWN + 1);
        named = found.iter().map(|worker| worker.id).collect();
    }
    one("worker", selector, named)
}

/// The run that a selector names: its id, or a prefix of one.
pub(crate) fn run_id(view: &dyn Read, selector: &str) -> Result<Id, Error> {
    by_prefix("run", selector, |first, last| {
        let found = leases::runs_between(view, first, last, SHOWN + 1);
        found.iter().map(|run| run.id).collect()
    })
}

/// The lease that a selector names: its id, or a prefix of one.
pub(crate) fn lease_id(view: &dyn Read, selector: &str) -> Result<Id, Error> {
    by_prefix("lease", selector, |first, last| {
        let found = leases::leases_between(view, first, last, SHOWN + 1);
        found.iter().map(|lease| lease.id).collect()
    })
}

fn by_prefix(
    kind: &'static str,
    selector: &str,
    between: impl FnOnce(Id, Id) -> Vec<Id>,
) -> Result<Id, Error> {
    if let Some(id) = Id::parse(selector) {
        return Ok(id);
    }
    let range = Id::prefix_range(selector).filter(|_| !selector.is_empty());
    let found = range.map(|(first, last)| between(first, last));
    one(kind, selector, found.unwrap_or_default())
}

fn one(kind: &'static str, selector: &str, mut found: Vec<Id>) -> Result<Id, Error> {
    match found.len() {
        0 => Err(Error::not_found(kind, selector)),
        1 => Ok(found.remove(0)),
        _ => {
            let matches = found.iter().take(SHOWN).map(ToString::to_string).collect();
            Err(Refusal::Ambiguous {
                kind,
                selector: selector.to_owned(),
                matches,
            }
            .into())
        }
    }
}
