//! The kernel's own network: a bridge, an end of it in each namespace, and rules of nftables at the receiver.
//!
//! It forwards at the speed of memory and can cut, lose and reset; it can not delay.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use async_trait::async_trait;
use tokio::sync::Mutex;

use super::filter::Filter;
use super::{Fabric, Rules, Seat, Way, tool};

/// See the module.
#[derive(Default)]
pub struct Bridge {
    seats: Mutex<BTreeSet<Seat>>,
    filter: Filter,
}

impl Bridge {
    /// Makes the bridge, with the harness at it. Everything is made in this process's namespaces.
    ///
    /// # Errors
    /// When the machine refuses.
    pub async fn build() -> Result<Bridge> {
        let at = Seat::Clients.address();
        let script = format!(
            "set -e\nip link set lo up\nmkdir -p /run/netns\nip link add br0 type bridge\n\
             ip addr add {at}/16 dev br0\nip link set br0 up\n"
        );
        tool(&["sh", "-c", &script], "")
            .await
            .context("the bridge can't be made")?;
        Ok(Bridge::default())
    }
}

#[async_trait]
impl Fabric for Bridge {
    fn name(&self) -> &'static str {
        "bridge"
    }

    async fn attach(&self, seat: Seat) -> Result<()> {
        if !self.seats.lock().await.insert(seat) || seat == Seat::Clients {
            return Ok(());
        }
        let at = seat.address();
        let script = format!(
            "set -e\nip netns add {seat}\nip link add v-{seat} type veth peer name eth0 netns {seat}\n\
             ip link set v-{seat} master br0 up\nip -n {seat} link set lo up\n\
             ip -n {seat} addr add {at}/16 dev eth0\nip -n {seat} link set eth0 up\n"
        );
        tool(&["sh", "-c", &script], "").await?;
        Ok(())
    }

    async fn apply(&self, rules: &Rules) -> Result<()> {
        self.filter.apply(rules).await
    }

    async fn struck(&self) -> Result<BTreeMap<Way, u64>> {
        self.filter.count().await
    }
}
