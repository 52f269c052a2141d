//! The follower of the feed: what the journal says happened, carried out on this replica.
//!
//! What never lives here: decisions. Each row is a hint to look at the state again, so a row that is seen
//! twice, late, or together with its consequences does no harm. Invariants: a replica carries out everything
//! up to an index before it says so; a gap in the feed leads to a look at everything, never to silence.

use std::sync::Arc;

use palyra_replica::FeedItem;
use palyra_state::dispatch::{self, State};
use palyra_state::{Cursor, Id, Read, Row, nodes};

use crate::caller::end_of;
use crate::control::Control;
use crate::outbox::{End, Waiting};
use crate::registry::Entry;
use crate::workers::delivery::concerned;

impl Control {
    /// Follows the feed from the row after `start` on, until this replica stops. `start` must have been read
    /// before the first connection was accepted: whoever comes later looks at the state and sees what lies
    /// before.
    pub(crate) async fn follow(self, start: u64) {
        let mut feed = self.replica().feed(Cursor {
            index: start,
            ordinal: u32::MAX,
        });
        let mut stopping = self.stopping();
        loop {
            let item = tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                item = feed.next() => item,
            };
            match item {
                Some(FeedItem::Rows(rows)) => self.carry_out(&rows),
                Some(FeedItem::Gap { .. }) => self.look_at_everything(),
                None => return,
            }
        }
    }

    fn carry_out(&self, rows: &[Row]) {
        let Some(last) = rows.last() else { return };
        self.readers().publish(rows);
        self.marks().note(last.index);
        let view = self.replica().view();
        self.on_workers(concerned(rows));
        for row in rows {
            let id = Id::parse(&row.subject);
            let (domain, _) = row.action.split_once('.').unwrap_or((row.action.as_str(), ""));
            match (domain, id) {
                ("dispatch", Some(id)) => self.on_dispatch(&view, id),
                ("pairing" | "approval" | "grant" | "run", Some(id)) => self.waiters().wake(id),
                ("lease", _) => self.wake_run(row),
                ("fleet", _) => self.on_fleet_policy(),
                ("node", Some(id)) => self.on_node(&view, id),
                ("identity" | "access", id) => {
                    self.on_identity(id, &row.subject);
                    if row.action == "identity.rotation_requested" {
                        self.on_rotation(&view, id);
                    }
                }
                ("cluster", _) => self.look_up_staleness(&view),
                _ => {}
            }
        }
        self.enforced()
            .send_modify(|index| *index = (*index).max(last.index));
    }

    fn look_at_everything(&self) {
        let view = self.replica().view();
        self.look_up_staleness(&view);
        for entry in self.registry().all() {
            self.on_node(&view, entry.device_id);
            if entry.epoch() != 0 && entry.outbox.end().is_none() {
                self.deliver_bound(&entry, &view);
                let delivered = entry.all_delivered();
                // A view that is newer than every delivery: what it does not show as open has ended.
                self.call_off_ended(&entry, &delivered, &self.replica().view());
            }
            self.tell_rotation(&entry, &view);
            self.deliver_work(&entry);
            self.look_after(&entry);
            if let Err(error) = self.may_stay(&entry.peer) {
                self.end_session(&entry, end_of(&error));
            }
        }
        self.recheck_connections(None);
        self.waiters().wake_all();
        self.readers().publish_gap(view.index());
        self.enforced()
            .send_modify(|index| *index = (*index).max(view.index()));
    }

    /// A lease changed: whoever waits for its run looks again.
    fn wake_run(&self, row: &Row) {
        if let Some(run) = row.detail.get("run").and_then(|id| Id::parse(id)) {
            self.waiters().wake(run);
        }
    }

    /// Ends the sessions of a device that are not its session in the state.
    fn on_node(&self, view: &dyn Read, device_id: Id) {
        let here = self.registry().of_device(device_id);
        if here.is_empty() {
            return;
        }
        let current = nodes::node(view, device_id)
            .and_then(|node| node.session)
            .map(|session| session.epoch);
        for entry in here {
            // An attach whose epoch is not known yet looks for itself, and one newer than the view is in no
            // view yet.
            let epoch = entry.epoch();
            if epoch == 0 || Some(epoch) == current || epoch > view_index(view) {
                continue;
            }
            let newer = current.is_some_and(|current| current > epoch);
            self.end_session(&entry, if newer { End::Superseded } else { End::Lost });
        }
    }

    /// The certificates of a device or an operator changed: closes what admission would refuse now.
    fn on_identity(&self, device_id: Option<Id>, subject: &str) {
        let sessions = device_id
            .map(|id| self.registry().of_device(id))
            .unwrap_or_default();
        for entry in sessions {
            if let Err(error) = self.may_stay(&entry.peer) {
                self.end_session(&entry, end_of(&error));
            }
        }
        self.recheck_connections(Some(subject));
        self.readers().wake(subject);
    }

    /// An operator wants a device to change its certificate.
    fn on_rotation(&self, view: &dyn Read, device_id: Option<Id>) {
        let sessions = device_id
            .map(|id| self.registry().of_device(id))
            .unwrap_or_default();
        for entry in sessions {
            self.tell_rotation(&entry, view);
        }
    }

    fn on_dispatch(&self, view: &dyn Read, id: Id) {
        self.waiters().wake(id);
        let Some(record) = dispatch::dispatch(view, id) else {
            return;
        };
        if record.state().is_terminal() {
            for entry in self.registry().of_device(record.device_id) {
                self.call_off(&entry, &record);
            }
        } else if record.replica_id == self.replica_id()
            && let Some(entry) = self.registry().live(record.device_id, record.epoch)
        {
            self.pass_on(&entry, &record);
        }
    }

    /// Tells a node about an open dispatch that is bound to its session. `false` when the session ended for it.
    pub(crate) fn pass_on(&self, entry: &Arc<Entry>, record: &dispatch::Dispatch) -> bool {
        let fits = if record.state() == State::Cancelling {
            // Also when it was never given: the node says so, and that ends it.
            entry.outbox.put(Waiting::Cancel {
                dispatch_id: record.id,
                reason: record.reason.clone(),
                confirm: Some((record.epoch, record.attempt)),
            })
        } else {
            entry.deliver(record.id, record.attempt)
        };
        if !fits {
            self.end_session(entry, End::SlowReader);
        }
        fits
    }

    /// Looks which of these dispatches have ended or are forgotten, and calls them off.
    pub(crate) fn call_off_ended(&self, entry: &Arc<Entry>, ids: &[Id], view: &dyn Read) {
        for id in ids {
            match dispatch::dispatch(view, *id) {
                Some(record) if record.device_id != entry.device_id => {
                    entry.forget(*id);
                }
                Some(record) if record.state().is_terminal() => self.call_off(entry, &record),
                Some(_) => {}
                None => {
                    entry.forget(*id);
                }
            }
        }
    }

    /// Tells a node that a dispatch which it was given ended without it.
    fn call_off(&self, entry: &Arc<Entry>, record: &dispatch::Dispatch) {
        if !entry.forget(record.id) {
            return;
        }
        let reason = match record.state() {
            State::Cancelled if !record.reason.is_empty() => record.reason.clone(),
            State::Cancelled | State::TimedOut | State::SessionLost => record.state().as_str().to_owned(),
            _ => return,
        };
        if !entry.outbox.put(Waiting::Cancel {
            dispatch_id: record.id,
            reason,
            confirm: None,
        }) {
            self.end_session(entry, End::SlowReader);
        }
    }
}

/// The index that a view reflects.
fn view_index(view: &dyn Read) -> u64 {
    palyra_state::meta(view).index
}
