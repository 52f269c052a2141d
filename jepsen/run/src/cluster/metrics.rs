//! What a replica says of itself on its page of metrics: role, term, indexes. It answers alone, without its peers,
//! so this works also when it is cut off.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A replica that is well answers in a few milliseconds.
const WITHIN: Duration = Duration::from_millis(700);
const MAX_PAGE: u64 = 1 << 20;

/// A page of metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    figures: BTreeMap<String, f64>,
}

impl Metrics {
    /// A figure by its name without `palyra_`, labels included; 0 when it is not there.
    #[must_use]
    pub fn get(&self, name: &str) -> u64 {
        // Counters and gauges of the product are whole numbers.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        self.figures.get(name).map_or(0, |value| *value as u64)
    }

    /// Whether it leads, as it says.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.get("role{role=\"leader\"}") == 1
    }

    /// Its term.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.get("raft_term")
    }

    /// Index of the last entry that it has applied.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.get("raft_applied_index")
    }

    /// Index up to which its log is purged.
    #[must_use]
    pub fn purged(&self) -> u64 {
        self.get("raft_purged_index")
    }

    /// Index that its last snapshot covers.
    #[must_use]
    pub fn snapshot(&self) -> u64 {
        self.get("raft_snapshot_index")
    }

    fn parse(page: &str) -> Metrics {
        let figures = page
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| {
                let (name, value) = line.rsplit_once(' ')?;
                let name = name.strip_prefix("palyra_").unwrap_or(name);
                Some((name.to_owned(), value.parse().ok()?))
            });
        Metrics {
            figures: figures.collect(),
        }
    }
}

pub(super) async fn fetch(address: &str) -> Result<Metrics> {
    let page = timeout(WITHIN, get(address, "/metrics"));
    Ok(Metrics::parse(&page.await.context("no answer in time")??))
}

async fn get(address: &str, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_PAGE).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        bail!("{address}{path} is no HTTP");
    };
    let first = head.lines().next().unwrap_or_default();
    if !first.contains(" 200") {
        bail!("{address}{path} answered {first}");
    }
    Ok(body.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read() {
        let page = "# HELP palyra_role x\npalyra_role{role=\"leader\"} 1\npalyra_raft_term 12\n\
                    palyra_raft_applied_index 345\nbad line\n";
        let metrics = Metrics::parse(page);
        assert!(metrics.leads());
        assert_eq!(
            (metrics.term(), metrics.applied(), metrics.purged()),
            (12, 345, 0)
        );
    }
}
