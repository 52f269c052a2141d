//! The end of a lease on this machine: cleaned, told, and forgotten when the control plane knows.
//!
//! Invariant: nothing is told clean that was not looked at, and what is not clean is tried again until it is.

use std::sync::Arc;
use std::time::Duration;

use palyra_client::new_ulid;
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body;
use prost::Message;
use tokio::sync::watch;

use super::{MESSAGE_MAX, Said, Shared, blocking, call};
use crate::worker::place::Place;
use crate::worker::store::Record;

/// A cleanup that failed is tried again by itself after this long.
const CLEAN_AGAIN: Duration = Duration::from_secs(15);

/// A result that an earlier life did not get rid of.
pub(crate) async fn owed(shared: &Arc<Shared>, record: &mut Record) {
    let bytes = record.finish.as_deref().and_then(|text| hex::decode(text).ok());
    if let Some(finish) = bytes.and_then(|bytes| wire::LeaseFinish::decode(bytes.as_slice()).ok()) {
        let request_id = finish.request_id.clone();
        call(shared, &record.lease_id, request_id, Body::Finish(finish)).await;
    }
    record.finish = None;
}

/// Cleans, says how it went, and does so again until it went well and the control plane knows.
pub(crate) async fn clean(shared: &Arc<Shared>, mut record: Record, again: &mut watch::Receiver<u64>) {
    let lease_id = record.lease_id.clone();
    loop {
        let place = Place::left(&shared.base, &lease_id, record.groups.clone());
        match blocking(move || place.clean().map_err(|error| error.to_string())).await {
            Ok((files, bytes)) => {
                record.clean = true;
                record.removed_files += files;
                record.removed_bytes += bytes;
                record.unclean = String::new();
            }
            Err(why) => record.unclean = why,
        }
        if record.cleaned_id.is_empty() || !record.clean {
            record.cleaned_id = new_ulid();
        }
        let (store, kept) = (shared.store.clone(), record.clone());
        if let Err(error) = blocking(move || store.put(&kept).map_err(|error| error.to_string())).await {
            tracing::error!(lease = lease_id, %error, "the record of the lease could not be written");
        }
        let state = if record.clean { "cleaned" } else { "unclean" };
        let message = record.unclean.clone();
        let _ = shared.said.send(Said::State {
            lease_id: lease_id.clone(),
            state,
            message,
        });
        if record.clean {
            break;
        }
        tracing::error!(
            code = "N1004",
            lease = lease_id,
            why = record.unclean,
            "the cleanup failed; nothing is given to this worker"
        );
        let body = cleaned(&record);
        call(shared, &lease_id, record.cleaned_id.clone(), body).await;
        // By itself, or when an operator asks for it.
        let _ = tokio::time::timeout(CLEAN_AGAIN, again.changed()).await;
    }
    call(shared, &lease_id, record.cleaned_id.clone(), cleaned(&record)).await;
    let store = shared.store.clone();
    if let Err(error) =
        blocking(move || store.forget(&record.lease_id).map_err(|error| error.to_string())).await
    {
        tracing::warn!(lease = lease_id, %error, "the record of a clean lease stays");
    }
}

fn cleaned(record: &Record) -> Body {
    Body::Cleaned(wire::LeaseCleaned {
        request_id: record.cleaned_id.clone(),
        lease_id: record.lease_id.clone(),
        fence: record.fence,
        ok: record.clean,
        message: crate::work::plain(&record.unclean, MESSAGE_MAX),
        removed_files: record.removed_files,
        removed_bytes: record.removed_bytes,
    })
}
