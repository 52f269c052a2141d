//! Questions for the person at the machine, and their answers.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Kind, Result};

/// A dispatch that waits for the person at the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The dispatch.
    pub id: String,
    /// The capability that would run.
    pub capability: String,
    /// Its description, from the owner's file.
    pub description: String,
    /// The JSON that it would get, cut to 4 KiB.
    pub payload: String,
    /// Waiting since (Unix ms).
    pub since_ms: u64,
    /// Refused on its own then (Unix ms).
    pub deadline_at_ms: u64,
}

/// Asks the running agent what waits for a decision.
pub async fn list(data_dir: &Path) -> Result<Vec<Pending>> {
    Err(Error::new(Kind::Internal, "N0001", data_dir.display().to_string(), ""))
}

/// Tells the running agent the person's decision. `id` may be a prefix that names one dispatch.
pub async fn decide(data_dir: &Path, id: &str, allow: bool) -> Result<Pending> {
    let _ = (id, allow);
    Err(Error::new(Kind::Internal, "N0001", data_dir.display().to_string(), ""))
}
