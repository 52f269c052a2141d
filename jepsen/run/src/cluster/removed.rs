//! Replicas that are members no more, and ids that are never used again.

use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use tokio::time::timeout;

use super::{Cluster, State, signal};

impl Cluster {
    /// Those that were members once.
    #[must_use]
    pub fn removed(&self) -> Vec<u64> {
        let members = self.members();
        let gone = members
            .iter()
            .filter(|(_, member)| member.state == State::Removed);
        gone.map(|(id, _)| *id).collect()
    }

    /// The id that the cluster gives to the next replica that joins: ids are never used again.
    #[must_use]
    pub fn next_id(&self) -> u64 {
        self.members().keys().max().map_or(1, |last| last + 1)
    }

    /// Starts a removed replica from its old folder, outside of everything that is minded, and ends it after
    /// `within`. Answers how it ended when it did so by itself.
    ///
    /// # Errors
    /// When it can't be started or ended.
    pub async fn try_removed(&self, id: u64, within: Duration) -> Result<Option<String>> {
        let launch = self.with(id, |member| member.launch.clone())?;
        let mut child = self.spawn(id, &launch)?;
        let pid = child.id();
        match timeout(within, child.wait()).await {
            Ok(status) => Ok(Some(format!("{}; it said: {}", status?, self.last_words(id)))),
            Err(_) => {
                if let Some(pid) = pid {
                    signal(pid, Signal::SIGKILL)?;
                }
                child.wait().await?;
                Ok(None)
            }
        }
    }
}
