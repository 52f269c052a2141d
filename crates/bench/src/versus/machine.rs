//! What the machine itself allows, measured in the same run: a write that is on disk, a way there and back over
//! loopback, a TLS handshake.
//!
//! What never lives here: a system under test.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::report::Report;
use crate::spread::Spread;

const TURNS: usize = 500;
/// What one entry with its record takes, about.
const BYTES: usize = 512;

/// Limits of this machine, now.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Machine {
    /// `fdatasync` after an append, median.
    pub(crate) sync_us: f64,
    /// A message there and back over loopback, median.
    pub(crate) round_trip_us: f64,
}

impl Machine {
    /// Measures on the disk of `folder`.
    pub(crate) async fn measure(folder: &Path) -> Result<Machine> {
        let folder = folder.to_owned();
        let synced = tokio::task::spawn_blocking(move || syncs(&folder)).await??;
        Ok(Machine {
            sync_us: p50_us(&synced),
            round_trip_us: p50_us(&round_trips().await?),
        })
    }

    /// Puts them into the report, with how far one client's write is from them.
    pub(crate) fn tell(&self, report: &mut Report, one_client_p50_us: Option<f64>) {
        let floor = self.sync_us + self.round_trip_us;
        report.fact("fdatasync_p50_us", self.sync_us.round());
        report.fact("loopback_round_trip_p50_us", self.round_trip_us.round());
        if let Some(p50) = one_client_p50_us {
            report.promise(
                "one client's p50 is at most 3 times an fdatasync and a round trip",
                p50 <= 3.0 * floor,
                format!("{:.2}", p50 / floor),
            );
        }
    }
}

fn p50_us(spread: &Spread) -> f64 {
    spread.quantile_ms(0.5).unwrap_or(0.0) * 1_000.0
}

fn syncs(folder: &Path) -> Result<Spread> {
    let mut file = tempfile::tempfile_in(folder)
        .with_context(|| format!("no file can be made in {}", folder.display()))?;
    let bytes = [7_u8; BYTES];
    let mut spread = Spread::new();
    for _ in 0..TURNS {
        let begun = Instant::now();
        file.write_all(&bytes)?;
        file.sync_data()?;
        spread.record(begun.elapsed());
    }
    Ok(spread)
}

async fn round_trips() -> Result<Spread> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    let echo = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let mut bytes = [0_u8; BYTES];
        for _ in 0..TURNS {
            stream.read_exact(&mut bytes).await?;
            stream.write_all(&bytes).await?;
        }
        std::io::Result::Ok(())
    });
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut bytes, mut spread) = ([7_u8; BYTES], Spread::new());
    for _ in 0..TURNS {
        let begun = Instant::now();
        stream.write_all(&bytes).await?;
        stream.read_exact(&mut bytes).await?;
        spread.record(begun.elapsed());
    }
    tokio::time::timeout(Duration::from_secs(10), echo).await???;
    Ok(spread)
}
